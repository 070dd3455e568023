"""How commands speak: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape

from imma_cli.errors import ImmaError

T = TypeVar("T")

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def print_json(value: object) -> None:
    """*value* as JSON on standard output, without any styling."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def show_error(error: ImmaError) -> None:
    """One red line that says what is wrong, each reason below it, and what to do."""
    err.print(f"[bold red]Error:[/] {escape(error.what)}", soft_wrap=True)
    for reason in error.reasons:
        err.print(f"  - {escape(reason)}", soft_wrap=True)
    if error.hint:
        err.print(escape(error.hint), soft_wrap=True)


def _leading(what: str) -> str:
    """*what* as the beginning of a line that goes on with a reason."""
    return what if what.endswith((".", ":")) else f"{what}:"


class Refusals:
    """Runs checks one after the other, so that a user sees everything that is wrong at once."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.errors: list[ImmaError] = []

    def check(self, check: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
        """What *check* gives, or None where it refuses."""
        try:
            return check(*args, **kwargs)
        except ImmaError as error:
            self.errors.append(error)
            return None

    def add(self, what: str, hint: str | None = None) -> None:
        """One more thing that is wrong."""
        self.errors.append(ImmaError(what, hint=hint))

    def raise_all(self) -> None:
        """Raises ImmaError with everything that was refused, if anything was."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            reasons = [
                line for e in self.errors for line in ([f"{_leading(e.what)} {r}" for r in e.reasons] or [e.what])
            ]
            hints = dict.fromkeys(e.hint for e in self.errors if e.hint)
            raise ImmaError(self.what, reasons, "\n".join(hints) or None)
