"""Metrics of the pixels themselves: no weights, nothing learned, nothing to download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imma_cli.verification.metrics import Metric, hookimpl
from imma_metrics._pictures import SizedSettings, squares

# Of Wang et al. 2004: an 11 × 11 Gaussian window of σ = 1.5, and constants that keep flat patches from dividing by zero
RADIUS, SIGMA = 5, 1.5
C1, C2 = 0.01**2, 0.03**2


class Pixel(Metric):
    """How alike two pictures are pixel for pixel: finds copies, and nothing that has moved."""

    name = "pixel"
    summary = "1 − mean absolute difference of the pixels, 0 to 1"
    Settings = SizedSettings
    settings: SizedSettings

    def similarity(self, references: Sequence[Image.Image], images: Sequence[Image.Image]) -> NDArray[np.float64]:
        candidates = squares(images, self.settings.side)
        rows = [
            1 - np.abs(candidates - r).mean((1, 2, 3), dtype=np.float64)
            for r in squares(references, self.settings.side)
        ]
        return np.array(rows).reshape(len(references), len(images))


class Ssim(Metric):
    """Structural similarity (Wang et al., IEEE TIP 13(4), 2004), per colour channel, windows inside the picture only.

    torchmetrics has the same map, but averages also over windows that reach beyond the edge into a mirror image, and computes
    every pair anew with a square kernel. Here the means and variances of each picture are computed once, and the Gaussian runs
    along rows, then columns: all pairs of a trial take seconds on one processor core, not minutes.
    """

    name = "ssim"
    summary = "structural similarity of brightness, contrast and structure in small windows, −1 to 1"
    Settings = SizedSettings
    settings: SizedSettings

    def similarity(self, references: Sequence[Image.Image], images: Sequence[Image.Image]) -> NDArray[np.float64]:
        candidates = [_moments(x) for x in _doubles(images, self.settings.side)]
        table = np.empty((len(references), len(images)))
        for row, (r, r_mean, r_variance) in enumerate(map(_moments, _doubles(references, self.settings.side))):
            for column, (x, x_mean, x_variance) in enumerate(candidates):
                product = r_mean * x_mean
                covariance = _blur(r * x) - product
                likeness = (2 * product + C1) * (2 * covariance + C2)
                likeness /= (r_mean**2 + x_mean**2 + C1) * (r_variance + x_variance + C2)
                table[row, column] = likeness.mean()
        return table


def _doubles(images: Sequence[Image.Image], side: int) -> NDArray[np.float64]:
    # variances are differences of nearly equal numbers: float32 would leave noise where a picture is flat
    return squares(images, side).astype(np.float64)


def _moments(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """A picture [3, H, W], and the mean and the variance in the window around each place, [3, H − 10, W − 10]."""
    mean = _blur(x)
    return x, mean, _blur(x * x) - mean**2


def _blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Gaussian-weighted mean around each place whose window lies inside: [..., H, W] to [..., H − 10, W − 10]."""
    weights = np.exp(-(np.arange(-RADIUS, RADIUS + 1) ** 2) / (2 * SIGMA**2))
    weights /= weights.sum()
    height, width = (n - 2 * RADIUS for n in x.shape[-2:])
    down = sum(w * x[..., i : i + height, :] for i, w in enumerate(weights))
    across: NDArray[np.float64] = sum(w * down[..., i : i + width] for i, w in enumerate(weights))
    return across


@hookimpl
def imma_metrics() -> list[type[Metric]]:
    return [Pixel, Ssim]
