"""Checkpoints of the real sizes with random weights, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch

from imma_cli.checkpoints import compose_single_file
from imma_cli.checkpoints.row_map import empty_network
from imma_cli.families import CONFIGS, family_named
from imma_cli.families.model import Model

CONFIG = CONFIGS / "sd1"


def random_network(part: str, config: Path, dtype: torch.dtype, generator: torch.Generator) -> torch.nn.Module:
    """The network that *config* describes, with weights on which activations neither vanish nor explode."""
    network: torch.nn.Module = empty_network(part, config).to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() > 1:
                inputs = weight[0].numel()
                weight.normal_(0, inputs**-0.5, generator=generator)
            else:
                weight.fill_(1.0 if name.endswith("weight") else 0.0)
        for name, buffer in network.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return network


def sd1(work: Path, dtype: str) -> Path:
    """The checkpoint in the folder *work*, made where it is not there yet."""
    path = work / f"sd1-{dtype}.safetensors"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_sd1(path, getattr(torch, dtype))
    return path


def write_sd1(path: Path, dtype: torch.dtype) -> Path:
    """An SD 1.x single file of the real size: 4.3 GB in float32, 2.1 GB in float16."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    networks = {part: random_network(part, CONFIG, dtype, generator) for part in ("unet", "vae", "text_encoder")}
    model = Model(family_named("sd1"), **networks, tokenizer=None, scheduler=None)
    save_file(compose_single_file(model, CONFIG), path, {"format": "pt"})
    return path
