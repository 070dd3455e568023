"""What hardening costs as its inputs grow: pixels, batch, concepts, attacks, pictures.

    python benchmarks/speed/cost.py         # raw lines to benchmarks/speed/results/cost.jsonl; table and picture to docs/performance.md
    python benchmarks/speed/cost.py --draw  # table and picture again, from the raw lines

Every point has a process of its own, on one core; seconds are the processor's, so that other work on the machine counts
less. Pixels and batch: the published loop with LoRA on random weights of SD 1.x's size. The others: the default on the demo model.
Needs 5 GB of disk under --work, and 10 GB of memory. What the raw lines hold is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imma_cli.environment import prepare_environment

prepare_environment()

import page
from loops import concept

RESULTS = Path(__file__).parent / "results" / "cost.jsonl"
PICTURE = page.PAGE.parent / "images" / "cost.svg"
GROWING: dict[str, tuple[int, ...]] = {
    "pixels": (256, 512, 768),
    "batch": (1, 2, 4),
    "concepts": (1, 3, 10),
    "attacks": (1, 3, 6),
    "pictures": (5, 20, 80, 320),
}
REAL_SIZE = ("pixels", "batch")
ATTACKS = ("lora", "full-finetune", "loha", "dora", "lokr", "dreambooth-lora")
USUAL = {"pixels": 256, "batch": 1, "concepts": 1, "attacks": 3, "pictures": 20}
"""What does not grow. Batches at 256 pixels, where four take no longer than one does at 512."""
REAL_SIZE_CYCLES, CYCLES_OF_EPISODE = 2, 5
"""The first cycle of a run warms up, and is not counted."""


class Clock:
    """Processor seconds at the end of the preparations, and of every cycle."""

    def __init__(self) -> None:
        self.began = time.process_time()
        self.prepared = 0.0
        self.marks: list[float] = []

    def prepare(self) -> None:
        self.prepared = time.process_time() - self.began
        self.marks.append(time.process_time())

    def mark(self, step: object) -> None:
        self.marks.append(time.process_time())

    def cycle(self) -> float:
        return (self.marks[-1] - self.marks[1]) / (len(self.marks) - 2)


def real_size(path: Path, pixels: int, batch: int) -> Clock:
    """The published loop against LoRA at SD 1.x's size."""
    from imma_cli.attacks.manager import discover
    from imma_cli.attacks.settings import parse_attacks
    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.families.runtime import choose_runtime
    from imma_cli.immunizers.imma import ImmunizerSettings, immunize

    runtime = choose_runtime("cpu")
    model = runtime.apply(open_checkpoint(path).load())
    model.unet.register_to_config(sample_size=pixels // 8)
    attacks = parse_attacks(["lora"], discover())
    clock = Clock()

    def release() -> None:
        model.release(attacks[0].computes_with)
        clock.prepare()

    settings = ImmunizerSettings(steps=2 * REAL_SIZE_CYCLES, batch_size=batch)
    immunize(model, attacks, [concept(pixels, 4)], settings, runtime, clock.mark, on_encoded=release)
    return clock


def demo_model(concepts: int, attacks: int, pictures: int) -> Clock:
    """The default on the demo model. What must stay is the same for all, and not counted."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from imma_cli.attacks.manager import discover
    from imma_cli.attacks.settings import parse_attacks
    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.demo import write_demo
    from imma_cli.families.runtime import choose_runtime
    from imma_cli.immunizers.episodes import immunize_in_episodes
    from imma_cli.immunizers.retention import retain
    from imma_cli.immunizers.settings import EpisodesSettings

    runtime = choose_runtime("cpu")
    with TemporaryDirectory() as folder:
        write_demo(Path(folder), force=True)
        model = runtime.apply(open_checkpoint(Path(folder) / "model.safetensors").load())
    retention = retain(model, ["a cat", "a dog"] * 8, noisings=4, seed=0, runtime=runtime)
    protected = [replace(concept(128, pictures), name=f"blue style {i}") for i in range(concepts)]
    # an episode for every attacker on every concept, and of the same length whatever their number
    cycles, steps = CYCLES_OF_EPISODE * max(3, concepts * attacks), 2 * CYCLES_OF_EPISODE
    settings = EpisodesSettings(steps=3 * cycles, shortest=steps, longest=steps, checks=0)
    clock = Clock()
    immunize_in_episodes(
        model,
        parse_attacks(ATTACKS[:attacks], discover()),
        protected,
        settings,
        runtime,
        retention,
        clock.mark,
        on_encoded=clock.prepare,
    )
    return clock


def child(work: Path, growing: str, size: int) -> dict[str, Any]:
    import torch

    from imma_cli.families.runtime import Runtime
    from imma_cli.immunizers.memory import peak_memory

    torch.set_num_threads(1)
    of = {**USUAL, growing: size}
    if growing in REAL_SIZE:
        clock = real_size(work / "sd1-float32.safetensors", of["pixels"], of["batch"])
    else:
        clock = demo_model(of["concepts"], of["attacks"], of["pictures"])
    peak = peak_memory(Runtime("cpu", "sdpa", "fp32"))
    return {"prepare_seconds": clock.prepared, "cycle_seconds": clock.cycle(), "peak_bytes": peak}


def measure(work: Path, kinds: list[str]) -> None:
    from models import sd1

    RESULTS.parent.mkdir(exist_ok=True)
    done = {(line["growing"], line["size"]) for line in measured()}
    for growing in kinds:
        if growing in REAL_SIZE:
            sd1(work, "float32")
        for size in GROWING[growing]:
            if (growing, size) in done:
                continue
            alone = {**os.environ, "OMP_NUM_THREADS": "1"}
            line = {"growing": growing, "size": size}
            line |= page.child(__file__, "--work", work, "--child", growing, str(size), env=alone)
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


def measured() -> list[dict[str, Any]]:
    return [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


SHOWN: dict[str, Callable[[dict[str, Any]], float]] = {
    "preparing, s": lambda line: float(line["prepare_seconds"]),
    "a cycle, s": lambda line: float(line["cycle_seconds"]),
    "peak memory, GB": lambda line: float(line["peak_bytes"]) / 1e9,
}


def show() -> None:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    lines = measured()
    kinds = [kind for kind in GROWING if any(line["growing"] == kind for line in lines)]
    rows = ["| what grows | model | size | " + " | ".join(SHOWN) + " |", "|---" * (3 + len(SHOWN)) + "|"]
    rcParams["svg.hashsalt"] = "imma"  # the same lines give the same file
    figure = Figure(figsize=(2.6 * len(kinds), 6.5), layout="constrained")
    panels = figure.subplots(len(SHOWN), len(kinds), squeeze=False)
    for column, kind in enumerate(kinds):
        own = sorted((line for line in lines if line["growing"] == kind), key=lambda line: line["size"])
        model = "SD 1.x's size" if kind in REAL_SIZE else "demo"
        for line in own:
            cells = (f"{of(line):.2f}" if of(line) < 10 else f"{of(line):.0f}" for of in SHOWN.values())
            rows.append(f"| {kind} | {model} | {line['size']} | " + " | ".join(cells) + " |")
        for panel, (name, of) in zip(panels[:, column], SHOWN.items(), strict=True):
            sizes = [line["size"] for line in own]
            panel.plot(sizes, [of(line) for line in own], marker="o")
            panel.set_ylim(0, 1.15 * max(of(line) for line in own))
            panel.set_xticks([size for size in sizes if size == sizes[0] or size > 0.1 * sizes[-1]])
            if not column:
                panel.set_ylabel(name)
        panels[0, column].set_title(f"{kind} ({model})", fontsize=9)
    figure.savefig(PICTURE, metadata={"Date": None})
    text = "\n".join([*rows, "", f"![How time and memory grow with the inputs](images/{PICTURE.name})"])
    print(text)
    page.put("cost.py", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("speed-work"))
    parser.add_argument("--growing", default=",".join(GROWING), help="separated by commas")
    parser.add_argument("--child", nargs=2, metavar=("GROWING", "SIZE"), help=argparse.SUPPRESS)
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.work, args.child[0], int(args.child[1]))))
        return
    if unknown := set(args.growing.split(",")) - GROWING.keys():
        parser.error(f"--growing: {', '.join(sorted(unknown))} does not grow; there are {', '.join(GROWING)}")
    if not args.draw:
        args.work.mkdir(parents=True, exist_ok=True)
        measure(args.work, args.growing.split(","))
    show()


if __name__ == "__main__":
    main()
