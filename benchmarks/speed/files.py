"""Memory and time of reading and writing checkpoints of the real size.

    python benchmarks/speed/files.py        # raw lines to benchmarks/speed/results/files.jsonl, and a table

Needs about 11 GB of disk under --work, and 9 GB of memory. Every measurement has a process of its own; peak memory is that
of the whole process, less what it had when everything was imported and less the model's own 4.3 GB in float32. When the
file is written, it is in the page cache, as it is for cp: it was read before.
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

RESULTS = Path(__file__).parent / "results" / "files.jsonl"
DTYPES = ("float32", "float16")
NOTHING = "nothing"


def resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(path: Path, protect: str) -> dict[str, Any]:
    """In this process: read *path*, change everything that *protect* names, write it. With nothing to change: read it from the disk."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401

    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.immunizers.scope import protected_weights

    imported = resident()
    opened = open_checkpoint(path)
    if protect == NOTHING:
        forget(path)
    began = time.monotonic()
    model = opened.load()
    read_seconds = time.monotonic() - began
    if protect == NOTHING:
        return {"first_read_seconds": read_seconds}
    held = sum(p.numel() * p.element_size() for n in model.networks.values() for p in n.parameters())
    read_peak = peak() - imported - held
    changed = {}
    with torch.no_grad():
        for name, weight in protected_weights(model.unet, protect).items():  # type: ignore[arg-type]
            weight.add_(0.001)  # in place, as a caller's own copy would be the caller's
            changed[f"unet.{name}"] = weight
    target = path.with_name("written.safetensors")
    began = time.monotonic()
    report = opened.write(target, changed, {}, force=True)
    write_seconds = time.monotonic() - began
    target.unlink()
    return {
        "model_bytes": held,
        "read_seconds": read_seconds,
        "read_peak_above": read_peak,
        "write_seconds": write_seconds,
        "write_peak_above": peak() - imported - held,
        "tensors": report.tensors,
    }


def forget(path: Path) -> None:
    """The system drops what it keeps of the file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(path: Path) -> float:
    """Seconds of cp and fsync."""
    target = path.with_name("copied.safetensors")
    began = time.monotonic()
    subprocess.run(["cp", str(path), str(target)], check=True)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.monotonic() - began
    target.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("speed-work"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--draw", action="store_true", help="the table again, from the raw lines")
    parser.add_argument("--child", nargs=2, metavar=("FILE", "PROTECT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(Path(args.child[0]), args.child[1])))
        return
    if args.draw:
        show()
        return
    lines = []
    for dtype in DTYPES:
        path = made(args.work, dtype)
        for protect in ("attention", "unet"):
            for repetition in range(args.repetitions):
                copy_seconds = copied(path)
                line = {"dtype": dtype, "changed": protect, "repetition": repetition, "copy_seconds": copy_seconds}
                for what in (NOTHING, protect):
                    line |= page.child(__file__, "--child", path, what)
                lines.append(line)
                print(lines[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    show()


def made(work: Path, dtype: str) -> Path:
    """In a process of its own: what it takes must not count."""
    code = "import sys; from pathlib import Path; from models import sd1; sd1(Path(sys.argv[1]), sys.argv[2])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code, str(work), dtype], check=True, env=environment)
    return work / f"sd1-{dtype}.safetensors"


def show() -> None:
    text = table([json.loads(line) for line in RESULTS.read_text().splitlines()])
    print(text)
    page.put("files.py", text)


def table(lines: list[dict[str, Any]]) -> str:
    rows = [
        "| file | changed | reading: s from the disk | s from the page cache | MB above the model | writing: s | as a multiple of cp and fsync | MB above the model |",
        "|---" * 8 + "|",
    ]
    for dtype in DTYPES:
        for protect in ("attention", "unet"):
            own = [line for line in lines if (line["dtype"], line["changed"]) == (dtype, protect)]
            cells = [
                dtype,
                protect,
                f"{median(x['first_read_seconds'] for x in own):.1f}",
                f"{median(x['read_seconds'] for x in own):.1f}",
                f"{max(x['read_peak_above'] for x in own) / 1e6:.0f}",
                f"{median(x['write_seconds'] for x in own):.1f}",
                f"{median(x['write_seconds'] / x['copy_seconds'] for x in own):.2f}",
                f"{max(x['write_peak_above'] for x in own) / 1e6:.0f}",
            ]
            rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
