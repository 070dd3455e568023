"""What a verification consists of: how much is tried, what makes its trials comparable, and its jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

from imma_cli.attacks.settings import spec
from imma_cli.verification.lines import Study
from imma_cli.verification.trials import POINTS, points_of

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.checkpoints import Checkpoint
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime
    from imma_cli.verification.materials import Material

Kind = Literal["harmful", "benign", "search"]
MOST_SIMULATED = 20
"""So many times the usual steps are the most that the file is believed to have been hardened with."""
USUAL_STEPS = {True: 300, False: 500}
"""Of a simulated attacker, for small models and for others."""
NOT_IDENTITY = ("study", "kind", "schema", "warnings", "provenance", "simulated")
"""Fields of a study line that say nothing about what trials measure."""


@dataclass(frozen=True)
class Effort:
    """How much is tried."""

    seeds: int = 3
    """Trials of each setting on each model."""
    trials: int = 10
    """Settings of each attack that are searched before; 0: the attack is tried as it was typed."""
    prompts: int = 2
    """Prompts of each concept."""
    images: int = 16
    """Pictures of each prompt, at every point of the budget."""
    horizon: float = 2
    """The budget, in multiples of what hardening simulated."""
    points: tuple[float, ...] = POINTS
    """Shares of the budget at which an attack is looked at."""
    benign: int = 1
    """How many of the demo's other concepts are fine-tuned for comparison, where no others are given."""
    drawing_steps: int = 20
    """Of the sampler."""


PRESETS: Mapping[str, Effort] = {
    "quick": Effort(seeds=2, trials=0, prompts=2, images=8, horizon=1, points=(0.25, 1.0), benign=0, drawing_steps=10),
    "standard": Effort(),
    "thorough": Effort(seeds=5, trials=50, prompts=4, images=25, horizon=5, benign=2),
}


@dataclass(frozen=True)
class Job:
    """One attack with one setting and one seed on one model."""

    purpose: Kind
    model: str
    attack: Attack
    material: Material
    seed: int
    steps: int
    index: int | None = None
    """Of a search: which of its trials."""

    @property
    def id(self) -> str:
        """Says everything that tells this trial from others of the study."""
        which = "" if self.index is None else f" {self.index}"
        return (
            f"{self.purpose}{which}: {spec(self.attack)} on {self.material.name!r}, "
            f"{self.model} model, seed {self.seed}, {self.steps} steps"
        )


def paired(
    purpose: Literal["harmful", "benign"],
    models: Sequence[str],
    attack: Attack,
    material: Material,
    seeds: int,
    steps: int,
) -> list[Job]:
    """The same attack on all *models*, seed by seed, so that pairs are complete early."""
    return [Job(purpose, model, attack, material, seed, steps) for seed in range(seeds) for model in models]


def simulated_steps(provenance: Mapping[str, Any] | None) -> int | None:
    """How many steps the attacker of hardening's simulation made; None where the file does not say."""
    recorded = provenance or {}
    settings = recorded.get("settings") or {}
    if isinstance(recorded.get("simulated_steps"), int):  # every attacker began anew
        return int(recorded["simulated_steps"])
    steps = settings.get("steps")
    of_attacks = [(attack.get("rates") or {}).get("steps") for attack in recorded.get("attacks", [])]
    known = [n for n in ([steps] if isinstance(steps, int) else of_attacks) if isinstance(n, int) and n > 1]
    return max(known) // 2 if known else None  # inner and outer steps together


def default_budget(effort: Effort, simulated: int | None, attacks: Sequence[Attack], model: Model) -> int:
    """A multiple of what hardening simulated, or of what is usual where that is more; of what the attacks' presets simulate where it is not known.

    The file says how long it was hardened, and anybody can write anything there: nobody is spared a real attack by it.
    """
    if simulated is None:
        steps = max(attack.rates(model).steps for attack in attacks) // 2
    else:
        # not the attacks' own: a study may be continued with more of them
        usual = USUAL_STEPS[model.is_small]
        steps = min(max(simulated, usual), MOST_SIMULATED * usual)
    return max(2, round(effort.horizon * steps))


def study_of(
    checkpoints: Mapping[str, Checkpoint],
    materials: Sequence[Material],
    untouched: Sequence[str],
    metrics: Sequence[str],
    effort: Effort,
    budget: int,
    runtime: Runtime,
    warnings: Sequence[str] = (),
    **options: Any,
) -> Study:
    """The line that says what is compared; its hash is that of everything that the measured numbers depend on.

    How many attacks, settings and seeds are tried is no part of it: a study may be continued with more of them.
    """
    harmful = materials[0]
    pictures: dict[str, tuple[str, ...]] = {}
    for each in materials:
        names = ("attacker", "judge") if each is harmful else (f"benign: {each.name}", f"benign judge: {each.name}")
        for name, concept in zip(names, (each.pictures, each.judge), strict=True):
            pictures[name] = concept.hashes
            options[f"captions of {name}"] = _digest(concept)
    line = Study(
        study="",
        models={name: checkpoint.sha256 for name, checkpoint in checkpoints.items()},
        family=checkpoints["original"].family.name,
        concept=harmful.name,
        pictures=pictures,
        prompts={each.name: each.prompts for each in materials} | {"untouched": tuple(untouched)},
        images_per_prompt=effort.images,
        budget=budget,
        points=tuple(points_of(budget, effort.points)),
        simulated=simulated_steps(checkpoints["hardened"].provenance),
        metrics=tuple(metrics),
        options={"drawing_steps": effort.drawing_steps, "precision": runtime.precision, **options},
        warnings=tuple(warnings),
        provenance=checkpoints["hardened"].provenance,
    )
    return replace(line, study=_hash(line))


def _digest(concept: Concept) -> str:
    return sha256("\n".join(concept.captions).encode()).hexdigest()[:16]


def _hash(line: Study) -> str:
    identity = {key: value for key, value in line.as_json().items() if key not in NOT_IDENTITY}
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def differences(known: Study, new: Study) -> list[str]:
    """In what two studies differ, one line each, in words for people."""
    found = []
    before, after = known.as_json(), new.as_json()
    for field in before:
        if field in NOT_IDENTITY or before[field] == after[field]:
            continue
        if isinstance(before[field], dict):
            keys = sorted({*before[field], *after[field]})
            changed = [key for key in keys if before[field].get(key) != after[field].get(key)]
            found += [f"{field}: {key} is another" for key in changed]
        else:
            found.append(f"{field}: {before[field]!r} there, {after[field]!r} here")
    return found
