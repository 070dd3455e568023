"""Raw lines of the benchmark: one JSON object each, appended whole, so that several processes can write one file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class Lines:
    """One file. What it holds already is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            for text in self.path.read_text().splitlines():
                yield json.loads(text)

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return [line for line in self if all(line.get(key) == value for key, value in wanted.items())]

    def add(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
