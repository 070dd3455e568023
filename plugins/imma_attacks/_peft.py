"""LoRA matrices in a diffusers model through PEFT, and out again without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import nn

ADAPTER = "imma"
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS: dict[str, list[str] | str] = {
    "attention": PROJECTIONS,
    "cross-attention": r".*\.attn2\.to_(q|k|v|out\.0)",
    "transformer": [*PROJECTIONS, "ff.net.0.proj", "ff.net.2"],
    "everything": [*PROJECTIONS, "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "proj_in", "proj_out"],
}
"""Where matrices go, by name, as PEFT wants it: ends of modules' names, or a pattern for whole names."""

Targets = Literal["attention", "cross-attention", "transformer", "everything"]


@contextmanager
def lora_layers(unet: Any, rank: int, seed: int, targets: Targets = "attention") -> Iterator[dict[str, nn.Parameter]]:
    """The matrices A [rank, in] and B [out, rank] of every targeted layer, by name; gone after the context."""
    before = {id(p) for p in unet.parameters()}
    asked = {name: p.requires_grad for name, p in unet.named_parameters()}
    devices = [unet.device] if unet.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # PEFT initialises from torch's global generator
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS[targets])
        unet.add_adapter(config, adapter_name=ADAPTER)
    try:
        yield {name: p for name, p in unet.named_parameters() if id(p) not in before}
    finally:
        unet.unload_lora()
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(asked[name])
