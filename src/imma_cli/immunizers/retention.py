"""What must stay: the original's own predictions, for prompts that have nothing to do with the concepts.

Knowledge distillation (arXiv 1503.02531) on pictures that the model draws itself: no data is needed. The prompts are
everyday nouns, nouns beside random words of the tokenizer's vocabulary, and random words alone, so that what the model
knows besides nouns (styles, say) is met as well; some of the pictures are seen with the empty prompt, which
classifier-free guidance relies on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imma_cli.concepts.batches import conditioning_of, encode
from imma_cli.concepts.drawing import draw
from imma_cli.families.processes import ALONE, Processes
from imma_cli.immunizers.looks import with_other_look

if TYPE_CHECKING:
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime

NOUNS = (
    *("apple", "baby", "banana", "bear", "bee", "bell", "bicycle", "bird", "boat", "book", "bottle", "bread"),
    *("bridge", "bus", "cake", "camera", "candle", "car", "castle", "cat", "chair", "cheese", "clock", "cloud"),
    *("computer", "cow", "cup", "dog", "door", "drum", "eye", "face", "fish", "flower", "forest", "ghost"),
    *("guitar", "hammer", "hand", "hat", "heart", "horse", "house", "key", "kite", "lamp", "lemon", "lion"),
    *("lock", "man", "monkey", "moon", "mountain", "mushroom", "pencil", "person", "phone", "pig", "pizza", "rabbit"),
    *("rain", "robot", "rocket", "rose", "scissors", "sheep", "ship", "shoe", "snail", "snake", "spider", "star"),
    *("sun", "table", "tent", "tiger", "train", "tree", "truck", "trumpet", "umbrella", "window", "woman", "zebra"),
)
DRAWING_SEED = 2_000_000_000
"""Far from the seeds of drawn concepts and of whatever judges a model later."""
DRAWING_STEPS = 10
GUIDANCE = (1.0, 7.0)
"""The scales of classifier-free guidance (arXiv 2207.12598) that people draw with, from none to strong."""
PLAIN = 0.5
"""Share of the predictions that are held as they are, without guidance: ordinary fine-tuning begins with those."""
UNFAMILIAR = 0.5


def prompts_beside(concepts: Sequence[str], vocabulary: Sequence[str], count: int, seed: int) -> list[str]:
    """*count* prompts of which none has a word of the names in *concepts*."""
    rng = random.Random(seed)
    forbidden = set(re.findall(r"\w+", " ".join(concepts).lower()))
    nouns = [noun for noun in NOUNS if noun not in forbidden] or ["thing"]
    words = [word for word in vocabulary if word not in forbidden] or nouns
    forms: list[Callable[[], str]] = [
        lambda: f"a {rng.choice(nouns)}",
        lambda: f"a {rng.choice(nouns)} in {rng.choice(words)} style",
        lambda: " ".join(rng.choices(words, k=rng.randint(2, 6))),
        lambda: f"a {rng.choice(words)} {rng.choice(nouns)}",
    ]
    return [forms[i % len(forms)]() for i in range(count)]


def vocabulary_of(model: Model) -> list[str]:
    """Whole words that the tokenizer knows as such: no pieces of words, numbers or signs."""
    end = "</w>"
    return sorted(
        word.removesuffix(end)
        for word in model.tokenizer.get_vocab()
        if word.endswith(end) and len(word) >= 3 + len(end) and word.removesuffix(end).isalpha() and word.isascii()
    )


@dataclass(frozen=True)
class Retention:
    """Noised pictures, prompts, and what the original predicts for them with and without; all computed once."""

    latents: Tensor  # [N, C, h, w]
    conditioning: Tensor  # [N, tokens, D]
    empty: Tensor  # [tokens, D]
    noise: Tensor  # [M, C, h, w], where M is a multiple of N: picture m % N
    timesteps: Tensor  # int64 [M]
    guidance: Tensor  # [M]
    predicted: Tensor  # [2, M, C, h, w]: with the prompt, and with the empty one
    held_out: int
    """The last so many of the M, one noising of every picture, are never trained on: they tell how far the model has drifted."""

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """Numbers of *count* predictions that may be trained on: int64 [count]."""
        return torch.randint(len(self.noise) - self.held_out, (count,), generator=generator)

    @torch.no_grad()
    def measured_drift(self, model: Model) -> float:
        """The same over what was held out."""
        rows = torch.arange(len(self.noise) - self.held_out, len(self.noise))
        parts = [(self.difference(model, part), len(part)) for part in torch.split(rows, model.at_once)]
        return sum(float(difference) * count for difference, count in parts) / self.held_out

    def difference(self, model: Model, rows: Tensor) -> Tensor:
        """Mean squared difference of *model*'s guided predictions from the original's, over *rows*: a scalar.

        In units of the target's variance, which is about 1: the noise's, or the velocity's. What is drawn follows u + g (c - u), with and without the prompt; so that is held, not c and u apart.

        Errors of c and u that have nothing to do with each other make one of g² + (g - 1)² times their square.
        """
        both = self.predict(model, rows).float()
        both = both - self.predicted[:, rows].to(both.device).float()
        scale = self.guidance[rows, None, None, None].to(both.device)
        guided = both[1] + scale * (both[0] - both[1])
        return (guided.square() / (scale.square() + (scale - 1).square())).mean()

    def predict(self, model: Model, rows: Tensor) -> Tensor:
        """What *model* says with the prompts and without: [2, rows, C, h, w]."""
        pictures = rows % len(self.latents)
        prompted = self.conditioning[pictures].to(model.device)
        conditioning = torch.cat([prompted, self.empty.expand_as(prompted)])
        drawn = (each.to(model.device) for each in (self.latents[pictures], self.noise[rows], self.timesteps[rows]))
        latents, noise, timesteps = (torch.cat([each, each]) for each in drawn)
        predicted = model.family.predict(model, latents, conditioning, noise, timesteps)
        return predicted.reshape(2, len(rows), *predicted.shape[1:])


def retained(saved: Mapping[str, Any], device: torch.device) -> Retention:
    """The one whose fields were *saved*, on *device*."""
    fields: dict[str, Any] = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in saved.items()}
    return Retention(**fields)


@torch.no_grad()
def retain(
    model: Model,
    prompts: Sequence[str],
    *,
    noisings: int,
    seed: int,
    runtime: Runtime,
    unfamiliar: float = UNFAMILIAR,
    guidance: tuple[float, float] = GUIDANCE,
    on_picture: Callable[[int], None] = lambda done: None,
    processes: Processes = ALONE,
) -> Retention:
    """Let *model* draw one picture for each of *prompts*, noise each *noisings* times, and keep what it predicts.

    A share *unfamiliar* of the pictures gets another look first: what others will train the model on is nothing that it
    draws already, and its predictions there are to stay too. Each of *processes* draws and predicts its share.
    """
    seeds = [DRAWING_SEED + seed * 1000 + i for i in range(len(prompts))]
    with runtime.autocast():
        pictures = draw(model, prompts, seeds, model.at_once, on_picture, processes, steps=DRAWING_STEPS)
    rng = random.Random(seed)
    pictures = [with_other_look(each, rng) if rng.random() < unfamiliar else each for each in pictures]
    latents = encode(model, pictures).mean
    generator = torch.Generator().manual_seed(seed)
    count = len(prompts) * noisings
    kept = Retention(
        latents,
        conditioning_of(model, prompts),
        conditioning_of(model, [""])[0],
        torch.randn((count, *latents.shape[1:]), generator=generator).to(latents.device),
        torch.randint(model.family.training_timesteps(model), (count,), generator=generator).to(latents.device),
        _scales(guidance, count, generator).to(latents.device),
        torch.zeros(2, count, *latents.shape[1:], device=latents.device),
        held_out=held_out_of(len(prompts), noisings),
    )
    for rows in processes.share(torch.split(torch.arange(count), model.at_once)):
        with runtime.autocast():
            kept.predicted[:, rows] = kept.predict(model, rows).float()
    processes.add_up([kept.predicted])  # what a process has not predicted is 0 there
    return kept


def held_out_of(pictures: int, noisings: int) -> int:
    """How many of *pictures*, each noised so often, are never trained on: one noising of each, or a quarter of all."""
    return max(1, min(pictures, pictures * noisings // 4))


def _scales(guidance: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    low, high = guidance
    drawn = low + (high - low) * torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < PLAIN, torch.ones(count), drawn)
