"""`imma verify` on the demo model hardened against LoRA: how long it takes, and what it finds.

    python benchmarks/verification/run.py --preset standard --processes 2     # all four attacks
    python benchmarks/verification/run.py --preset quick --attacks lora,dreambooth --processes 2

Hardens with default settings, then starts the same command as often as --processes says, with one report folder. Raw
trials, the summary and the time go to benchmarks/verification/results/PRESET; the whole report is left in --work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).parent
CONCEPT, HOME = "high contrast style", "concepts/high-contrast-style"
ATTACKS = "lora,dreambooth,dreambooth-lora,textual-inversion"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("quick", "standard", "thorough"), default="standard")
    parser.add_argument("--attacks", default=ATTACKS)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, default=Path("verification-work"), help="goes on there if it was interrupted"
    )
    args = parser.parse_args()
    demo, report = args.work / "demo", args.work / args.preset
    hardened = demo / "model-immunized.safetensors"
    if not hardened.exists():
        subprocess.run(["imma", "demo", demo, "--force"], check=True)
        harden = ["imma", "harden", demo / "model.safetensors", "--concept", CONCEPT]
        harden += ["--method", "imma", "--attack", "lora"]
        subprocess.run([*harden, "--images", demo / HOME / "defend", "--output", hardened], check=True)
    command = ["imma", "verify", hardened, "--against", demo / "model.safetensors", "--concept", CONCEPT]
    command += ["--images", demo / HOME / "attack", "--judge", demo / HOME / "judge", "--preset", args.preset]
    command += [part for attack in args.attacks.split(",") for part in ("--attack", attack)]
    began = time.monotonic()
    running = [subprocess.Popen([*command, "--report", report]) for _ in range(args.processes)]
    codes = [process.wait() for process in running]
    seconds = time.monotonic() - began
    if any(code not in (0, 1) for code in codes):  # two seeds cannot say "resistant", but 2 is also wrong use
        print(f"exit codes {codes}")
    results = HERE / "results" / args.preset
    results.mkdir(parents=True, exist_ok=True)
    for name in ("trials.jsonl", "summary.json"):
        shutil.copy(report / name, results / name)
    timing = {
        "seconds": seconds,
        "processes": args.processes,
        "cores": os.cpu_count(),
        "load_average_15_min": os.getloadavg()[2],
        "exit_codes": codes,
    }
    (results / "timing.json").write_text(json.dumps(timing, indent=1) + "\n")
    print(json.dumps(timing))


if __name__ == "__main__":
    main()
