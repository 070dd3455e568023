"""Less memory for a step: what was computed on the way forward is partly computed again on the way back.

Autograd keeps what each operation needs for its gradient. Activations and norms keep what they got, and the layer behind
them keeps what they gave: the second is made from the first again, which takes next to no time. diffusers' gradient
checkpointing runs every block a second time, convolutions and attention with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from imma_cli.families.halving import widening_of

Recompute = Literal["nothing", "activations", "blocks"]
"""nothing: everything is kept. activations: what activations, frozen norms and widened weights give is made again. blocks: all is."""
Again = Callable[[], Tensor]
Norm = nn.GroupNorm | nn.LayerNorm


def usual(*, on_cpu: bool, small: bool, halved: bool) -> Recompute:
    """What is computed again where nobody says."""
    # looking at every tensor from Python is little beside a large model's step on a processor; the widened copies of halved weights would otherwise be kept
    return "activations" if halved or (on_cpu and not small) else "nothing"


def recompute(unet: Any, what: Recompute) -> None:
    """Have diffusers' *unet* compute *what* again. Gradients stay the same, to the last bit on a CPU."""
    if what == "blocks":
        unet.enable_gradient_checkpointing(_blocks)
    else:
        unet.disable_gradient_checkpointing()
    own = unet.__dict__.get("forward")
    if isinstance(own, partial) and own.func is _keeping_less:
        del unet.forward
    if what == "activations" and "forward" not in unet.__dict__:  # another's stays
        unet.forward = partial(_keeping_less, unet)


def _blocks(block: nn.Module | Callable[..., Any], *inputs: Any) -> Any:
    call = block.__call__ if isinstance(block, nn.Module) else block
    return checkpoint(call, *inputs, use_reentrant=False)


def _keeping_less(unet: nn.Module, *inputs: Any, **options: Any) -> Any:
    # a subclass may compute something else
    found = (module for module in unet.modules() if isinstance(module, Norm) and type(module) in get_args(Norm))
    norms = {id(norm.weight): norm for norm in found}
    with saved_tensors_hooks(partial(_kept, norms), _made):
        return type(unet).forward(unet, *inputs, **options)


def _kept(norms: Mapping[int, Norm], tensor: Tensor) -> Again:
    """How to get *tensor* again, without keeping it where what makes it is kept anyway."""
    if made_by := widening_of(tensor):
        return made_by
    node: Any = tensor.grad_fn
    if node is None:
        return partial(_unchanged, tensor, tensor._version)
    number = tensor.output_nr
    # what a layer makes of its inputs: rows of them, of fewer bits in mixed precision
    for step in ("ViewBackward0", "ToCopyBackward0"):
        if node is not None and node.name() == step:
            node, number = node.next_functions[0]
    # a norm's other outputs, which it keeps for itself, are its statistics
    if node is not None and number == 0 and tensor._version == 0 and (made_by := _making(norms, node)):
        laid_out = tensor.size(), tensor.stride()
        return partial(_like, laid_out, tensor.dtype, tensor.device, made_by)
    # torch forbids to keep the tensor itself: with the operation that keeps what it gave, it would be a circle
    return partial(_unchanged, tensor.detach(), tensor._version)


def _making(norms: Mapping[int, Norm], node: Any) -> Again | None:
    """How the operation *node* makes its output, where it keeps what that takes."""
    name = node.name()
    if name == "SiluBackward0":
        return lambda: F.silu(node._saved_self)
    if name == "GeluBackward0":
        return lambda: F.gelu(node._saved_self, approximate=node._saved_approximate)
    if name not in ("NativeGroupNormBackward0", "NativeLayerNormBackward0"):
        return None
    # without weight and bias nobody can tell whose output it is; neither keeps all that its module knows, and a weight that is trained comes out as another object: such a norm's output is kept
    weight = node._saved_weight
    norm = norms.get(id(weight))
    if norm is None or norm.bias is None or norm.bias.requires_grad:
        return None
    bias = partial(_unchanged, norm.bias, norm.bias._version)
    if isinstance(norm, nn.LayerNorm):
        return lambda: F.layer_norm(node._saved_input, norm.normalized_shape, weight, bias(), norm.eps)
    return lambda: F.group_norm(node._saved_input, norm.num_groups, weight, bias(), norm.eps)


def _like(
    laid_out: tuple[torch.Size, tuple[int, ...]], dtype: torch.dtype, device: torch.device, again: Again
) -> Tensor:
    """What *again* makes, with the size and the strides of the tensor that it stands for."""
    size, stride = laid_out
    made = again().to(device, dtype).reshape(size)
    return (
        made if made.stride() == stride else torch.empty_strided(size, stride, dtype=dtype, device=device).copy_(made)
    )


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    if tensor._version != version:  # as autograd would say it, which does not look where others keep its tensors
        raise RuntimeError(
            "A tensor that a gradient needs was changed in place between the way there and the way back."
        )
    return tensor


@torch.no_grad()
def _made(again: Again) -> Tensor:
    return again()
