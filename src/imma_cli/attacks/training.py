"""The attacker's training step: what hardening simulates and what verification runs are the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from imma_cli.attacks.attack import AttackSettings
from imma_cli.attacks.gradients import PLAIN, Scaling, Stepping, length, mean_gradient, require_finite, scaling_for
from imma_cli.errors import ImmaError
from imma_cli.families.processes import ALONE, Processes

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Preset


@contextmanager
def trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, *parameters* and nothing else of a frozen model ask for gradients."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


Group = dict[str, Any]
"""Parameters that share a rate, as torch's optimizers take them."""


def adamw(
    parameters: Sequence[nn.Parameter] | Sequence[Group], learning_rate: float, *, eight_bit: bool = False
) -> torch.optim.Optimizer:
    """AdamW as the published fine-tuning scripts set it, in one pass over each tensor instead of a dozen.

    *eight_bit*: with moments in 8 bits, block by block (arXiv 2110.02861); those of small tensors stay as they are.
    """
    settings: dict[str, Any] = {"lr": learning_rate, "betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}
    if eight_bit:
        from bitsandbytes.optim import AdamW8bit

        found: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
        return found
    return torch.optim.AdamW(parameters, fused=True, **settings)


def laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """*gradient* with the strides of *parameter*: torch's fused optimizers read both in the order of memory, whatever they are.

    `Tensor.backward` sees to it by itself; `torch.autograd.grad` gives a transposed gradient where it has one.
    """
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def gradient_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    losses: Sequence[Callable[[], Tensor]],
    max_grad_norm: float | None,
    processes: Processes = ALONE,
    scaling: Scaling | None = None,
) -> float:
    """One optimizer step on *parameters* alone, by the mean of *losses*; gives that mean before the step.

    Raises:
        NotFiniteError: a loss or the gradient is NaN or infinite; nothing was changed.
        ImmaError: the losses depend on none of the parameters.
    """
    with trainable(parameters):
        mean, gradients = mean_gradient(losses, parameters, processes, scaling)
        if all(g is None for g in gradients):
            raise ImmaError(
                "The loss depends on none of the parameters to be trained.",
                hint="An attack's loss must depend on what it attaches, and for hardening on the model's own weights instead of copies.",
            )
        if scaling and not scaling.fits(gradients):
            return float(mean)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else laid_out_as(parameter, gradient)
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm) if max_grad_norm is not None else length(gradients)
        # a loss may be finite where its gradient is not
        require_finite(norm, "gradient")
        optimizer.step()
    return float(mean)


def optimizer_state(optimizer: torch.optim.Optimizer, scaling: Scaling | None = None) -> dict[str, Any]:
    """The rates and moments of *optimizer*, and its losses' scale: all besides its settings, for :func:`restore_optimizer`."""
    state = optimizer.state_dict()
    return {
        "rates": [group["lr"] for group in state["param_groups"]],
        "moments": {str(number): dict(moments) for number, moments in state["state"].items()},
        "scaling": scaling.state() if scaling else None,
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], scaling: Scaling | None = None
) -> None:
    """Make *optimizer*, made anew over the same parameters with the same settings, go on where *saved* was taken."""
    groups = optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, saved["rates"], strict=True):
        group["lr"] = rate
    optimizer.load_state_dict(
        {"param_groups": groups, "state": {int(number): moments for number, moments in saved["moments"].items()}}
    )
    if scaling:
        scaling.restore(saved["scaling"])


def attacker_optimizer(
    settings: AttackSettings, parameters: Sequence[Group], learning_rate: float, *, eight_bit: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that *settings* name; what they leave open is as in the published fine-tuning scripts."""
    if settings.optimizer == "radam":
        return torch.optim.RAdam(parameters, lr=learning_rate, weight_decay=1e-2, decoupled_weight_decay=True)
    if settings.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=learning_rate, weight_decay=1e-2)
    return adamw(parameters, learning_rate, eight_bit=eight_bit)


class Attacker:
    """The parameters φ of an attached attack, their optimizer and the course of its rate over *steps* steps."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        rates: Preset,
        settings: AttackSettings | None = None,
        steps: int | None = None,
        rate_of: Callable[[str], float] = lambda name: 1.0,
        how: Stepping = PLAIN,
    ) -> None:
        if not parameters:
            raise ValueError("the attack attached no parameters")
        settings = settings or AttackSettings()
        if steps is None and (settings.schedule != "constant" or settings.warmup):
            raise ValueError("a rate that changes needs to know the number of steps")
        self.parameters = list(parameters.values())
        self.processes, self.scaling = how.processes, scaling_for(how.precision)
        self.processes.make_same(self.parameters)
        self.max_grad_norm = rates.max_grad_norm
        groups = _groups(parameters, rates, rate_of)
        self.optimizer = attacker_optimizer(settings, groups, rates.learning_rate, eight_bit=how.eight_bit)
        self.schedule = _schedule(settings, self.optimizer, steps or 0)

    def step(self, *losses: Callable[[], Tensor]) -> float:
        """One step down on the attack's loss, or on the mean of several, which the processes share."""
        loss = gradient_step(self.optimizer, self.parameters, losses, self.max_grad_norm, self.processes, self.scaling)
        if not (self.scaling and self.scaling.left_out):
            self.schedule.step()
        return loss

    def state(self) -> dict[str, Any]:
        """Everything that steps change."""
        return {
            "parameters": list(self.parameters),
            "optimizer": optimizer_state(self.optimizer, self.scaling),
            "steps": self.schedule.last_epoch,
        }

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> None:
        for parameter, value in zip(self.parameters, saved["parameters"], strict=True):
            parameter.copy_(value)
        restore_optimizer(self.optimizer, saved["optimizer"], self.scaling)
        self.schedule.last_epoch = saved["steps"]


def _groups(parameters: Mapping[str, nn.Parameter], rates: Preset, rate_of: Callable[[str], float]) -> list[Group]:
    groups: dict[float, Group] = {}
    for name, parameter in parameters.items():
        rate = rates.learning_rate * rate_of(name)
        groups.setdefault(rate, {"params": [], "lr": rate})["params"].append(parameter)
    return list(groups.values())


def _schedule(
    settings: AttackSettings, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    warmup = round(settings.warmup * steps)
    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
    return schedule
