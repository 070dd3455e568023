"""Adapters of PEFT in a part of a model, and out again without a trace.

PEFT and diffusers take seconds to import, and attacks are also imported to be listed: so they are imported where they are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from imma_cli.attacks import AttackSettings, Choice, Space
from imma_cli.errors import ImmaError

ADAPTER = "imma"
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS: dict[str, list[str] | str] = {
    "attention": PROJECTIONS,
    "cross-attention": r".*\.attn2\.to_(q|k|v|out\.0)",
    "transformer": [*PROJECTIONS, "ff.net.0.proj", "ff.net.2"],
    "everything": [*PROJECTIONS, "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "proj_in", "proj_out"],
}
"""Where adapters go in a UNet, by name, as PEFT wants it: ends of modules' names, or a pattern for whole names."""
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
"""The projections of CLIP's text encoder."""

Targets = Literal["attention", "cross-attention", "transformer", "everything"]


@dataclass(frozen=True)
class MatrixSettings(AttackSettings):
    """Settings of attacks that put low-rank matrices beside layers of the UNet."""

    rank: int = 4
    """Rank of the matrices."""
    targets: Targets = "attention"
    """Which layers get matrices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")


MATRIX_SEARCH: Mapping[str, Space] = {"rank": Choice((1, 4, 16)), "targets": Choice(tuple(TARGETS))}


@contextmanager
def adapter(network: nn.Module, config: Any, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters, by name, that PEFT's *config* adds to *network*; gone after the context.

    Raises:
        ImmaError: PEFT cannot put that method into these layers; says why.
    """
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import inject_adapter_in_model

    before = {id(p) for p in network.parameters()}
    asked = {name: p.requires_grad for name, p in network.named_parameters()}
    on_gpu = [p.device for p in network.parameters() if p.device.type == "cuda"][:1]
    try:
        with torch.random.fork_rng(devices=on_gpu), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT would do on other devices
            warnings.filterwarnings("error", "Invalid")  # it would go on with another size than was asked for
            torch.manual_seed(seed)  # PEFT initialises from torch's global generator
            try:
                inject_adapter_in_model(config, network, adapter_name=ADAPTER)
            except Exception as error:
                raise ImmaError(
                    f"PEFT cannot put {config.peft_type.value} into these layers.",
                    [str(error)],
                    "Choose another size or other targets.",
                ) from error
        added = {name: p for name, p in network.named_parameters() if id(p) not in before}
        # beside weights that are held in 16 bits PEFT takes 16 too: too few to learn in
        for parameter in added.values():
            parameter.data = parameter.data.float()
        yield added
    finally:
        recurse_remove_peft_layers(network)
        network.__dict__.pop("peft_config", None)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(asked[name])


def lora(rank: int, targets: list[str] | str, **options: Any) -> Any:
    """PEFT's configuration of LoRA with a scale of 1 (alpha = rank), which every program that reads such files agrees on."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, **options)


def lora_in(
    unet: nn.Module, settings: MatrixSettings, seed: int, **options: Any
) -> AbstractContextManager[dict[str, nn.Parameter]]:
    """LoRA beside the layers of *unet* that *settings* target."""
    return adapter(unet, lora(settings.rank, TARGETS[settings.targets], **options), seed)
