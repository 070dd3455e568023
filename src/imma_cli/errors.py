"""The one error that is meant for the user, raised anywhere and caught once, in ``imma_cli.cli.main``."""

from __future__ import annotations

from collections.abc import Iterable


class ImmaError(Exception):
    """Something the user can mend.

    *what* says what could not be done; *reasons* lists every cause that was found, not only the first; *hint* says
    what to do about it.
    """

    def __init__(self, what: str, reasons: Iterable[str] = (), hint: str | None = None) -> None:
        self.what = what
        self.reasons = tuple(reasons)
        self.hint = hint
        super().__init__("\n".join([what, *(f"  - {r}" for r in self.reasons), *([hint] if hint else [])]))


def writable(text: str) -> str:
    """*text* as a file in UTF-8 can hold it: what is no character, as in names in another encoding, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()
