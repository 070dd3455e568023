"""A cycle of the default method at SD 1.x's real size: two steps of an attacker's, one that raises his loss and holds everything else.

    python benchmarks/speed/default.py         # raw lines to benchmarks/speed/results/default.jsonl, the table to docs/performance.md
    python benchmarks/speed/default.py --draw  # the table again, from the raw lines

Random weights, 512 × 512 pixels, LoRA, fp32, on one core; seconds are the processor's. Needs 5 GB of disk under --work, and 10 GB of memory.
"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from imma_cli.environment import prepare_environment

prepare_environment()

import page
from loops import concept

RESULTS = Path(__file__).parent / "results" / "default.jsonl"
CYCLES = 3
"""The first makes the optimizers' states, and is not counted."""


def measure(work: Path) -> list[dict[str, Any]]:
    import torch
    from models import sd1

    from imma_cli.attacks.manager import discover
    from imma_cli.attacks.settings import parse_attacks
    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.cli.fitting import Saving, expected
    from imma_cli.families import CONFIGS
    from imma_cli.families.runtime import choose_runtime
    from imma_cli.immunizers.episodes import immunize_in_episodes
    from imma_cli.immunizers.imma import Step
    from imma_cli.immunizers.memory import peak_memory
    from imma_cli.immunizers.retention import retain
    from imma_cli.immunizers.settings import EpisodesSettings

    torch.set_num_threads(1)
    runtime = choose_runtime("cpu")
    attacks, settings = parse_attacks(["lora"], discover()), EpisodesSettings(steps=3 * CYCLES, checks=0)
    foreseen = expected(CONFIGS / "sd1", attacks, settings, runtime, Saving()).peak
    model = runtime.apply(open_checkpoint(sd1(work, "float32")).load())
    # two pictures that must stay instead of 64: a step takes four noised ones of however many
    retention = retain(model, ["a cat", "a dog"], noisings=3, seed=0, runtime=runtime)
    marks: list[float] = []

    def mark(step: Step) -> None:
        marks.append(time.process_time())

    immunize_in_episodes(
        model,
        attacks,
        [concept(model.family.resolution(model))],
        settings,
        runtime,
        retention,
        mark,
        on_encoded=lambda: model.release({"text_encoder"}),
    )
    seconds = [later - earlier for earlier, later in pairwise(marks)]
    return [{"cycles": seconds, "peak_bytes": peak_memory(runtime), "estimated_bytes": foreseen}]


def show() -> None:
    rows = ["| a cycle, processor s | peak memory, GB | estimated, without Python and torch |", "|---|---|---|"]
    for line in map(json.loads, RESULTS.read_text().splitlines()):
        cycles = line["cycles"]
        rows.append(
            f"| {sum(cycles) / len(cycles):.0f} ({min(cycles):.0f} to {max(cycles):.0f}) | "
            f"{line['peak_bytes'] / 1e9:.2f} | {line['estimated_bytes'] / 1e9:.1f} |"
        )
    page.put("default.py", "\n".join(rows))
    print("\n".join(rows))


if __name__ == "__main__":
    page.run(__doc__, measure, RESULTS, show)
