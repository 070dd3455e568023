"""Whole commands at SD 1.x's real size, from their start to the written file: the memory that users see, beside what imma said.

    python benchmarks/speed/commands.py         # raw lines to benchmarks/speed/results/commands.jsonl, the table to docs/performance.md
    python benchmarks/speed/commands.py --draw  # the table again, from the raw lines

Random weights, 512 × 512 pixels, fp32, two cycles of the published method. Needs 9 GB of disk under --work, and 8 GB of
memory; 16 where the checkpoint has to be made first. Estimates do not count what Python,
torch and diffusers take by themselves: that is measured apart, after an estimate of the demo model's size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import page
from loops import concept

RESULTS = Path(__file__).parent / "results" / "commands.jsonl"
MAKE = "import sys, pathlib, models; models.sd1(pathlib.Path(sys.argv[1]), 'float32')"
BASE = """
from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.cli.fitting import Saving, expected
from imma_cli.families import CONFIGS
from imma_cli.families.runtime import choose_runtime
from imma_cli.immunizers.imma import ImmunizerSettings
from imma_cli.immunizers.memory import peak_memory

runtime = choose_runtime("cpu")
expected(CONFIGS / "demo", parse_attacks(["lora"], discover()), ImmunizerSettings(), runtime, Saving())
print(peak_memory(runtime))
"""
SAVINGS: tuple[tuple[str, ...], ...] = ((), ("--low-memory",), ("--low-memory", "--gradient-checkpointing"))


def python(code: str, *arguments: str) -> str:
    """What *code* prints in a process of its own: a process's peak memory, as the system tells it, begins at its parent's."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent).stdout


def run(command: list[str]) -> tuple[str, int, float]:
    """What *command* says, its peak memory in bytes, and the seconds it took."""
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-m", "imma_cli", *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"imma {' '.join(command)} ended with {process.returncode}")
    return said, used.ru_maxrss * 1024, time.monotonic() - began


def measure(work: Path) -> list[dict[str, Any]]:
    work = work.resolve()
    python(MAKE, str(work))
    checkpoint, pictures, output = work / "sd1-float32.safetensors", work / "pictures", work / "hardened.safetensors"
    base = int(python(BASE))
    pictures.mkdir(exist_ok=True)
    for number, picture in enumerate(concept(512).images):
        picture.save(pictures / f"{number}.png")
    lines = []
    for saving in SAVINGS:
        command = [
            "harden", str(checkpoint), "--concept", "blue style", "--images", str(pictures), "--method", "imma",
            "--attack", "lora", "--steps", "4", "--device", "cpu", "--output", str(output), "--force", "--json", *saving,
        ]  # fmt: skip
        planned = json.loads(run([*command, "--dry-run"])[0])
        _, peak, seconds = run(command)
        lines.append(
            {
                "options": list(saving),
                "seconds": seconds,
                "peak_bytes": peak,
                "base_bytes": base,
                "estimated_bytes": planned["estimated_peak_bytes"],
            }
        )
        output.unlink()
    return lines


def show() -> None:
    rows = [
        "| `imma harden --method imma --attack lora` | s, with reading and writing | peak memory, GB | estimated, GB | Python and its packages, GB |",
        "|---|---|---|---|---|",
    ]
    for line in map(json.loads, RESULTS.read_text().splitlines()):
        options = f"`{' '.join(line['options'])}`" if line["options"] else "nothing saved"
        rows.append(
            f"| {options} | {line['seconds']:.0f} | {line['peak_bytes'] / 1e9:.2f} | {line['estimated_bytes'] / 1e9:.2f} | {line['base_bytes'] / 1e9:.2f} |"
        )
    page.put("commands.py", "\n".join(rows))
    print("\n".join(rows))


if __name__ == "__main__":
    page.run(__doc__, measure, RESULTS, show)
