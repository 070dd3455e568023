"""Simulated attackers: for every episode another one, drawn from what an attack says a real attacker would vary.

The literature's largest single gain comes from this diversity (ResAlign, arXiv 2507.16302).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from imma_cli.attacks.attack import Attack, Choice, Preset, Range

if TYPE_CHECKING:
    from imma_cli.families.model import Model

RATE_SPREAD = 2.0
"""Learning rates are drawn between the preset's divided by this and multiplied by it."""
TRIES = 8


def draw_attacker(attack: Attack, model: Model, rng: random.Random) -> Attack:
    """*attack* with other settings: each of its search space's that the user left alone is drawn, or left, at even odds.

    The learning rate is always drawn, where it was left alone.
    """
    rates = attack.rates(model)
    for _ in range(TRIES):
        try:
            return type(attack)(replace(attack.settings, **_drawn(attack, rates, rng)))
        except (ValueError, TypeError):  # a combination that the attack refuses
            continue
    return type(attack)(attack.settings)


def _drawn(attack: Attack, rates: Preset, rng: random.Random) -> dict[str, Any]:
    defaults: Mapping[str, Any] = {field.name: field.default for field in fields(attack.settings)}
    drawn: dict[str, Any] = {}
    for name, declared in attack.search.items():
        if name not in defaults or name in attack.given or getattr(attack.settings, name) != defaults[name]:
            continue
        if name == "learning_rate":
            drawn[name] = rates.learning_rate * RATE_SPREAD ** rng.uniform(-1, 1)
        elif rng.random() < 0.5:
            drawn[name] = _value(declared, getattr(rates, name, 1), rng)
    return drawn


def _value(declared: Range | Choice, preset: Any, rng: random.Random) -> Any:
    if isinstance(declared, Choice):
        return rng.choice(declared.options)
    scale = preset if declared.of_preset else 1
    low, high = declared.low * scale, declared.high * scale
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if declared.log else rng.uniform(low, high)
    whole = isinstance(declared.low, int) and isinstance(declared.high, int) and not declared.of_preset
    return round(value) if whole else value
