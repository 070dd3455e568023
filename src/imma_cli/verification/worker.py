"""Carries out a verification's jobs, alone or beside other processes that share its storage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import sleep
from typing import TYPE_CHECKING, Any

from imma_cli.attacks.settings import record, spec
from imma_cli.errors import ImmaError
from imma_cli.verification import measuring
from imma_cli.verification.lines import AttackRecord, Measurement
from imma_cli.verification.measuring import Bench, Outcome
from imma_cli.verification.plan import Job, paired
from imma_cli.verification.search import STEPS, setting, space, typed

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.verification.materials import Material
    from imma_cli.verification.storage import Claim, Storage

SEARCH_SEED = 1_000_000
"""No measured seed is one of the search's: what won there by luck must not be measured with the same luck again."""

PAUSE = 2.0
"""Seconds between two looks at what other processes have finished."""

Watch = Callable[[float, str, float | None], None]
"""Is told how many jobs are done (with the share of the present one), what is being done, and the attacker's loss."""


Claimed = tuple["Claim", str, Callable[[measuring.OnProgress], Outcome]]
"""A claim, what it is for, and how it is carried out."""


@dataclass
class Campaign:
    """The jobs of one verification: what may be begun depends on what is finished."""

    bench: Bench
    attacks: Sequence[Attack]
    harmful: Material
    benign: Sequence[Material]
    budget: int
    others: Sequence[str] = ("hardened",)
    """The models that are compared with the original."""
    storage: Storage = field(kw_only=True)

    @property
    def total(self) -> int:
        """How many jobs there are in all."""
        each = self.bench.effort.seeds * (1 + len(self.others))
        per_attack = self.bench.effort.trials + each * (1 + len(self.benign))
        return len(self.others) + len(self.attacks) * per_attack

    @property
    def done(self) -> int:
        """How many of them are finished."""
        searched = sum(min(self.bench.effort.trials, self.storage.searched(spec(attack))) for attack in self.attacks)
        return searched + len(self._known() & self._finished())

    @property
    def is_over(self) -> bool:
        """Whether everything is finished, by whomever."""
        settled = all(self.settled(attack) is not None for attack in self.attacks)
        return settled and self._known() <= self._finished()

    def _known(self) -> set[str]:
        """The jobs, apart from searches, that are known by now."""
        jobs = [job.id for attack in self.attacks for job in self._paired(attack) or ()]
        return {*map(_look, self.others), *jobs, *(job.id for job in self._ordinary())}

    def _finished(self) -> set[str]:
        return {result.job for result in self.storage.finished()}

    def settled(self, attack: Attack) -> tuple[Attack, int] | None:
        """The best found setting of *attack* and its number of steps; None while the search goes on.

        The typed setting where nothing was searched, or no trial of the search succeeded.
        """
        if not self.bench.effort.trials:
            return attack, self.budget
        if self.storage.searched(spec(attack)) < self.bench.effort.trials:
            return None
        results = self.storage.search_results(spec(attack))
        values = [(result.value, -i) for i, result in enumerate(results) if result.value is not None]
        if not values:
            return attack, self.budget
        best = results[-max(values)[1]]
        return setting(attack, best.settings), self.steps(best.settings)

    def steps(self, settings: Mapping[str, Any]) -> int:
        """The steps that the share of the budget in *settings* comes to."""
        share: float = settings.get(STEPS, 1.0)
        return max(1, round(self.budget * share))

    def work(
        self, watch: Watch = lambda done, title, loss: None, on_finished: Callable[[], None] = lambda: None
    ) -> None:
        """Carry out jobs until all are done, by whomever. *on_finished* is called after each of one's own."""
        while True:
            claimed = next(self._claims(), None)
            if claimed is None:
                if self.is_over:
                    return
                watch(self.done, "Waiting for other processes", None)
                sleep(PAUSE if self.storage.busy() else 0.1)  # not busy: something was given back this moment
                continue
            claim, title, carry_out = claimed
            done = self.done
            watch(done, title, None)
            with claim:
                outcome = carry_out(lambda share, loss: watch(done + min(share, 0.999), title, loss))  # noqa: B023 - called at once
                if outcome.failed:
                    claim.fail(outcome.lines)
                else:
                    claim.finish(outcome.lines, outcome.value)
            on_finished()

    def _claims(self) -> Iterator[Claimed]:
        """What may be done now, in the order of what tells most; each is claimed when it is asked for."""
        succeeded = {result.job for result in self.storage.finished() if result.status == "ok"}
        for name in self.others:
            claim = None if _look(name) in succeeded else self.storage.claim(_look(name))
            if claim:
                yield claim, f"Untouched prompts, {name}", partial(self._look_at, name)
        for attack in self.attacks:
            if self.settled(attack) is None:
                rates = attack.rates(self.bench.models["original"])
                count = self.bench.effort.trials
                claim = self.storage.claim_search(spec(attack), count, space(attack, rates), typed(attack, rates))
                if claim:
                    title = f"{attack.name}: search {(claim.index or 0) + 1} of {count}"
                    yield claim, title, partial(self._search, attack, claim)
            yield from self._claim(self._paired(attack) or (), succeeded)
        yield from self._claim(self._ordinary(), succeeded)

    def _claim(self, jobs: Iterable[Job], succeeded: Collection[str]) -> Iterator[Claimed]:
        for job in jobs:
            claim = None if job.id in succeeded else self.storage.claim(job.id)
            if claim:
                what = "" if job.purpose == "harmful" else f" on {job.material.name}"
                title = f"{job.attack.name}{what}: {job.model}, seed {job.seed}"
                yield claim, title, partial(measuring.attack, self.bench, job, claim.attempt)

    def _paired(self, attack: Attack) -> list[Job] | None:
        settled = self.settled(attack)
        if settled is None:
            return None
        models = ("original", *self.others)
        return paired("harmful", models, settled[0], self.harmful, self.bench.effort.seeds, settled[1])

    def _ordinary(self) -> Iterator[Job]:
        """Ordinary fine-tuning: the attacks as they were typed, on concepts that nobody protected."""
        models = ("original", *self.others)
        for material in self.benign:
            for attack in self.attacks:
                yield from paired("benign", models, attack, material, self.bench.effort.seeds, self.budget)

    def _look_at(self, name: str, watch: measuring.OnProgress) -> Outcome:
        try:
            return measuring.look_at(self.bench, name)
        except Exception:
            if name == "hardened":
                raise
            self.bench.forget(name)  # a baseline that cannot be made: its trials say why
            return Outcome((), failed=True)

    def _search(self, attack: Attack, claim: Claim, watch: measuring.OnProgress) -> Outcome:
        steps = self.steps(claim.settings)
        try:
            chosen = setting(attack, claim.settings)
        except ImmaError as error:
            line = Measurement(
                study=self.bench.study,
                trial=f"search {claim.index}: {spec(attack)}, {dict(claim.settings)}",
                purpose="search",
                model="hardened",
                attack=AttackRecord(**record(attack)),
                concept=self.harmful.name,
                seed=SEARCH_SEED,
                step=0,
                budget=steps,
                status="failed",
                reason=" ".join([error.what, *error.reasons]),
            )
            return Outcome((line.as_json(),), failed=True)
        job = Job("search", "hardened", chosen, self.harmful, SEARCH_SEED, steps, claim.index)
        return measuring.attack(self.bench, job, claim.attempt, watch)


def _look(name: str) -> str:
    return f"look at the {name} model"
