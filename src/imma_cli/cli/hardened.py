"""What `imma harden` records and says when it is done: the provenance, the changes, the course, the result."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from imma_cli.cli.console import out
from imma_cli.cli.erasing import say as say_erased

if TYPE_CHECKING:
    from torch import Tensor

    from imma_cli.attacks.attack import Attack
    from imma_cli.checkpoints import Checkpoint, WriteReport
    from imma_cli.cli.erasing import Erased
    from imma_cli.cli.hardening import HardeningSettings, Task
    from imma_cli.families.model import Model
    from imma_cli.immunizers.erasing import Settings as ErasingSettings
    from imma_cli.immunizers.imma import Immunized

WHEN, BAR = 10, 12
"""Widths of the course of short attacks."""


def before(opened: Checkpoint) -> tuple[str, ...]:
    """What its user should know of a checkpoint that imma wrote: the new record takes the place of the old one."""
    made = opened.provenance
    if made is None:
        return ()
    concepts = ", ".join(concept["name"] for concept in made.get("concepts", []))
    return (
        f"imma wrote this checkpoint{f' (for {concepts})' if concepts else ''}. This run changes it further, and the record in its "
        "output describes this run only. To measure resistance, compare with the original that the first run was given.",
    )


def provenance(
    opened: Checkpoint,
    task: Task,
    seed: int,
    erasing_settings: ErasingSettings | None,
    simulated_steps: int | None,
) -> dict[str, Any]:
    """What was done, to whom and with what. Without times and paths: the same input gives the same file."""
    from dataclasses import asdict

    from imma_cli import __version__
    from imma_cli.attacks.settings import record
    from imma_cli.concepts.concept import hashed
    from imma_cli.immunizers.settings import EpisodesSettings

    settings = task.settings
    own = {"method": "none", "seed": seed} if settings is None else asdict(settings)
    held = {"keep": list(task.keep)} if task.keep or isinstance(settings, EpisodesSettings) else {}
    return {
        "tool": "imma",
        "version": __version__,
        "input_sha256": opened.sha256,
        "concepts": [
            {"name": c.name, "images": c.origin, "sha256": list(c.hashes), "captions_sha256": hashed(c.captions)}
            for c in task.concepts
        ],
        "attacks": [record(a) | _simulated(a, task.model, settings) for a in task.attacks],
        "settings": {"method": "episodes"} | held | own,
        **({"simulated_steps": simulated_steps} if simulated_steps else {}),
        "runtime": asdict(task.runtime),
        **({"erase": asdict(erasing_settings)} if erasing_settings else {}),
    }


def _simulated(attack: Attack, model: Model, settings: HardeningSettings | None) -> dict[str, Any]:
    """What hardening took from the attack besides its settings."""
    from dataclasses import asdict

    from imma_cli.immunizers.settings import EpisodesSettings

    rates = asdict(attack.rates(model))
    if not isinstance(settings, EpisodesSettings):
        return {"rates": rates}
    # rate and steps of the outer loop are the settings'; what the user did not give was drawn anew for every attacker
    taken = {name: rates[name] for name in ("learning_rate", "max_grad_norm")}
    return {"rates": taken, "given": sorted(attack.given)}


@dataclass(frozen=True)
class Changes:
    """What erasing and hardening changed together, by state-dict name of the UNet."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]

    @classmethod
    def of(cls, model: Model, erased: Erased | None, result: Immunized) -> Changes:
        """*model* holds the weights that hardening began with: the erased ones where there was erasing."""
        began = dict(model.unet.named_parameters())
        before = {name: began[name].detach() for name in result.weights}
        if erased is None:
            return cls(before, result.weights)
        # what was erased and not hardened is written too; what was both counts from the original
        return cls(before | erased.before, erased.after | result.weights)

    def by_part(self) -> dict[str, Tensor]:
        """As `Checkpoint.write` takes them."""
        return {f"unet.{name}": weight.cpu() for name, weight in self.after.items()}

    @property
    def relative(self) -> float:
        """Length of the change over the changed weights' own length."""
        moved = sum(float((new - self.before[name]).square().sum()) for name, new in self.after.items())
        whole = sum(float(old.square().sum()) for old in self.before.values())
        return float((moved / whole) ** 0.5)


