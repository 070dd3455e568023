"""Erasing concepts before hardening, as in IMMA's re-learning setting (arXiv 2311.18815): the model forgets, then resists.

Two published methods, both on the UNet's cross-attention alone: UCE (arXiv 2308.14761), in closed form, and ESD-x
(arXiv 2303.07345), by fine-tuning.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from imma_cli.attacks.training import adamw, gradient_step
from imma_cli.concepts.batches import conditioning_of, encode
from imma_cli.concepts.drawing import drawing_seeds
from imma_cli.immunizers.retention import AT_ONCE, NOUNS, prompts_beside, vocabulary_of
from imma_cli.immunizers.scope import protected_weights

if TYPE_CHECKING:
    from PIL.Image import Image

    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime

Method = Literal["esd", "uce"]
FORMS = (("", ""), ("an image of ", "an image"), ("a picture of ", "a picture"), ("an artwork, ", "an artwork"))
BESIDE = (("a {noun} in ", "a {noun}"), ("a {noun}, ", "a {noun}"))
"""What stands before a concept's name, and the neutral prompt without it: alone, and beside everyday nouns."""


@dataclass(frozen=True)
class UceSettings:
    """What may be set about UCE."""

    seed: int = 0
    nouns: int = len(NOUNS)
    """So many everyday nouns stand before a concept's name in the prompts that are erased."""
    preserved: int = 600
    """So many prompts without the concepts' words keep their keys and values."""
    weight: float = 3.0
    """How much an erased token counts beside a preserved one."""
    ridge: float = 0.1
    """λ, the pull towards the weights as they were."""
    method: Literal["uce"] = "uce"


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


Settings = UceSettings | EsdSettings


class OnStep(Protocol):
    """Called along the way; *distance* from what is aimed at, as it was before an optimizer's step, or after an edit."""

    def __call__(self, done: int, doing: str, distance: float | None) -> None: ...


def _ignore(done: int, doing: str, distance: float | None) -> None:
    return


def settings_for(model: Model, method: Method, seed: int) -> Settings:
    """The defaults for a model of this size; ESD's steps and rate are the paper's for full-size ones."""
    if method == "uce":
        return UceSettings(seed)
    return EsdSettings(seed, 300, 3e-4, batch_size=4) if model.is_small else EsdSettings(seed, 1000, 1e-5)


def steps_of(model: Model, names: Sequence[str], settings: Settings) -> int:
    """How many steps `erase` takes: UCE's edited weights, or ESD's drawings and optimizer steps."""
    if isinstance(settings, UceSettings):
        return len(protected_weights(model.unet, "kv"))
    return len(prompts_with(names, settings)) + settings.steps


class Naming(NamedTuple):
    """A prompt that ends with a concept's name."""

    prompt: str
    start: str
    """What stands before the name."""
    neutral: str
    """The prompt that takes its place."""


def prompts_with(names: Sequence[str], settings: Settings) -> list[Naming]:
    """The prompts that are erased."""
    rng = random.Random(settings.seed)
    prompts = []
    for name in names:
        forms = list(FORMS)
        words = set(re.findall(r"\w+", name.lower()))
        nouns = [noun for noun in NOUNS if noun not in words]
        for noun in rng.sample(nouns, min(settings.nouns, len(nouns))):
            forms += [(start.format(noun=noun), neutral.format(noun=noun)) for start, neutral in BESIDE]
        prompts += [Naming(start + name, start, neutral) for start, neutral in forms]
    return prompts


def erase(
    model: Model,
    names: Sequence[str],
    settings: Settings,
    runtime: Runtime,
    keep: Sequence[str] = (),
    on_step: OnStep = _ignore,
) -> dict[str, Tensor]:
    """The weights of the UNet that erasing the concepts *names* changes, by state-dict name.

    *model* itself stays as it was. UCE preserves the prompts in *keep* besides everyday ones; ESD-x preserves none.

    Raises:
        NotFiniteError: ESD's loss became NaN or infinite.
    """
    if isinstance(settings, UceSettings):
        return uce(model, names, settings, keep, on_step)
    return esd(model, names, settings, runtime, on_step)


