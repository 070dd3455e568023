"""What CLIP and DINO share: a vision model of transformers, its own preprocessing, and the cosine of its embeddings."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imma_cli.errors import ImmaError
from imma_cli.verification.metrics import Metric

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 32
NAMED = 5
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# "name" or "organisation/name"; what else has a slash, a dot in front or a tilde is meant to be a folder
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")


class TransformersMetric(Metric):
    """Cosine similarity of the embeddings of one model, given by the setting ``model``: a folder or a name on the hub."""

    types: ClassVar[frozenset[str]]
    """The ``model_type`` of the configurations that this metric can read."""
    settings: Any

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._loaded: tuple[Any, Any] | None = None

    @abstractmethod
    def load(self, source: str, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        """The model of *source* and *config*, and transformers' report on loading it."""

    @abstractmethod
    def embed(self, model: Any, pixel_values: Tensor) -> Tensor:
        """Embeddings [B, D] of preprocessed pictures [B, 3, H, W]."""

    def missing(self) -> list[str]:
        return self._folder_faults() or self._download_needed()

    def prepare(self, device: str = "cpu") -> None:
        """Load the model and embed one picture, so that a folder that does not fit together is refused here."""
        faults = self._folder_faults()
        if faults:
            raise ImmaError(f"The metric {self.name} cannot be used here.", faults)
        try:
            processor, model = self._load()
            loaded = processor, model.to(device)
            self._embeddings(loaded, [Image.new("RGB", (48, 64), "teal")])
        except ImmaError:
            raise
        except Exception as error:  # a foreign folder, or a hub out of reach, may raise anything
            raise ImmaError(
                f"The model {self.settings.model} of the metric {self.name} cannot be used.",
                [" ".join(str(error).split()) or type(error).__name__],
                f"Download it where there is a network (hf download {self.settings.model} --local-dir FOLDER) "
                f"and give the folder: {self.name}:model=FOLDER"
                if self._is_on_hub()
                else f"{self.name}:model=FOLDER takes a folder as save_pretrained of transformers writes it.",
            ) from error
        self._loaded = loaded

    def similarity(self, references: Sequence[Image.Image], images: Sequence[Image.Image]) -> NDArray[np.float64]:
        if not references or not images:
            return np.empty((len(references), len(images)))
        if self._loaded is None:
            self.prepare()
        assert self._loaded is not None
        return (self._embeddings(self._loaded, references) @ self._embeddings(self._loaded, images).T).numpy()

    def _embeddings(self, loaded: tuple[Any, Any], images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of length 1, [N, D], float64."""
        import torch

        processor, model = loaded
        batches = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                batch = [image.convert("RGB") for image in images[start : start + BATCH]]
                pixel_values = processor(images=batch, return_tensors="pt")["pixel_values"]
                batches.append(self.embed(model, pixel_values.to(model.device)).double().cpu())
        embeddings = torch.cat(batches)
        if not embeddings.isfinite().all():
            raise ImmaError(f"The model {self.settings.model} of the metric {self.name} gives NaN or Inf.")
        return torch.nn.functional.normalize(embeddings, dim=-1)

    def _load(self) -> tuple[Any, Any]:
        import torch

        from imma_cli.checkpoints.loading import quiet

        source = str(self._folder()) if self._folder().is_dir() else self.settings.model
        with quiet():
            from transformers import AutoConfig, AutoImageProcessor

            config = AutoConfig.from_pretrained(source)
            if config.model_type not in self.types:
                raise ImmaError(
                    f"The metric {self.name} cannot read {self.settings.model}.",
                    [f"it is a model of type {config.model_type}, not {' or '.join(sorted(self.types))}"],
                )
            # always Pillow, whether torchvision is there or not: the two do not scale pictures quite alike
            processor = AutoImageProcessor.from_pretrained(source, backend="pil")
            # the dtype, or transformers would take over the file's; the sizes, to name the tensors that do not fit
            options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
            model, report = self.load(source, config, **options)
        # what the file lacks is filled at random, without an error; a pooler is not used
        absent = [key for key in sorted(report["missing_keys"]) if not key.startswith("pooler.")]
        misfits = sorted(key for key, *_ in report["mismatched_keys"])
        if absent or misfits:
            raise ImmaError(
                f"The weights in {self.settings.model} do not belong to its config.json.",
                [f"it has no {key}" for key in absent[:NAMED]]
                + [f"{key} has another shape" for key in misfits[:NAMED]],
            )
        return processor, model.requires_grad_(False).eval()

    def _folder(self) -> Path:
        return Path(self.settings.model).expanduser()

    def _is_on_hub(self) -> bool:
        return not self._folder().exists() and HUB_NAME.fullmatch(self.settings.model) is not None

    def _folder_faults(self) -> list[str]:
        folder = self._folder()
        if not self.settings.model:
            return [f"{self.name}:model= is empty"]
        if self._is_on_hub():
            return []
        if not folder.is_dir():
            return [f"there is no folder {self.settings.model}, and this is no name of a model on the hub"]
        lacks = [name for name in ("config.json", "preprocessor_config.json") if not (folder / name).is_file()]
        if not any((folder / name).is_file() for name in WEIGHTS):
            lacks.append("model.safetensors")
        return [f"{self.settings.model} has no {name}" for name in lacks]

    def _download_needed(self) -> list[str]:
        if not self._is_on_hub():
            return []
        from huggingface_hub import try_to_load_from_cache

        if any(isinstance(try_to_load_from_cache(self.settings.model, name), str) for name in WEIGHTS):
            return []
        return [
            f"{self.settings.model} is not on this machine yet: it is downloaded when first used. "
            f"Without a network, give a folder: {self.name}:model=FOLDER"
        ]
