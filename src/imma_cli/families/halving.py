"""Frozen weights in 16 bits, computed with in 32: half the memory for what nobody trains.

Checkpoints that were published in float16 lose nothing by it. bfloat16 stands in where a value is too large for float16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

ATTENTION = re.compile(r"\.attn[12]\.")
"""In every UNet of diffusers; what hardening changes is there."""


def _widened(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias as the layer computes with them."""
    device = inputs.device.type
    wanted = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
    weight = layer.weight.to(wanted)
    if weight is not layer.weight:
        weight.widened_from = layer.weight  # type: ignore[attr-defined]
    return weight, None if layer.bias is None else layer.bias.to(wanted)


def widening_of(tensor: Tensor) -> Callable[[], Tensor] | None:
    """How to make *tensor* again, where it is the widened weight of such a layer, or a view of it; else None."""
    whole = tensor if tensor._base is None else tensor._base
    narrow: Tensor | None = getattr(whole, "widened_from", None)
    if narrow is None:
        return None
    view = tensor.size(), tensor.stride(), tensor.storage_offset()
    dtype, version = tensor.dtype, narrow._version

    def widened() -> Tensor:
        if narrow._version != version:
            raise RuntimeError("A weight in 16 bits was changed between the way there and the way back.")
        return narrow.to(dtype).as_strided(*view)

    return widened


class HalvedLinear(nn.Linear):
    """A linear layer that widens its weight for as long as it computes."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, *_widened(self, inputs))


class HalvedConv2d(nn.Conv2d):
    """A convolution that widens its weight for as long as it computes."""

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self._conv_forward(inputs, *_widened(self, inputs)))


HALVED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: HalvedLinear, nn.Conv2d: HalvedConv2d}


def halved_layers(unet: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of *unet* outside its attention, by name."""
    for name, module in unet.named_modules():
        if type(module) in HALVED and not ATTENTION.search(name):
            yield name, module


@torch.no_grad()
def halve(unet: nn.Module) -> None:
    """Hold the weights of *unet* outside its attention in 16 bits, but for norms and biases, which are small."""
    for _, module in halved_layers(unet):
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        weight.data = narrowed(weight.data)
        # the class and not a hook: copies of the network (copy.deepcopy) keep it, and PEFT knows it for what it is
        module.__class__ = HALVED[type(module)]


def narrowed(weight: Tensor) -> Tensor:
    """*weight* in 16 bits; itself, where it is already."""
    if weight.element_size() == 2:
        return weight
    known = not isinstance(weight, FakeTensor)
    fits = not known or bool(weight.abs().max() <= torch.finfo(torch.float16).max)
    return weight.to(torch.float16 if fits else torch.bfloat16)
