"""What came of jobs and search trials, as it is noted in the trials of an Optuna storage."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState


@dataclass(frozen=True)
class Result:
    """What came of one attempt at a job or search trial."""

    job: str
    status: Literal["ok", "failed"]
    lines: tuple[dict[str, Any], ...]
    value: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """What a search suggested; empty for jobs, and where the settings are those that the user typed."""
    attempt: int = 1
    index: int | None = None
    """Which search trial it is, from 0; None for jobs."""

    @classmethod
    def of(cls, trial: FrozenTrial) -> Result:
        """The result that `Claim` noted in *trial*, which is COMPLETE or `has_failed`."""
        noted = trial.user_attrs
        kept = json.loads(noted["result"])
        return cls(
            job=noted["job"],
            status="ok" if trial.state == TrialState.COMPLETE else "failed",
            lines=tuple(kept["lines"]),
            value=kept["value"],
            settings=dict(trial.params),
            attempt=noted["attempt"],
            index=noted["index"],
        )


def has_failed(trial: FrozenTrial) -> bool:
    """Whether the attack failed; a trial that was abandoned says nothing about it."""
    return trial.state == TrialState.FAIL and "result" in trial.user_attrs and "abandoned" not in trial.user_attrs
