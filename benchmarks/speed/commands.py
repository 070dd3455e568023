"""Whole commands at SD 1.x's real size, from their start to the written file: the memory that users see, beside what imma said.

    python benchmarks/speed/commands.py         # raw lines to benchmarks/speed/results/commands.jsonl, the table to docs/performance.md
    python benchmarks/speed/commands.py --draw  # the table again, from the raw lines

Random weights, 512 × 512 pixels, fp32, two cycles of the published method: the memory does not grow with their number. Needs
9 GB of disk under --work, and 8 GB of memory.
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
SAVINGS: tuple[tuple[str, ...], ...] = ((), ("--low-memory",), ("--low-memory", "--gradient-checkpointing"))


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
    from models import sd1

    checkpoint, pictures, output = sd1(work, "float32"), work / "pictures", work / "hardened.safetensors"
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
                "estimated_bytes": planned["estimated_peak_bytes"],
            }
        )
        output.unlink()
    return lines


def show() -> None:
    rows = [
        "| `imma harden --method imma --attack lora` | s, with reading and writing | peak memory, GB | estimated, without Python and torch |",
        "|---|---|---|---|",
    ]
    for line in map(json.loads, RESULTS.read_text().splitlines()):
        options = f"`{' '.join(line['options'])}`" if line["options"] else "nothing saved"
        rows.append(
            f"| {options} | {line['seconds']:.0f} | {line['peak_bytes'] / 1e9:.2f} | {line['estimated_bytes'] / 1e9:.1f} |"
        )
    page.put("commands.py", "\n".join(rows))
    print("\n".join(rows))


if __name__ == "__main__":
    page.run(__doc__, measure, RESULTS, show)
