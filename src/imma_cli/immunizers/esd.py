"""Erased Stable Diffusion, ESD-x (arXiv 2303.07345): erasing by fine-tuning cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from imma_cli.attacks.gradients import scaling_for
from imma_cli.attacks.training import adamw, gradient_step
from imma_cli.concepts.batches import conditioning_of, encode
from imma_cli.concepts.drawing import drawing_seeds
from imma_cli.immunizers.naming import OnStep, ignore, prompts_with
from imma_cli.immunizers.scope import protected_weights

if TYPE_CHECKING:
    from PIL.Image import Image

    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime


@dataclass(frozen=True)
class EsdSettings:
    """What may be set about ESD-x."""

    seed: int
    steps: int
    learning_rate: float
    guidance: float = 1.0
    """η: how far beyond the neutral prediction, on the side away from the concept."""
    batch_size: int = 1
    nouns: int = 16
    """So many everyday nouns stand before a concept's name in the prompts that are erased."""
    method: Literal["esd"] = "esd"


def esd(
    model: Model, names: Sequence[str], settings: EsdSettings, runtime: Runtime, on_step: OnStep = ignore
) -> dict[str, Tensor]:
    """Cross-attention learns to steer away from the concept.

        min over θ   | ε_θ(x_t, c) − [ε_θ0(x_t, n) − η (ε_θ0(x_t, c) − ε_θ0(x_t, n))] |²

    Differs from the paper in two ways. There, n is the empty prompt; here, the noun stays in it where c has one, so that
    the noun is not erased as well. There, x_t is what the model being trained has denoised down to t; here, a
    finished drawing by the original, noised to t, so that nothing is drawn in a step.
    """
    device, steps, size = model.device, settings.steps, settings.batch_size
    prompts, _, neutrals = zip(*prompts_with(names, settings.nouns, settings.seed), strict=True)
    latents = encode(model, list(_drawings(model, prompts, settings, runtime, on_step))).mean  # [N, C, h, w]
    named, unnamed = conditioning_of(model, prompts), conditioning_of(model, neutrals)  # [N, tokens, D]
    learner = model.sharing(private=list(protected_weights(model.unet, "cross-attention").values()))
    learned = protected_weights(learner.unet, "cross-attention")
    parameters = list(learned.values())
    optimizer = adamw(parameters, settings.learning_rate)
    optimizer.param_groups[0]["weight_decay"] = 0.0  # it would pull everybody's weights towards zero
    scaling = scaling_for(runtime.precision)
    generator = torch.Generator().manual_seed(settings.seed)
    predict, levels = model.family.predict, model.family.training_timesteps(model)
    for done in range(1, steps + 1):
        rows = torch.randint(len(prompts), (size,), generator=generator)
        noise = torch.randn((size, *latents.shape[1:]), generator=generator).to(device)
        timesteps = torch.randint(levels, (size,), generator=generator).to(device)
        with torch.no_grad(), runtime.autocast():
            concept = predict(model, latents[rows], named[rows], noise, timesteps).float()
            neutral = predict(model, latents[rows], unnamed[rows], noise, timesteps).float()
        target = neutral - settings.guidance * (concept - neutral)
        loss = _distance(learner, latents[rows], named[rows], noise, timesteps, target, runtime)
        on_step(len(prompts) + done, "Erasing", gradient_step(optimizer, parameters, [loss], None, scaling=scaling))
    return {name: weight.detach().clone() for name, weight in learned.items()}


def _distance(
    model: Model,
    latents: Tensor,
    conditioning: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    target: Tensor,
    runtime: Runtime,
) -> Callable[[], Tensor]:
    """The mean squared distance of *model*'s prediction from *target*, to be computed in an optimizer's step."""
    return lambda: F.mse_loss(
        runtime.forward(lambda: model.family.predict(model, latents, conditioning, noise, timesteps)).float(), target
    )


def _drawings(
    model: Model, prompts: Sequence[str], settings: EsdSettings, runtime: Runtime, on_step: OnStep
) -> Iterator[Image]:
    seeds = drawing_seeds("defend", settings.seed, len(prompts))
    for i in range(0, len(prompts), model.at_once):
        with runtime.autocast():
            yield from model.family.draw(model, prompts[i : i + model.at_once], seeds[i : i + model.at_once])
        on_step(min(i + model.at_once, len(prompts)), "Drawing what is erased", None)
