"""A cycle of the default method at SD 1.x's real size: two steps of an attacker's, one that raises his loss and holds everything else.

    python benchmarks/speed/default.py         # raw lines to benchmarks/speed/results/default.jsonl, the table to docs/performance.md
    python benchmarks/speed/default.py --draw  # the table again, from the raw lines

Random weights, 512 × 512 pixels, LoRA, fp32. Every line has a process of its own, on one core; seconds are the
processor's. Needs 5 GB of disk under --work, and 16 GB of memory.
"""

from __future__ import annotations

import argparse
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
SAVINGS = {"as it comes": (False, False)}
"""Low memory, gradient checkpointing."""
CYCLES = 3
"""The first makes the optimizers' states, and is not counted."""


def child(path: Path, which: str) -> dict[str, Any]:
    import torch

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
    saving = Saving(*SAVINGS[which])
    runtime = choose_runtime("cpu", halved=saving.low_memory)
    attacks, settings = parse_attacks(["lora"], discover()), EpisodesSettings(steps=3 * CYCLES, checks=0)
    foreseen = expected(CONFIGS / "sd1", attacks, settings, runtime, saving).peak
    model = runtime.apply(open_checkpoint(path).load(halved=saving.low_memory), recomputed=saving.recomputed)
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
    return {"which": which, "cycles": seconds, "peak_bytes": peak_memory(runtime), "estimated_bytes": foreseen}


def show() -> None:
    rows = ["| | a cycle, processor s | peak memory, GB | estimated, without Python and torch |", "|---|---|---|---|"]
    for line in map(json.loads, RESULTS.read_text().splitlines()):
        cycles = line["cycles"]
        rows.append(
            f"| {line['which']} | {sum(cycles) / len(cycles):.0f} ({min(cycles):.0f} to {max(cycles):.0f}) | "
            f"{line['peak_bytes'] / 1e9:.2f} | {line['estimated_bytes'] / 1e9:.1f} |"
        )
    page.put("default.py", "\n".join(rows))
    print("\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("speed-work"))
    parser.add_argument("--draw", action="store_true", help="the table again, from the raw lines")
    parser.add_argument("--child", choices=SAVINGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.draw:
        from models import sd1

        path = sd1(args.work, "float32")
        if args.child:
            print(json.dumps(child(path, args.child)))
            return
        lines = [page.child(__file__, "--work", args.work, "--child", which) for which in SAVINGS]
        RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    show()


if __name__ == "__main__":
    main()
