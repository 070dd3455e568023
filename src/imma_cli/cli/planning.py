"""What `imma harden --dry-run` says: a few real steps on a copy, and what all of them would take. Elsewhere, an estimate."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from imma_cli.attacks.settings import spec
from imma_cli.cli.console import out, print_json
from imma_cli.cli.hardening import kept_prompts
from imma_cli.cli.progress import waiting
from imma_cli.immunizers.checking import STEPS as CHECK_STEPS
from imma_cli.immunizers.checking import QuickCheck
from imma_cli.immunizers.duration import cycles_of, share_of
from imma_cli.immunizers.episodes import immunize_in_episodes
from imma_cli.immunizers.erasing import erase, steps_of
from imma_cli.immunizers.esd import EsdSettings
from imma_cli.immunizers.imma import ImmunizerSettings, Step, immunize
from imma_cli.immunizers.memory import peak_memory
from imma_cli.immunizers.naming import prompts_with
from imma_cli.immunizers.retention import Retention, retain
from imma_cli.immunizers.scope import protected_weights
from imma_cli.immunizers.settings import EpisodesSettings, defaults_for
from imma_cli.immunizers.uce import UceSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from imma_cli.attacks.attack import Attack
    from imma_cli.cli.fitting import Saving
    from imma_cli.cli.hardening import HardeningSettings, Task
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime
    from imma_cli.immunizers.estimate import Estimate

TRIED = 4
"""Cycles that are timed for each attack on each concept."""
TRIED_PICTURES = 4


def say_plan(
    task: Task,
    erasing: EsdSettings | UceSettings | None,
    target: Path,
    drawing_seconds: float,
    expected: Estimate | None,
    *,
    json: bool,
) -> None:
    """Run a few steps of everything for real, on a copy, and say what all of them would take.

    Of a step's batches, and of drawing, what one of the processes would do that share it.
    """
    model, attacks, settings, runtime, names = task.model, task.attacks, task.settings, task.runtime, task.names
    with waiting("Trying a few steps", quiet=json):
        changed, seconds = _erasing(model, names, erasing, runtime) if erasing else ({}, 0.0)
        cycles = 0
        if settings:
            tried = share_of(settings, task.shared_by)
            if isinstance(tried, EpisodesSettings):
                per_cycle, besides = _timed_episodes(task, tried)
            else:
                per_cycle, besides = _timed(task, tried), 0.0
            cycles = cycles_of(model, attacks, len(task.concepts), settings)
            seconds += per_cycle * cycles + besides + drawing_seconds / task.shared_by
            changed |= protected_weights(model.unet, settings.protect)
    rates = [attack.rates(model) for attack in attacks]
    plan = {
        "would_write": str(target),
        "would_change_tensors": len(changed),
        "would_change_parameters": sum(p.numel() for p in changed.values()),
        "attacks": [{"name": a.name, "rates": asdict(r)} for a, r in zip(attacks, rates, strict=True)],
        "settings": asdict(settings) if settings else None,
        "concepts": names,
        **({"erase": asdict(erasing)} if erasing else {}),
        "runtime": asdict(runtime),
        "cycles": cycles,
        "estimated_seconds": seconds,
        "measured_peak_bytes": peak_memory(runtime),
        **({"estimated_peak_bytes": expected.peak} if expected else {}),
    }
    if json:
        print_json(plan)
        return
    out.print(f"Would write {target}{_exists(target)}", markup=False)
    out.print(
        f"  change: {plan['would_change_tensors']} tensors, {plan['would_change_parameters']:,} values{f' ({settings.protect})' if settings else ''}"
    )
    if erasing:
        out.print(f"  erase first, by {erasing.method}: {steps_of(model, names, erasing)} steps")
    for attack, each in zip(attacks, rates, strict=True):
        assert settings is not None  # without hardening there are no attacks
        outer = settings.outer_learning_rate
        if outer is None:
            in_episodes = isinstance(settings, EpisodesSettings)
            outer = defaults_for(model).outer_learning_rate if in_episodes else each.outer_learning_rate
        out.print(f"  against {spec(attack)}: learning rate {each.learning_rate:g}, outer {outer:g}", markup=False)
    if settings:
        inner = settings.inner_steps if isinstance(settings, EpisodesSettings) else 1
        out.print(f"  {(1 + inner) * cycles} steps in all, {inner * cycles} of them the attackers'")
    out.print(f"  on {runtime}", markup=False)
    out.print(
        f"  about {seconds:.0f} s (timed over a few real steps); peak memory {peak_memory(runtime) / 1e9:.2f} GB, measured"
    )


def say_elsewhere(
    runtime: Runtime,
    saving: Saving,
    settings: HardeningSettings,
    attacks: Sequence[Attack],
    names: Sequence[str],
    erasing: str | None,
    target: Path,
    expected: Estimate,
    *,
    json: bool,
) -> None:
    """What a run on a GPU that this machine lacks would need. How long it takes, nothing here can tell."""
    if json:
        plan = {
            "would_write": str(target),
            "attacks": [{"name": attack.name, "spec": spec(attack)} for attack in attacks],
            "settings": asdict(settings),
            "concepts": list(names),
            **({"erase": {"method": erasing}} if erasing else {}),
            "runtime": asdict(runtime),
            "estimated_peak_bytes": expected.peak,
        }
        print_json(plan)
        return
    out.print(f"Would write {target}{_exists(target)}", markup=False)
    if erasing:
        out.print(f"  erase first, by {erasing}: what that needs is not estimated")
    out.print(f"  against {', '.join(spec(attack) for attack in attacks)}", markup=False)
    options = f"{saving.options}{' --8bit' * settings.eight_bit}".strip()
    out.print(f"  on {runtime}{f', {options}' if options else ''}", markup=False)
    out.print(
        f"  peak memory about {expected.peak / 1e9:.1f} GB, estimated on this machine, which has no CUDA device: "
        "not counting what CUDA takes for itself, some hundred MB. How long it takes, only the GPU can tell."
    )


def _exists(target: Path) -> str:
    return " (it exists: give --force to replace it)" if target.exists() else ""


def _erasing(
    model: Model, names: list[str], settings: EsdSettings | UceSettings, runtime: Runtime
) -> tuple[dict[str, Tensor], float]:
    """The weights that erasing would change, and the seconds it would take."""
    began = monotonic()
    if isinstance(settings, UceSettings):
        return erase(model, names, settings, runtime), monotonic() - began
    marks: dict[str, list[float]] = {}

    def mark(done: int, doing: str, distance: float | None) -> None:
        marks.setdefault(doing, []).append(monotonic())

    tried = replace(settings, steps=TRIED, nouns=1)
    changed = erase(model, names[:1], tried, runtime, on_step=mark)
    drawing, steps = marks.values()
    drawn = len(prompts_with(names, settings.nouns, 0)) / len(prompts_with(names[:1], tried.nouns, 0))
    per_step = (steps[-1] - steps[0]) / (TRIED - 1)
    return changed, (drawing[-1] - began) * drawn + per_step * settings.steps


def _timed(task: Task, settings: ImmunizerSettings) -> float:
    """Seconds of a cycle with *settings*."""
    marks: list[float] = []

    def mark(step: Step) -> None:
        marks.append(monotonic())

    turns = len(task.attacks) * len(task.concepts)
    immunize(task.model, task.attacks, task.concepts, replace(settings, steps=2 * TRIED), task.runtime, mark)
    # the turns take turns, so after the first round, which also warms up, every one has been timed equally often
    return (marks[-1] - marks[turns - 1]) / (len(marks) - turns)


def _timed_episodes(task: Task, settings: EpisodesSettings) -> tuple[float, float]:
    """Seconds of a cycle with *settings*, and of what is done besides: drawings to keep, and the short attacks."""
    marks: list[float] = []

    def mark(step: Step) -> None:
        marks.append(monotonic())

    model, attacks, concepts, runtime = task.model, task.attacks, task.concepts, task.runtime
    prompts = kept_prompts(model, concepts, settings, task.keep)
    tried = prompts[:TRIED_PICTURES]
    began = monotonic()
    noisings = defaults_for(model).noisings
    retention = retain(model, tried, noisings=noisings, seed=settings.seed, runtime=runtime)
    besides = (monotonic() - began) / len(tried) * len(prompts) / task.shared_by
    # every attack's turn is short, so that all of them are among the few
    turns = max(3, len(attacks) * len(concepts))
    length = TRIED * settings.inner_steps
    steps = TRIED * turns * (1 + settings.inner_steps)
    short = replace(settings, steps=steps, shortest=length, longest=length, checks=0)
    immunize_in_episodes(model, attacks, concepts, short, runtime, retention, on_step=mark)
    if checks := settings.checks_in(settings.cycles(model)):
        few, more = (_checked(task, retention, steps) for steps in (1, 1 + TRIED))
        besides += (checks + 1) * (few + (more - few) / TRIED * CHECK_STEPS)
    # without the first of every turn: attaching an attacker is little beside the hundreds of steps of a real one
    cycles = [marks[i] - marks[i - 1] for i in range(1, len(marks)) if i % TRIED]
    return sum(cycles) / len(cycles), besides


def _checked(task: Task, retention: Retention, steps: int) -> float:
    """Seconds of a round of short attacks, were they *steps* steps long."""
    began = monotonic()
    QuickCheck(task.model, task.attacks, task.concepts, retention, task.runtime, seed=0, steps=steps)
    return monotonic() - began
