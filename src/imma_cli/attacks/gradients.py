"""The gradient of a step: of one batch or the mean over several, in one process or shared by many, also in float16."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imma_cli.errors import ImmaError
from imma_cli.families.processes import ALONE, Processes


class NotFiniteError(ImmaError):
    """A loss or its gradient became NaN or infinite."""


def require_finite(value: Tensor, what: str = "loss") -> None:
    """Raises NotFiniteError where *value* is NaN or infinite; *what* it is."""
    if not torch.isfinite(value.detach()):
        raise NotFiniteError(
            f"The {what} became {float(value.detach())}.",
            hint="Nothing was written. Lower the learning rates (--outer-learning-rate, --attack NAME:learning_rate=...).",
        )


class Scaling:
    """Losses in float16 are scaled up for the way back, as small gradients would be zero there (arXiv 1710.03740, section 3.2).

    Where a scaled gradient is not finite, the step is left out and the scale halved; after `GROWTH` steps it is doubled.
    """

    GROWTH = 100
    LEAST = 1.0

    def __init__(self, scale: float = 2.0**14) -> None:
        self.scale = scale
        self.since = 0
        """Steps since the scale last changed."""
        self.left_out = False
        """Whether the last step was."""

    def fits(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether *gradients*, which are scaled back already, are finite; the scale of the next ones follows.

        Raises:
            NotFiniteError: they are not, without any scaling: then that is not the reason.
        """
        fine = bool(torch.isfinite(length(gradients)))
        if not fine and self.scale <= self.LEAST:
            raise NotFiniteError(
                "The gradient is not finite in float16.",
                hint="Nothing was written. Compute in --precision bf16 or fp32, or lower the learning rates.",
            )
        self.left_out = not fine
        self.since = self.since + 1 if fine else 0
        if not fine:
            self.scale /= 2
        elif self.since == self.GROWTH:
            self.scale, self.since = self.scale * 2, 0
        return fine

    def state(self) -> dict[str, Any]:
        return {"scale": self.scale, "since": self.since}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.scale, self.since = saved["scale"], saved["since"]


def scaling_for(precision: str) -> Scaling | None:
    """What losses in *precision* need; bfloat16 reaches as far as float32."""
    return Scaling() if precision == "fp16" else None


@dataclass(frozen=True)
class Stepping:
    """How steps are computed, whoever makes them."""

    processes: Processes = ALONE
    """Who shares the losses of a step."""
    precision: str = "fp32"
    """Of the losses."""
    eight_bit: bool = False
    """Whether AdamW's moments are held in 8 bits."""


PLAIN = Stepping()


def mean_gradient(
    losses: Sequence[Callable[[], Tensor]],
    parameters: Sequence[Tensor],
    processes: Processes = ALONE,
    scaling: Scaling | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The mean of *losses*, and its gradient; both are the same in all *processes*, which share the work.

    None stands where nothing depends on a parameter.

    Raises:
        NotFiniteError: a loss is NaN or infinite, in whatever process.
    """
    total: list[Tensor | None] = [None] * len(parameters)
    mean = torch.zeros((), device=parameters[0].device)
    scale = scaling.scale if scaling else 1.0
    for loss_of in processes.share(losses):
        loss = loss_of()
        mean += loss.detach() / len(losses)
        if processes.count == 1:
            require_finite(loss)  # before the way back is gone for nothing
        if loss.requires_grad:
            added = torch.autograd.grad(loss * (scale / len(losses)), parameters, allow_unused=True)
            total = [b if a is None else a if b is None else a + b for a, b in zip(total, added, strict=True)]
    processes.add_up([mean, *total])
    require_finite(mean)
    if scaling:
        total = [None if gradient is None else gradient / scale for gradient in total]
    return mean, total


def length(gradients: Sequence[Tensor | None]) -> Tensor:
    """Of all *gradients* as one vector: a scalar."""
    return torch.sqrt(sum((g.square().sum() for g in gradients if g is not None), torch.zeros(())))
