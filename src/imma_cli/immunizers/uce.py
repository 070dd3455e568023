"""Unified Concept Editing (arXiv 2308.14761): erasing in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from imma_cli.concepts.batches import conditioning_of
from imma_cli.immunizers.naming import OnStep, ignore, prompts_with
from imma_cli.immunizers.retention import NOUNS, prompts_beside, vocabulary_of
from imma_cli.immunizers.scope import protected_weights

if TYPE_CHECKING:
    from imma_cli.families.model import Model


@dataclass(frozen=True)
class UceSettings:
    """What may be set about UCE."""

    seed: int = 0
    nouns: int = len(NOUNS)
    """So many everyday nouns stand before a concept's name in the prompts that are erased."""
    preserved: int = 600
    """So many prompts without the concepts' words keep their keys and values."""
    weight: float = 1.0
    """How much all erased tokens count together beside all preserved ones."""
    ridge: float = 0.02
    """λ, the pull towards the weights as they were, in units of the embeddings' mean square."""
    method: Literal["uce"] = "uce"


@torch.no_grad()
def uce(
    model: Model, names: Sequence[str], settings: UceSettings, keep: Sequence[str] = (), on_step: OnStep = ignore
) -> dict[str, Tensor]:
    """The paper's closed form, for every cross-attention's keys and values, in float64.

        W' = (Σ_i v_i* c_iᵀ + λ W + Σ_j W c_j c_jᵀ) (Σ_i c_i c_iᵀ + λ I + Σ_j c_j c_jᵀ)⁻¹,   v_i* = W c_i*

    The c_i are the embeddings of a prompt's tokens from the concept's name to the end, padding included, since all of
    them tell of the name; the c_i* are those at the same places of the neutral prompt. The c_j are all tokens of the
    preserved prompts. W stands to the left of every sum, so one [D, D] matrix edits all weights.

    Differs from the paper in scale alone: the sums are means here, and λ is in units of the embeddings' mean square. So
    the settings mean the same for every text encoder and number of prompts; a λ too small for the embeddings lets the
    weights grow manifold in directions that hardly any embedding has.
    """
    old, new = (torch.cat(part) for part in zip(*_erased_tokens(model, names, settings), strict=True))  # [I, D]
    beside = [*keep, *prompts_beside(names, vocabulary_of(model), settings.preserved, settings.seed)]
    preserved = conditioning_of(model, beside).flatten(0, 1).double()  # [J, D]
    ridge = settings.ridge * preserved.square().mean()
    kept = preserved.T @ preserved / len(preserved) + ridge * torch.eye(preserved.shape[1]).to(preserved)
    erased = settings.weight * old.T / len(old)
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
    for prompt, start, neutral in prompts_with(names, settings.nouns, settings.seed):
        # of the tokens of what stands before the name, the last is the end sign
        first = len(model.tokenizer(start).input_ids) - 1
        old, new = conditioning_of(model, [prompt, neutral])[:, first:].double()
        yield old, new
