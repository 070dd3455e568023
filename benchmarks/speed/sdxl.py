"""One attacker's step and one outer step at SDXL's size: a UNet of 2.6 billion random weights, 1024 × 1024 pixels, batch 1.

    python benchmarks/speed/sdxl.py         # a raw line to benchmarks/speed/results/sdxl.jsonl, the table to docs/performance.md
    python benchmarks/speed/sdxl.py --draw  # the table again, from the raw lines

imma does not read SDXL's checkpoints yet. What is measured is what would harden them: the same steps, with the frozen weights in 16 bits,
activations (or every block) computed twice, and AdamW's moments in 8 bits. Takes about 20 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import page

RESULTS = Path(__file__).parent / "results" / "sdxl.jsonl"
CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""Of stabilityai/stable-diffusion-xl-base-1.0's UNet."""


def random_unet() -> Any:
    """With what is frozen in 16 bits from the beginning, and the attention in 32."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    from imma_cli.families.halving import ATTENTION, halve

    with init_empty_weights():
        unet: Any = UNet2DConditionModel(**CONFIG)
    for name, module in unet.named_modules():
        for own, weight in list(module.named_parameters(recurse=False)):
            full = f"{name}.{own}"
            wide = weight.dim() < 2 or ATTENTION.search(full)
            value = torch.empty(weight.shape, dtype=torch.float32 if wide else torch.float16)
            if weight.dim() < 2:
                value.fill_(1.0 if own == "weight" else 0.0)
            else:
                value.normal_(0, weight[0].numel() ** -0.5)
            setattr(module, own, torch.nn.Parameter(value, requires_grad=False))
    halve(unet)
    return unet.eval()


def measure(recomputed: Any, eight_bit: bool, side: int) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from imma_cli.attacks.training import adamw, gradient_step
    from imma_cli.families.recomputing import recompute
    from imma_cli.families.runtime import Runtime
    from imma_cli.immunizers.memory import peak_memory
    from imma_cli.immunizers.scope import protected_weights

    began = time.monotonic()
    unet = random_unet()
    attention = list(protected_weights(unet, "attention").values())
    parameters = sum(weight.numel() for weight in unet.parameters())
    recompute(unet, recomputed)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), unet)
    unet.requires_grad_(False)
    lora = [weight for name, weight in unet.named_parameters() if "lora_" in name]
    words, pooled = torch.randn(1, 77, 2048), torch.randn(1, 1280)
    sizes = torch.tensor([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]], dtype=torch.float32)

    def loss() -> torch.Tensor:
        noisy, noise = torch.randn(2, 1, 4, side, side)
        more = {"text_embeds": pooled, "time_ids": sizes}
        predicted = unet(noisy, torch.tensor([500]), words, added_cond_kwargs=more, return_dict=False)[0]
        return torch.nn.functional.mse_loss(predicted, noise)

    inner, outer = adamw(lora, 1e-4, eight_bit=eight_bit), adamw(attention, 1e-5, eight_bit=eight_bit)
    built, times = time.monotonic() - began, {}
    for name, optimizer, trained in (("attacker", inner, lora), ("immunizer", outer, attention)):
        began, spent = time.monotonic(), time.process_time()
        value = gradient_step(optimizer, trained, [partial(loss)], 1.0)
        times[f"{name}_seconds"] = round(time.monotonic() - began, 1)
        times[f"{name}_processor_seconds"] = round(time.process_time() - spent, 1)
        print(name, value, times, flush=True)
    peak = peak_memory(Runtime("cpu", "sdpa", "fp32"))
    trained = sum(weight.numel() for weight in attention)
    size = {"side": 8 * side, "parameters": parameters, "trained": trained}
    return size | {"recomputed": recomputed, "8bit": eight_bit, "built_seconds": built, "peak_bytes": peak, **times}


def show() -> None:
    rows = [
        "| pixels | computed twice | moments | attacker's step, processor seconds | outer step | peak memory, GB |",
        "|---|---|---|---|---|---|",
    ]
    for line in map(json.loads, RESULTS.read_text().splitlines()):
        moments = "8 bits" if line["8bit"] else "32 bits"
        rows.append(
            f"| {line['side']} × {line['side']} | {line['recomputed']} | {moments} | {line['attacker_processor_seconds']:.0f} "
            f"| {line['immunizer_processor_seconds']:.0f} | {line['peak_bytes'] / 1e9:.1f} |"
        )
    size = f"{line['parameters'] / 1e9:.2f} billion weights, of which {line['trained'] / 1e9:.2f} billion are trained by an outer step."
    page.put("sdxl.py", "\n".join([*rows, "", size]))
    print("\n".join([*rows, size]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recompute", choices=("activations", "blocks"), default="blocks")
    parser.add_argument("--moments", choices=(8, 32), type=int, default=8, help="bits")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    if not args.draw:
        line = measure(args.recompute, args.moments == 8, args.side // 8)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
    show()


if __name__ == "__main__":
    main()
