"""DINO's embeddings of pictures (Caron et al., arXiv 2104.14294; DINOv2: Oquab et al., arXiv 2304.07193)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from imma_cli.verification.metrics import Metric, PluginSettings, hookimpl
from imma_metrics._transformers import TransformersMetric

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DinoSettings(PluginSettings):
    """Settings of DINO."""

    model: str = "facebook/dino-vits16"
    """A folder in the layout of transformers, or the name of a DINO or DINOv2 model on the Hugging Face hub."""


class Dino(TransformersMetric):
    """Cosine similarity of the class token after the last normalisation.

    The default is the ViT-S/16 that DreamBooth's DINO score (arXiv 2208.12242) is defined with.
    """

    name = "dino"
    summary = "which individual is depicted: cosine of DINO's class tokens, −1 to 1"
    types: ClassVar = frozenset({"vit", "dinov2", "dinov2_with_registers", "dinov3_vit"})
    Settings = DinoSettings
    settings: DinoSettings

    def load(self, source: str, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        from transformers import AutoModel

        loaded: tuple[Any, dict[str, Any]] = AutoModel.from_pretrained(source, config=config, **options)
        return loaded

    def embed(self, model: Any, pixel_values: Tensor) -> Tensor:
        # not pooler_output: ViT's pooler is a layer that DINO does not have, and would be random
        tokens: Tensor = model(pixel_values=pixel_values).last_hidden_state
        return tokens[:, 0]


@hookimpl
def imma_metrics() -> list[type[Metric]]:
    return [Dino]
