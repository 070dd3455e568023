"""About how long hardening is going to take, told before it begins: how many predictions it makes, times one's seconds.

For large models, where all else is little beside the UNet. Not counted: encoding, optimizers, erasing, what attacks compute besides their loss (prior
preservation, say), and what gradients to more than the attention take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from time import monotonic
from typing import TYPE_CHECKING

import torch

from imma_cli.concepts.batches import conditioning_of
from imma_cli.families.family import DRAWING_STEPS
from imma_cli.families.recomputing import Recompute
from imma_cli.immunizers.checking import PAIRS, judged_of
from imma_cli.immunizers.checking import STEPS as CHECK_STEPS
from imma_cli.immunizers.imma import ImmunizerSettings
from imma_cli.immunizers.objectives import Aim
from imma_cli.immunizers.retention import DRAWING_STEPS as KEPT_STEPS
from imma_cli.immunizers.retention import held_out_of
from imma_cli.immunizers.settings import EpisodesSettings, defaults_for
from imma_cli.verification.trials import DRAWS

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime

FORTH_AND_BACK: dict[Recompute, float] = {"nothing": 2.5, "activations": 2.5, "blocks": 3.0}
"""What a prediction with its gradient to the attention takes, in predictions without: at SD 1.x's size, on one core, rounded up to halves
(benchmarks/speed/foretold.py)."""
GUIDED = 2
"""Predictions with the prompt and without."""
BEFORE_AND_AFTER = 2
ORIGINALS: dict[Aim, int] = {"absolute": 0, "relative": 1, "original": 2}
"""How often an objective looks at a picture without learning from it."""


@dataclass(frozen=True)
class Passes:
    """How many pictures go through the UNet."""

    learned: int = 0
    """There and back."""
    predicted: int = 0
    """There only."""

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.learned + other.learned, self.predicted + other.predicted)

    def __mul__(self, times: int) -> Passes:
        return Passes(times * self.learned, times * self.predicted)


def cycles_of(
    model: Model, attacks: Sequence[Attack], concepts: int, settings: ImmunizerSettings | EpisodesSettings
) -> int:
    """How many times attacker and defender take a step, for so many *concepts*."""
    if isinstance(settings, EpisodesSettings):
        return settings.cycles(model)
    return sum(settings.cycles(attack.rates(model)) for attack in attacks) * concepts


def passes_of(
    model: Model,
    attacks: Sequence[Attack],
    pictures: Sequence[int],
    settings: ImmunizerSettings | EpisodesSettings,
    *,
    drawn: bool,
    kept: int,
    processes: int = 1,
) -> Passes:
    """Of hardening against *attacks* on concepts of so many *pictures*, which the model has *drawn* itself, or not.

    In episodes, the pictures of *kept* prompts are what must stay. Where several *processes* harden together: the first one's,
    which has the largest share of everything and runs the short attacks.
    """
    settings = share_of(settings, processes)
    passes = Passes(0, GUIDED * DRAWING_STEPS * ceil(sum(pictures) / processes)) if drawn else Passes()
    if not isinstance(settings, EpisodesSettings):
        cycles = cycles_of(model, attacks, len(pictures), settings)
        players = 2 if settings.method == "imma" else 1
        return passes + Passes(players * settings.batch_size * settings.accumulate) * cycles
    noisings = defaults_for(model).noisings
    passes += Passes(0, GUIDED * ceil(kept / processes) * (KEPT_STEPS + noisings))
    learned = settings.inner_steps * settings.batch_size + settings.outer_batch + GUIDED * settings.keep_batch
    cycle = Passes(learned, ORIGINALS[settings.objective] * settings.outer_batch) * settings.accumulate
    passes += cycle * settings.cycles(model)
    if checks := settings.checks_in(settings.cycles(model)):
        judged = sum(judged_of(count) for count in pictures) // len(pictures)
        attack = Passes(CHECK_STEPS, BEFORE_AND_AFTER * DRAWS * judged)
        passes += attack * min(PAIRS, len(attacks) * len(pictures)) * (checks + 1)
        passes += Passes(0, GUIDED * held_out_of(kept, noisings)) * checks
    return passes


def seconds_of(passes: Passes, prediction: float, recomputed: Recompute) -> float:
    """What *passes* take where one prediction takes so many seconds."""
    return prediction * (FORTH_AND_BACK[recomputed] * passes.learned + passes.predicted)


def share_of(settings: ImmunizerSettings | EpisodesSettings, processes: int) -> ImmunizerSettings | EpisodesSettings:
    """What one of so many *processes* does of every step."""
    return replace(settings, accumulate=max(1, settings.accumulate // processes))


@torch.no_grad()
def seconds_of_prediction(model: Model, runtime: Runtime) -> float:
    """What the UNet takes to predict for one picture. Draws no random numbers that anybody else would."""
    config = model.unet.config
    side = config.sample_size
    latents = torch.zeros(1, config.in_channels, side, side, device=model.device)
    words, timesteps = conditioning_of(model, [""]), torch.zeros(1, dtype=torch.int64, device=model.device)
    # a GPU chooses and loads its kernels at the first one
    for _ in range(1 if model.device.type == "cpu" else 2):
        began = monotonic()
        with runtime.autocast():
            predicted = model.family.predict(model, latents, words, torch.zeros_like(latents), timesteps)
        float(predicted.sum())  # waits for a GPU
    return monotonic() - began
