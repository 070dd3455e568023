"""Numbers as a person reads them. The page, the model card and the terminal say the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXIT_MEANINGS = {
    0: "resistant to every attack that was tried and works on the original",
    1: "not resistant, or broken",
    2: "could not be judged",
}

MODELS = {
    "original": "original",
    "hardened": "hardened",
    "maximize": "direct maximisation",
    "random": "random change of the same norm",
}


def percent(share: float) -> str:
    """*share* in percent, with a real minus sign."""
    text = f"{share:.1%}".replace("-", "−")
    return "0.0%" if text == "−0.0%" else text


def interval(estimate: Mapping[str, Any] | None) -> str:
    """The bounds of an SGR's interval, or why there is none."""
    if estimate is None:
        return "not measured"
    if estimate["low"] is None:
        return str(estimate["reason"])
    return f"{percent(estimate['low'])} to {percent(estimate['high'])}"


def sgr(estimate: Mapping[str, Any] | None) -> str:
    """An SGR in one line: the number, its interval, and whether it shows a difference."""
    if estimate is None:
        return "not measured"
    if estimate["estimate"] is None:
        return f"undefined: {estimate['reason']}"
    shown = "" if estimate["difference_shown"] or estimate["low"] is None else "; no difference shown"
    return f"{percent(estimate['estimate'])} ({interval(estimate)}{shown})"


def recovery(pooled: Mapping[str, Any] | None) -> str:
    """Steps to recover on the original → on the other model, ``never within N`` where censored."""
    if pooled is None:
        return "not measured"
    if pooled["steps"] is None and pooled["censored_at"] is None:
        return str(pooled["reason"])
    first = "?" if pooled["original_steps"] is None else f"{pooled['original_steps']:.0f}"
    then = f"never within {pooled['censored_at']}" if pooled["steps"] is None else f"{pooled['steps']:.0f}"
    return f"{first} → {then}"


def several(number: int, noun: str) -> str:
    """``1 picture``, ``2 pictures``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
