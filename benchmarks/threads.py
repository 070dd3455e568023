"""How long steps on the demo model take with one and with two threads, several times in one run.

python benchmarks/threads.py
"""

from __future__ import annotations

import logging
import os
import time
from importlib.resources import as_file, files
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
logging.getLogger("xformers").setLevel(logging.ERROR)

import torch

from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.checkpoints import open_checkpoint
from imma_cli.concepts.folders import read_concept
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.imma import ImmunizerSettings, immunize


def main() -> None:
    with as_file(files("imma_cli.demo")) as demo:
        model = open_checkpoint(demo / "model.safetensors").load()
        concept = read_concept("high contrast style", demo / "concepts" / "high-contrast-style" / "defend")
    attacks = parse_attacks(["lora"], discover())
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(4):
        for threads, seconds in times.items():
            torch.set_num_threads(threads)
            marks: list[float] = []
            settings = ImmunizerSettings(steps=42)
            immunize(
                model,
                attacks,
                [concept],
                settings,
                Runtime("cpu", "sdpa", "fp32"),
                lambda _, m=marks: m.append(time.monotonic()),
            )
            seconds.append((marks[-1] - marks[0]) / 40)
    for threads, seconds in times.items():
        print(f"{threads} threads: {median(seconds) * 1000:.0f} ms a step; all: {[round(s * 1000) for s in seconds]}")
    print(f"two threads take {median(b / a for a, b in zip(*times.values(), strict=True)):.2f} times as long as one")


if __name__ == "__main__":
    main()
