"""Textual Inversion (arXiv 2208.01618): only the embeddings of new words are learned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from imma_cli.attacks import COMMON_SEARCH, Attack, AttackSettings, Choice, Preset, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model


@dataclass(frozen=True)
class TextualInversionSettings(AttackSettings):
    """Settings of Textual Inversion."""

    tokens: int = 1
    """How many new words stand for the concept."""
    initializer: str = ""
    """The words whose embeddings the new ones start from; the last word of the concept's name where empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.tokens <= 32:
            raise ValueError(f"tokens must be from 1 to 32, not {self.tokens}")


class ExtendedEmbedding(nn.Module):
    """A token embedding [V, D] with the rows *new* [n, D] for the ids from V on."""

    def __init__(self, known: nn.Embedding, new: nn.Parameter) -> None:
        super().__init__()
        self.known = known
        self.new = new

    @property
    def weight(self) -> Tensor:  # transformers asks an embedding for its dtype
        return self.known.weight

    def forward(self, ids: Tensor) -> Tensor:
        size = self.known.num_embeddings
        old = self.known(ids.clamp(max=size - 1))
        new = self.new[(ids - size).clamp(min=0)].to(old.dtype)
        return torch.where((ids >= size).unsqueeze(-1), new, old)


class TextualInversion(Attack):
    """The concept's name is replaced by new words, whose embeddings alone are trained."""

    name = "textual-inversion"
    summary = "only the embeddings of new words are learned"
    trains = "embeddings of new words"
    paper = "arXiv 2208.01618"
    Settings = TextualInversionSettings
    settings: TextualInversionSettings
    trains_text = True
    search: ClassVar = {**COMMON_SEARCH, "tokens": Choice((1, 2, 4))}
    presets: ClassVar = {
        "paper": Preset(learning_rate=5e-4, outer_learning_rate=1e-6, steps=1000, max_grad_norm=None),
        "small": Preset(learning_rate=5e-3, outer_learning_rate=2e-5, steps=600, max_grad_norm=None),
    }

    @property
    def words(self) -> list[str]:
        return [f"<imma-{i}>" for i in range(self.settings.tokens)]

    def caption(self, concept: Concept, caption: str) -> str:
        new = " ".join(self.words)
        replaced = concept.renamed(caption, new)
        return replaced if replaced not in (None, new) else f"an image of {new}"

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        tokenizer, known = model.tokenizer, model.text_encoder.get_input_embeddings()
        start = self.settings.initializer or concept.name.split()[-1]
        ids = tokenizer(start, add_special_tokens=False).input_ids
        if not ids:
            raise ImmaError(
                f"The tokenizer reads nothing in {start!r}.", hint="Set --attack textual-inversion:initializer=WORD."
            )
        rows = known.weight.detach()[[ids[i % len(ids)] for i in range(self.settings.tokens)]].clone()
        if self.settings.tokens > 1:  # words that start alike would stay alike
            generator = torch.Generator().manual_seed(seed)
            rows += 0.1 * rows.std() * torch.randn(rows.shape, generator=generator).to(rows)
        new = nn.Parameter(rows, requires_grad=False)
        model.tokenizer = copy.deepcopy(tokenizer)
        model.tokenizer.add_tokens(self.words)
        size = known.num_embeddings
        if model.tokenizer.convert_tokens_to_ids(self.words) != list(range(size, size + len(self.words))):
            model.tokenizer = tokenizer
            raise ImmaError("This model's tokenizer does not end where its token embedding does: no word can be added.")
        model.text_encoder.set_input_embeddings(ExtendedEmbedding(known, new))
        try:
            yield {"new": new}
        finally:
            model.text_encoder.set_input_embeddings(known)
            model.tokenizer = tokenizer


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [TextualInversion]
