"""Attacks that train the model's own weights, and give them back as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def given_back(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """*parameters*, to be changed; afterwards they hold their old values again, bit for bit."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield dict(parameters)
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
