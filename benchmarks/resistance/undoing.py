"""What an attacker who knows how the model was hardened may do to its attention before fine-tuning it.

None of it needs the original weights: who has those needs no hardened model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from imma_cli.families.model import Model
from imma_cli.immunizers.scope import protected_weights

AFTER = ", after "
"""Stands between an attack's settings and what was done to the model before, in the raw lines."""
SEED = 7


def undo(model: Model, how: str) -> None:
    """Do *how*, a key of `UNDOING`, to every attention weight of *model*."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for weight in protected_weights(model.unet, "attention").values():
            if weight.dim() == 2:
                weight.copy_(UNDOING[how](weight, generator))


def _rank(share: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    def largest(weight: Tensor, generator: torch.Generator) -> Tensor:
        """The best approximation of a part of the rank: a small change that is spread out falls away."""
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        kept = max(1, round(share * len(s)))
        return u[:, :kept] * s[:kept] @ v[:kept]

    return largest


def _flattened(weight: Tensor, generator: torch.Generator) -> Tensor:
    """No direction above twice the median: a change that lies in a few directions loses most of its length."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return u * s.clamp(max=2 * float(s.median())) @ v


def _reinitialised(weight: Tensor, generator: torch.Generator) -> Tensor:
    """As diffusers begins a linear layer: torch's default, uniform within ±1/sqrt(inputs)."""
    bound = weight.shape[1] ** -0.5
    return torch.empty_like(weight).uniform_(-bound, bound, generator=generator)


def _noisy(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of a tenth of the weight's length: finely tuned obstacles do not survive it."""
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return weight + 0.1 * weight.norm() / noise.norm() * noise


UNDOING: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "keeping half of the rank": _rank(0.5),
    "flattening the largest directions": _flattened,
    "scaling to 0.9": lambda weight, generator: 0.9 * weight,
    "adding noise": _noisy,
    "initialising anew": _reinitialised,
}


def undone(model: Model, how: str) -> Model:
    """A copy of *model*, which itself stays as it was, with *how* done to it."""
    other = model.sharing(private=list(nn.Module.parameters(model.unet)))
    undo(other, how)
    return other