def _course_of(result: Immunized) -> dict[str, float | None]:
    """Mean losses of both players over the first and the last tenth."""
    tenth = max(1, len(result.steps) // 10)  # no steps, no means

    def mean(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    return {
        "attacker_first": mean([s.inner_loss for s in result.steps[:tenth]]),
        "attacker_last": mean([s.inner_loss for s in result.steps[-tenth:]]),
        "immunizer_first": mean([s.outer_loss for s in result.steps[:tenth]]),
        "immunizer_last": mean([s.outer_loss for s in result.steps[-tenth:]]),
    }


def report(
    written: WriteReport, changes: Changes, result: Immunized, provenance: dict[str, Any], erased: Erased | None
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "output": str(written.path),
        "changed_tensors": written.tensors,
        "changed_parameters": written.parameters,
        "relative_change": changes.relative,
        "dropped": list(written.dropped),
        "unreached": list(result.unreached),
        "losses": _course_of(result),
        "checks": [asdict(check) for check in result.checks],
        "taken": None if result.taken is None else result.taken.cycle,
        "steps": [asdict(step) for step in result.steps],
        **({"erasing_distances": erased.distances} if erased else {}),
        "provenance": provenance,
    }


def say_checks(result: Immunized) -> None:
    """The course of the short attacks, which of these states was taken, and whether it is within the limit."""
    from imma_cli.immunizers.checking import STEPS

    if not result.checks:
        return
    out.print(f"  loss after {STEPS} steps of attack, and how far other prompts had moved:")
    block = "█" if out.encoding.lower().startswith("utf") else "#"
    most = max(result.checks[0].undefended, *(check.loss for check in result.checks))

    def say(when: str, loss: float, besides: str = "") -> None:
        bar = block * max(1, round(BAR * loss / most))
        out.print(f"    {when:<{WHEN}} {loss:.4f} {bar:<{BAR}} {besides}".rstrip())

    say("original", result.checks[0].undefended)
    for check in result.checks:
        marks = [] if check.within else ["[yellow]too far[/]"]
        marks += ["[green]taken[/]"] if check == result.taken else []
        say(f"cycle {check.cycle}", check.loss, ", ".join([f"{check.drift:.4f}", *marks]))
    if result.taken and not result.taken.within:
        out.print(
            "  [yellow]moved further than --strength allows:[/] look at what it draws for other prompts; a lower "
            "--outer-learning-rate or more --steps keep more"
        )


def say_done(
    written: WriteReport,
    changes: Changes,
    result: Immunized,
    checkpoint: Path,
    task: Task,
    erased: Erased | None,
) -> None:
    from imma_cli.attacks.settings import spec

    attacks, names = task.attacks, task.names
    out.print(f"[bold green]Wrote[/] {escape(str(written.path))}")
    out.print(
        f"  changed: {written.tensors} tensors, {written.parameters:,} values, "
        f"by {changes.relative:.1%} of their length; every other weight is identical, byte for byte"
    )
    if erased:
        say_erased(erased)
    if result.unreached:
        out.print(
            f"  [yellow]not hardened:[/] {len(result.unreached)} of {len(result.weights)} protected tensors, "
            "which no attack's loss depends on: the attack computes with copies of them"
        )
    # of attackers who begin anew they say nothing: short attacks do
    losses = {} if result.checks else _course_of(result)
    if losses.get("attacker_first") is not None:
        out.print(
            f"  simulated attacker's loss: {losses['attacker_first']:.4f} at first, {losses['attacker_last']:.4f} at last"
        )
    if losses.get("immunizer_first") is not None:
        out.print(
            f"  loss that the immunizer raises, of the attacked model: {losses['immunizer_first']:.4f} at first, {losses['immunizer_last']:.4f} at last"
        )
    say_checks(result)
    if written.dropped:
        out.print(f"  left out: {len(written.dropped)} copies of the unhardened weights")
    if result.checks:
        out.print("  Longer attacks get more.")
    command = ["imma", "verify", str(written.path), "--against", str(checkpoint), "--concept", names[0]]
    command += [
        "--images",
        "FOLDER",
        *(part for each in [spec(a) for a in attacks] or ["NAME"] for part in ("--attack", each)),
        "--report",
        "report",
    ]
    if attacks:
        out.print(
            "\nA simulated attacker is not a real one. To see what a real one still gets, with pictures not used here:"
        )
    else:
        out.print("\nErased is not gone: fine-tuning can bring it back. To see how fast, with pictures not used here:")
    out.print("  " + shlex.join(command), markup=False)
    if erased and attacks:
        out.print("  What hardening adds to erasing: --against the erased model alone, as --method none writes it")
    if len(names) > 1:
        out.print(f"  and the same for the other {len(names) - 1} concepts")
    out.print(
        f"Who has the {'unhardened' if attacks else 'original'} checkpoint can simply fine-tune that one: do not publish both."
    )
