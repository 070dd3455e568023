"""``imma inspect``: what a checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from imma_cli.cli.console import out, print_json


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file or a diffusers folder.")],
    config: Annotated[
        Path | None, typer.Option(help="Configuration folder in diffusers' layout, for widths that imma does not know.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Show a checkpoint's family, parts, size, what hardening may change, and where it comes from."""
    from imma_cli.checkpoints import open_checkpoint

    found = open_checkpoint(checkpoint, config)
    attention = [name for name in found.shapes["unet"] if _is_attention(name)]
    report = {
        "path": str(found.path),
        "layout": found.layout,
        "family": found.family.name,
        "architecture": found.architecture,
        "bytes": found.size,
        "sha256": found.sha256,
        "parts": {n: {"parameters": p.parameters, "dtype": p.dtype} for n, p in found.parts.items()},
        "changeable_attention_tensors": len(attention),
        "notices": list(found.notices),
        "metadata": {k: v for k, v in found.metadata.items() if k != "imma"},
        "provenance": found.provenance,
    }
    if json:
        print_json(report)
        return
    table = Table("", Column(overflow="fold"), title=escape(str(found.path)), show_header=False, title_justify="left")
    table.add_row("family", f"{found.family.title} ({found.architecture})")
    table.add_row("layout", found.layout)
    table.add_row("size", f"{found.size / 1e6:,.1f} MB")
    table.add_row("sha256", found.sha256)
    for name, part in found.parts.items():
        table.add_row(name, f"{part.parameters / 1e6:,.2f} M parameters, {part.dtype}")
    table.add_row("may be changed", f"{len(attention)} attention projections of the UNet (--protect attention)")
    for notice in found.notices:
        table.add_row("notice", escape(notice))
    made = found.provenance
    if made is None:
        table.add_row("provenance", "not made by imma")
    else:
        attacks = ", ".join(a["name"] for a in made.get("attacks", []))
        concepts = ", ".join(c["name"] for c in made.get("concepts", []))
        erased = (made.get("erase") or {}).get("method")
        done = [f"{concepts} erased by {erased}"] if erased else []
        done += [f"hardened for {concepts} against {attacks}{_how(made.get('settings', {}))}"] if attacks else []
        table.add_row("provenance", escape(f"imma {made.get('version')}: {', then '.join(done)}"))
        table.add_row("", f"from sha256 {made.get('input_sha256')}, seed {made.get('settings', {}).get('seed')}")
    out.print(table)


def _how(settings: Mapping[str, Any]) -> str:
    """The settings that say how far hardening was to go, of those that the record has."""
    said = [f"{name} {settings[name]}" for name in ("method", "strength") if settings.get(name) is not None]
    said += [f"at most {settings['steps']} steps"] if settings.get("steps") is not None else []
    return f" ({', '.join(said)})" if said else ""


def _is_attention(name: str) -> bool:
    return any(f".{p}." in name for p in ("to_q", "to_k", "to_v", "to_out.0"))
