"""LoRA matrices in a diffusers model through PEFT, and out again without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

ADAPTER = "imma"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@contextmanager
def lora_layers(unet: Any, rank: int, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """The matrices A [rank, in] and B [out, rank] of every attention projection, by name; gone after the context."""
    before = {id(p) for p in unet.parameters()}
    asked = {name: p.requires_grad for name, p in unet.named_parameters()}
    devices = [unet.device] if unet.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # PEFT initialises from torch's global generator
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), adapter_name=ADAPTER)
    try:
        yield {name: p for name, p in unet.named_parameters() if id(p) not in before}
    finally:
        unet.unload_lora()
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(asked[name])
