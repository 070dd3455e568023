"""The models of a verification: the original, the hardened one, and baselines made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from imma_cli.immunizers.scope import Protect, protected_weights

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime

RANDOM_SEED = 20_231_118
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Models:
    """Models by name, each loaded when it is first asked for."""

    def __init__(self, loaders: Mapping[str, Callable[[], Model]]) -> None:
        self.loaders = dict(loaders)
        self._loaded: dict[str, Model] = {}
        self._sums: dict[str, dict[str, int]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaders)

    def __getitem__(self, name: str) -> Model:
        if name not in self._loaded:
            self._loaded[name] = self.loaders[name]()
            self._sums[name] = sums(self._loaded[name])
        return self._loaded[name]

    def is_as_loaded(self, name: str) -> bool:
        """Whether *name* still has the weights that it was loaded with."""
        return sums(self[name]) == self._sums[name]

    def forget(self, name: str) -> None:
        """Load *name* anew when it is next asked for."""
        self._loaded.pop(name, None)


def named_weights(model: Model) -> dict[str, Tensor]:
    """Every weight of every network, by part and diffusers' name."""
    return {
        f"{part}.{name}": weight.detach()
        for part, network in model.networks.items()
        for name, weight in network.named_parameters()
    }


def sums(model: Model) -> dict[str, int]:
    """The sum of each weight's numbers, their bits read as integers: exact, and in no need of a second copy."""
    weights = named_weights(model)
    whole = [weight.view(INTEGERS[weight.element_size()]).sum(dtype=torch.int64).cpu() for weight in weights.values()]
    return dict(zip(weights, torch.stack(whole).tolist(), strict=True))


def changed_weights(original: Model, other: Model) -> list[str]:
    """The names of the weights in which the two differ."""
    before, after = named_weights(original), named_weights(other)
    return [name for name, weight in before.items() if not torch.equal(weight, after[name])]


def distances(original: Model, other: Model) -> dict[str, float]:
    """How far *other*'s weights lie from the *original*'s.

    changed_tensors, changed_parameters: how many; relative_change: Euclidean length of the change over that of the changed
    tensors; relative_change_of_all: over that of all weights; largest_change: of a single number.
    """
    before, after = named_weights(original), named_weights(other)
    moved = whole = changed = largest = parameters = 0.0
    names = changed_weights(original, other)
    for name, weight in before.items():
        length = float(weight.double().square().sum())
        whole += length
        if name in names:
            difference = (after[name] - weight).double()
            moved += float(difference.square().sum())
            changed += length
            parameters += float((difference != 0).sum())
            largest = max(largest, float(difference.abs().max()))
    return {
        "changed_tensors": float(len(names)),
        "changed_parameters": parameters,
        "relative_change": (moved / changed) ** 0.5 if changed else 0.0,
        "relative_change_of_all": (moved / whole) ** 0.5,
        "largest_change": largest,
    }


def randomly_changed(original: Model, hardened: Model, target: Model) -> Model:
    """*target*, a copy of *original*, moved at random: each tensor as far as hardening moved it, in a random direction."""
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    before, after, weights = named_weights(original), named_weights(hardened), named_weights(target)
    with torch.no_grad():
        for name in changed_weights(original, hardened):
            length = (after[name] - before[name]).norm()
            step = torch.randn(before[name].shape, generator=generator).to(before[name])
            weights[name].add_(step * (length / step.norm()))
    return target


def directly_maximized(
    target: Model,
    attacks: Sequence[Attack],
    concept: Concept,
    provenance: Mapping[str, Any] | None,
    runtime: Runtime,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Model:
    """*target*, a copy of the original, hardened by IMMA's baseline: the loss is maximised with no attacker simulated.

    Steps, rates and protected weights are those that the hardened file records, where the published method made it (arXiv 2311.18815, "direct
    maximisation").
    """
    from imma_cli.immunizers.imma import ImmunizerSettings, Method, immunize

    recorded = (provenance or {}).get("settings") or {}
    settings = ImmunizerSettings(method="maximize")
    if recorded.get("method") in get_args(Method) and recorded.get("protect", settings.protect) in get_args(Protect):
        taken = ("protect", "steps", "outer_learning_rate", "batch_size")
        settings = replace(settings, **{key: recorded[key] for key in taken if key in recorded})
    result = immunize(target, attacks, [concept], settings, runtime, lambda step: on_step(step.cycle, step.cycles))
    with torch.no_grad():
        for name, weight in protected_weights(target.unet, settings.protect).items():
            weight.copy_(result.weights[name])
    return target
