"""What the speed benchmarks share: measuring in a process of its own, and the page.

Tables go to docs/performance.md, between the comment that names them and the next end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def child(script: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What *script* says in its last line, as JSON, when it is run with *arguments*. Its complaints go where ours do."""
    command = [sys.executable, script, *map(str, arguments)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
    line: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return line


def put(script: str, text: str) -> None:
    name = script.removesuffix(".py")
    mark, end = f"<!-- {name}: written by {script} -->", "<!-- end -->"
    before, found, rest = PAGE.read_text(encoding="utf-8").partition(mark)
    if not found:
        raise SystemExit(f"{PAGE} has no place for {script}")
    PAGE.write_text(f"{before}{mark}\n\n{text.strip()}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def run(
    about: str | None,
    measure: Callable[[Path], Iterable[Mapping[str, Any]]],
    results: Path,
    show: Callable[[], None],
) -> None:
    """The command line of a script that measures in one process: raw lines to *results*, and what *show* makes of them."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("speed-work"))
    parser.add_argument("--draw", action="store_true", help="the table again, from the raw lines")
    args = parser.parse_args()
    if not args.draw:
        args.work.mkdir(parents=True, exist_ok=True)
        results.parent.mkdir(exist_ok=True)
        results.write_text("".join(json.dumps(line) + "\n" for line in measure(args.work)))
    show()
