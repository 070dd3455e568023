"""What a step of each optimizer costs an attacker who trains all of the demo model's UNet, as hardening in episodes draws them.

    python benchmarks/speed/optimizers.py   # raw lines to benchmarks/speed/results/optimizers.jsonl, the table to docs/performance.md

On one core, in processor seconds; all take turns in one process. Grouped: torch's implementations that take many tensors in one call.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import page

RESULTS = Path(__file__).parent / "results" / "optimizers.jsonl"
TURNS = 5
STEPS = 5
"""In a turn."""
WARMING = 10
"""The first step makes the states, and RAdam's first five are simpler than the others."""


def measure(work: Path) -> list[dict[str, Any]]:
    import torch
    from torch.optim import Adafactor, AdamW, RAdam

    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.demo import write_demo

    torch.set_num_threads(1)
    home = work / "demo"
    write_demo(home, force=True)
    weights = list(open_checkpoint(home / "model.safetensors").load().unet.parameters())
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = 1e-3 * torch.randn(weight.shape, generator=generator)
    radam = partial(RAdam, decoupled_weight_decay=True)
    kinds = {
        "AdamW": {"one pass": partial(AdamW, fused=True), "plain": AdamW, "grouped": partial(AdamW, foreach=True)},
        "RAdam": {"plain": radam, "grouped": partial(radam, foreach=True)},
        "Adafactor": {"plain": Adafactor, "grouped": partial(Adafactor, foreach=True)},
    }
    optimizers = {
        (kind, how): make(weights, lr=1e-6, weight_decay=1e-2)
        for kind, ways in kinds.items()
        for how, make in ways.items()
    }
    for optimizer in optimizers.values():
        for _ in range(WARMING):
            optimizer.step()
    lines = []
    for turn in range(TURNS):
        for (kind, how), optimizer in optimizers.items():
            began = time.process_time()
            for _ in range(STEPS):
                optimizer.step()
            lines.append(
                {"turn": turn, "optimizer": kind, "how": how, "seconds": (time.process_time() - began) / STEPS}
            )
    return lines


def show() -> None:
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()]
    ways = ("one pass", "plain", "grouped")
    rows = [f"| a step, ms | {' | '.join(ways)} |", "|---|---|---|---|"]
    for kind in dict.fromkeys(line["optimizer"] for line in lines):
        cells = []
        for how in ways:
            took = [1000 * line["seconds"] for line in lines if (line["optimizer"], line["how"]) == (kind, how)]
            cells.append(f"{median(took):.0f} ({min(took):.0f} to {max(took):.0f})" if took else "—")
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    print("\n".join(rows))
    page.put("optimizers.py", "\n".join(rows))


if __name__ == "__main__":
    page.run(__doc__, measure, RESULTS, show)
