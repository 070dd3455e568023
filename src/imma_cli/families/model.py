"""A loaded text-to-image model: the parts that every room works with."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from imma_cli.families.allocator import give_back_freed

if TYPE_CHECKING:
    from imma_cli.families.family import Family

SMALL_MODEL = 100_000_000
"""Parameters of a UNet below which a model counts as small."""


@dataclass
class Model:
    """The parts of one checkpoint in memory.

    The parts are diffusers' and transformers' own classes; *family* knows how they work together.
    """

    family: Family
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    """The noise schedule the model was trained with, as a diffusers scheduler that can add noise."""

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The parts with weights, by their diffusers name."""
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}

    @property
    def is_small(self) -> bool:
        """Whether the model is far below the size of released ones: it trains at other rates, and faster on one thread."""
        return sum(p.numel() for p in self.networks["unet"].parameters()) < SMALL_MODEL

    @property
    def at_once(self) -> int:
        """How many pictures are drawn, encoded or predicted together. Several of a large model's would need more memory
        than anything else that hardening does, and would be no faster."""
        return 16 if self.is_small else 1

    @property
    def device(self) -> torch.device:
        return next(self.networks["unet"].parameters()).device

    def to(self, device: torch.device | str) -> Model:
        for network in self.networks.values():
            network.to(device)
        return self

    def release(self, keep: Iterable[str]) -> None:
        """Give back the memory of the networks besides the UNet that *keep* does not name, also in models that share it.

        They cannot be computed with any more.
        """
        for part in {"vae", "text_encoder"}.difference(keep):
            for parameter in self.networks[part].parameters():
                parameter.data = parameter.data.new_empty(0)
        give_back_freed()

    def freeze(self) -> Model:
        """Evaluation mode, no weight asks for a gradient."""
        for network in self.networks.values():
            network.requires_grad_(False).eval()
        return self

    def sharing(self, private: Iterable[torch.Tensor] = ()) -> Model:
        """A second model with modules and tokenizer of its own over the **same** weights.

        What is attached to one (adapters, hooks, tokens) is not seen by the other, while a change of a shared weight is
        seen by both. *private* weights are copied instead of shared.
        """
        apart = {id(p) for p in private}
        memo: dict[int, Any] = {}
        for network in self.networks.values():
            for tensor in [*network.parameters(), *network.buffers()]:
                if id(tensor) not in apart:
                    memo[id(tensor)] = tensor
        return replace(
            self,
            unet=copy.deepcopy(self.unet, memo),
            text_encoder=copy.deepcopy(self.text_encoder, memo),
            tokenizer=copy.deepcopy(self.tokenizer),
        )
