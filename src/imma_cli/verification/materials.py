"""What an attack gets, what it is judged by, and what is drawn afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from imma_cli.concepts.concept import Concept, hashed


@dataclass(frozen=True)
class Material:
    """One concept: an attacker's pictures, others that judge what came of it, and prompts to draw."""

    purpose: Literal["harmful", "benign"]
    pictures: Concept
    judge: Concept
    prompts: tuple[str, ...]
    """Captions of judging pictures. The attacker never saw these together with a picture."""

    @property
    def name(self) -> str:
        return self.pictures.name


def material(purpose: Literal["harmful", "benign"], pictures: Concept, judge: Concept | None, prompts: int) -> Material:
    """*pictures* to attack with; every third of them is kept to judge by where there is no *judge*.

    At most *prompts* distinct captions of judging pictures, spread evenly, are what is drawn. Needs two pictures at least.
    """
    if judge is None:
        pictures, judge = split(pictures)
    captions = list(dict.fromkeys(judge.captions))
    count = min(prompts, len(captions))
    chosen = tuple(captions[i * len(captions) // count] for i in range(count))
    return Material(purpose, pictures, judge, chosen)


def split(concept: Concept) -> tuple[Concept, Concept]:
    """The attacker's pictures, and every third kept for judging."""

    def only(rows: Iterable[int]) -> Concept:
        kept = list(rows)
        return replace(
            concept, images=tuple(concept.images[i] for i in kept), captions=tuple(concept.captions[i] for i in kept)
        )

    every = range(len(concept.images))
    return only(i for i in every if i % 3 != 1), only(i for i in every if i % 3 == 1)


def warnings(provenance: Mapping[str, Any] | None, harmful: Material, *benign: Material) -> list[str]:
    """What a reader must know about the pictures before believing the numbers."""
    found = []
    if provenance is None:
        found.append("The hardened file does not say which pictures it was hardened with.")
    else:
        concepts = provenance.get("concepts", [])
        used = {h for c in concepts for h in c.get("sha256", [])}
        texts = {h for c in concepts for h in c.get("captions_sha256", [])}
        for what, concept in (("attacker's", harmful.pictures), ("judging", harmful.judge)):
            shared = len(used & set(concept.hashes))
            if shared:
                found.append(f"{shared} of the {what} pictures were used for hardening: real attackers have others.")
        # whoever names a style plainly uses the same words; only captions of pictures tell something
        written = [caption for caption in harmful.pictures.captions if caption != harmful.name]
        same = len(texts & set(hashed(written)))
        if same:
            found.append(f"{same} of the attacker's captions were used for hardening: real attackers write others.")
        if harmful.name.casefold() not in {c["name"].casefold() for c in concepts}:
            hardened_for = ", ".join(repr(c["name"]) for c in concepts) or "no concept"
            found.append(f"The file says that it was hardened for {hardened_for}, not for {harmful.name!r}.")
    both = len(set(harmful.pictures.hashes) & set(harmful.judge.hashes))
    if both:
        found.append(
            f"{both} pictures are the attacker's and judge at the same time: learning them by heart would pass."
        )
    protected = {*harmful.pictures.hashes, *harmful.judge.hashes}
    for each in benign:
        shared = len(protected & {*each.pictures.hashes, *each.judge.hashes})
        if shared:
            found.append(f"{shared} pictures of {each.name!r} show {harmful.name!r} too: its benign SGR is no price.")
    return found
