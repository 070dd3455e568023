"""Where the computation runs: device, attention kernel, precision. Chosen once, refused clearly, shown to the user."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from imma_cli.errors import ImmaError
from imma_cli.families.allocator import give_back_gaps
from imma_cli.families.halving import halve
from imma_cli.families.recomputing import Recompute, recompute, usual

if TYPE_CHECKING:
    from imma_cli.families.model import Model

Attention = Literal["auto", "xformers", "sdpa"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """The choices that were made; ``auto`` is resolved."""

    device: str
    attention: str
    precision: str
    attention_because: str = ""
    """Why this kernel and not the other."""
    halved: bool = False
    """Whether the UNet's weights outside its attention, which nobody trains then, are held in 16 bits."""

    def __str__(self) -> str:
        because = f" ({self.attention_because})" if self.attention_because else ""
        return f"{self.named}{because}"

    @property
    def named(self) -> str:
        """What was chosen, without why."""
        halved = " (what is frozen in 16 bits)" if self.halved else ""
        return f"{self.device}, {self.precision}{halved}, {self.attention} attention"

    def autocast(self) -> AbstractContextManager[object]:
        """The mixed precision that losses are computed in; weights and optimizer states stay float32."""
        mixed = MIXED.get(self.precision)
        return torch.autocast(torch.device(self.device).type, mixed or torch.bfloat16, enabled=mixed is not None)

    def forward(self, loss_of: Callable[[], Tensor]) -> Tensor:
        """The loss in mixed precision. Autocast is left at once: its copies of weights would outlive an optimizer's step."""
        with self.autocast():
            return loss_of()

    def apply(self, model: Model, *, recomputed: Recompute | None = None) -> Model:
        """Move *model*, switch its attention, and have a step compute again what is *recomputed*.

        None: activations for large models on processors and where weights are halved, else nothing.
        """
        if self.halved:
            halve(model.unet)
        model.to(self.device)
        if self._one_thread(model):
            # in layers this narrow threads wait for each other longer than they compute (benchmarks/threads.py)
            torch.set_num_threads(1)
        if self.attention == "xformers":
            model.family.use_xformers(model)
        if recomputed is None:
            recomputed = usual(on_cpu=self.device == "cpu", small=model.is_small, halved=self.halved)
        recompute(model.unet, recomputed)
        if self.device == "cpu" and not model.is_small:
            give_back_gaps(model.unet)
        return model

    def core_to_spare(self, model: Model) -> bool:
        """Whether *model* is computed on one core, and there are more."""
        return self._one_thread(model) and cores() > 1

    def _one_thread(self, model: Model) -> bool:
        return self.device == "cpu" and model.is_small and "OMP_NUM_THREADS" not in os.environ


def cores() -> int:
    """How many of the processor's cores this process may use."""
    allowed: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def choose_runtime(
    device: str = "auto", attention: Attention = "auto", precision: Precision = "auto", *, halved: bool = False
) -> Runtime:
    """Resolve ``auto`` and refuse what cannot work here.

    Raises:
        ImmaError: lists everything that was asked for and is not possible on this machine.
    """
    reasons: list[str] = []
    cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    # a launcher of several processes (accelerate, torchrun) tells each which GPU of the machine is its own
    if device == "cuda" and (own := os.environ.get("LOCAL_RANK", "")).isdecimal():
        device = f"cuda:{int(own)}"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        reasons.append(f"--device {device}: choose auto, cpu, cuda or cuda:N")
    elif kind == "cuda" and not cuda:
        reasons.append(f"--device {device}: this PyTorch sees no CUDA device")
    elif kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        reasons.append(f"--device {device}: there are only {torch.cuda.device_count()} CUDA devices")
    faults = [] if attention == "sdpa" else xformers_faults(device if kind else "cpu")
    if attention == "xformers":
        reasons += [f"--attention xformers: {fault}; use sdpa" for fault in faults]
    if precision == "bf16" and kind == "cuda" and cuda and not torch.cuda.is_bf16_supported():
        reasons.append("--precision bf16: this GPU does not compute in bfloat16")
    if reasons:
        raise ImmaError("This machine cannot run what was asked for.", reasons)
    because = "as asked"
    if attention == "auto":
        attention = "sdpa" if faults else "xformers"
        because = f"no xformers: {'; '.join(faults)}" if faults else "xformers passed a probe of both its directions"
    if precision == "auto":
        # on processors, bfloat16 is many times slower than float32 without instructions for it
        native = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp16" if kind == "cuda" else "fp32"
    return Runtime(device, attention, precision, because, halved)


def elsewhere(device: str, attention: Attention = "auto", precision: Precision = "auto") -> Runtime | None:
    """What would be chosen on the CUDA device that is asked for, where this machine has none: to plan for it. Else None."""
    try:
        if torch.device(device).type != "cuda" or torch.cuda.is_available():
            return None
    except RuntimeError:  # no device's name
        return None
    # either kernel of attention takes the same memory, as neither holds the scores of all pairs
    return Runtime(
        device,
        "sdpa" if attention == "auto" else attention,
        "bf16" if precision == "auto" else precision,
        "as asked" if attention != "auto" else "xformers is probed where it is to run",
    )


def xformers_faults(device: str) -> list[str]:
    """Everything that keeps xformers' attention from working on *device*; empty: it works.

    An installed xformers may be built for another torch or GPU: one tiny call, and its gradient, tell.
    """
    faults = []
    if importlib.util.find_spec("xformers") is None:
        faults.append("it is not installed (pip install xformers)")
    if torch.device(device).type != "cuda":
        faults.append("it works on CUDA devices only")
    elif not torch.cuda.is_available():
        faults.append("this PyTorch sees no CUDA device")
    if faults:
        return faults
    try:
        import xformers.ops

        probe = torch.zeros(1, 8, 1, 16, device=device, dtype=torch.float16, requires_grad=True)
        torch.autograd.grad(xformers.ops.memory_efficient_attention(probe, probe, probe).sum(), probe)
    except Exception as error:  # noqa: BLE001 - whatever it is, SDPA works
        said = str(error).strip().split("\n")[0]
        return [f"the installed one fails on this PyTorch or GPU ({type(error).__name__}: {said})"]
    return []
