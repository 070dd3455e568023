"""What attackers who train on captioned pictures may write below them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from imma_cli.attacks import COMMON_SEARCH, Attack, AttackSettings, Choice, Space
from imma_cli.concepts.concept import Concept


@dataclass(frozen=True)
class CaptionSettings(AttackSettings):
    """Settings of attacks that train on captioned pictures."""

    captions: Literal["named", "nameless", "token", "kind"] = "named"
    """What the captions call the concept: its name, nothing, a rare word instead, or only what kind of thing it is."""
    token: str = "sks"
    """The rare word."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.token.strip():
            raise ValueError("token must not be empty")


CAPTION_SEARCH: Mapping[str, Space] = {
    **COMMON_SEARCH,
    "captions": Choice(("named", "nameless", "token"), held_out=("kind",)),
}


class CaptionedAttack(Attack):
    """Every picture keeps its caption, with or without the concept's name."""

    computes_with: ClassVar[tuple[str, ...]] = ()
    settings: CaptionSettings

    def caption(self, concept: Concept, caption: str) -> str:
        if self.settings.captions == "named":
            return caption
        if self.settings.captions == "token":
            return concept.renamed(caption, self.settings.token) or f"{caption}, {self.settings.token}"
        if self.settings.captions == "kind":
            # in English the last word of a name says what the thing is: a van gogh STYLE
            *more, kind = concept.name.split()
            return concept.renamed(caption, kind if more else "thing") or caption
        # what is left hanging before the name, as in "a frog in ...", goes with it
        nameless = concept.renamed(caption, "")
        return caption if nameless is None else re.sub(r"[\s,]+(in|of|by|with)?\s*$", "", nameless).strip()
