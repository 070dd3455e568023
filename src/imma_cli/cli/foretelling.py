"""About how long `imma harden` is going to take, said before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imma_cli.cli.console import err
from imma_cli.cli.hardening import kept_prompts
from imma_cli.cli.progress import rounded

if TYPE_CHECKING:
    from imma_cli.cli.hardening import Task
    from imma_cli.families.recomputing import Recompute


def say_duration(task: Task, recomputed: Recompute | None, *, draws: int, besides: str = "") -> None:
    """About how long hardening is going to take. *draws* of each concept's pictures are still to be drawn: 0, it has them.

    *besides* is what takes time that is not counted.
    """
    from imma_cli.families.recomputing import usual
    from imma_cli.immunizers.duration import passes_of, seconds_of, seconds_of_prediction
    from imma_cli.immunizers.settings import EpisodesSettings

    model, settings = task.model, task.settings
    assert settings is not None
    kept = 0
    if isinstance(settings, EpisodesSettings):
        kept = len(kept_prompts(model, task.concepts, settings, task.keep))
    pictures = [draws or len(concept.images) for concept in task.concepts]
    passes = passes_of(model, task.attacks, pictures, settings, drawn=draws > 0, kept=kept, processes=task.shared_by)
    runtime = task.runtime
    again = recomputed or usual(on_cpu=runtime.device == "cpu", small=model.is_small, halved=runtime.halved)
    seconds = seconds_of(passes, seconds_of_prediction(model, task.runtime), again)
    whole = f"besides {besides}" if besides else "in all"
    err.print(f"About {rounded(seconds)} {whole}, estimated from the time of one prediction.", markup=False)
