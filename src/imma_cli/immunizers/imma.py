"""IMMA: the bi-level loop of arXiv 2311.18815, written once for every attack.

    max over θ in S_u   L(x_u, c; θ, φ*)      subject to   φ* = argmin over φ   L(x_l, c; θ, φ)        (eq. 2-3)

First order, alternating: a step down on the attacker's φ, then a step up on S_u through the attacked model. φ lives
through the whole run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imma_cli.attacks.attack import Attack, Preset
from imma_cli.attacks.gradients import Stepping, scaling_for
from imma_cli.attacks.training import Attacker, adamw, gradient_step, optimizer_state, restore_optimizer
from imma_cli.concepts.batches import Batch, Latents, TrainingSet, encode
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model
from imma_cli.families.processes import ALONE, Processes
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.checking import Check
from imma_cli.immunizers.keeper import Keeper
from imma_cli.immunizers.originals import put_back
from imma_cli.immunizers.scope import Protect, protected_weights
from imma_cli.immunizers.state import State, random_state, restore_random_state

Method = Literal["imma", "maximize"]


@dataclass(frozen=True)
class ImmunizerSettings:
    """What may be set about the loop. None means: what the attack's preset says."""

    method: Method = "imma"
    """``imma`` alternates both steps; ``maximize`` is the paper's baseline, the outer step alone."""
    protect: Protect = "attention"
    steps: int | None = None
    """Inner and outer steps together, for every attack on every concept."""
    outer_learning_rate: float | None = None
    batch_size: int = 1
    seed: int = 0
    accumulate: int = 1
    """Batches whose gradients make one step."""
    eight_bit: bool = False
    """Whether AdamW's moments are held in 8 bits, both players'."""

    def cycles(self, rates: Preset) -> int:
        """How many steps each player takes on one concept, against an attack with *rates*."""
        return max(1, (self.steps or rates.steps) // 2)


@dataclass(frozen=True)
class Step:
    """One cycle as it was: the attacker's loss before its step (None without one), and before the step up."""

    cycle: int
    cycles: int
    attack: str
    concept: str
    inner_loss: float | None
    outer_loss: float
    drift: float | None = None
    """How far predictions for other prompts have moved, where the method looks at them."""


@dataclass
class Immunized:
    """The new values of S_u by state-dict name of the UNet, and the course of both players."""

    weights: dict[str, Tensor]
    steps: list[Step] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    """What short attacks on copies got along the way, where the method runs them."""
    taken: Check | None = None
    """The check whose state the weights are; None: they are as at the end."""
    simulated_steps: int | None = None
    """The most steps that a simulated attacker may have made, where every one began anew."""
    unreached: tuple[str, ...] = ()
    """Weights of S_u that no attack's loss depended on, as the attacks computed with copies of them: they did not move."""

    def state(self) -> State:
        """The course so far."""
        return {
            "weights": self.weights,
            "steps": [asdict(step) for step in self.steps],
            "checks": [asdict(check) for check in self.checks],
            "taken": asdict(self.taken) if self.taken else None,
        }

    def restore(self, saved: Mapping[str, Any], device: torch.device) -> None:
        self.weights = {name: weight.to(device) for name, weight in saved["weights"].items()}
        self.steps = [Step(**step) for step in saved["steps"]]
        self.checks = [Check(**check) for check in saved["checks"]]
        self.taken = Check(**saved["taken"]) if saved["taken"] else None


@dataclass
class Turn:
    """One attack on one concept, attached to modules of its own over the shared weights."""

    attack: Attack
    concept: Concept
    model: Model
    attacker: Attacker
    batches: TrainingSet
    outer_learning_rate: float
    cycles: int
    runtime: Runtime
    accumulate: int

    def losses(self) -> list[Callable[[], Tensor]]:
        """The attacker's on the next batches."""
        return self._on_next(self.attack.loss)

    def concept_losses(self) -> list[Callable[[], Tensor]]:
        """The defender's on the next batches."""
        return self._on_next(self.attack.concept_loss)

    def _on_next(self, loss: Callable[[Model, Batch], Tensor]) -> list[Callable[[], Tensor]]:
        batches = [next(self.batches) for _ in range(self.accumulate)]
        return [partial(self.runtime.forward, partial(loss, self.model, batch)) for batch in batches]

    def state(self) -> State:
        """What has changed since the attacker was attached."""
        return {"attacker": self.attacker.state(), "batches": self.batches.state()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.attacker.restore(saved["attacker"])
        self.batches.restore(saved["batches"])


def immunize(
    model: Model,
    attacks: Sequence[Attack],
    concepts: Sequence[Concept],
    settings: ImmunizerSettings,
    runtime: Runtime,
    on_step: Callable[[Step], None] = lambda step: None,
    keeper: Keeper | None = None,
    on_encoded: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> Immunized:
    """Immunize *model* against every attack on every concept; they take turns. *model* itself stays as it was.

    *keeper* may hold the state of a run that was interrupted: it is continued, to the same weights. *on_encoded* is called
    when all pictures and captions are encoded: from then on, only what attacks themselves compute with is needed.
    *processes* share the batches of every step; all of them end with the same weights.

    Raises:
        NotFiniteError: a loss or a gradient became NaN or infinite.
        ImmaError: an attack's loss depends on none of the protected weights.
    """
    keeper = keeper or Keeper()
    protected = protected_weights(model.unet, settings.protect)
    result = Immunized({})
    with put_back(list(protected.values())), ExitStack() as stack:
        processes.make_same(protected.values())
        how = Stepping(processes, runtime.precision, settings.eight_bit)
        turns = _attach_all(stack, model, attacks, concepts, settings, protected, runtime, how)
        on_encoded()
        outer = Outer(list(protected.values()), turns[0].outer_learning_rate, how)
        if saved := keeper.begin():
            result.restore(saved["result"], model.device)
            _restore(saved.pop("players"), protected, outer, turns)
        for step in _alternate(turns, outer, settings, done=len(result.steps)):
            result.steps.append(step)
            on_step(step)
            keeper.offer(lambda: {"result": result.state(), "players": _state(protected, outer, turns)})
        result.unreached = tuple(name for name, weight in protected.items() if weight not in outer.optimizer.state)
        # an attack that trains in place puts the old weights back when it is detached: take the new ones first
        result.weights = {name: weight.detach().clone() for name, weight in protected.items()}
    return result


class Outer:
    """The defender's side: S_u and its optimizer."""

    def __init__(self, weights: Sequence[nn.Parameter], learning_rate: float, how: Stepping) -> None:
        self.weights, self.processes, self.scaling = weights, how.processes, scaling_for(how.precision)
        self.optimizer = adamw(weights, learning_rate, eight_bit=how.eight_bit)

    def step(self, turn: Turn) -> float:
        """One step up on the loss of the concept, at the rate of the attack whose turn it is."""
        self.optimizer.param_groups[0]["lr"] = turn.outer_learning_rate
        # up is down on the negative: not every optimizer can be told to maximize
        losses = [partial(_negative, loss) for loss in turn.concept_losses()]
        norm = turn.attacker.max_grad_norm
        return -gradient_step(self.optimizer, self.weights, losses, norm, self.processes, self.scaling)

    def state(self) -> State:
        return optimizer_state(self.optimizer, self.scaling)

    def restore(self, saved: Mapping[str, Any]) -> None:
        restore_optimizer(self.optimizer, saved, self.scaling)


def _negative(loss_of: Callable[[], Tensor]) -> Tensor:
    return -loss_of()


def _alternate(turns: Sequence[Turn], outer: Outer, settings: ImmunizerSettings, done: int) -> Iterator[Step]:
    """The loop itself. Which step is whose follows from the cycle alone, never from the length of an epoch."""
    cycles = sum(turn.cycles for turn in turns)
    order = [turn for cycle in range(max(t.cycles for t in turns)) for turn in turns if cycle < turn.cycles]
    for cycle, turn in enumerate(order[done:], done):
        inner_loss = turn.attacker.step(*turn.losses()) if settings.method == "imma" else None
        outer_loss = outer.step(turn)
        yield Step(cycle + 1, cycles, turn.attack.name, turn.concept.name, inner_loss, outer_loss)


def _state(protected: Mapping[str, nn.Parameter], outer: Outer, turns: Sequence[Turn]) -> State:
    """Both players between two cycles."""
    return {
        "weights": dict(protected),
        "outer": outer.state(),
        "turns": [turn.state() for turn in turns],
        "random": random_state(turns[0].model.device),
    }


@torch.no_grad()
def _restore(saved: State, protected: Mapping[str, nn.Parameter], outer: Outer, turns: Sequence[Turn]) -> None:
    """The attackers were attached to the weights as they were at the beginning, as the interrupted run's were."""
    for name, weight in protected.items():
        weight.copy_(saved["weights"][name])
    outer.restore(saved["outer"])
    for turn, its in zip(turns, saved["turns"], strict=True):
        turn.restore(its)
    restore_random_state(saved["random"], turns[0].model.device)


def _attach_all(
    stack: ExitStack,
    model: Model,
    attacks: Sequence[Attack],
    concepts: Sequence[Concept],
    settings: ImmunizerSettings,
    protected: dict[str, nn.Parameter],
    runtime: Runtime,
    how: Stepping,
) -> list[Turn]:
    kept = {id(weight) for weight in protected.values()}
    turns: list[Turn] = []
    for concept in concepts:
        everything: Latents = encode(model, concept.images)
        for prototype in attacks:
            attack = type(prototype)(prototype.settings)
            # Only S_u may change for everyone. An attack that trains the model's own weights gets the rest as copies.
            own = [p for network in model.networks.values() for p in network.parameters() if id(p) not in kept]
            shared = model.sharing(private=own if attack.in_place else ())
            seed = settings.seed * 1000 + len(turns)
            chosen = concept.sample(attack.settings.pictures, seed)
            latents = everything if chosen is concept else encode(model, chosen.images)
            parameters = stack.enter_context(attack.attach(shared, chosen, seed))
            rates = attack.rates(shared)
            cycles = settings.cycles(rates)
            batches = TrainingSet(shared, attack, chosen, latents, seed=seed, batch_size=settings.batch_size)
            turns.append(
                Turn(
                    attack,
                    chosen,
                    shared,
                    Attacker(parameters, rates, attack.settings, cycles, attack.rate_of, how),
                    batches,
                    rates.outer_learning_rate if settings.outer_learning_rate is None else settings.outer_learning_rate,
                    cycles,
                    runtime,
                    settings.accumulate,
                )
            )
    return turns
