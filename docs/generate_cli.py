"""Writes docs/cli.md: what ``imma --help`` and ``imma COMMAND --help`` print, so that the reference cannot go stale.

    python docs/generate_cli.py

tests/test_docs.py compares the file with what this would write.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"
WIDTH = "100"
INTRODUCTION = """\
# Command reference

<!-- Made by docs/generate_cli.py from the program's own help. Do not edit: run the script. -->

The settings of each attack are not listed here, because attacks are plugins: `imma attacks NAME` shows them.
"""
# each of these makes typer or rich believe that it writes to a terminal, or changes what it writes
FOREIGN = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "LINES")


def help_of(*command: str) -> str:
    """What ``imma *command --help`` prints, 100 columns wide and without colours."""
    env = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    env |= {"COLUMNS": WIDTH, "TERMINAL_WIDTH": WIDTH, "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    call = "import sys; from imma_cli.cli import main; sys.argv[0] = 'imma'; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", call, *command, "--help"], env=env, capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise SystemExit(f"imma {' '.join(command)} --help failed:\n{done.stdout}{done.stderr}")
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n")


def commands() -> list[str]:
    """The commands in the order in which ``imma --help`` lists them."""
    import typer.main

    from imma_cli.cli import app

    group = typer.main.get_command(app)
    return [name for name, command in group.commands.items() if not command.hidden]


def reference() -> str:
    """The whole page."""
    sections = [("imma", help_of())] + [(f"imma {name}", help_of(name)) for name in commands()]
    return INTRODUCTION + "".join(f"\n## `{title}`\n\n```text\n{text}\n```\n" for title, text in sections)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
