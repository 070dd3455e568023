"""What differs between families of models, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imma_cli.families.family import Family

CONFIGS = Path(__file__).parent / "configs"
"""Configuration folders in diffusers' layout, one per architecture that the package knows."""

FAMILIES = {"sd1": "Stable Diffusion 1.x"}
"""The families that imma knows, by `Family.name`, with their titles. Known without torch."""


def family_named(name: str) -> Family:
    """The family whose ``Family.name`` is *name*. Imports torch. Raises KeyError for a name there is none of."""
    from imma_cli.families.stable_diffusion_1 import StableDiffusion1

    return {StableDiffusion1.name: StableDiffusion1}[name]()
