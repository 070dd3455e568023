"""What a search for an attack's strongest settings tries: Optuna proposes, the attack says over what."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from imma_cli.attacks.attack import Attack, Choice, Preset, Range
from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    from imma_cli.families.model import Model

STEPS = "steps"
"""How the share of the budget after which the attacker stops is called among the suggested values."""
STEPS_SHARE = (0.5, 1.0)
STARTUP = 5
"""So many results are drawn at random before TPE learns from them. It does not depend on how many are asked for, so
that a longer search begins like a shorter one."""


def space(attack: Attack, rates: Preset) -> dict[str, BaseDistribution]:
    """What may be suggested for *attack*: what it declares, without the settings that the user changed, and `STEPS`.

    Raises:
        ImmaError: the plugin declares something that cannot be searched.
    """
    defaults = {field.name: field.default for field in fields(attack.settings)}
    unknown = [name for name in attack.search if name not in defaults]
    reasons = [f"{name} is no setting of it" for name in unknown]
    if STEPS in attack.search:
        reasons.append(f"{STEPS} is what every search calls the share of the budget")
    found: dict[str, BaseDistribution] = {}
    for name, declared in attack.search.items():
        if name in unknown or getattr(attack.settings, name) != defaults[name]:
            continue
        try:
            found[name] = _distribution(name, declared, rates)
        except (ValueError, TypeError) as error:
            reasons.append(f"{name}: {error}")
    if reasons:
        raise ImmaError(f"The settings of the attack {attack.name} cannot be searched.", reasons)
    return {**found, STEPS: CategoricalDistribution(STEPS_SHARE)}


def require_searchable(attack: Attack, model: Model, *, searched: bool) -> None:
    """Ask the plugin of *attack* what only it can say, before hours of trials that would need it.

    Raises:
        ImmaError: it does not say its rates, or, where it is to be *searched*, over what.
    """
    try:
        rates = attack.rates(model)
        if searched:
            typed(attack, rates)
    except ImmaError:
        raise
    except (Exception, SystemExit) as error:
        reasons = [f"{type(error).__name__}: {error}"]
        raise ImmaError(f"The attack {attack.name} cannot be set up.", reasons, "Leave it out, or mend it.") from error


def _distribution(name: str, declared: Range | Choice, rates: Preset) -> BaseDistribution:
    if isinstance(declared, Choice):
        return CategoricalDistribution((*declared.options, *declared.held_out))
    low, high = declared.low, declared.high
    if declared.of_preset:
        preset = _of_preset(name, rates)
        low, high = low * preset, high * preset
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=declared.log)
    return FloatDistribution(low, high, log=declared.log)


def _of_preset(name: str, rates: Preset) -> float:
    value = getattr(rates, name, None)
    if value is None:
        raise ValueError(f"no preset says a {name}")
    return float(value) if not isinstance(value, int) else value


def typed(attack: Attack, rates: Preset) -> dict[str, Any] | None:
    """The values within `space` of the attack as the user typed it; None where one of them lies outside."""
    searched = space(attack, rates)
    values = {name: getattr(attack.settings, name) for name in searched if name != STEPS}
    for name, value in values.items():
        declared = attack.search[name]
        if value is None and isinstance(declared, Range) and declared.of_preset:
            values[name] = _of_preset(name, rates)
    values[STEPS] = max(STEPS_SHARE)
    try:
        create_trial(state=TrialState.RUNNING, params=values, distributions=searched)
    except (ValueError, TypeError):
        return None
    return values


def setting(attack: Attack, values: Mapping[str, Any]) -> Attack:
    """*attack* with the suggested *values* applied; `STEPS` is left to whoever runs it.

    Raises:
        ImmaError: the attack refuses this combination.
    """
    changes = {name: value for name, value in values.items() if name != STEPS}
    try:
        return type(attack)(replace(attack.settings, **changes))
    except (ValueError, TypeError) as error:
        listed = ", ".join(f"{name}={value}" for name, value in changes.items())
        raise ImmaError(f"The attack {attack.name} refuses {listed}.", [str(error)]) from None


def propose(
    searched: Mapping[str, BaseDistribution], results: Iterable[tuple[Mapping[str, Any], float]], seed: int
) -> dict[str, Any]:
    """The next values of *searched* to try, with TPE (arXiv 2304.11127), after *results*: values and what came of them.

    The same arguments give the same values: nothing else is looked at, so nothing depends on who was killed before.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP, multivariate=True, constant_liar=False
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
    for values, value in results:
        study.add_trial(create_trial(params=dict(values), distributions=dict(searched), value=value))
    return study.ask(dict(searched)).params
