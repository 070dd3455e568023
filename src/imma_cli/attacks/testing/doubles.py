"""Stand-ins for testing pipelines: an attack that does nothing, and a metric that always says the same.

No entry point leads here, so that no real run can use them by mistake. ``IMMA_TEST_PLUGINS=1`` brings them in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from imma_cli.attacks import Attack, Preset, hookimpl
from imma_cli.verification.metrics import Metric, PluginSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor, nn

    from imma_cli.concepts.batches import Batch
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model


class Nothing(Attack):
    """One number beside the model that its loss does not depend on: the attacked model is the model."""

    name = "nothing"
    summary = "does nothing, for testing pipelines: no verdict is worth anything with it"
    trains = "one number that nothing depends on"
    paper = "none"
    search: ClassVar = {}
    presets: ClassVar = {
        "paper": Preset(learning_rate=1e-3, outer_learning_rate=1e-5, steps=2),
        "small": Preset(learning_rate=1e-3, outer_learning_rate=1e-4, steps=2),
    }

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        import torch

        self._idle = torch.nn.Parameter(torch.zeros((), device=model.device), requires_grad=False)
        yield {"idle": self._idle}

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return super().loss(model, batch) + 0 * self._idle


@dataclass(frozen=True)
class FixedSettings(PluginSettings):
    """Settings of the fixed metric."""

    value: float = 0.5
    """The similarity of any two pictures."""


class Fixed(Metric):
    """Whatever the pictures are, they are as similar as the settings say."""

    name = "fixed"
    summary = "the same number for all pictures, for testing pipelines"
    Settings = FixedSettings
    settings: FixedSettings

    def similarity(self, references: Sequence[Image.Image], images: Sequence[Image.Image]) -> NDArray[np.float64]:
        import numpy as np

        return np.full((len(references), len(images)), self.settings.value)


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [Nothing]


@hookimpl
def imma_metrics() -> list[type[Metric]]:
    return [Fixed]
