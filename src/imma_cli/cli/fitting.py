"""Memory: what a run is going to need, which settings fit, and what to do where it was not enough."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imma_cli.cli.console import err
from imma_cli.cli.progress import waiting
from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.checkpoints import Checkpoint
    from imma_cli.cli.hardening import HardeningSettings
    from imma_cli.families.processes import Processes
    from imma_cli.families.recomputing import Recompute
    from imma_cli.families.runtime import Runtime
    from imma_cli.immunizers.estimate import Estimate

SPARE = 0.95
"""The share of free memory that a run may be planned to take."""


@dataclass(frozen=True)
class Saving:
    """What is done to need less memory."""

    low_memory: bool = False
    gradient_checkpointing: bool = False

    @property
    def options(self) -> str:
        chosen = {"--low-memory": self.low_memory, "--gradient-checkpointing": self.gradient_checkpointing}
        return " ".join(name for name, given in chosen.items() if given)

    @property
    def recomputed(self) -> Recompute | None:
        """What a step computes again; None leaves it to the runtime."""
        return "blocks" if self.gradient_checkpointing else None


LADDER = (Saving(), Saving(low_memory=True), Saving(gradient_checkpointing=True), Saving(True, True))
"""From the fastest to the smallest."""


def free_memory(runtime: Runtime) -> int:
    """Bytes that are free on the device."""
    if runtime.device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(runtime.device)[0])
    import os

    import psutil

    # processes that a launcher started on this machine share what there is
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    free = min(int(psutil.virtual_memory().available), _left_to_container())
    return free // max(1, int(beside)) if beside.isdecimal() else free


def _left_to_container() -> int:
    """Bytes that a Linux control group still leaves to this process; a lot where there is none."""
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == "max" else int(limit) - used


def expected(
    config: Path,
    attacks: Sequence[Attack],
    settings: HardeningSettings,
    runtime: Runtime,
    saving: Saving,
    concepts: int = 1,
) -> Estimate:
    """What hardening against so many *concepts* is going to need, of the device's memory."""
    from imma_cli.families.runtime import MIXED
    from imma_cli.immunizers.estimate import estimate

    return estimate(
        config,
        attacks,
        settings,
        halved=saving.low_memory,
        recomputed=saving.recomputed,
        on_cpu=runtime.device == "cpu",
        mixed=runtime.precision in MIXED,
        concepts=concepts,
    )


def plan(
    config: Path,
    attacks: Sequence[Attack],
    settings: HardeningSettings,
    runtime: Runtime,
    asked: Saving,
    fit: bool,
    named: bool,
    concepts: int = 1,
    begun: Mapping[str, Any] | None = None,
) -> tuple[Saving, HardeningSettings, Estimate]:
    """What is done to save memory, the settings with it, and the estimate.

    With *fit*, the fastest that holds what was *asked* and fits what is free: where nothing else helps, AdamW's moments are
    held in 8 bits too, and a batch of the published method's becomes several smaller ones.

    *named*: the user named the attacks, so none is left out for it. *begun* is the command of a saved state that is to be
    gone on from: what its result depends on is chosen as it was then.

    Raises:
        ImmaError: nothing fits.
    """
    if not fit:
        return asked, settings, expected(config, attacks, settings, runtime, asked, concepts)
    free = free_memory(runtime)
    choices = [(saving, each) for each in _smaller(settings) for saving in LADDER]
    # where none is as it was then, it is another command, and refused as such later
    as_begun = [choice for choice in choices if begun and _as_begun(begun, *choice)]
    for saving, tried_settings in as_begun or choices:
        if asked.low_memory > saving.low_memory or asked.gradient_checkpointing > saving.gradient_checkpointing:
            continue
        tried = [a for a in attacks if not a.in_place] if saving.low_memory else attacks
        if saving.low_memory and ((named and len(tried) < len(attacks)) or settings.protect == "unet"):
            continue
        found = expected(config, tried, tried_settings, runtime, saving, concepts)
        if found.peak <= SPARE * free:
            return saving, tried_settings, found
    raise ImmaError(
        f"No settings fit: {free / 1e9:.1f} GB are free on {runtime.device}, and the smallest need {found.peak / 1e9:.1f} GB.",
        hint="Free memory, simulate fewer attacks (--attack lora alone), or take a larger device.",
    )


def planned(
    opened: Checkpoint,
    attacks: Sequence[Attack],
    settings: HardeningSettings,
    runtime: Runtime,
    asked: Saving,
    processes: Processes,
    *,
    fit: bool,
    named: bool,
    concepts: int,
    begun: Mapping[str, Any] | None = None,
    quiet: bool,
) -> tuple[Saving, HardeningSettings, Estimate]:
    """As `plan`, by the first of *processes* for all of them, and said."""
    with waiting("Estimating memory", quiet=quiet):
        found = None
        if processes.first:
            found = plan(opened.config, attacks, settings, runtime, asked, fit, named, concepts, begun)
        told = processes.told(found)
        assert told is not None
    saving, settings, expected = told
    if not quiet:
        say(expected, saving, settings, runtime, chosen=fit)
    return saving, settings, expected


def _as_begun(begun: Mapping[str, Any], saving: Saving, settings: HardeningSettings) -> bool:
    """Whether a run with these goes on from the state of the command *begun*. What is computed twice makes no difference."""
    # by another version of imma, it may lack some
    then = {**(begun.get("settings") or {}), "halved": begun.get("runtime", {}).get("halved")}
    chosen = {
        "halved": saving.low_memory,
        "eight_bit": settings.eight_bit,
        "batch_size": settings.batch_size,
        "accumulate": settings.accumulate,
    }
    return all(then.get(name) == value for name, value in chosen.items())


def _smaller(settings: HardeningSettings) -> Iterator[HardeningSettings]:
    """*settings*, and what needs less memory with nearly the same steps."""
    from importlib.util import find_spec

    from imma_cli.immunizers.imma import ImmunizerSettings

    different = [settings]
    # in episodes, outer batches have a size of their own, which splitting would multiply
    if isinstance(settings, ImmunizerSettings) and settings.batch_size > 1:
        different.append(replace(settings, batch_size=1, accumulate=settings.accumulate * settings.batch_size))
    for each in different:
        yield each
        if not each.eight_bit and find_spec("bitsandbytes"):
            yield replace(each, eight_bit=True)


def out_of_memory(error: BaseException) -> ImmaError | None:
    """What to say of *error*, where it means that memory ran out."""
    if "torch" not in sys.modules:
        return None
    import torch

    on_gpu = isinstance(error, torch.OutOfMemoryError)
    if not on_gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
        return None
    where = "The GPU's memory" if on_gpu else "Memory"
    return ImmaError(
        f"{where} ran out. Nothing was written, and finished trials are kept.",
        hint="Less of it is needed with --gradient-checkpointing, a smaller --batch-size and fewer attacks; imma harden also has "
        "--low-memory and --8bit, and --fit chooses what fits. What it would need: imma harden --dry-run.",
    )


def say(found: Estimate, saving: Saving, settings: HardeningSettings, runtime: Runtime, *, chosen: bool) -> None:
    options = saving.options + " --8bit" * settings.eight_bit
    if settings.accumulate > 1:
        options += f" --batch-size {settings.batch_size} --accumulate {settings.accumulate}"
    how = f" with {options.strip()}" if options and chosen else ""
    err.print(
        f"About {found.peak / 1e9:.1f} GB{how}, estimated, not counting Python and torch; {free_memory(runtime) / 1e9:.1f} GB are free.",
        markup=False,
    )
