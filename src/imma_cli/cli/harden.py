"""``imma harden``: change a checkpoint's weights so that fine-tuning it on a concept fails."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from imma_cli.cli import hardening
from imma_cli.cli.console import Refusals, err, print_json
from imma_cli.cli.progress import course, waiting

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.checkpoints import Checkpoint
    from imma_cli.concepts.concept import Concept


def harden(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file or a diffusers folder.")],
    concept: Annotated[list[str], typer.Option(help="What to protect. Repeatable.")],
    attack: Annotated[
        list[str], typer.Option(help="Attack to immunize against: NAME[:key=value,...]. Repeatable. See: imma attacks.")
    ],
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of pictures, one for each --concept in the same order. Left out, the model draws them."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="What to write. Default: beside the checkpoint, NAME-immunized.")
    ] = None,
    method: Annotated[
        Literal["episodes", "imma", "maximize"],
        typer.Option(
            help="episodes: attackers drawn anew, other prompts held on to. imma: as published. maximize: its baseline."
        ),
    ] = "imma",
    strength: Annotated[
        Literal["low", "medium", "high"],
        typer.Option(help="With episodes: how far predictions for other prompts may move for it."),
    ] = "medium",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="With episodes: a prompt that must stay as it is, besides everyday ones. Repeatable."),
    ] = None,
    protect: Annotated[
        Literal["unet", "attention", "cross-attention", "kv"],
        typer.Option(help="Which weights may change."),
    ] = "attention",
    steps: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Inner and outer steps: in all with episodes, else for each attack on each concept. "
            "Default: by the model's size, or the attack's preset.",
        ),
    ] = None,
    outer_learning_rate: Annotated[
        float | None, typer.Option(help="Rate of the immunizing steps. Default: by size, or the attack's preset's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in a step.")] = 1,
    draw: Annotated[
        int, typer.Option(min=1, max=1000, help="How many pictures the model draws without --images.")
    ] = 20,
    seed: Annotated[int, typer.Option(min=0, max=1_000_000, help="Same seed, same weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    attention: Annotated[
        Literal["auto", "xformers", "sdpa"], typer.Option(help="Attention kernel; auto takes xformers on a GPU.")
    ] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="Precision of the losses; weights stay in fp32.")
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="Configuration folder in diffusers' layout, for widths that imma does not know.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing: say what would change, where, and what it would take.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Immunize a checkpoint against fine-tuning on a concept, and write it in the layout it came in."""
    refusals = Refusals("The checkpoint cannot be hardened like this.")
    target = output or _beside(checkpoint)
    attacks, concepts, opened = _inputs(refusals, checkpoint, config, attack, concept, images)
    if outer_learning_rate is not None and not 0 < outer_learning_rate < float("inf"):
        refusals.add(f"--outer-learning-rate must be a positive number, not {outer_learning_rate:g}.")
    if any(not prompt.strip() for prompt in keep or ()):
        refusals.add("A --keep is empty; the empty prompt is held on to anyway.")
    if method != "episodes" and (keep or strength != "medium"):
        refusals.add(f"--keep and --strength belong to --method episodes; {method} holds on to nothing.")
    if opened is not None:
        refusals.check(opened.check_output, target, force=force or dry_run)

    from imma_cli.families.runtime import choose_runtime

    runtime = refusals.check(choose_runtime, device, attention, precision)
    refusals.raise_all()
    assert opened is not None
    assert runtime is not None
    assert attacks is not None

    from imma_cli.concepts.drawing import draw_concept

    for notice in opened.notices:
        if not json:
            err.print(f"[yellow]Note:[/] {escape(notice)}")
    with waiting("Reading the checkpoint", quiet=json):
        model = runtime.apply(opened.load(), gradient_checkpointing=gradient_checkpointing)
    settings = hardening.settings_for(method, protect, strength, steps, outer_learning_rate, batch_size, seed)
    drawing_seconds = 0.0
    if not images:
        concepts = []
        count = 2 if dry_run else draw
        began = monotonic()
        for name in concept:
            with course(f"Drawing {name}", count, quiet=json) as advance:
                concepts.append(draw_concept(model, name, role="defend", seed=seed, count=count, on_picture=advance))
        drawing_seconds = (monotonic() - began) / count * draw
    if dry_run:
        from imma_cli.cli.planning import say_plan

        say_plan(model, attacks, concepts, settings, runtime, target, drawing_seconds, json=json)
        return

    result = hardening.carry_out(model, attacks, concepts, settings, runtime, keep or (), quiet=json)
    with waiting("Writing", quiet=json):
        provenance = hardening.provenance(opened, attacks, concepts, settings, runtime, model, keep or ())
        weights = {f"unet.{name}": weight.cpu() for name, weight in result.weights.items()}
        written = opened.write(target, weights, provenance, force=force)
    change = hardening.relative_change(model, result)
    if json:
        print_json(hardening.report(written, change, result, provenance))
    else:
        hardening.say_done(written, change, result, checkpoint, attacks, concepts)


def _beside(checkpoint: Path) -> Path:
    # not resolve(): where a link leads is somebody's cache; a relative path stays one
    if checkpoint.is_dir():
        folder = checkpoint.absolute()
        return folder.with_name(f"{folder.name}-immunized")
    return checkpoint.with_name(f"{checkpoint.stem}-immunized.safetensors")


def _inputs(
    refusals: Refusals,
    checkpoint: Path,
    config: Path | None,
    attack: list[str],
    concept: list[str],
    images: list[Path] | None,
) -> tuple[list[Attack] | None, list[Concept], Checkpoint | None]:
    """Everything the user named, checked without loading a weight; what is wrong is left in *refusals*."""
    from imma_cli.attacks.manager import discover
    from imma_cli.attacks.settings import parse_attacks
    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.concepts.folders import read_concept

    attacks = refusals.check(parse_attacks, attack, discover())
    if any(not name.strip() for name in concept):
        refusals.add("A --concept is empty.")
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
    if opened is not None:
        for each in attacks or ():
            refusals.check(each.require_family, opened.family)
    return attacks, concepts, opened
