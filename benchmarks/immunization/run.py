"""What `imma harden` does to the demo model, measured: time, attacks before and after, untouched prompts, the file.

    python benchmarks/immunization/run.py            # everything; raw data to benchmarks/immunization/results/
    python benchmarks/immunization/run.py --quick    # one seed, two attacks

Every attack trains on pictures that hardening never saw, at least twice as long as hardening simulated, with three
seeds, and is judged on a third set of pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
logging.getLogger("xformers").setLevel(logging.ERROR)

import torch
from PIL import Image, ImageDraw

from imma_cli.attacks.attack import Attack
from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.checkpoints import open_checkpoint
from imma_cli.checkpoints.safetensors_file import read_header
from imma_cli.concepts.folders import read_concept
from imma_cli.demo import CONCEPTS, write_demo
from imma_cli.families.model import Model
from imma_cli.families.runtime import choose_runtime
from imma_cli.verification.effnet import content_features, cosine
from imma_cli.verification.recovery import steps_to_recover
from imma_cli.verification.trials import Trial, run_trial

HERE = Path(__file__).parent
CASES = [
    ("lora", "high-contrast-style"),
    ("dreambooth", "high-contrast-style"),
    ("dreambooth-lora", "high-contrast-style"),
    ("textual-inversion", "high-contrast-style"),
    ("lora", "guitar"),
]
UNRELATED = [
    f"{noun} in {style} style"
    for style in ("noto", "retro", "fluent", "flat")
    for noun in (
        "a red apple",
        "a rocket",
        "an umbrella",
        "a frog",
        "a hamburger",
        "an alarm clock",
        "a sailboat",
        "a cactus",
    )
]
PICTURED = 6


def harden(folder: Path, attack: str, concept: str, output: Path) -> dict[str, Any]:
    """`imma harden --method imma` with default settings in a process of its own; what it printed, its time and its peak memory."""
    command = [
        *("imma", "harden", str(folder / "model.safetensors"), "--concept", CONCEPTS[concept].text),
        *("--method", "imma", "--attack", attack),
        *("--images", str(folder / "concepts" / concept / "defend"), "--output", str(output), "--force", "--json"),
    ]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    report = json.loads(printed)
    provenance = report.pop("provenance")
    del report["output"]  # a temporary path
    return report | {
        "case": f"{attack} / {concept}",
        "seconds": time.monotonic() - began,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "load_average": os.getloadavg()[0],
        "rates": provenance["attacks"][0]["rates"],
    }


def untouched(original: Model, hardened: Model) -> dict[str, float]:
    """EfficientNet-Lite0 similarity of unrelated prompts drawn by both from the same seeds, and two yardsticks."""
    first, second, others = (
        content_features(draw(model, UNRELATED, seed)) for model, seed in ((original, 0), (hardened, 0), (original, 1))
    )
    same = cosine(first, second).diagonal()
    return {
        "mean": float(same.mean()),
        "lowest": float(same.min()),
        "same_prompt_other_seed_by_original": float(cosine(first, others).diagonal().mean()),
        "another_prompt_by_original": float(cosine(first, first.roll(1, 0)).diagonal().mean()),
    }


def draw(model: Model, prompts: Sequence[str], seed: int) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    for i in range(0, len(prompts), 8):
        part = prompts[i : i + 8]
        pictures += model.family.draw(model, part, [1000 * seed + i + j for j in range(len(part))], guidance_scale=3.0)
    return pictures


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path, side: int = 96, label: int = 190) -> None:
    """Labelled rows of pictures."""
    width = label + side * max(len(pictures) for _, pictures in rows)
    page = Image.new("RGB", (width, side * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for i, (text, pictures) in enumerate(rows):
        pen.text((6, side * i + side // 2 - 6), text, fill="black")
        for j, picture in enumerate(pictures):
            page.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (label + side * j, side * i))
    page.save(path, optimize=True)


def check_file(original: Path, hardened: Path) -> dict[str, Any]:
    """The hardened single file beside its input, read by diffusers alone and byte by byte."""
    from diffusers import StableDiffusionPipeline

    config = open_checkpoint(original).config
    pipeline = StableDiffusionPipeline.from_single_file(str(hardened), config=str(config), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red apple in noto style", num_inference_steps=10).images[0]
    a, b = read_header(original), read_header(hardened)
    blocks = []
    for path, header in ((original, a), (hardened, b)):
        raw = path.read_bytes()
        start = header.data_start
        blocks.append({n: raw[start + e.start : start + e.end] for n, e in header.entries.items()})
    changed = [name for name in blocks[0] if blocks[0][name] != blocks[1][name]]
    attention = re.compile(r"\.attn[12]\.to_(q|k|v|out\.0)\.")
    return {
        "draws_in_plain_diffusers": picture.size == (64, 64) and len(picture.getcolors(4096) or range(4096)) > 10,
        "same_keys_in_same_order": list(a.entries) == list(b.entries),
        "same_dtypes_and_shapes": [(e.dtype, e.shape) for e in a.entries.values()]
        == [(e.dtype, e.shape) for e in b.entries.values()],
        "changed_tensors": len(changed),
        "changed_outside_attention": [name for name in changed if not attention.search(name)],
    }


def run_case(folder: Path, original: Model, attack: str, concept: str, seeds: int, results: Path) -> None:
    """Harden, attack both models, compare; raw trials, summary and pictures go to *results*."""
    name = f"{attack}-{concept}"
    output = folder / f"{name}.safetensors"
    hardening = harden(folder, attack, concept, output)
    model = open_checkpoint(output).load()
    budget = 2 * len(hardening.pop("steps"))
    trials, rows = attack_both(folder, original, model, attack, concept, budget, seeds)
    (results / f"{name}.jsonl").write_text("".join(json.dumps(trial.as_json()) + "\n" for trial in trials))
    sheet(rows, results / f"{name}.png")
    result = {
        "hardening": hardening,
        "simulated_inner_steps": budget // 2,
        "attack_steps": budget,
        "comparison": compare(trials),
        "prevented_at_end": prevented(trials),
        "untouched_similarity": untouched(original, model),
    }
    if (attack, concept) == CASES[0]:
        again = folder / "again.safetensors"
        harden(folder, attack, concept, again)
        digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (output, again)]
        result["file"] = check_file(folder / "model.safetensors", output) | {
            "two_runs_identical": digests[0] == digests[1]
        }
        some = UNRELATED[:8] + UNRELATED[16:20]
        pairs = [(which, draw(m, some, 0)) for which, m in (("original", original), ("hardened", model))]
        sheet(pairs, results / "untouched.png")
    (results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", help="numbers of the cases to run, as 0,2: several processes can share the work")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    cases, seeds = (CASES[:2], 1) if args.quick else (CASES, args.seeds)
    if args.cases:
        cases = [CASES[int(n)] for n in args.cases.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_demo(folder)
        original = open_checkpoint(folder / "model.safetensors").load()
        for attack, concept in cases:
            run_case(folder, original, attack, concept, seeds, args.out)
            (args.out / "table.md").write_text(table(args.out))
    print(table(args.out))


def attack_both(
    folder: Path, original: Model, hardened: Model, attack: str, concept: str, budget: int, seeds: int
) -> tuple[list[Trial], list[tuple[str, Sequence[Image.Image]]]]:
    """Paired trials on both models, and what the first seed's attacker draws on the way."""
    (parsed,) = parse_attacks([attack], discover())
    text, home = CONCEPTS[concept].text, folder / "concepts" / concept
    pictures, judge = read_concept(text, home / "attack"), read_concept(text, home / "judge")
    points = [round(budget * share) for share in (0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1)]
    looks = (0, budget // 2, budget)
    prompts = [parsed.caption(judge, caption) for caption in judge.captions[:PICTURED]]
    drawn: dict[tuple[int, str], list[Image.Image]] = {}
    trials: list[Trial] = []
    for seed in range(seeds):
        for which, model in (("original", original), ("hardened", hardened)):

            def look(step: int, attacked: Model, attack: Attack, seed: int = seed, which: str = which) -> None:
                if seed == 0 and step in looks:
                    drawn[step, which] = draw(attacked, prompts, 7)

            trials.append(
                run_trial(
                    model,
                    which,
                    parsed,
                    pictures,
                    judge,
                    steps=budget,
                    seed=seed,
                    runtime=choose_runtime("cpu"),
                    points=points,
                    on_point=look,
                )
            )
    rows: list[tuple[str, Sequence[Image.Image]]] = [("real (unseen by the attacker)", judge.images[:PICTURED])]
    rows += [(f"{which}, step {step}", drawn[step, which]) for step in looks for which in ("original", "hardened")]
    return trials, rows


def compare(trials: Sequence[Trial]) -> dict[str, Any]:
    """The mean loss on both models along the budget, and the steps that each takes to half the gain on the original."""
    curves = {
        which: {
            group[0].step: fmean(point.loss for point in group)
            for group in zip(*(t.points for t in trials if t.model == which), strict=True)
        }
        for which in ("original", "hardened")
    }
    needed = steps_to_recover(curves["original"], curves["hardened"], share=0.5, lower_is_better=True)
    return {
        "attack": trials[0].attack["spec"],
        "seeds": len({t.seed for t in trials}),
        **{which: [{"step": s, "loss": loss} for s, loss in curve.items()] for which, curve in curves.items()},
        "halfway_loss": needed.target,
        "steps_to_halfway": {"original": needed.original_steps, "hardened": needed.steps},
    }


def prevented(trials: Sequence[Trial]) -> dict[str, float]:
    """Share of the attacker's gain on the original that the hardening took away at the end, per seed and on average."""
    shares = {}
    for seed, pair in groupby(sorted(trials, key=lambda t: (t.seed, t.model)), key=lambda t: t.seed):
        hardened, original = pair  # alphabetical
        gain = original.points[0].loss - original.points[-1].loss
        shares[f"seed {seed}"] = (hardened.points[-1].loss - original.points[-1].loss) / gain
    return shares | {"mean": fmean(shares.values())}


def table(results: Path) -> str:
    """The summaries of all cases that have been run, as Markdown."""
    paths = [results / f"{attack}-{concept}.json" for attack, concept in CASES]
    lines = [
        "| hardened and attacked with | harden: s / GB | loss on unseen pictures, original: start → end | hardened: start → end "
        "| steps to half the gain: original / hardened | gain prevented at the end | untouched prompts, similarity |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in (json.loads(path.read_text()) for path in paths if path.exists()):
        c, h = case["comparison"], case["hardening"]
        needed = c["steps_to_halfway"]
        reached = [f"{n:.0f}" if n is not None else f"> {case['attack_steps']}" for n in needed.values()]
        ends = [f"{c[w][0]['loss']:.4f} → {c[w][-1]['loss']:.4f}" for w in ("original", "hardened")]
        lines.append(
            f"| {h['case']} | {h['seconds']:.0f} / {h['peak_gb']:.2f} | {ends[0]} | {ends[1]} | {' / '.join(reached)} "
            f"| {case['prevented_at_end']['mean']:.0%} | {case['untouched_similarity']['mean']:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
