"""Raw lines of the benchmark: one JSON object each, appended whole, so that several processes can write one file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "resistance.md"


def put_on_page(mark: str, text: str) -> None:
    """Replace what stands on the page between the comment that begins with *mark* and the next end."""
    page = PAGE.read_text(encoding="utf-8")
    before, comment, rest = page.partition(f"<!-- {mark}: ")
    _, _, after = rest.partition("<!-- end -->")
    line = rest.split("\n", 1)[0]
    PAGE.write_text(f"{before}{comment}{line}\n\n{text.strip()}\n\n<!-- end -->{after}", encoding="utf-8")


class Lines:
    """One file. What it holds already is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            # a line without its end was being written when somebody was killed
            for text in self.path.read_text().splitlines(keepends=True):
                if text.endswith("\n"):
                    yield json.loads(text)

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return [line for line in self if all(line.get(key) == value for key, value in wanted.items())]

    def add(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
