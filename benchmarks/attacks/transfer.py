"""To which attacks does hardening transfer? Every attack that ships, on three models.

    python benchmarks/attacks/transfer.py            # raw lines to benchmarks/attacks/results/transfer.jsonl, and the table

The demo model is attacked as it is, hardened against LoRA alone, and hardened against the three attacks that are
strongest on the LoRA-hardened one, taking turns. Default settings, 300 steps (as many as hardening simulates for each
attack), two seeds, on pictures of the held-out style that hardening never saw, judged on others. What is there already
is not run again. Several processes may share the work, --part 1/2 and --part 2/2: first with --models original,lora,
and when both are done with --models strongest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from PIL import Image

from imma_cli.attacks import Attack
from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.checkpoints import open_checkpoint
from imma_cli.concepts.concept import Concept
from imma_cli.concepts.folders import read_concept
from imma_cli.demo import CONCEPTS, PROMPTS, write_demo
from imma_cli.families.model import Model
from imma_cli.families.runtime import choose_runtime
from imma_cli.verification.metrics import discover_metrics, parse_metrics
from imma_cli.verification.trials import run_trial

RESULTS = Path(__file__).parent / "results"
LINES, TABLE = RESULTS / "transfer.jsonl", RESULTS / "transfer.md"
CONCEPT = "high-contrast-style"
STEPS = 300
SEEDS = (0, 1)
METRICS = ("effnet", "effnet-style")
DRAWN_STEPS = 10
MODELS = ("original", "lora", "strongest")


def shipped() -> list[str]:
    return sorted(name for name, found in discover().found.items() if found.distribution == "imma-cli")


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def write(line: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with LINES.open("a") as file:  # one write of one line: processes do not mix theirs
        file.write(json.dumps(line) + "\n")
    print({key: value for key, value in line.items() if key != "scores"}, flush=True)


def end_loss(lines: Iterable[dict[str, Any]], attack: str, model: str) -> float:
    return fmean(line["losses"][-1] for line in lines if (line.get("attack"), line["model"]) == (attack, model))


def strongest(lines: list[dict[str, Any]]) -> list[str]:
    """The three attacks that end lowest on the model hardened against LoRA."""
    return sorted(shipped(), key=lambda name: end_loss(lines, name, "lora"))[:3]


def checkpoint(work: Path, model: str, attacks: list[str]) -> Path:
    """The checkpoint of *model*, hardened now if it is not there; its time goes to the raw lines."""
    demo = work / "demo"
    if not (demo / "model.safetensors").exists():
        write_demo(demo)
    if model == "original":
        return demo / "model.safetensors"
    output = work / f"{model}.safetensors"
    if not output.exists():
        began = time.monotonic()
        harden(demo, attacks, output)
        write({"model": model, "hardened_against": attacks, "seconds": round(time.monotonic() - began, 1)})
    return output


def harden(demo: Path, attacks: list[str], output: Path, *options: object) -> dict[str, Any]:
    """`imma harden --method imma` on the model in the folder *demo*; what it says."""
    command = ["imma", "harden", demo / "model.safetensors", "--concept", CONCEPTS[CONCEPT].text]
    command += ["--method", "imma", "--json", *options]
    command += [part for attack in attacks for part in ("--attack", attack)]
    command += ["--images", demo / "concepts" / CONCEPT / "defend", "--output", output]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


class Judge:
    """Draws with a model and compares, as `imma verify` does."""

    def __init__(self, references: Concept) -> None:
        self.references = references
        self.metrics = parse_metrics(list(METRICS), discover_metrics())
        for metric in self.metrics:
            metric.prepare("cpu")

    def draw(self, model: Model, prompts: list[str], count: int) -> list[Image.Image]:
        everything = [prompt for prompt in prompts for _ in range(count)]
        seeds = [900_000 + i for i in range(len(everything))]
        return model.family.draw(model, everything, seeds, steps=DRAWN_STEPS)

    def scores(self, model: Model, attack: Attack) -> dict[str, list[float]]:
        """For every metric the similarity of each picture to the references, on average over these."""
        prompts = [attack.caption(self.references, caption) for caption in self.references.captions[:2]]
        images = self.draw(model, prompts, 8)
        return {
            metric.name: [round(float(x), 5) for x in metric.similarity(self.references.images, images).mean(0)]
            for metric in self.metrics
        }

    def untouched(self, model: Model, original: Model) -> dict[str, float]:
        """Similarity of what both draw for unrelated prompts from the same seeds."""
        prompts = [prompt for prompt in PROMPTS if self.references.name not in prompt][:16]
        before, after = self.draw(original, prompts, 1), self.draw(model, prompts, 1)
        return {m.name: round(float(m.similarity(before, after).diagonal().mean()), 4) for m in self.metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("transfer-work"))
    parser.add_argument("--part", default="1/1", metavar="I/N")
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    runtime = choose_runtime("cpu")
    original = None
    for which in args.models.split(","):
        attacks = strongest(read()) if which == "strongest" else [which] * (which != "original")
        model = runtime.apply(open_checkpoint(checkpoint(args.work, which, attacks)).load())
        folder = args.work / "demo" / "concepts" / CONCEPT
        pictures, judging = (read_concept(CONCEPTS[CONCEPT].text, folder / role) for role in ("attack", "judge"))
        judge = Judge(judging)
        if which == "original":
            original = model
        elif not any("untouched" in line and line["model"] == which for line in read()):
            base = original or runtime.apply(open_checkpoint(checkpoint(args.work, "original", [])).load())
            write({"model": which, "untouched": judge.untouched(model, base)})
        for name in shipped()[part - 1 :: parts]:
            (attack,) = parse_attacks([name], discover())
            for seed in SEEDS:
                key = (which, name, seed)
                if any((line["model"], line.get("attack"), line.get("seed")) == key for line in read()):
                    continue
                began = time.monotonic()
                drawn: dict[int, dict[str, list[float]]] = {}
                trial = run_trial(
                    model, which, attack, pictures, judging, steps=STEPS, seed=seed, runtime=runtime,
                    on_point=lambda step, m, a: drawn.update({step: judge.scores(m, a)} if step in (0, STEPS) else {}),  # noqa: B023
                )  # fmt: skip
                line = {"model": which, "attack": name, "seed": seed, "learning_rate": trial.learning_rate}
                line |= {"steps": [p.step for p in trial.points], "losses": [round(p.loss, 5) for p in trial.points]}
                write(line | {"seconds": round(time.monotonic() - began, 1), "scores": drawn})
    if len([line for line in read() if "attack" in line]) == len(shipped()) * len(MODELS) * len(SEEDS):
        TABLE.write_text(table(read()))
        print(TABLE.read_text())


def table(lines: list[dict[str, Any]]) -> str:
    """For each attack the loss on unseen pictures at the end on every model, the gain prevented, and the SGR."""

    def losses(name: str, model: str) -> list[list[float]]:
        return [line["losses"] for line in lines if (line.get("attack"), line["model"]) == (name, model)]

    def gain(name: str, model: str) -> float:
        """Below what the original began with: what was gained from the attacker's point of view."""
        start = fmean(course[0] for course in losses(name, "original"))
        return start - end_loss(lines, name, model)

    def similarity(name: str, model: str, metric: str) -> float:
        found = [line for line in lines if (line.get("attack"), line["model"]) == (name, model)]
        return fmean(fmean(line["scores"][str(STEPS)][metric]) for line in found)

    rows = []
    for name in sorted(shipped(), key=lambda n: end_loss(lines, n, "original")):
        cells = [f"`{name}`", *(f"{end_loss(lines, name, model):.3f}" for model in MODELS)]
        for model in MODELS[1:]:
            cells.append(f"{100 * (1 - gain(name, model) / gain(name, 'original')):.0f} %")
            for metric in METRICS:
                before, after = (similarity(name, m, metric) for m in ("original", model))
                cells.append(f"{100 * (before - after) / before:.1f} %")
        rows.append("| " + " | ".join(cells) + " |")
    heads = ["attack", "loss: original", "hardened: lora", "hardened: three"]
    for model in ("lora", "three"):
        heads += [f"{model}: gain prevented", *(f"{model}: SGR {metric}" for metric in METRICS)]
    said = [line for line in lines if "untouched" in line or "hardened_against" in line]
    notes = [f"- {json.dumps(line)}" for line in said]
    return "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *rows, "", *notes, ""])


if __name__ == "__main__":
    main()
