"""Less memory for a step: what was computed on the way forward is partly computed again on the way back.

Autograd keeps what each operation needs for its gradient. Activations and norms keep what they got, and the layer behind
them keeps what they gave: the second is made from the first again, which takes next to no time. diffusers' gradient
checkpointing runs every block a second time, convolutions and attention with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from imma_cli.families.halving import widened_from

Recompute = Literal["nothing", "activations", "blocks"]
"""nothing: everything is kept for the way back. activations: what activations, norms and widened weights give is made again. blocks:
all is."""
Again = Callable[[], Tensor]


def usual(*, on_cpu: bool, small: bool, halved: bool) -> Recompute:
    """What is computed again where nobody says."""
    # there, keeping hold of every tensor from Python is little beside a step
    return "activations" if halved or (on_cpu and not small) else "nothing"


def recompute(unet: Any, what: Recompute) -> None:
    """Have diffusers' *unet* compute *what* again. Gradients stay the same, to the last bit on a CPU."""
    for hooks in (unet._forward_pre_hooks, unet._forward_hooks):
        for handle in [handle for handle, hook in hooks.items() if hook in (_keep_less, _keep_all)]:
            del hooks[handle]
    if what == "blocks":
        unet.enable_gradient_checkpointing(_blocks)
    else:
        unet.disable_gradient_checkpointing()
    if what == "activations":
        # functions of this module and no closures: copies of the network (copy.deepcopy) take them along
        unet.register_forward_pre_hook(_keep_less)
        unet.register_forward_hook(_keep_all, always_call=True)


def _blocks(block: nn.Module | Callable[..., Any], *inputs: Any) -> Any:
    call = block.__call__ if isinstance(block, nn.Module) else block
    return checkpoint(call, *inputs, use_reentrant=False)


def _keep_less(unet: nn.Module, inputs: Any) -> None:
    norms = {id(module.weight): module for module in unet.modules() if isinstance(module, nn.GroupNorm)}
    saved_tensors_hooks(partial(_kept, norms), _made).__enter__()


def _keep_all(unet: nn.Module, inputs: Any, outputs: Any) -> None:
    saved_tensors_hooks(_made, _made).__exit__()


def _kept(norms: Mapping[int, nn.GroupNorm], tensor: Tensor) -> Tensor | Again:
    """*tensor*, or how to make it again from what is kept anyway."""
    if narrow := widened_from(tensor):
        return narrow
    made_by: Any = tensor.grad_fn
    # a norm's other outputs, which it keeps for itself, are its statistics
    name = made_by.name() if made_by is not None and tensor.output_nr == 0 else ""
    if name == "SiluBackward0":
        return lambda: F.silu(made_by._saved_self)
    if name == "GeluBackward0":
        return lambda: F.gelu(made_by._saved_self, approximate=made_by._saved_approximate)
    if name == "NativeGroupNormBackward0" and (norm := norms.get(id(made_by._saved_weight))):
        return lambda: F.group_norm(made_by._saved_input, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return tensor


@torch.no_grad()
def _made(kept: Tensor | Again) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()
