"""Parameters that learn at rates of their own."""

from __future__ import annotations


def check_multiple(setting: str, value: float) -> None:
    """Raises ValueError where *value* is no sensible multiple of an attack's rate."""
    if not 0 < value <= 100:
        raise ValueError(f"{setting} must be above 0 and at most 100, not {value:g}")
