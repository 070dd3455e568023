"""Tables of the speed benchmarks go to docs/performance.md, between the comment that names them and the next end."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def put(script: str, text: str) -> None:
    name = script.removesuffix(".py")
    mark, end = f"<!-- {name}: written by {script} -->", "<!-- end -->"
    before, found, rest = PAGE.read_text(encoding="utf-8").partition(mark)
    if not found:
        raise SystemExit(f"{PAGE} has no place for {script}")
    PAGE.write_text(f"{before}{mark}\n\n{text.strip()}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")
