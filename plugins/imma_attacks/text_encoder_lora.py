"""LoRA (arXiv 2106.09685) in the UNet and the text encoder together, as the trainers that most people use have it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from imma_attacks._exports import save_lora
from imma_attacks._peft import TEXT_TARGETS, adapter, lora, lora_in
from imma_attacks._rates import check_multiple
from imma_attacks.lora import Lora, LoraSettings
from imma_cli.attacks import Attack, Choice, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model

TEXT = "text_encoder."


@dataclass(frozen=True)
class TextEncoderLoraSettings(LoraSettings):
    """Settings of LoRA in both networks."""

    text_rate: float = 0.5
    """The text encoder's rate, as a multiple of the UNet's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_multiple("text_rate", self.text_rate)


class TextEncoderLora(Lora):
    """Low-rank matrices in the UNet, and beside the attention projections of the text encoder."""

    name = "text-encoder-lora"
    summary = "LoRA on the UNet and the text encoder together"
    trains = "LoRA matrices beside layers of the UNet and the text encoder"
    Settings = TextEncoderLoraSettings
    settings: TextEncoderLoraSettings
    trains_text = True
    computes_with = ("text_encoder",)
    search: ClassVar = {**Lora.search, "text_rate": Choice((0.1, 0.5, 1.0))}

    def rate_of(self, parameter: str) -> float:
        return self.settings.text_rate if parameter.startswith(TEXT) else 1.0

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        unet = lora_in(model.unet, self.settings, seed)
        text = adapter(model.text_encoder, lora(self.settings.rank, TEXT_TARGETS), seed)
        with unet as in_unet, text as in_text:
            yield in_unet | {TEXT + name: p for name, p in in_text.items()}

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        save_lora(folder, model.unet, model.text_encoder)


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [TextEncoderLora]
