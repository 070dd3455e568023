"""S_u: the weights that hardening may change."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn

from imma_cli.errors import ImmaError

Protect = Literal["unet", "attention", "cross-attention", "kv"]
PATTERNS: dict[Protect, str] = {
    "unet": r"",
    # attn1 is self-attention, attn2 is cross-attention in every UNet of diffusers
    "attention": r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)$",
    "cross-attention": r"\.attn2\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)$",
    "kv": r"\.attn2\.(to_k|to_v)\.(weight|bias)$",
}


def protected_weights(unet: nn.Module, protect: Protect) -> dict[str, nn.Parameter]:
    """The weights of *unet* that *protect* names, by state-dict name.

    Raises:
        ImmaError: the network has none.
    """
    pattern = re.compile(PATTERNS[protect])
    chosen = {name: p for name, p in unet.named_parameters() if pattern.search(name)}
    if not chosen:
        raise ImmaError(f"This model has no weights of the kind {protect!r} to protect.")
    return chosen
