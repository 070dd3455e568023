"""What torch.compile would give: a pass through the demo model's UNet and back to its attention, compiled and not.

    python benchmarks/speed/compiled.py     # raw lines to benchmarks/speed/results/compiled.jsonl, the table to docs/performance.md

On one core, in processor seconds; both take turns in one process. Needs a C++ compiler.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import page

RESULTS = Path(__file__).parent / "results" / "compiled.jsonl"
TURNS = 5
STEPS = 5
"""In a turn."""


def measure(work: Path) -> dict[str, Any]:
    import torch

    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.demo import write_demo
    from imma_cli.families.model import Model
    from imma_cli.immunizers.scope import protected_weights

    torch.set_num_threads(1)
    home = work / "demo"
    write_demo(home, force=True)
    plain, compiled = (open_checkpoint(home / "model.safetensors").load() for _ in range(2))
    compiled.unet.compile()
    words = plain.family.encode_prompts(plain, ["a cat"]).detach()
    side = plain.unet.config.sample_size
    latents = torch.randn(1, plain.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))

    def step(model: Model) -> tuple[torch.Tensor, ...]:
        weights = list(protected_weights(model.unet, "attention").values())
        for weight in weights:
            weight.requires_grad_(True)
        predicted = model.unet(latents, torch.tensor([500]), encoder_hidden_states=words, return_dict=False)[0]
        return torch.autograd.grad(predicted.square().mean(), weights)

    def seconds(model: Model, steps: int) -> float:
        began = time.process_time()
        for _ in range(steps):
            step(model)
        return time.process_time() - began

    compiling = seconds(compiled, 1)
    seconds(plain, 1)
    # all of the gradient together: of single weights it may be zero but for rounding
    there, here = (torch.cat([gradient.flatten() for gradient in step(model)]) for model in (compiled, plain))
    difference = float((there - here).norm() / here.norm())
    turns = [
        {"plain": seconds(plain, STEPS) / STEPS, "compiled": seconds(compiled, STEPS) / STEPS} for _ in range(TURNS)
    ]
    return {"compiling": compiling, "difference": difference, "turns": turns}


def show() -> None:
    found = json.loads(RESULTS.read_text().splitlines()[-1])
    plain, compiled = ([turn[how] for turn in found["turns"]] for how in ("plain", "compiled"))
    ratios = [c / p for c, p in zip(compiled, plain, strict=True)]
    rows = [
        "| a step, s | compiled, s | ratio, lowest to highest of the turns | compiling, s | gradients differ by |",
        "|---|---|---|---|---|",
        f"| {median(plain):.3f} | {median(compiled):.3f} | {min(ratios):.2f} to {max(ratios):.2f} | {found['compiling']:.0f} | {found['difference']:.0e} |",
    ]
    print("\n".join(rows))
    page.put("compiled.py", "\n".join(rows))


if __name__ == "__main__":
    page.run(__doc__, lambda work: [measure(work)], RESULTS, show)
