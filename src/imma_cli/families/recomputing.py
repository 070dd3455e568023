"""Less memory for a step: what was computed on the way forward is partly computed again on the way back.

diffusers' gradient checkpointing runs every block a second time, convolutions and attention with it. Selective
checkpointing keeps what these give, and computes again what is cheap: norms, activations, sums, linear layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["nothing", "cheap", "blocks"]
"""nothing: everything is kept for the way back. cheap: all but convolutions and attention is computed again. blocks: all of it is."""


def usual(*, on_cpu: bool, small: bool) -> Recompute:
    """What is computed again where nobody says: what is cheap, where that is little of a step's time."""
    return "cheap" if on_cpu and not small else "nothing"


def recompute(unet: Any, what: Recompute) -> None:
    """Have diffusers' *unet* compute *what* again. Gradients stay the same, to the last bit on a CPU."""
    if what == "nothing":
        unet.disable_gradient_checkpointing()
    else:
        unet.enable_gradient_checkpointing(_cheap if what == "cheap" else _blocks)


def _blocks(block: nn.Module | Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(_call(block), *inputs, use_reentrant=False)


def _cheap(block: nn.Module | Callable[..., Any], *inputs: Any) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(_call(block), *inputs, use_reentrant=False, context_fn=contexts)


def _call(block: nn.Module | Callable[..., Any]) -> Callable[..., Any]:
    return block.__call__ if isinstance(block, nn.Module) else block


def _policy(context: Any, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    name = str(getattr(operation, "_schema", operation)).partition("(")[0]
    costly = "convolution" in name or ("attention" in name and "backward" not in name)
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE
