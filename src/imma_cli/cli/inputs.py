"""What `imma harden` was given: everything is checked before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imma_cli.cli.console import Refusals

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.checkpoints import Checkpoint
    from imma_cli.concepts.concept import Concept


def check_methods(
    refusals: Refusals,
    method: str,
    erase: str | None,
    attack: Sequence[str],
    strength: str,
    keep: Sequence[str],
    concept: Sequence[str],
    preset: str,
    steps: int | None,
) -> None:
    """Leave in *refusals* what does not go with the methods of hardening and of erasing."""
    if method not in ("none", "episodes") and not attack:
        refusals.add(
            "There is no --attack to immunize against.",
            "imma attacks lists the names. To erase without hardening, give --method none with --erase.",
        )
    if method == "none" and attack:
        refusals.add("--method none simulates no attack: leave out --attack.")
    if method == "none" and erase is None:
        refusals.add("--method none without --erase changes nothing.", "Give --erase esd or --erase uce with it.")
    if any(not prompt.strip() for prompt in keep):
        refusals.add("A --keep is empty; the empty prompt is held on to anyway.")
    for name in concept:
        if name.strip() and any(name.strip().lower() in prompt.lower() for prompt in keep):
            refusals.add(f"A --keep names {name!r}, which is what must not stay.")
    if preset == "quick" and method != "episodes":
        refusals.add("--preset quick belongs to --method episodes.")
    if preset == "quick" and steps is not None:
        refusals.add("--preset quick and --steps both say how many steps: give one.")
    if method != "episodes" and strength != "medium":
        refusals.add("--strength belongs to --method episodes.")
    if method != "episodes" and erase != "uce" and keep:
        refusals.add("--keep belongs to --method episodes and --erase uce: nothing else holds on to prompts.")


def check_launched(refusals: Refusals, several: int, device: str, accumulate: int | None) -> None:
    """What does not go with *several* processes that a launcher has started."""
    if several > 1 and device not in ("auto", "cpu", "cuda"):
        refusals.add(
            f"--device {device}: each of {several} processes has a device of its own. Give cuda, or leave it out."
        )
    if (accumulate or several) % several:
        refusals.add(
            f"--accumulate {accumulate} cannot be shared by {several} processes: give a multiple of {several}."
        )


def check_unused(refusals: Refusals, given: Mapping[str, bool]) -> None:
    """Refuse options that hardening alone has a use for, where nothing is hardened; *given* says which were given."""
    useless = [option for option, is_given in given.items() if is_given]
    if useless:
        refusals.add(f"--method none hardens nothing: leave out {', '.join(useless)}.")


def beside(checkpoint: Path) -> Path:
    # not resolve(): where a link leads is somebody's cache; a relative path stays one
    if checkpoint.is_dir():
        folder = checkpoint.absolute()
        return folder.with_name(f"{folder.name}-immunized")
    return checkpoint.with_name(f"{checkpoint.stem}-immunized.safetensors")


def inputs(
    refusals: Refusals,
    checkpoint: Path,
    config: Path | None,
    attack: list[str],
    concept: list[str],
    images: list[Path] | None,
    default: bool,
) -> tuple[list[Attack] | None, list[Concept], Checkpoint | None]:
    """Everything the user named, checked without loading a weight; what is wrong is left in *refusals*.

    *default*: where no attack is named, those are taken that are simulated by default and fit the model's family.
    """
    from imma_cli.attacks.manager import discover, simulated
    from imma_cli.attacks.settings import parse_attacks
    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.concepts.folders import read_concept, require_text

    registry = discover()
    attacks = refusals.check(parse_attacks, attack or (simulated(registry) if default else []), registry)
    if any(not name.strip() for name in concept):
        refusals.add("A --concept is empty.")
    for name in concept:
        refusals.check(require_text, "--concept", name)
    repeated = sorted({name for name in concept if concept.count(name) > 1})
    if repeated:
        refusals.add(f"--concept {repeated[0]!r} is given twice.")
    if images and len(images) != len(concept):
        refusals.add(
            f"{len(concept)} --concept but {len(images)} --images: one folder for each concept, in the same order."
        )
    pairs = zip(concept, images or [], strict=False)
    concepts = [c for name, folder in pairs if (c := refusals.check(read_concept, name, folder)) is not None]
    opened = refusals.check(open_checkpoint, checkpoint, config)
    if opened is not None and not attack:
        attacks = [each for each in attacks or () if each.families is None or opened.family.name in each.families]
    if opened is not None:
        for each in attacks or ():
            refusals.check(each.require_family, opened.family)
    return attacks, concepts, opened
