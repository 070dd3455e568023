"""LPIPS, the learned perceptual distance of Zhang et al. (arXiv 1801.03924), version 0.1, from weights on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imma_cli.errors import ImmaError
from imma_cli.verification.metrics import Metric, hookimpl
from imma_metrics._pictures import SizedSettings, squares

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 8
# The scaling layer: to what ImageNet's mean and deviation become for pictures in [−1, 1], as LPIPS rounds them
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Conv(NamedTuple):
    """A convolution followed by ReLU; *tapped* where LPIPS looks at the ReLU's output."""

    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    tapped: bool = False


class Pool(NamedTuple):
    """A maximum over *kernel* × *kernel* places, every second one."""

    kernel: int


class Net(NamedTuple):
    """A backbone up to its last tapped layer, numbered as torchvision's ``features`` are."""

    layers: tuple[Conv | Pool, ...]
    weights: str


NETS = {
    "alex": Net(
        (
            Conv(64, 11, 4, 2, tapped=True),
            Pool(3),
            Conv(192, 5, 1, 2, tapped=True),
            Pool(3),
            Conv(384, tapped=True),
            Conv(256, tapped=True),
            Conv(256, tapped=True),
        ),
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    ),
    "vgg": Net(
        (
            *(Conv(64), Conv(64, tapped=True), Pool(2)),
            *(Conv(128), Conv(128, tapped=True), Pool(2)),
            *(Conv(256), Conv(256), Conv(256, tapped=True), Pool(2)),
            *(Conv(512), Conv(512), Conv(512, tapped=True), Pool(2)),
            *(Conv(512), Conv(512), Conv(512, tapped=True)),
        ),
        "https://download.pytorch.org/models/vgg16-397923af.pth",
    ),
}
LINEAR = "https://github.com/richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1"


@dataclass(frozen=True)
class LpipsSettings(SizedSettings):
    """Settings of LPIPS."""

    net: str = "alex"
    """The backbone: ``alex`` (AlexNet) or ``vgg`` (VGG16)."""
    backbone: str = ""
    """File with torchvision's ImageNet weights of the backbone."""
    linear: str = ""
    """File with LPIPS' own weights for that backbone, ``alex.pth`` or ``vgg.pth`` of version 0.1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.net not in NETS:
            raise ValueError(f"net must be {' or '.join(NETS)}, not {self.net!r}")


class Lpips(Metric):
    """1 − LPIPS, so that, as for every metric, higher is more similar; 1 for identical pictures, below 0 at worst."""

    name = "lpips"
    summary = "how alike two pictures look, place by place: 1 − LPIPS, at most 1"
    Settings = LpipsSettings
    settings: LpipsSettings

    def __init__(self, settings: LpipsSettings) -> None:
        super().__init__(settings)
        self._network: nn.Sequential | None = None
        self._linear: list[Tensor] = []

    def missing(self) -> list[str]:
        wanted = {"backbone": NETS[self.settings.net].weights, "linear": f"{self.settings.net}.pth from {LINEAR}"}
        given = {name: getattr(self.settings, name) for name in wanted}
        return [
            f"there is no file {given[name]}; download {source}"
            if given[name]
            else f"lpips:{name}=FILE is not set; download {source}"
            for name, source in wanted.items()
            if not given[name] or not Path(given[name]).expanduser().is_file()
        ]

    def prepare(self, device: str = "cpu") -> None:
        super().prepare(device)
        net = NETS[self.settings.net]
        network = _build(net)
        backbone = _weights(self.settings.backbone, {f"features.{k}": v for k, v in network.state_dict().items()})
        network.load_state_dict({key.removeprefix("features."): weight for key, weight in backbone.items()})
        tapped = [layer.channels for layer in net.layers if isinstance(layer, Conv) and layer.tapped]
        shapes = {f"lin{i}.model.1.weight": (1, channels, 1, 1) for i, channels in enumerate(tapped)}
        linear = _weights(self.settings.linear, shapes)
        self._linear = [linear[key].to(device) for key in shapes]
        self._network = network.requires_grad_(False).eval().to(device)

    def similarity(self, references: Sequence[Image.Image], images: Sequence[Image.Image]) -> NDArray[np.float64]:
        if self._network is None:
            self.prepare()
        table = np.empty((len(references), len(images)))
        # the references stay, the images pass by in batches: VGG's features of one picture take 32 MB
        rows = [features for batch in self._features(references) for features in batch]
        column = 0
        for batch in self._features(images):
            for row, reference in enumerate(rows):
                table[row, column : column + len(batch)] = [1 - self._distance(reference, image) for image in batch]
            column += len(batch)
        return table

    def _features(self, images: Sequence[Image.Image]) -> Iterator[list[list[Tensor]]]:
        """By batch and picture: the tapped layers' outputs [C, h, w], of length 1 at each place."""
        import torch

        assert self._network is not None
        device = self._linear[0].device
        shift, scale = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (SHIFT, SCALE))
        taps = [layer.tapped for layer in NETS[self.settings.net].layers if isinstance(layer, Conv)]
        for start in range(0, len(images), BATCH):
            pixels = torch.from_numpy(squares(images[start : start + BATCH], self.settings.side)).to(device)
            hidden = (pixels * 2 - 1 - shift) / scale
            tapped = []
            which = iter(taps)
            with torch.inference_mode():
                for layer in self._network:
                    hidden = layer(hidden)
                    if isinstance(layer, torch.nn.ReLU) and next(which):
                        tapped.append(hidden / (hidden.square().sum(1, keepdim=True).sqrt() + 1e-10))
            yield [list(picture) for picture in zip(*(layer.unbind() for layer in tapped), strict=True)]

    def _distance(self, a: list[Tensor], b: list[Tensor]) -> float:
        """The squared differences, weighted by channel, averaged over places, summed over layers: equation 1."""
        layers = zip(self._linear, a, b, strict=True)
        return float(sum((w[0] * (x - y).square()).sum(0).mean() for w, x, y in layers))


