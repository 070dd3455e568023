"""About how long `imma harden` is going to take, said before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from imma_cli.cli.console import err
from imma_cli.cli.hardening import kept_prompts
from imma_cli.cli.progress import rounded

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.cli.hardening import HardeningSettings
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model
    from imma_cli.families.recomputing import Recompute
    from imma_cli.families.runtime import Runtime


def say_duration(
    model: Model,
    attacks: Sequence[Attack],
    concepts: Sequence[Concept],
    settings: HardeningSettings,
    runtime: Runtime,
    keep: Sequence[str],
    recomputed: Recompute | None,
    *,
    draws: int,
    processes: int,
    besides: str = "",
) -> None:
    """About how long hardening is going to take. *draws* of each concept's pictures are still to be drawn: 0, it has them.

    *besides* is what takes time that is not counted.
    """
    from imma_cli.families.recomputing import usual
    from imma_cli.immunizers.duration import passes_of, seconds_of, seconds_of_prediction
    from imma_cli.immunizers.settings import EpisodesSettings

    kept = len(kept_prompts(model, concepts, settings, keep)) if isinstance(settings, EpisodesSettings) else 0
    pictures = [draws or len(concept.images) for concept in concepts]
    passes = passes_of(model, attacks, pictures, settings, drawn=draws > 0, kept=kept, processes=processes)
    again = recomputed or usual(on_cpu=runtime.device == "cpu", small=model.is_small)
    seconds = seconds_of(passes, seconds_of_prediction(model, runtime), again)
    whole = f"besides {besides}" if besides else "in all"
    err.print(f"About {rounded(seconds)} {whole}, estimated from the time of one prediction.", markup=False)
