"""What `imma harden` records and says: the plan, the provenance, the result."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from imma_cli.cli.console import out, print_json
from imma_cli.cli.progress import waiting

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.checkpoints import Checkpoint, WriteReport
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime
    from imma_cli.immunizers.imma import Immunized, ImmunizerSettings


def provenance(
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
    from imma_cli.concepts.concept import hashed

    return {
        "tool": "imma",
        "version": __version__,
        "input_sha256": opened.sha256,
        "concepts": [
            {"name": c.name, "images": c.origin, "sha256": list(c.hashes), "captions_sha256": hashed(c.captions)}
            for c in concepts
        ],
        "attacks": [record(a) | {"rates": asdict(a.rates(model))} for a in attacks],
        "settings": asdict(settings),
        "runtime": asdict(runtime),
    }


def relative_change(model: Model, result: Immunized) -> float:
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


def report(written: WriteReport, change: float, result: Immunized, provenance: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "output": str(written.path),
        "changed_tensors": written.tensors,
        "changed_parameters": written.parameters,
        "relative_change": change,
        "dropped": list(written.dropped),
        "unreached": list(result.unreached),
        "losses": _course_of(result),
        "steps": [asdict(step) for step in result.steps],
        "provenance": provenance,
    }


def say_done(
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
    if result.unreached:
        out.print(
            f"  [yellow]not hardened:[/] {len(result.unreached)} of {len(result.weights)} protected tensors, "
            "which no attack's loss depends on: the attack computes with copies of them"
        )
    if losses["attacker_first"] is not None:
        out.print(
            f"  simulated attacker's loss: {losses['attacker_first']:.4f} at first, {losses['attacker_last']:.4f} at last"
        )
    out.print(
        f"  loss that the immunizer raises, right after the attacker's step: {losses['immunizer_first']:.4f} at first, {losses['immunizer_last']:.4f} at last"
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


def say_plan(
    model: Model,
    attacks: list[Attack],
    concepts: list[Concept],
    settings: ImmunizerSettings,
    runtime: Runtime,
    target: Path,
    drawing_seconds: float,
    *,
    json: bool,
) -> None:
    """Run a few steps of everything for real, on a copy, and say what all of them would take."""
    from dataclasses import asdict, replace
    from time import monotonic

    from imma_cli.attacks.settings import spec
    from imma_cli.immunizers.imma import Step, immunize
    from imma_cli.immunizers.memory import peak_memory
    from imma_cli.immunizers.scope import protected_weights

    protected = protected_weights(model.unet, settings.protect)
    marks: list[float] = []

    def mark(step: Step) -> None:
        marks.append(monotonic())

    with waiting("Trying a few steps", quiet=json):
        immunize(model, attacks, concepts, replace(settings, steps=8), runtime, mark)
    rates = [attack.rates(model) for attack in attacks]
    steps = [settings.steps or each.steps for each in rates]
    outer = [
        each.outer_learning_rate if settings.outer_learning_rate is None else settings.outer_learning_rate
        for each in rates
    ]
    turns = len(attacks) * len(concepts)
    # the turns take turns, so after the first round, which also warms up, every one has been timed equally often
    per_cycle = (marks[-1] - marks[turns - 1]) / (len(marks) - turns)
    seconds = per_cycle * sum(count // 2 for count in steps) * len(concepts) + drawing_seconds
    plan = {
        "would_write": str(target),
        "would_change_tensors": len(protected),
        "would_change_parameters": sum(p.numel() for p in protected.values()),
        "attacks": [{"name": a.name, "rates": asdict(r)} for a, r in zip(attacks, rates, strict=True)],
        "concepts": [c.name for c in concepts],
        "runtime": asdict(runtime),
        "estimated_seconds": seconds,
        "measured_peak_bytes": peak_memory(runtime),
    }
    if json:
        print_json(plan)
        return
    exists = " (it exists: give --force to replace it)" if target.exists() else ""
    out.print(f"Would write {target}{exists}", markup=False)
    out.print(
        f"  change: {plan['would_change_tensors']} tensors, {plan['would_change_parameters']:,} values ({settings.protect})"
    )
    for attack, each, count, rate in zip(attacks, rates, steps, outer, strict=True):
        out.print(
            f"  against {spec(attack)}: {count} steps, learning rate {each.learning_rate:g}, outer {rate:g}",
            markup=False,
        )
    out.print(f"  on {runtime.device}, attention {runtime.attention}, precision {runtime.precision}")
    out.print(
        f"  about {seconds:.0f} s (timed over a few real steps); peak memory {peak_memory(runtime) / 1e9:.2f} GB, measured"
    )
