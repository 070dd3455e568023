"""The demo model: how long commands take, and how much of hardening is diffusers' own forward and backward.

    python benchmarks/speed/demo.py         # raw lines to benchmarks/speed/results/demo.jsonl, the table to docs/performance.md
    python benchmarks/speed/demo.py --draw  # the table again, from the raw lines

Nothing else should run on the machine. Shares are measured on one core: with a second one, forward and backward overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import page

RESULTS = Path(__file__).parent / "results" / "demo.jsonl"
STYLE = "high contrast style"


def shares(home: Path, steps: int) -> dict[str, float]:
    """Seconds of a cycle of the default hardening, and the share of them inside the UNet's forward and torch's backward."""
    import torch
    from diffusers import UNet2DConditionModel

    from imma_cli.attacks.manager import discover, simulated
    from imma_cli.attacks.settings import parse_attacks
    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.concepts.folders import read_concept
    from imma_cli.families.runtime import choose_runtime
    from imma_cli.immunizers.episodes import immunize_in_episodes
    from imma_cli.immunizers.retention import retain
    from imma_cli.immunizers.settings import EpisodesSettings

    runtime = choose_runtime("cpu")
    model = runtime.apply(open_checkpoint(home / "model.safetensors").load())
    registry = discover()
    attacks = parse_attacks(simulated(registry), registry)
    concept = read_concept(STYLE, home / "concepts" / "high-contrast-style" / "defend")
    retention = retain(model, ["a cat", "a dog"] * 8, noisings=4, seed=0, runtime=runtime)
    spent = {"forward": 0.0, "backward": 0.0}

    def timed(name: str, of: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return of(*args, **options)
            finally:
                spent[name] += time.perf_counter() - began

        return run

    UNet2DConditionModel.forward = timed("forward", UNet2DConditionModel.forward)
    torch.autograd.grad = timed("backward", torch.autograd.grad)
    marks = []
    settings = EpisodesSettings(steps=steps, checks=0)
    began = time.perf_counter()
    immunize_in_episodes(model, attacks, [concept], settings, runtime, retention, lambda step: marks.append(step.cycle))
    whole = time.perf_counter() - began
    return {"cycle_seconds": whole / len(marks), **{name: seconds / whole for name, seconds in spent.items()}}


def command(*arguments: str) -> tuple[float, float]:
    """Seconds of the wall, and of the processor, that `imma` takes."""
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "imma_cli", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 1):  # 1: a verdict, too
        raise SystemExit(f"failed: imma {' '.join(arguments)}")
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime


def measure(work: Path) -> None:
    home, style = work / "demo", work / "demo" / "concepts" / "high-contrast-style"
    command("demo", str(home), "--force")
    lines: list[dict[str, Any]] = []

    def note(what: str, **found: Any) -> None:
        lines.append({"what": what, **found})
        print(lines[-1], flush=True)

    for _ in range(5):
        note("imma --help", cpu_seconds=command("--help")[1])
    for _ in range(3):
        code = [sys.executable, __file__, "--shares", str(home)]
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        said = subprocess.run(code, check=True, capture_output=True, text=True, env=alone).stdout
        note("shares", **json.loads(said.splitlines()[-1]))
    hardened = str(work / "hardened.safetensors")
    harden = ["harden", str(home / "model.safetensors"), "--concept", STYLE, "--images", str(style / "defend")]
    harden += ["--output", hardened, "--force", "--json"]
    note("imma harden --preset quick", seconds=command(*harden, "--preset", "quick")[0])
    note("imma harden", seconds=command(*harden)[0])
    verify = ["verify", hardened, "--against", str(home / "model.safetensors"), "--concept", STYLE, "--json"]
    verify += ["--images", str(style / "attack"), "--judge", str(style / "judge")]
    verify += ["--attack", "lora", "--attack", "dreambooth", "--preset", "quick"]
    note("imma verify --preset quick, two attacks", seconds=command(*verify)[0])
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))


def show() -> None:
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()]
    found = [line for line in lines if line["what"] == "shares"]
    shares = {name: [line[name] for line in found] for name in ("forward", "backward")}
    both = [sum(pair) for pair in zip(*shares.values(), strict=True)]
    rows = ["| | |", "|---|---|"]
    helped = median(line["cpu_seconds"] for line in lines if line["what"] == "imma --help")
    rows.append(f"| `imma --help` | {helped:.2f} s of processor time |")
    cycle = median(line["cycle_seconds"] for line in found)
    rows.append(f"| one cycle of `imma harden` (two attacker's steps, an outer one), on one core | {cycle:.2f} s |")
    rows.append(
        f"| of that in diffusers' UNet and torch's backward | {median(both):.0%} ({median(shares['forward']):.0%} forward, {median(shares['backward']):.0%} backward) |"
    )
    for line in lines:
        if "seconds" in line:
            typed, comma, rest = line["what"].partition(",")
            rows.append(f"| `{typed}`{comma}{rest} | {line['seconds']:.0f} s |")
    print("\n".join(rows))
    page.put("demo.py", "\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("speed-work"))
    parser.add_argument("--shares", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    if args.shares:
        print(json.dumps(shares(args.shares, steps=360)))
        return
    if not args.draw:
        args.work.mkdir(parents=True, exist_ok=True)
        measure(args.work)
    show()


if __name__ == "__main__":
    main()
