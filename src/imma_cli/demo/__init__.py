"""The demo: a small text-to-image model trained from scratch, and pictures of three concepts it was never shown.

Everything lies in the package, so `write_demo` needs no network. How it was made: ``benchmarks/demo_model``.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

from imma_cli.errors import ImmaError

MODEL = "model.safetensors"
LICENSES = "LICENSES.txt"
ROLES = ("defend", "attack", "judge")


class DemoConcept(NamedTuple):
    text: str
    """What to pass as ``--concept``."""
    description: str


CONCEPTS = {
    "high-contrast-style": DemoConcept("high contrast style", "a drawing style: 40 pictures of other things per role"),
    "guitar": DemoConcept("guitar", "an object: 8 pictures per role, drawn in the four styles the model knows"),
    "adventurer": DemoConcept("adventurer character", "a character in several poses: 4 or 5 pictures per role"),
}


PROMPTS = tuple(
    f"{noun} in {style} style"
    for noun, style in zip(
        (
            *(
                "a red apple",
                "a rocket",
                "an umbrella",
                "a frog",
                "a hamburger",
                "an alarm clock",
                "a sailboat",
                "a cactus",
            ),
            *(
                "a bicycle",
                "a penguin",
                "a house",
                "a birthday cake",
                "a key",
                "a sunflower",
                "an octopus",
                "a balloon",
            ),
        ),
        ("noto", "retro", "fluent", "flat") * 4,
        strict=True,
    )
)
"""What the demo model draws well, and what none of its concepts is about."""


@contextmanager
def concept_folder(name: str, role: str) -> Iterator[Path]:
    """The folder with the pictures of the concept *name* for *role*, one of `ROLES`."""
    with as_file(files(__name__).joinpath("concepts", name, role)) as folder:
        yield folder


def write_demo(target: Path, *, force: bool = False) -> list[Path]:
    """Write the demo model and the concepts' pictures into the folder *target*; returns what was written.

    That is ``model.safetensors`` (a single file as Stable Diffusion 1.x's), ``concepts/NAME/{defend,attack,judge}/``
    with a ``metadata.csv`` each, and ``LICENSES.txt``. Everything is complete before anything gets its final name.

    Raises `ImmaError` where something of that exists already, unless *force*, which replaces exactly these (each
    concept's folder as a whole), and where *target* cannot be written.
    """
    names = [MODEL, *(f"concepts/{name}" for name in CONCEPTS), LICENSES]
    existing = [name for name in names if (target / name).exists()]
    if existing and not force:
        raise ImmaError(
            f"The demo was not written: {target} has some of it already.",
            [f"{target / name} exists" for name in existing],
            "Choose another folder, or replace these with --force.",
        )
    try:
        return _write(target, names)
    except OSError as error:
        raise ImmaError(
            f"The demo could not be written to {target}.",
            [f"{error.filename or target}: {error.strerror or error}"],
            "Choose a folder you may write to, on a disk with 30 MB to spare.",
        ) from error


def _write(target: Path, names: list[str]) -> list[Path]:
    target.mkdir(parents=True, exist_ok=True)
    # in the target folder itself, so that every rename stays within one file system
    with tempfile.TemporaryDirectory(prefix=".imma-demo-", dir=target) as workbench:
        new, old = Path(workbench, "new"), Path(workbench, "old")
        for name in names:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(files(__name__).joinpath(name), new / name)
        for name in names:
            (target / name).parent.mkdir(exist_ok=True)
            if (target / name).exists():  # a folder cannot be renamed over another
                (target / name).rename(old / name)
            (new / name).rename(target / name)
    return [target / name for name in names]


def _copy(packaged: Traversable, target: Path) -> None:
    """A file, or a folder with everything in it."""
    if packaged.is_dir():
        target.mkdir()
        for child in packaged.iterdir():
            _copy(child, target / child.name)
    else:
        with packaged.open("rb") as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
