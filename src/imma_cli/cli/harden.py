"""``imma harden``: change a checkpoint's weights so that fine-tuning it on a concept fails."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from imma_cli.cli import erasing, fitting, foretelling, hardened, hardening, profiling, resuming
from imma_cli.cli.console import Refusals, err, print_json
from imma_cli.cli.inputs import beside, check_launched, check_methods, check_unused, inputs
from imma_cli.cli.progress import waiting


def harden(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file or a diffusers folder.")],
    concept: Annotated[list[str], typer.Option(help="What to protect. Repeatable.")],
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="Attack to immunize against: NAME[:key=value,...]. Repeatable. Default with --method episodes: "
            "several strong ones; imma attacks lists all."
        ),
    ] = None,
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
        Literal["episodes", "imma", "maximize", "none"],
        typer.Option(
            help="episodes: attackers drawn anew, other prompts held on to. imma: as published. maximize: its baseline. "
            "none: erase only."
        ),
    ] = "episodes",
    erase: Annotated[
        Literal["esd", "uce"] | None,
        typer.Option(
            help="Make the model forget the concepts first. esd: fine-tune its cross-attention away from them. "
            "uce: edit its keys and values at once."
        ),
    ] = None,
    preset: Annotated[
        Literal["quick", "standard"],
        typer.Option(
            help="With episodes: quick makes a quarter of the steps and does not check itself, for a first look."
        ),
    ] = "standard",
    strength: Annotated[
        Literal["low", "medium", "high"],
        typer.Option(help="With episodes: how far predictions for other prompts may move for it."),
    ] = "medium",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="With episodes or --erase uce: a prompt that must stay as it is, besides everyday ones. Repeatable."
        ),
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
        float | None, typer.Option(help="Rate of the outer steps. Default: by size, or the attack's preset's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures in a batch.")] = 1,
    accumulate: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Batches whose gradients make one step. Default: 1; under accelerate launch one for each process, which share them.",
        ),
    ] = None,
    draw: Annotated[
        int, typer.Option(min=1, max=1000, help="How many pictures the model draws without --images.")
    ] = 20,
    seed: Annotated[int, typer.Option(min=0, max=1_000_000, help="Same seed, same weights.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    attention: Annotated[
        Literal["auto", "xformers", "sdpa"], typer.Option(help="Attention kernel; auto takes xformers on a GPU.")
    ] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Precision of the losses; weights stay in fp32.")
    ] = "auto",
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="Hold weights that nobody trains in 16 bits. Without attacks that train all weights.",
        ),
    ] = False,
    eight_bit: Annotated[
        bool, typer.Option("--8bit", help="Hold AdamW's moments in 8 bits (pip install 'imma-cli\\[8bit]').")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for more time: compute every block twice.")
    ] = False,
    fit: Annotated[
        bool, typer.Option("--fit", help="Save as much memory as it takes to fit what is free, and no more.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="Configuration folder in diffusers' layout, for widths that imma does not know.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Write a trace of a few cycles by torch's profiler to this file.")
    ] = None,
    save_every: Annotated[
        float,
        typer.Option(min=0, help="Minutes after which the state of the run is saved beside the output; 0: never."),
    ] = 10,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the state that the same command saved; if there is none, start."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Write nothing: say what would change, where, and what it would take; with --device cuda also where there is none.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Immunize a checkpoint against fine-tuning on a concept, and write it in the layout it came in."""
    from imma_cli.families.processes import ALONE, joined, launched

    rank, several = launched()
    if rank and (dry_run or method == "none"):  # one process does it
        return
    quiet = json or rank > 0
    refusals = Refusals("The checkpoint cannot be hardened like this.")
    target = output or beside(checkpoint)
    check_launched(refusals, several, device, accumulate)
    attacks, concepts, opened = inputs(
        refusals, checkpoint, config, attack or [], concept, images, default=method == "episodes"
    )
    if outer_learning_rate is not None and not 0 < outer_learning_rate < float("inf"):
        refusals.add(f"--outer-learning-rate must be a positive number, not {outer_learning_rate:g}.")
    check_methods(refusals, method, erase, attack or [], strength, keep or [], concept, preset, steps)
    if method == "none":
        check_unused(
            refusals,
            {
                "--images": bool(images),
                "--draw": draw != 20,
                "--steps": steps is not None,
                "--outer-learning-rate": outer_learning_rate is not None,
                "--batch-size": batch_size != 1,
                "--accumulate": accumulate is not None,
                "--8bit": eight_bit,
                "--protect": protect != "attention",
                "--profile": profile is not None,
            },
        )
    if opened is not None:
        refusals.check(opened.check_output, target, force=force or dry_run)
    if profile is not None:
        refusals.check(profiling.check, profile)
        if dry_run:
            refusals.add("A --dry-run writes nothing, and so no --profile: leave one of the two out.")
    saved = refusals.check(resuming.existing, target) if resume else None

    from dataclasses import replace

    from imma_cli.families.model import SMALL_MODEL
    from imma_cli.families.runtime import choose_runtime, elsewhere

    if low_memory:
        hardening.check_low_memory(refusals, attacks if attack else (), protect)
    absent = elsewhere(device, attention, precision) if dry_run and method != "none" else None
    runtime = absent or refusals.check(choose_runtime, device, attention, precision)
    if absent and fit:
        refusals.add("--fit has to know what is free: run it where the GPU is.")
    if eight_bit and runtime and not absent:
        refusals.check(hardening.check_eight_bit, runtime.device)
    refusals.raise_all()
    assert opened is not None
    assert runtime is not None
    assert attacks is not None

    from imma_cli.immunizers.erasing import settings_for as erasing_settings_for

    processes = joined(runtime.device) if not (dry_run or method == "none") else ALONE
    for notice in opened.notices + hardened.before(opened):
        if not quiet:
            err.print(f"[yellow]Note:[/] {escape(notice)}")
    settings = hardening.settings_for(
        method, protect, strength, steps, outer_learning_rate, batch_size, seed, accumulate or several, eight_bit
    )
    saving, expected = fitting.Saving(low_memory, gradient_checkpointing), None
    large = opened.parts["unet"].parameters >= SMALL_MODEL
    if not attack and (low_memory or large):
        attacks = hardening.without_copies(attacks, quiet=quiet)
    if settings and (fit or large or dry_run):
        saving, settings, expected = fitting.planned(
            opened,
            attacks,
            settings,
            runtime,
            saving,
            processes,
            fit=fit,
            named=bool(attack),
            concepts=len(concept),
            begun=saved.command if saved else None,
            quiet=quiet or absent is not None,
        )
        if saving.low_memory and not low_memory:
            attacks = hardening.without_copies(attacks, quiet=quiet)
    runtime = replace(runtime, halved=saving.low_memory)
    if not (quiet or dry_run):  # a dry run says it with the rest
        err.print(f"On {runtime}", markup=False)
    if absent:
        from imma_cli.cli.planning import say_elsewhere

        assert expected is not None
        assert settings is not None
        hardening.require_enough(settings, len(attacks) * len(concept), small=not large)
        say_elsewhere(runtime, saving, settings, attacks, concept, erase, target, expected, json=json)
        return
    with waiting("Reading the checkpoint", quiet=quiet):
        model = runtime.apply(opened.load(halved=runtime.halved), recomputed=saving.recomputed)
    if preset == "quick" and settings:
        settings = hardening.quickened(settings, model)
    settings = hardening.checked(settings, model, len(attacks) * len(concept))
    erasing_settings = erasing_settings_for(model, erase, seed) if erase else None
    draws = draw if settings and not images else 0
    task = hardening.Task(
        model, attacks, concepts or erasing.named_only(concept), settings, runtime, keep=keep or (), shared_by=several
    )
    if settings and large and not (quiet or dry_run or saved):
        foretelling.say_duration(task, saving.recomputed, draws=draws, besides="erasing" if erase else "")
    if dry_run:
        from imma_cli.cli.planning import say_plan

        drawing_seconds = 0.0
        if draws:
            few, seconds = hardening.draw_all(task, 2, seed, quiet=quiet)
            task, drawing_seconds = replace(task, concepts=few), seconds / 2 * draws
        say_plan(task, erasing_settings, target, drawing_seconds, expected, json=json)
        return

    def record(simulated_steps: int | None = None) -> dict[str, Any]:
        return hardened.provenance(opened, task, seed, erasing_settings, simulated_steps)

    with waiting("Hashing the checkpoint", quiet=quiet):
        asked = resuming.command_of(record(), opened.config, drawn=draws)
    resuming.require_same(saved, asked, processes)
    with resuming.keeping(target, asked, save_every, saved, processes, resume=resume, quiet=quiet) as keeper:
        if draws:
            task = replace(task, concepts=hardening.drawn(task, draws, seed, keeper, processes, quiet=quiet))
        erased = None
        if erasing_settings:
            erased = erasing.carry_out(task, erasing_settings, keeper, quiet=quiet)
        with profiling.recording(profile if processes.first else None, quiet=quiet) as after_cycle:
            result = hardening.carry_out(task, keeper, after_cycle, processes, quiet=quiet)
    if not processes.first:
        return
    changes = hardened.Changes.of(model, erased, result)
    with waiting("Writing", quiet=quiet):
        provenance = record(result.simulated_steps)
        written = opened.write(target, changes.by_part(), provenance, force=force)
        keeper.remove()
    if json:
        print_json(hardened.report(written, changes, result, provenance, erased))
    else:
        hardened.say_done(written, changes, result, checkpoint, task, erased)
