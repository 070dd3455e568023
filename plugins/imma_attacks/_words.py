"""New words in front of a text encoder, whose embeddings can be trained; gone after the context."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imma_cli.attacks import AttackSettings
from imma_cli.concepts.concept import Concept
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model

MOST = 32
"""New words that an attack may add; a prompt has room for 75."""


@dataclass(frozen=True)
class NewWordSettings(AttackSettings):
    """Settings of attacks that let new words stand for the concept."""

    tokens: int = 1
    """How many new words stand for the concept."""
    initializer: str = ""
    """The words whose embeddings the new ones start from; the last word of the concept's name where empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.tokens <= MOST:
            raise ValueError(f"tokens must be from 1 to {MOST}, not {self.tokens}")

    @property
    def words(self) -> list[str]:
        return [f"<imma-{i}>" for i in range(self.tokens)]

    def start(self, concept: Concept) -> str:
        return self.initializer or concept.name.split()[-1]


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


@contextmanager
def new_words(model: Model, words: Sequence[str], start: str, seed: int) -> Iterator[nn.Parameter]:
    """The embeddings [n, D] of *words*, which begin as those of the tokens of *start*.

    Raises:
        ImmaError: the tokenizer reads nothing in *start*, or cannot be given further words.
    """
    tokenizer, known = model.tokenizer, model.text_encoder.get_input_embeddings()
    ids = tokenizer(start, add_special_tokens=False).input_ids
    if not ids:
        raise ImmaError(f"The tokenizer reads nothing in {start!r}.", hint="Choose another word to start from.")
    rows = known.weight.detach()[[ids[i % len(ids)] for i in range(len(words))]].clone()
    if len(words) > 1:  # words that start alike would stay alike
        generator = torch.Generator().manual_seed(seed)
        rows += 0.1 * rows.std() * torch.randn(rows.shape, generator=generator).to(rows)
    new = nn.Parameter(rows, requires_grad=False)
    extended = copy.deepcopy(tokenizer)
    extended.add_tokens(list(words))
    size = known.num_embeddings
    if extended.convert_tokens_to_ids(list(words)) != list(range(size, size + len(words))):
        raise ImmaError("This model's tokenizer does not end where its token embedding does: no word can be added.")
    model.tokenizer = extended
    model.text_encoder.set_input_embeddings(ExtendedEmbedding(known, new))
    try:
        yield new
    finally:
        model.text_encoder.set_input_embeddings(known)
        model.tokenizer = tokenizer


def with_words(concept: Concept, caption: str, words: Sequence[str]) -> str:
    """*caption* with the new *words* in place of the concept's name; a sentence of its own where the name is not there."""
    new = " ".join(words)
    replaced = concept.renamed(caption, new)
    return replaced if replaced not in (None, new) else f"an image of {new}"
