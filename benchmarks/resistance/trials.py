"""One attack on one model, measured with what `imma verify` measures with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from cases import CASES, UNDEFENDED, benign, harmful
from lines import Lines
from undoing import AFTER, undone

from imma_cli.attacks.attack import Attack
from imma_cli.attacks.settings import spec
from imma_cli.demo import PROMPTS
from imma_cli.families.model import Model
from imma_cli.families.runtime import choose_runtime
from imma_cli.verification.judging import judge, similarities
from imma_cli.verification.materials import Material
from imma_cli.verification.measuring import Bench, draw
from imma_cli.verification.metrics import discover_metrics, parse_metrics
from imma_cli.verification.models import Models
from imma_cli.verification.plan import Effort
from imma_cli.verification.search import STEPS, propose, setting, space
from imma_cli.verification.trials import run_trial
from imma_cli.verification.untouched import unrelated

METRICS = ("effnet", "effnet-style")
POINTS = (0.03, 0.06, 0.1, 0.15, 0.22, 0.35, 0.6, 0.8, 1.0)
"""Shares of the budget where the loss is measured: dense at first, where undefended models are learned."""
SEARCH_SEED = 500
"""Far from the seeds that count."""


@dataclass(frozen=True)
class Plan:
    """How much is tried."""

    budget: int
    attack_seeds: int
    search: int
    """Settings of each attack that are searched on the defended model."""
    images: int
    prompts: int = 2
    drawing_steps: int = 10


class Defended(Protocol):
    """Where models and pictures come from."""

    home: Path

    def model(self, case: str, row: str, seed: int) -> Model: ...


class Trials:
    """Runs what is not among the lines yet."""

    def __init__(self, defences: Defended, lines: Lines, plan: Plan) -> None:
        self.defences, self.lines, self.plan = defences, lines, plan
        metrics = parse_metrics(list(METRICS), discover_metrics())
        for metric in metrics:
            metric.prepare("cpu")
        effort = Effort(images=plan.images, prompts=plan.prompts, drawing_steps=plan.drawing_steps)
        self.bench = Bench("resistance", Models({}), metrics, choose_runtime("cpu"), effort)
        self._loaded: tuple[tuple[str, str, int], Model] | None = None

    def model(self, case: str, row: str, seed: int) -> Model:
        """The defended model; one is held at a time."""
        key = case, row, seed
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = key, self.defences.model(case, row, seed)
        return self._loaded[1]

    def untouched(self, case: str, row: str, seed: int) -> None:
        """How like the original's are the pictures that the defended model draws for unrelated prompts."""
        key = {"kind": "untouched", "case": case, "row": row, "defence_seed": seed}
        if self.lines.find(**key):
            return
        prompts = unrelated(PROMPTS, CASES[case].concept)
        before = draw(self.bench, self.model(case, UNDEFENDED, 0), prompts, 2)
        after = draw(self.bench, self.model(case, row, seed), prompts, 2)
        scores = {m.name: _rounded(similarities(m, before, after).diagonal()) for m in self.bench.metrics}
        self.lines.add(key | {"scores": scores})

    def attack(
        self,
        case: str,
        row: str,
        defence_seed: int,
        attack: Attack,
        found: str,
        *,
        undoing: str = "",
        steps: int | None = None,
    ) -> None:
        """All seeds of one setting on the concept; *found* says how it came to be among the attackers.

        *undoing* is what the attacker does to the weights before, if anything; *steps* its budget, if not the plan's.
        """
        on = self._harmful(case)
        for seed in range(self.plan.attack_seeds):
            self._trial(case, row, defence_seed, attack, on, seed, steps=steps, found=found, undoing=undoing)

    def ordinary(self, case: str, row: str, defence_seed: int, attack: Attack) -> None:
        """Ordinary fine-tuning on what nobody protected."""
        for each in benign(self.defences.home, CASES[case], self.plan.prompts):
            for seed in range(self.plan.attack_seeds):
                self._trial(case, row, defence_seed, attack, each, seed)

    def strongest(self, case: str, row: str, attack: Attack) -> Attack:
        """The setting that gets most from the row's first model among the attack's own and those that are searched."""
        if not self.plan.search or row == UNDEFENDED:
            return attack
        model = self.model(case, row, 0)
        searched = space(attack, attack.rates(model))
        results: list[tuple[dict[str, Any], float]] = []
        for index in range(self.plan.search):
            values = propose(searched, results, SEARCH_SEED + index)
            steps = round(values[STEPS] * self.plan.budget)
            tried = setting(attack, values)
            line = self._trial(case, row, 0, tried, self._harmful(case), SEARCH_SEED, purpose="search", steps=steps)
            results.append((values, fmean(fmean(s) for s in line["scores"].values()) if line["scores"] else -1.0))
        return setting(attack, max(results, key=lambda pair: pair[1])[0])

    def _harmful(self, case: str) -> Material:
        return harmful(self.defences.home, CASES[case], self.plan.prompts)

    def _trial(
        self,
        case: str,
        row: str,
        defence_seed: int,
        attack: Attack,
        on: Material,
        seed: int,
        *,
        purpose: str = "",
        steps: int | None = None,
        found: str = "",
        undoing: str = "",
    ) -> dict[str, Any]:
        budget = steps or self.plan.budget
        key: dict[str, Any] = {"kind": purpose or on.purpose, "case": case, "row": row, "defence_seed": defence_seed}
        name = spec(attack) + (AFTER + undoing if undoing else "")
        key |= {"attack": name, "on": on.name, "seed": seed, "budget": budget}
        if done := self.lines.find(**key):
            return done[0]
        began = time.monotonic()
        model = self.model(case, row, defence_seed)
        if undoing:
            model = undone(model, undoing)
        line = key | {"found": found} | self._measured(model, row, attack, on, seed, budget)
        self.lines.add(line | {"seconds": round(time.monotonic() - began, 1)})
        print({k: v for k, v in line.items() if k not in ("scores", "before", "steps")}, flush=True)
        return line

    def _measured(self, model: Model, row: str, attack: Attack, on: Material, seed: int, budget: int) -> dict[str, Any]:
        points = sorted({0, *(max(1, round(share * budget)) for share in POINTS)})
        drawn: dict[int, list[Any]] = {}
        looks = {0, budget} if row == UNDEFENDED else {budget}

        def look(step: int, attacked: Model, attached: Attack) -> None:
            if step in looks:
                prompts: Sequence[str] = [attached.caption(on.pictures, prompt) for prompt in on.prompts]
                drawn[step] = draw(self.bench, attacked, prompts)

        try:
            trial = run_trial(
                model,
                row,
                attack,
                on.pictures,
                on.judge,
                steps=budget,
                seed=seed,
                runtime=self.bench.runtime,
                points=points,
                on_point=look,
            )
        except Exception as error:  # noqa: BLE001 - a setting under which training blows up is one that fails
            return {"failed": f"{type(error).__name__}: {error}", "scores": {}, "losses": []}
        scores, _ = judge(self.bench.metrics, on, drawn)
        measured: dict[str, Any] = {
            "steps": [point.step for point in trial.points],
            "losses": [round(point.loss, 5) for point in trial.points],
            "scores": {name: _rounded(values) for name, values in scores[budget].items()},
        }
        if 0 in scores:
            measured["before"] = {name: _rounded(values) for name, values in scores[0].items()}
        return measured


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]
