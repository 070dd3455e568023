"""Erasing concepts before hardening, as in IMMA's re-learning setting (arXiv 2311.18815): the model forgets, then resists.

Two published methods, both on the UNet's cross-attention alone: UCE (arXiv 2308.14761), in closed form, and ESD-x
(arXiv 2303.07345), by fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from imma_cli.immunizers.esd import EsdSettings, esd
from imma_cli.immunizers.naming import OnStep, ignore, prompts_with
from imma_cli.immunizers.scope import protected_weights
from imma_cli.immunizers.uce import UceSettings, uce

if TYPE_CHECKING:
    from torch import Tensor

    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime

Method = Literal["esd", "uce"]
Settings = UceSettings | EsdSettings


def settings_for(model: Model, method: Method, seed: int) -> Settings:
    """The defaults for a model of this size; ESD's steps and rate are the paper's for full-size ones."""
    if method == "uce":
        return UceSettings(seed)
    return EsdSettings(seed, 300, 3e-4, batch_size=4) if model.is_small else EsdSettings(seed, 1000, 1e-5)


def steps_of(model: Model, names: Sequence[str], settings: Settings) -> int:
    """How many steps `erase` takes: UCE's edited weights, or ESD's drawings and optimizer steps."""
    if isinstance(settings, UceSettings):
        return len(protected_weights(model.unet, "kv"))
    return len(prompts_with(names, settings.nouns, settings.seed)) + settings.steps


def erase(
    model: Model,
    names: Sequence[str],
    settings: Settings,
    runtime: Runtime,
    keep: Sequence[str] = (),
    on_step: OnStep = ignore,
) -> dict[str, Tensor]:
    """The weights of the UNet that erasing the concepts *names* changes, by state-dict name.

    *model* itself stays as it was. UCE preserves the prompts in *keep* besides everyday ones; ESD-x preserves none.

    Raises:
        NotFiniteError: ESD's loss became NaN or infinite.
    """
    if isinstance(settings, UceSettings):
        return uce(model, names, settings, keep, on_step)
    return esd(model, names, settings, runtime, on_step)