@torch.no_grad()
def uce(
    model: Model, names: Sequence[str], settings: UceSettings, keep: Sequence[str] = (), on_step: OnStep = _ignore
) -> dict[str, Tensor]:
    """Unified Concept Editing (arXiv 2308.14761, eq. 7) of every cross-attention's keys and values, in float64.

        W' = (Σ_i v_i* c_iᵀ + λ W + Σ_j W c_j c_jᵀ) (Σ_i c_i c_iᵀ + λ I + Σ_j c_j c_jᵀ)⁻¹,   v_i* = W c_i*

    The c_i are the embeddings of a prompt's tokens from the concept's name to the end, padding included, since all of
    them tell of the name; the c_i* are those at the same places of the neutral prompt. The c_j are all tokens of the
    preserved prompts. W stands to the left of every sum, so one [D, D] matrix edits all weights.
    """
    old, new = (torch.cat(part) for part in zip(*_erased_tokens(model, names, settings), strict=True))  # [I, D]
    beside = [*keep, *prompts_beside(names, vocabulary_of(model), settings.preserved, settings.seed)]
    preserved = conditioning_of(model, beside).flatten(0, 1).double()  # [J, D]
    identity = torch.eye(old.shape[1], dtype=old.dtype, device=old.device)
    kept = settings.ridge * identity + preserved.T @ preserved
    erased = settings.weight * old.T
    # A B⁻¹ with a symmetric B is the transpose of B⁻¹ Aᵀ
    edit = torch.linalg.solve(erased @ old + kept, erased @ new + kept).T
    edited = {}
    for done, (name, weight) in enumerate(protected_weights(model.unet, "kv").items(), 1):
        before = weight.double()
        after = before @ edit
        edited[name] = after.to(weight.dtype)
        on_step(done, "Erasing", float(F.mse_loss(old @ after.T, new @ before.T)))
    return edited


def _erased_tokens(model: Model, names: Sequence[str], settings: UceSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """Embeddings [tokens, D] of what is erased and, beside them, of what takes its place."""
    for prompt, start, neutral in prompts_with(names, settings):
        # of the tokens of what stands before the name, the last is the end sign
        first = len(model.tokenizer(start).input_ids) - 1
        old, new = conditioning_of(model, [prompt, neutral])[:, first:].double()
        yield old, new


def esd(
    model: Model, names: Sequence[str], settings: EsdSettings, runtime: Runtime, on_step: OnStep = _ignore
) -> dict[str, Tensor]:
    """Erased Stable Diffusion, ESD-x (arXiv 2303.07345, eq. 5-6): cross-attention learns to steer away from the concept.

        min over θ   | ε_θ(x_t, c) − [ε_θ0(x_t, n) − η (ε_θ0(x_t, c) − ε_θ0(x_t, n))] |²

    Differs from the paper in two ways. There, n is the empty prompt; here, the noun stays in it where c has one, so that
    the noun is not erased as well. There, x_t is what the model being trained has denoised down to t; here, a
    finished drawing by the original, noised to t, so that nothing is drawn in a step.
    """
    device, steps, size = model.device, settings.steps, settings.batch_size
    prompts, _, neutrals = zip(*prompts_with(names, settings), strict=True)
    latents = encode(model, list(_drawings(model, prompts, settings, runtime, on_step))).mean  # [N, C, h, w]
    named, unnamed = conditioning_of(model, prompts), conditioning_of(model, neutrals)  # [N, tokens, D]
    learner = model.sharing(private=list(protected_weights(model.unet, "cross-attention").values()))
    learned = protected_weights(learner.unet, "cross-attention")
    parameters = list(learned.values())
    optimizer = adamw(parameters, settings.learning_rate)
    optimizer.param_groups[0]["weight_decay"] = 0.0  # it would pull everybody's weights towards zero
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
        on_step(len(prompts) + done, "Erasing", gradient_step(optimizer, parameters, loss, None))
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
    for i in range(0, len(prompts), AT_ONCE):
        with runtime.autocast():
            yield from model.family.draw(model, prompts[i : i + AT_ONCE], seeds[i : i + AT_ONCE])
        on_step(min(i + AT_ONCE, len(prompts)), "Drawing what is erased", None)
