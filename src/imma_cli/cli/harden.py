"""``imma harden``: change a checkpoint's weights so that fine-tuning it on a concept fails."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from imma_cli.cli.console import Refusals, err, out, print_json
from imma_cli.cli.progress import course, waiting

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.checkpoints import Checkpoint, WriteReport
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime
    from imma_cli.immunizers.imma import Immunized, ImmunizerSettings


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
        Literal["imma", "maximize"], typer.Option(help="imma, or the paper's baseline: maximise the loss directly.")
    ] = "imma",
    protect: Annotated[
        Literal["attention", "cross-attention", "kv"], typer.Option(help="Which projections may change.")
    ] = "attention",
    steps: Annotated[
        int | None,
        typer.Option(min=2, help="Inner and outer steps for each attack on each concept. Default: the preset's."),
    ] = None,
    outer_learning_rate: Annotated[
        float | None, typer.Option(help="Rate of the immunizing steps. Default: the attack's preset's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in a step.")] = 1,
    draw: Annotated[int, typer.Option(min=1, help="How many pictures the model draws without --images.")] = 20,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Same seed, same weights.")] = 0,
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
    """Immunize a checkpoint against fine-tuning on a concept (IMMA), and write it in the layout it came in."""
    refusals = Refusals("The checkpoint cannot be hardened like this.")
    target = output or _beside(checkpoint)
    attacks, concepts, opened = _inputs(refusals, checkpoint, config, attack, concept, images)
    if outer_learning_rate is not None and not 0 < outer_learning_rate < float("inf"):
        refusals.add(f"--outer-learning-rate must be a positive number, not {outer_learning_rate:g}.")
    if opened is not None:
        refusals.check(opened.check_output, target, force=force or dry_run)

    from imma_cli.families.runtime import choose_runtime

    runtime = refusals.check(choose_runtime, device, attention, precision)
    refusals.raise_all()
    assert opened is not None
    assert runtime is not None
    assert attacks is not None

    from imma_cli.concepts.drawing import draw_concept
    from imma_cli.immunizers.imma import ImmunizerSettings, immunize

    for notice in opened.notices:
        if not json:
            err.print(f"[yellow]Note:[/] {escape(notice)}")
    with waiting("Reading the checkpoint", quiet=json):
        model = runtime.apply(opened.load(), gradient_checkpointing=gradient_checkpointing)
    settings = ImmunizerSettings(method, protect, steps, outer_learning_rate, batch_size, seed)
    if not images:
        concepts = []
        count = 2 if dry_run else draw
        for name in concept:
            with course(f"Drawing {name}", count, quiet=json) as advance:
                concepts.append(draw_concept(model, name, role="defend", seed=seed, count=count, on_picture=advance))
    if dry_run:
        _say_plan(model, attacks, concepts, settings, runtime, target, json=json)
        return

    cycles = sum(max(1, (steps or a.rates(model).steps) // 2) for a in attacks) * len(concepts)
    with course("Hardening", cycles, quiet=json) as advance:
        result = immunize(
            model,
            attacks,
            concepts,
            settings,
            runtime,
            lambda step: advance(step.cycle, attacker_loss=step.inner_loss, immunizer_loss=step.outer_loss),
        )
    with waiting("Writing", quiet=json):
        provenance = _provenance(opened, attacks, concepts, settings, runtime, model)
        weights = {f"unet.{name}": weight.cpu() for name, weight in result.weights.items()}
        written = opened.write(target, weights, provenance, force=force)
    change = _relative_change(model, result)
    if json:
        print_json(_report(written, change, result, provenance))
    else:
        _say_done(written, change, result, checkpoint, attacks, concepts)


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
    return attacks, concepts, refusals.check(open_checkpoint, checkpoint, config)


def _provenance(
    opened: Checkpoint,
    attacks: list[Attack],
    concepts: list[Concept],
    settings: ImmunizerSettings,
    runtime: Runtime,
    model: Model,
) -> dict[str, Any]:
    """What was done, to whom and with what. Without times and paths: the same input gives the same file."""
    from dataclasses import asdict

    from imma_cli import __version__
    from imma_cli.attacks.settings import record

    return {
        "tool": "imma",
        "version": __version__,
        "input_sha256": opened.sha256,
        "concepts": [{"name": c.name, "images": c.origin, "sha256": list(c.hashes)} for c in concepts],
        "attacks": [record(a) | {"rates": asdict(a.rates(model))} for a in attacks],
        "settings": asdict(settings),
        "runtime": asdict(runtime),
    }


def _relative_change(model: Model, result: Immunized) -> float:
    """Length of the change of the protected weights over their own length."""
    before = dict(model.unet.named_parameters())
    moved = sum(float((new - before[name]).square().sum()) for name, new in result.weights.items())
    whole = sum(float(before[name].square().sum()) for name in result.weights)
    return float((moved / whole) ** 0.5)


def _course_of(result: Immunized) -> dict[str, float | None]:
    """Mean losses of both players over the first and the last tenth."""
    tenth = max(1, len(result.steps) // 10)

    def mean(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    return {
        "attacker_first": mean([s.inner_loss for s in result.steps[:tenth]]),
        "attacker_last": mean([s.inner_loss for s in result.steps[-tenth:]]),
        "immunizer_first": mean([s.outer_loss for s in result.steps[:tenth]]),
        "immunizer_last": mean([s.outer_loss for s in result.steps[-tenth:]]),
    }


def _report(written: WriteReport, change: float, result: Immunized, provenance: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "output": str(written.path),
        "changed_tensors": written.tensors,
        "changed_parameters": written.parameters,
        "relative_change": change,
        "dropped": list(written.dropped),
        "losses": _course_of(result),
        "steps": [asdict(step) for step in result.steps],
        "provenance": provenance,
    }


def _say_done(
    written: WriteReport,
    change: float,
    result: Immunized,
    checkpoint: Path,
    attacks: list[Attack],
    concepts: list[Concept],
) -> None:
    from imma_cli.attacks.settings import spec

    losses = _course_of(result)
    out.print(f"[bold green]Wrote[/] {escape(str(written.path))}")
    out.print(
        f"  changed: {written.tensors} attention tensors, {written.parameters:,} values, "
        f"by {change:.1%} of their length; every other weight is identical, byte for byte"
    )
    if losses["attacker_first"] is not None:
        out.print(
            f"  simulated attacker's loss: {losses['attacker_first']:.4f} at first, {losses['attacker_last']:.4f} at last"
        )
    out.print(
        f"  loss after the attacker's step: {losses['immunizer_first']:.4f} at first, {losses['immunizer_last']:.4f} at last"
    )
    if written.dropped:
        out.print(f"  left out: {len(written.dropped)} copies of the unhardened weights")
    command = ["imma", "verify", str(written.path), "--against", str(checkpoint), "--concept", concepts[0].name]
    command += ["--images", "FOLDER", *(part for a in attacks for part in ("--attack", spec(a)))]
    out.print(
        "\nA simulated attacker is not a real one. To see what a real one still gets, with pictures not used here:"
    )
    out.print("  " + shlex.join(command), markup=False)
    if len(concepts) > 1:
        out.print(f"  and the same for the other {len(concepts) - 1} concepts")
    out.print("Who has the unhardened checkpoint can simply fine-tune that one: do not publish both.")


def _say_plan(
    model: Model,
    attacks: list[Attack],
    concepts: list[Concept],
    settings: ImmunizerSettings,
    runtime: Runtime,
    target: Path,
    *,
    json: bool,
) -> None:
    """Run a few steps on a copy for real, and say what all of them would take."""
    from dataclasses import asdict, replace
    from time import monotonic

    from imma_cli.immunizers.imma import Step, immunize
    from imma_cli.immunizers.memory import peak_memory
    from imma_cli.immunizers.scope import protected_weights

    protected = protected_weights(model.unet, settings.protect)
    seconds = 0.0
    for attack in attacks:
        marks: list[float] = []

        def mark(step: Step, marks: list[float] = marks) -> None:
            marks.append(monotonic())

        with waiting(f"Trying a few steps of {attack.name}", quiet=json):
            immunize(model, [attack], concepts[:1], replace(settings, steps=8), runtime, mark)
        cycles = max(1, (settings.steps or attack.rates(model).steps) // 2) * len(concepts)
        seconds += (marks[-1] - marks[0]) / (len(marks) - 1) * cycles  # the first cycle also warms up
    plan = {
        "would_write": str(target),
        "would_change_tensors": len(protected),
        "would_change_parameters": sum(p.numel() for p in protected.values()),
        "attacks": [{"name": a.name, "rates": asdict(a.rates(model))} for a in attacks],
        "concepts": [c.name for c in concepts],
        "runtime": asdict(runtime),
        "estimated_seconds": seconds,
        "measured_peak_bytes": peak_memory(runtime),
    }
    if json:
        print_json(plan)
        return
    out.print(f"Would write {target}", markup=False)
    out.print(
        f"  change: {plan['would_change_tensors']} tensors, {plan['would_change_parameters']:,} values ({settings.protect})"
    )
    for attack in attacks:
        rates = attack.rates(model)
        out.print(
            f"  against {attack.name}: {settings.steps or rates.steps} steps, learning rate {rates.learning_rate:g}, "
            f"outer {settings.outer_learning_rate if settings.outer_learning_rate is not None else rates.outer_learning_rate:g}"
        )
    out.print(f"  on {runtime.device}, attention {runtime.attention}, precision {runtime.precision}")
    out.print(
        f"  about {seconds:.0f} s for the steps (timed over a few real ones); peak memory {peak_memory(runtime) / 1e9:.2f} GB"
    )
