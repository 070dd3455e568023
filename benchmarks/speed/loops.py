"""One step of hardening at SD 1.x's real size, beside a bare loop and the machine's own limit.

    python benchmarks/speed/loops.py        # raw lines to benchmarks/speed/results/loops.jsonl, tables to docs/performance.md

Every measurement has a process of its own; those that are compared take turns, several times in one run. A step is the
mean of an inner one (the attacker's, LoRA) and an outer one (all attention weights), 512 × 512 pixels, batch 1, fp32. Peak memory is
the whole process's, from its start to its end. Needs 5 GB of disk under --work, and 16 GB of memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import page

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "loops.jsonl"
LOOPS = ("bare", "imma", "imma, small pages", "imma --low-memory")
ONCE = ("as published", "imma --gradient-checkpointing", "limit")
"""Measured in the first turn only."""
Mark = tuple[float, float]
"""A time of day, and the processor seconds that the system has worked for the process: new memory is cleared in them."""
PUBLISHED = {"seconds": 43.5, "peak_bytes": 15.7e9}
"""The authors' own LoRA defence (github.com/amberyzheng/IMMA, fp32, 512 px, batch 1), measured on a machine of this kind."""


def now() -> Mark:
    return time.monotonic(), os.times().system


def concept(side: int, count: int = 2) -> Any:
    from PIL import Image

    from imma_cli.concepts.concept import Concept

    pictures = [
        Image.effect_mandelbrot((side, side), (-2 + i / count, -1, 1, 1.2), 20).convert("RGB") for i in range(count)
    ]
    return Concept("blue style", tuple(pictures), ("a cat in blue style",) * count, "made")


def encoded(model: Any, pictures: Any, number: int) -> tuple[Any, Any]:
    """Latents and caption of one of *pictures*."""
    import torch

    with torch.no_grad():
        latent = model.vae.encode(pictures[number : number + 1]).latent_dist.sample()
        words = model.family.encode_prompts(model, ["a cat in blue style"])
    return latent * model.vae.config.scaling_factor, words


