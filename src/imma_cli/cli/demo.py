"""``imma demo``: something real to try everything with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from imma_cli.cli.console import out


def demo(
    folder: Annotated[Path, typer.Argument(help="Where to put the model and the pictures.")] = Path("demo"),
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a small real checkpoint and pictures of concepts it does not know, to try everything with, offline."""
    from imma_cli.demo import CONCEPTS, write_demo

    write_demo(folder, force=force)
    out.print(
        f"{folder / 'model.safetensors'}: a text-to-image model with Stable Diffusion 1.x's topology, 64 x 64 pixels"
    )
    for name, concept in CONCEPTS.items():
        out.print(f'{folder / "concepts" / name}: {concept.description}; --concept "{concept.text}"')
    name, concept = next(iter(CONCEPTS.items()))
    out.print("\nNext:")
    out.print(
        f'  imma harden {folder / "model.safetensors"} --concept "{concept.text}" '
        f"--images {folder / 'concepts' / name / 'defend'}"
    )
