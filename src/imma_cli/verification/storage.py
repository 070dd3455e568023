"""Jobs and search trials of a verification, shared by any number of processes through one Optuna storage.

Every attempt at a job is one Optuna trial. A worker claims a job by creating a RUNNING trial that names it and then
looks again: whoever has the lowest number keeps the job. A trial that ended without a result is *abandoned*: nobody
looks at it again, except for the settings that a search had proposed there.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from types import TracebackType
from typing import Any, Self

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from imma_cli.errors import ImmaError
from imma_cli.verification.backends import Location
from imma_cli.verification.outcomes import Result, has_failed
from imma_cli.verification.search import propose
from imma_cli.verification.workers import DEAD_AFTER, HEARTBEAT, Watch, this_worker

LONGEST_NAME = 512
"""Characters of a study's name that fit into Optuna's tables."""

Proposal = tuple[Mapping[str, Any], Mapping[str, BaseDistribution]]


class Claim:
    """The right to do one job, for as long as the context lasts; left without a result, it is given back."""

    def __init__(self, storage: Storage, trial: FrozenTrial) -> None:
        self._storage = storage
        self._trial_id = trial._trial_id
        self._over = False
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self.job: str = trial.user_attrs["job"]
        self.attempt: int = trial.user_attrs["attempt"]
        """1, or more where what failed is tried again."""
        self.index: int | None = trial.user_attrs["index"]
        """Which search trial it is, from 0; None for jobs."""
        self.settings: Mapping[str, Any] = dict(trial.params)
        """What the search suggests; empty for jobs, and where the settings are those that the user typed."""

    def finish(self, lines: Sequence[dict[str, Any]], value: float | None = None) -> bool:
        """Keep *lines* and, for a search trial, the *value* to maximise.

        Returns:
            Whether they count; False where this worker seemed dead to another, which does the job again.

        Raises:
            ValueError: a search trial without a finite value.
        """
        if self.index is None:
            return self._end(TrialState.COMPLETE, lines, value)
        if value is None or not math.isfinite(value):
            raise ValueError(f"a search trial ends with a finite value or fails, but not with {value}")
        return self._end(TrialState.COMPLETE, lines, value, [value])

    def fail(self, lines: Sequence[dict[str, Any]]) -> bool:
        """Keep *lines* of a trial that itself failed. That is a result: it is not tried again unless asked for."""
        return self._end(TrialState.FAIL, lines, None)

    def _end(
        self, state: TrialState, lines: Sequence[dict[str, Any]], value: float | None, values: list[float] | None = None
    ) -> bool:
        if self._over:
            raise RuntimeError(f"{self.job} has its result")
        result = json.dumps({"lines": list(lines), "value": value})
        kept = self._storage._end(self._trial_id, state, "result", result, values)
        self._over = True
        return kept

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self._storage.heartbeat):
            count += 1
            # a server that is away for a moment is no reason to stop, and what is finished needs no heartbeat
            with suppress(ImmaError, UpdateFinishedTrialError):
                self._storage._beat(self._trial_id, count)

    def __enter__(self) -> Self:
        self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._beating.join(timeout=5)
        if not self._over:
            try:
                self._storage._abandon(self._trial_id)
            except ImmaError:  # then it is free again as soon as this process has ended
                if error is None:
                    raise


class Storage:
    """The jobs and searches of one study. Every method raises `ImmaError` where the storage does not answer."""

    def __init__(
        self, location: Location, study: str, *, retry_failed: bool, heartbeat: float, dead_after: float
    ) -> None:
        self.heartbeat = heartbeat
        self._name = f"imma-{study}"
        self._answering = location.answering
        self._backend = location.open()
        self._worker = this_worker()
        self._watch = Watch(dead_after)
        self._mine: set[int] = set()
        with self._answering():
            self._jobs = self._study_id(self._name)
            studies = (self._jobs, *self._searches().values()) if retry_failed else ()
            self._retried = {t._trial_id for study_id in studies for t in self._trials(study_id) if has_failed(t)}

    @classmethod
    def open(
        cls,
        url: str | None,
        study: str,
        *,
        retry_failed: bool = False,
        heartbeat: float = HEARTBEAT,
        dead_after: float = DEAD_AFTER,
    ) -> Storage:
        """The jobs of *study*, a hash, in the storage *url*: ``sqlite:///FILE``, ``postgresql://…``, ``journal:FILE``,
        another of SQLAlchemy's, or None for memory. *retry_failed*: what has failed until now may be claimed once more.

        Raises:
            ImmaError: the storage cannot be reached, read or written, or it holds something else.
        """
        optuna.logging.set_verbosity(optuna.logging.CRITICAL)
        return cls(Location(url), study, retry_failed=retry_failed, heartbeat=heartbeat, dead_after=dead_after)

    def claim(self, job: str) -> Claim | None:
        """The right to do *job* now; None where it is done, or where a living worker has it."""
        with self._answering():
            return self._claim(self._jobs, job, None, lambda: ({}, {}))

    def claim_search(
        self, spec: str, count: int, space: Mapping[str, BaseDistribution], first: Mapping[str, Any] | None
    ) -> Claim | None:
        """The next of *count* search trials over *space* of the attack *spec*; None where all are done or taken.

        Trial 0 tries *first*, which lies in *space*; None: the settings as they were typed, which do not.
        """

        def suggest(index: int) -> Proposal:
            if index == 0:
                return ({}, {}) if first is None else (first, space)
            before = (r for r in self._results(study_id, space) if r.index is not None and r.index < index)
            results = [(r.settings, r.value) for r in before if r.value is not None]
            seed = sha256(f"{self._name}\0{spec}\0{index}".encode()).digest()[:4]
            return propose(space, results, int.from_bytes(seed)), space

        with self._answering():
            study_id = self._search(spec)
            claims = (self._claim(study_id, f"{spec} #{i}", i, partial(suggest, i)) for i in range(count))
            return next((claim for claim in claims if claim), None)

    def is_done(self, job: str) -> bool:
        """Whether *job* has a result that is not to be tried again."""
        with self._answering():
            return self._has_result(self._trials(self._jobs, job))

    def searched(self, spec: str) -> int:
        """How many search trials of *spec* have a result that is not to be tried again."""
        with self._answering():
            study_id = self._searches().get(spec)
            trials = [] if study_id is None else self._trials(study_id)
            by_job = (
                [t for t in trials if t.user_attrs["job"] == job] for job in {t.user_attrs["job"] for t in trials}
            )
            return sum(map(self._has_result, by_job))

    def busy(self) -> bool:
        """Whether a living worker elsewhere is at something of this study, so that waiting makes sense."""
        with self._answering():
            trials = (t for study_id in (self._jobs, *self._searches().values()) for t in self._trials(study_id))
            running = [t for t in trials if t.state == TrialState.RUNNING and t._trial_id not in self._mine]
            return bool([t for t in running if self._is_alive(t)])  # every heartbeat is looked at

    def finished(self) -> list[Result]:
        """Every result there is, also failed ones: jobs by name, then search trials by attack and index."""
        with self._answering():
            studies = (self._jobs, *(study_id for _, study_id in sorted(self._searches().items())))
            return [result for study_id in studies for result in self._results(study_id)]

    def search_results(self, spec: str) -> list[Result]:
        """The results of the search of *spec* by index, also failed ones."""
        with self._answering():
            study_id = self._searches().get(spec)
            return [] if study_id is None else self._results(study_id)

    def _claim(self, study_id: int, job: str, index: int | None, suggest: Callable[[], Proposal]) -> Claim | None:
        earlier = self._trials(study_id, job)
        attempt = self._attempt(earlier)
        if attempt is None:
            return None
        # what was proposed once is done, whatever has become known since
        settings, space = (earlier[0].params, earlier[0].distributions) if earlier else suggest()
        attributes = {"job": job, "index": index, "attempt": attempt, "worker": self._worker, "heartbeat": 0}
        template = create_trial(
            state=TrialState.RUNNING, params=dict(settings), distributions=dict(space), user_attrs=attributes
        )
        trial_id = self._backend.create_new_trial(study_id, template)
        self._mine.add(trial_id)
        trial = self._backend.get_trial(trial_id)
        if self._attempt([t for t in self._trials(study_id, job) if t.number < trial.number]) != attempt:
            self._abandon(trial_id)
            return None
        return Claim(self, trial)

    def _attempt(self, trials: Sequence[FrozenTrial]) -> int | None:
        """The attempt at a job that may begin after its *trials*; None where it is done or a living worker has it."""
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                if self._is_alive(trial):
                    return None
                self._abandon(trial._trial_id)
        return None if self._has_result(trials) else 1 + sum(map(has_failed, trials))

    def _has_result(self, trials: Sequence[FrozenTrial]) -> bool:
        failed = [t for t in trials if has_failed(t)]
        done = any(t.state == TrialState.COMPLETE for t in trials)
        return done or bool(failed and failed[-1]._trial_id not in self._retried)

    def _is_alive(self, trial: FrozenTrial) -> bool:
        return self._watch.is_alive(trial._trial_id, trial.user_attrs["worker"], trial.user_attrs["heartbeat"])

    def _beat(self, trial_id: int, count: int) -> None:
        with self._answering():
            self._backend.set_trial_user_attr(trial_id, "heartbeat", count)

    def _end(self, trial_id: int, state: TrialState, key: str, value: Any, values: list[float] | None = None) -> bool:
        """Note *value* and end the trial, in this order; False where it had been ended by another."""
        with self._answering():
            try:
                self._backend.set_trial_user_attr(trial_id, key, value)
                self._backend.set_trial_state_values(trial_id, state, values)
            except UpdateFinishedTrialError:
                return False
        return True

    def _abandon(self, trial_id: int) -> None:
        self._end(trial_id, TrialState.FAIL, "abandoned", True)

    def _trials(self, study_id: int, job: str | None = None) -> list[FrozenTrial]:
        trials = self._backend.get_all_trials(study_id, deepcopy=False)
        return [t for t in trials if "job" in t.user_attrs and job in (None, t.user_attrs["job"])]

    def _results(self, study_id: int, space: Mapping[str, BaseDistribution] | None = None) -> list[Result]:
        """Every result in a fixed order; with *space*, only those whose settings were suggested from it."""
        found: dict[tuple[int, str, int], Result] = {}
        for trial in self._trials(study_id):
            if space in (None, trial.distributions) and (trial.state == TrialState.COMPLETE or has_failed(trial)):
                result = Result.of(trial)
                found.setdefault((result.index or 0, result.job, result.attempt), result)
        return [found[key] for key in sorted(found)]

    def _search(self, spec: str) -> int:
        study_id = self._searches().get(spec)
        if study_id is None:
            digest = sha256(spec.encode()).hexdigest()
            name = f"{self._name}-search-{spec}"
            name = name if len(name) <= LONGEST_NAME else f"{self._name}-search-{digest}"
            study_id = self._study_id(name)
            self._backend.set_study_user_attr(self._jobs, f"search {digest}", {"spec": spec, "study": name})
        return study_id

    def _searches(self) -> dict[str, int]:
        noted = self._backend.get_study_user_attrs(self._jobs)
        return {n["spec"]: self._study_id(n["study"]) for key, n in noted.items() if key.startswith("search ")}

    def _study_id(self, name: str) -> int:
        try:
            return self._backend.get_study_id_from_name(name)
        except KeyError:
            with suppress(DuplicatedStudyError):  # another process was faster
                return self._backend.create_new_study([StudyDirection.MAXIMIZE], name)
            return self._backend.get_study_id_from_name(name)
