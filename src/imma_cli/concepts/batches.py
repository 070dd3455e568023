"""What a training step sees: cached latents and embeddings, and the step's own randomness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from imma_cli.concepts.caches import room

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model


@dataclass(frozen=True)
class Batch:
    """One step's pictures and randomness.

    *latents* and *noise* are [B, C, h, w], *timesteps* is int64 [B]; *conditioning* is [B, tokens, D], or None where it
    has to be computed from *captions* because the attack changes how they are encoded.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: tuple[str, ...]
    conditioning: Tensor | None


@dataclass(frozen=True)
class Latents:
    """Pictures as the autoencoder's posterior: it is not trained by anybody, so they are coded once."""

    mean: Tensor  # [N, C, h, w]
    std: Tensor  # [N, C, h, w]

    def __len__(self) -> int:
        return len(self.mean)


def pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """Pictures cropped to the middle square and scaled: float [N, 3, size, size] in [-1, 1]."""
    square = [ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS) for image in images]
    array = np.stack([np.asarray(image, dtype=np.float32) for image in square])
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def encode(model: Model, images: Sequence[Image.Image]) -> Latents:
    """The latents of *images* at the model's resolution. Only a few of them are in memory as pixels at a time."""
    side, several = model.family.resolution(model), min(8, model.at_once)
    found: Latents | None = None
    for first in range(0, len(images), several):
        part = pixels(images[first : first + several], side).to(model.device)
        mean, std = model.family.encode_images(model, part)
        if found is None:
            shape = len(images), *mean.shape[1:]
            found = Latents(room(shape, mean), room(shape, std))
        found.mean[first : first + several], found.std[first : first + several] = mean, std
    assert found is not None, "no pictures"
    return found


def conditioning_of(model: Model, captions: Sequence[str]) -> Tensor:
    """[N, tokens, D] for *captions*, each distinct one encoded once."""
    texts, rows = _distinct(captions)
    coded = _encoded(model, texts)
    return coded if len(texts) == len(rows) else coded[rows]


def _distinct(captions: Sequence[str]) -> tuple[list[str], list[int]]:
    """The captions without repetitions, and which of those every one is."""
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    return list(numbers), [numbers[caption] for caption in captions]


@torch.no_grad()
def _encoded(model: Model, texts: Sequence[str]) -> Tensor:
    found: Tensor | None = None
    for i, text in enumerate(texts):
        (coded,) = model.family.encode_prompts(model, [text])
        found = room((len(texts), *coded.shape), coded) if found is None else found
        found[i] = coded
    assert found is not None, "no captions"
    return found


class TrainingSet:
    """An endless, seeded stream of batches of one concept as one attack sees it.

    Every epoch goes through the pictures in a new order. All randomness comes from one CPU generator, so that the same
    seed gives the same stream on every device.
    """

    def __init__(
        self, model: Model, attack: Attack, concept: Concept, latents: Latents, *, seed: int, batch_size: int = 1
    ) -> None:
        self.latents, self.device = latents, model.device
        self.captions = [attack.caption(concept, caption) for caption in concept.captions]
        texts, self.caption_rows = _distinct(self.captions)
        self.conditioning = None if attack.trains_text else _encoded(model, texts)
        self.timesteps = model.family.training_timesteps(model)
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        """The pictures that are still to come in this epoch."""

    def __iter__(self) -> TrainingSet:
        return self

    def __next__(self) -> Batch:
        return self.batch([self._next_picture() for _ in range(self.batch_size)])

    def _next_picture(self) -> int:
        if not self.order:
            self.order = torch.randperm(len(self.latents), generator=self.generator).tolist()
        return self.order.pop(0)

    def state(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"generator": self.generator.get_state(), "order": list(self.order)}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.generator.set_state(saved["generator"])
        self.order = list(saved["order"])

    def batch(self, rows: Sequence[int]) -> Batch:
        """The pictures *rows* with fresh noise, timesteps and posterior sample."""
        # large caches are not on the device (`room`)
        mean, std = (cached[list(rows)].to(self.device) for cached in (self.latents.mean, self.latents.std))
        device = self.device
        captions = [self.caption_rows[row] for row in rows]
        sample = torch.randn(mean.shape, generator=self.generator).to(device)
        noise = torch.randn(mean.shape, generator=self.generator).to(device)
        timesteps = torch.randint(self.timesteps, (len(rows),), generator=self.generator).to(device)
        return Batch(
            latents=mean + std * sample,
            noise=noise,
            timesteps=timesteps,
            captions=tuple(self.captions[r] for r in rows),
            conditioning=None if self.conditioning is None else self.conditioning[captions].to(device),
        )
