"""What an attack learned, as files that other programs load.

The libraries that know these files take seconds to import, so each is imported where a file is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imma_attacks._peft import ADAPTER

KOHYA = "kohya.safetensors"
CUSTOM_DIFFUSION = "pytorch_custom_diffusion_weights.safetensors"


def save_lora(folder: Path, unet: nn.Module, text_encoder: nn.Module | None = None) -> None:
    """The adapters in both networks: ``pytorch_lora_weights.safetensors`` for diffusers, ``kohya.safetensors`` for A1111 and ComfyUI."""
    from diffusers import StableDiffusionPipeline

    parts = {"unet": unet} if text_encoder is None else {"unet": unet, "text_encoder": text_encoder}
    learned = {part: _adapter_state(network) for part, network in parts.items()}
    given: dict[str, Any] = {f"{part}_lora_layers": state for part, state in learned.items()}
    given |= {f"{part}_lora_adapter_metadata": _config(network).to_dict() for part, network in parts.items()}
    StableDiffusionPipeline.save_lora_weights(folder, **given)
    kohya: dict[str, Tensor] = {}
    for part, state in learned.items():
        kohya |= _as_kohya(part, state, _config(parts[part]))
    save_file(kohya, folder / KOHYA, metadata={"ss_network_module": "networks.lora"})


def save_peft(folder: Path, network: nn.Module) -> None:
    """The adapter in *network* as ``PeftModel.from_pretrained(network, folder)`` reads it."""
    _config(network).save_pretrained(folder)
    state = {f"base_model.model.{name}": tensor for name, tensor in _adapter_state(network).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_words(folder: Path, words: Sequence[str], embeddings: Tensor) -> None:
    """One file for each of *words*, with its row of *embeddings* [n, D]; diffusers, A1111 and ComfyUI read it."""
    for word, row in zip(words, embeddings.detach().cpu(), strict=True):
        save_file({word: row.clone()}, folder / f"{word.strip('<>')}.safetensors")


def save_custom_diffusion(folder: Path, unet: Any, projections: Mapping[str, Tensor]) -> None:
    """*projections* (the weights of K and V of cross-attention, by their layer's name) as ``unet.load_attn_procs`` reads them."""
    state: dict[str, Tensor] = {name: torch.zeros(0) for name in unet.attn_processors if ".attn1." in name}
    for name, weight in projections.items():
        layer, projection = name.rsplit(".", 1)
        state[f"{layer}.processor.{projection}_custom_diffusion.weight"] = weight.detach().cpu().contiguous()
    save_file(state, folder / CUSTOM_DIFFUSION)


def _config(network: Any) -> Any:
    return network.peft_config[ADAPTER]


def _adapter_state(network: Any) -> dict[str, Tensor]:
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    # some methods share matrices between layers, which a file cannot
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def _as_kohya(part: str, state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """kohya's names. A file for one text encoder calls it ``te``; its scale is alpha / rank, whatever PEFT's is."""
    from diffusers.utils import convert_state_dict_to_kohya

    magnitudes = {n: t for n, t in state.items() if n.endswith(".lora_magnitude_vector")}
    matrices = {f"{part}.{n}": t for n, t in state.items() if n not in magnitudes}
    converted: dict[str, Tensor] = convert_state_dict_to_kohya(matrices)
    found = {name.replace("lora_te1_", "lora_te_"): tensor for name, tensor in converted.items()}
    for name, tensor in found.items():
        if name.endswith(".alpha"):
            rank = int(tensor)
            scale = config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)
            found[name] = torch.tensor(scale * rank)
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part]
    for name, tensor in magnitudes.items():
        layer = name.removesuffix(".lora_magnitude_vector").replace(".", "_")
        # [out, 1], or [out, 1, 1, 1] of a convolution
        found[f"{prefix}{layer}.dora_scale"] = tensor.reshape(-1, *(1,) * max(1, tensor.ndim - 1))
    return found