def bare(path: Path, cycles: int, *, published: bool) -> list[Mark]:
    """What anybody would write: diffusers' UNet, PEFT's LoRA, two optimizers, encoders thrown away after caching.

    What the authors' code does differently, *published* does: both encoders run in every step, and gradients are computed for all
    weights of the UNet, whichever of them a step changes.
    """
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler
    from peft import LoraConfig

    from imma_cli.checkpoints import loading, open_checkpoint
    from imma_cli.concepts.batches import pixels

    # reading is not what is timed; that it has the heap give memory back is imma's, and not anybody's
    loading.give_back_large_blocks = lambda: None
    model = open_checkpoint(path).load()
    unet, schedule = model.unet, DDPMScheduler.from_config(model.scheduler.config)
    side = model.family.resolution(model)
    pictures = pixels(concept(side).images, side)
    anew = partial(encoded, model, pictures)
    batch = anew if published else [anew(number) for number in range(2)].__getitem__
    del model, anew
    names = ("to_q", "to_k", "to_v", "to_out.0")
    attention = [p for n, p in unet.named_parameters() if ".attn" in n and any(f".{name}." in n for name in names)]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(names)))
    lora = [p for n, p in unet.named_parameters() if "lora" in n]
    inner = torch.optim.AdamW(lora, lr=1e-4)
    outer = torch.optim.AdamW(attention, lr=1e-5, maximize=True)
    marks = [now()]
    for cycle in range(cycles):
        for parameters, optimizer in ((lora, inner), (attention, outer)):
            unet.requires_grad_(published)
            for parameter in parameters:
                parameter.requires_grad_(True)
            latent, words = batch(cycle % 2)
            noise, at = torch.randn_like(latent), torch.randint(1000, (1,))
            noisy = schedule.add_noise(latent, noise, at)
            loss = F.mse_loss(unet(noisy, at, encoder_hidden_states=words, return_dict=False)[0], noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            unet.zero_grad(set_to_none=True)
        marks.append(now())
    return marks


def ours(path: Path, cycles: int, *, low_memory: bool, checkpointing: bool) -> list[Mark]:
    """What `imma harden --method imma --attack lora` does between reading and writing."""
    from imma_cli.environment import prepare_environment

    prepare_environment()
    from imma_cli.attacks.manager import discover
    from imma_cli.attacks.settings import parse_attacks
    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.cli.fitting import Saving
    from imma_cli.families.runtime import choose_runtime
    from imma_cli.immunizers.imma import ImmunizerSettings, Step, immunize

    runtime = choose_runtime("cpu", halved=low_memory)
    saving = Saving(low_memory, checkpointing)
    model = runtime.apply(open_checkpoint(path).load(halved=low_memory), recomputed=saving.recomputed)
    attacks = parse_attacks(["lora"], discover())
    marks: list[Mark] = []

    def mark(step: Step) -> None:
        marks.append(now())

    def begin() -> None:
        model.release(attacks[0].computes_with)
        marks.append(now())

    side = model.family.resolution(model)
    settings = ImmunizerSettings(steps=2 * cycles)
    immunize(model, attacks, [concept(side)], settings, runtime, mark, on_encoded=begin)
    return marks


def child(path: Path, which: str, cycles: int) -> dict[str, Any]:
    from imma_cli.immunizers.memory import peak_memory

    began = time.monotonic()
    if which in ("bare", "as published"):
        marks = bare(path, cycles, published=which == "as published")
    else:
        marks = ours(path, cycles, low_memory="low" in which, checkpointing="checkpointing" in which)
    from imma_cli.families.runtime import Runtime

    both = [((later[0] - earlier[0]) / 2, (later[1] - earlier[1]) / 2) for earlier, later in itertools.pairwise(marks)]
    seconds, system = zip(*both, strict=True)
    # the first cycle also makes the optimizers' states and warms up
    line: dict[str, Any] = {"seconds": median(seconds[1:]), "all": [round(s, 3) for s in seconds]}
    line["system_seconds"] = median(system[1:])
    return line | {"peak_bytes": peak_memory(Runtime("cpu", "sdpa", "fp32")), "whole": time.monotonic() - began}


def limit(path: Path) -> dict[str, Any]:
    """Operations of a step, and how many this machine does per second in the two kinds that make them up."""
    import torch
    import torch.nn.functional as F
    from torch.utils.flop_counter import FlopCounterMode

    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.immunizers.scope import protected_weights

    def rate(of: Any, operations: float, times: int) -> float:
        of()
        began = time.monotonic()
        for _ in range(times):
            of()
        return operations * times / (time.monotonic() - began)

    with torch.no_grad():
        a = torch.randn(2048, 2048)
        product = rate(lambda: a @ a, 2 * 2048**3, 20)
        x, w = torch.randn(1, 320, 64, 64), torch.randn(320, 320, 3, 3)
        folded = rate(lambda: F.conv2d(x, w, padding=1), 2 * 64 * 64 * 320 * 320 * 9, 20)
    model = open_checkpoint(path).load()
    weights = list(protected_weights(model.unet, "attention").values())
    for weight in weights:
        weight.requires_grad_(True)
    side = int(model.unet.config.sample_size)
    words = model.family.encode_prompts(model, ["a cat"]).detach()
    with FlopCounterMode(display=False) as counter:
        inputs = torch.randn(1, 4, side, side), torch.tensor([500])
        out = model.unet(*inputs, encoder_hidden_states=words, return_dict=False)[0]
        torch.autograd.grad(out.square().mean(), weights)
    return {"operations": counter.get_total_flops(), "product_per_second": product, "convolution_per_second": folded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("speed-work"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cycles", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--draw", action="store_true", help="the table again, from the raw lines")
    args = parser.parse_args()
    if args.draw:
        show()
        return
    from models import sd1

    path = sd1(args.work, "float32")
    if args.child:
        print(json.dumps(limit(path) if args.child == "limit" else child(path, args.child, args.cycles)))
        return
    measure(args.work, path, args.repeats, args.cycles)
    show()


def measure(work: Path, path: Path, repeats: int, cycles: int) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    run = time.strftime("%Y-%m-%dT%H:%M:%S")
    with RESULTS.open("a") as file:
        for repeat in range(repeats):
            for which in (*LOOPS, *(ONCE if repeat == 0 else ())):
                line = {"run": run, "repeat": repeat, "which": which}
                env = os.environ | ({"THP_MEM_ALLOC_ENABLE": "0"} if "small pages" in which else {})
                line |= page.child(__file__, "--work", work, "--child", which, "--cycles", str(cycles), env=env)
                file.write(json.dumps(line) + "\n")
                file.flush()
                print(line, flush=True)


def show() -> None:
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()]
    lines = [line for line in lines if line["run"] == lines[-1]["run"]]
    found = {which: [line for line in lines if line["which"] == which] for which in (ONCE[0], *LOOPS, ONCE[1])}
    alone = {line["repeat"]: line["seconds"] for line in found["bare"]}
    (published,) = (line["seconds"] for line in found[ONCE[0]])
    rows = [
        "| loop | s a step | the system's work in it, processor s | × the bare loop, in the same turn | × as published | peak memory, GB |",
        "|---|---|---|---|---|---|",
        f"| the authors' code (measured apart) | {PUBLISHED['seconds']} | | | | {PUBLISHED['peak_bytes'] / 1e9:.1f} |",
    ]
    for which, those in found.items():
        seconds = median(line["seconds"] for line in those)
        ratios = [line["seconds"] / alone[line["repeat"]] for line in those]
        times = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        system = median(line["system_seconds"] for line in those)
        peak = max(line["peak_bytes"] for line in those) / 1e9
        rows.append(f"| {which} | {seconds:.1f} | {system:.1f} | {times} | {seconds / published:.2f} | {peak:.2f} |")
    (machine,) = [line for line in lines if line["which"] == "limit"]
    reached = machine["operations"] / median(line["seconds"] for line in found["imma"])
    rows += [
        "",
        f"An outer step takes {machine['operations'] / 1e12:.2f} · 10¹² operations forward and backward: imma does "
        f"{reached / 1e9:.0f} · 10⁹ a second. In the same run the machine does {machine['product_per_second'] / 1e9:.0f} · 10⁹ "
        f"in a product of matrices (2048 × 2048) and {machine['convolution_per_second'] / 1e9:.0f} · 10⁹ in a convolution "
        "(320 to 320 channels, 3 × 3, 64 × 64).",
    ]
    text = "\n".join(rows)
    print(text)
    page.put("loops.py", text)


if __name__ == "__main__":
    main()