def _build(net: Net) -> nn.Sequential:
    from torch import nn

    modules: list[nn.Module] = []
    channels = 3
    for layer in net.layers:
        if isinstance(layer, Pool):
            modules.append(nn.MaxPool2d(layer.kernel, 2))
        else:
            modules += [nn.Conv2d(channels, layer.channels, layer.kernel, layer.stride, layer.padding), nn.ReLU()]
            channels = layer.channels
    return nn.Sequential(*modules)


def _weights(file: str, wanted: Mapping[str, Tensor | tuple[int, ...]]) -> dict[str, Tensor]:
    """The *wanted* tensors, given by name and shape, of a state dict; it may hold others, such as the classifier's.

    Raises:
        ImmaError: the file is no state dict, or tensors are missing, misshapen or not finite.
    """
    import torch

    try:
        state = torch.load(Path(file).expanduser(), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the file is
        raise ImmaError(f"{file} holds no weights.", [" ".join(str(error).split())[:200]]) from error
    if not isinstance(state, dict):
        raise ImmaError(f"{file} holds no weights.", [f"it holds a {type(state).__name__}, not tensors by name"])
    reasons, weights = [], {}
    for key, like in wanted.items():
        shape, weight = tuple(getattr(like, "shape", like)), state.get(key)
        if not isinstance(weight, torch.Tensor):
            reasons.append(f"it has no tensor {key}")
        elif tuple(weight.shape) != shape:
            reasons.append(f"{key} has shape {tuple(weight.shape)}, not {shape}")
        elif not weight.isfinite().all():
            reasons.append(f"{key} holds NaN or Inf")
        else:
            weights[key] = weight.float()
    if reasons:
        raise ImmaError(f"{file} holds other weights than LPIPS needs here.", reasons[:8])
    return weights


@hookimpl
def imma_metrics() -> list[type[Metric]]:
    return [Lpips]
