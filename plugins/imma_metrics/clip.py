"""CLIP's image embeddings (Radford et al., arXiv 2103.00020): the CLIP-I of the literature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from imma_cli.verification.metrics import Metric, PluginSettings, hookimpl
from imma_metrics._transformers import TransformersMetric

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ClipSettings(PluginSettings):
    """Settings of CLIP."""

    model: str = "openai/clip-vit-base-patch32"
    """A folder in the layout of transformers, or the name of a CLIP model on the Hugging Face hub."""


class Clip(TransformersMetric):
    """Cosine similarity of CLIP's projected image embeddings, those that are compared with text."""

    name = "clip"
    summary = "what is depicted, as text would describe it: cosine of CLIP's image embeddings, −1 to 1"
    types: ClassVar = frozenset({"clip", "clip_vision_model"})
    Settings = ClipSettings
    settings: ClipSettings

    def load(self, source: str, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        # of a whole CLIPModel it takes what pictures need and leaves the text half on the disk
        from transformers import CLIPVisionModelWithProjection as Vision

        if config.model_type == "clip":
            # the size that counts is the whole model's; the picture half may state another, which CLIPModel ignores
            config.vision_config.projection_dim = config.projection_dim
            config = config.vision_config
        loaded: tuple[Any, dict[str, Any]] = Vision.from_pretrained(source, config=config, **options)
        return loaded

    def embed(self, model: Any, pixel_values: Tensor) -> Tensor:
        embeddings: Tensor = model(pixel_values=pixel_values).image_embeds
        return embeddings


@hookimpl
def imma_metrics() -> list[type[Metric]]:
    return [Clip]
