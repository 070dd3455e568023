"""pip of the environment that imma runs in, held to the versions that imma is built on."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from imma_cli.attacks.points import OWN, normalized
from imma_cli.errors import ImmaError
from imma_cli.packages.installed import constraints
from imma_cli.packages.sources import Source, redacted

PIP = (sys.executable, "-m", "pip")
KEPT = "imma keeps the versions of what it is built on. A plugin that needs others needs an environment of its own."


@dataclass(frozen=True)
class Planned:
    """One distribution that pip would install, or installed."""

    name: str
    version: str
    url: str


class NoWheelError(ImmaError):
    """No wheel was found for something; there may be a source distribution."""


@dataclass(frozen=True)
class Pip:
    """pip with a folder for its constraints and its report."""

    folder: Path

    def plan(self, sources: Sequence[Source], *, upgrade: bool) -> list[Planned]:
        """What pip would install, from wheels alone, so that nothing of it is run. Nothing is changed.

        Raises:
            NoWheelError: something has no wheel here, or does not exist.
            ImmaError: whatever else pip says.
        """
        command = self._install(sources, upgrade=upgrade, wheels_only=True)
        done = subprocess.run(
            [*command, "--dry-run", "--quiet"], capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        if done.returncode == 0:
            return self._report()
        reasons = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        if any(reason.startswith("No matching distribution found") for reason in reasons):
            raise NoWheelError("pip finds no wheel.", reasons)
        raise ImmaError("pip cannot install this.", reasons or done.stderr.splitlines()[-3:], KEPT)

    def install(self, sources: Sequence[Source], *, upgrade: bool, wheels_only: bool) -> list[Planned]:
        """Install *sources*; pip speaks to standard error meanwhile. Gives what was installed or replaced.

        Raises:
            ImmaError: pip failed.
        """
        command = self._install(sources, upgrade=upgrade, wheels_only=wheels_only)
        if subprocess.run(command, stdout=2, check=False).returncode:
            raise ImmaError("pip could not install this; its own words stand above.", hint=KEPT)
        return self._report()

    def _install(self, sources: Sequence[Source], *, upgrade: bool, wheels_only: bool) -> list[str]:
        kept = self.folder / "constraints.txt"
        kept.write_text("\n".join(constraints()) + "\n", encoding="utf-8")
        arguments = [a for s in sources for a in (["-e", s.argument] if s.editable else [s.argument])]
        options = ["--upgrade"] * upgrade + ["--only-binary=:all:"] * wheels_only
        report = ["--report", str(self.folder / "report.json")]
        return [*PIP, "install", "--disable-pip-version-check", *options, "-c", str(kept), *report, *arguments]

    def _report(self) -> list[Planned]:
        told: dict[str, Any] = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        return [
            Planned(each["metadata"]["name"], each["metadata"]["version"], redacted(each["download_info"]["url"]))
            for each in told["install"]
        ]


@contextmanager
def pip() -> Iterator[Pip]:
    """pip, with a temporary folder of its own."""
    with TemporaryDirectory(prefix="imma-pip-") as folder:
        yield Pip(Path(folder))


def uninstall(names: Sequence[str]) -> None:
    """Remove the packages *names*. Raises ImmaError where pip fails."""
    if subprocess.run([*PIP, "uninstall", "--yes", *names], stdout=2, check=False).returncode:
        raise ImmaError("pip could not uninstall this; its own words stand above.")


def manager() -> str:
    """Who made the environment that imma runs in: ``pipx``, ``uv tool``, ``uv``, or nobody in particular: empty."""
    prefix = Path(sys.prefix)
    if (prefix / "pipx_metadata.json").is_file():
        return "pipx"
    if (prefix / "uv-receipt.toml").is_file():
        return "uv tool"
    made = prefix / "pyvenv.cfg"
    if made.is_file() and any(line.startswith("uv =") for line in made.read_text(encoding="utf-8").splitlines()):
        return "uv"
    return ""


def command_for(sources: Sequence[Source], *, upgrade: bool) -> str:
    """What to type instead, to install *sources* with the program that made the environment."""
    made_by = manager()
    if made_by == "pipx":
        editable = any(source.editable for source in sources)
        options = ["--editable"] * editable + ["--force"] * upgrade
        return shlex.join(["pipx", "inject", *options, Path(sys.prefix).name, *(s.argument for s in sources)])
    if made_by == "uv tool":
        given = [a for s in sources for a in ("--with-editable" if s.editable else "--with", s.argument)]
        names = [s.name or s.argument for s in sources]
        fresh = [a for name in names for a in ("--upgrade-package", name)] if upgrade else []
        return shlex.join(["uv", "tool", "install", OWN, *_received(names), *given, *fresh])
    arguments = [a for s in sources for a in (["-e", s.argument] if s.editable else [s.argument])]
    if made_by == "uv":
        return shlex.join(["uv", "pip", "install", *["-U"] * upgrade, "--python", sys.executable, *arguments])
    return shlex.join([sys.executable, "-m", "ensurepip"])


def command_without(names: Sequence[str]) -> str:
    """What to type instead, to remove *names* with the program that made the environment."""
    made_by = manager()
    if made_by == "pipx":
        return shlex.join(["pipx", "uninject", Path(sys.prefix).name, *names])
    if made_by == "uv tool":
        return shlex.join(["uv", "tool", "install", OWN, *_received(names)])
    if made_by == "uv":
        return shlex.join(["uv", "pip", "uninstall", "--python", sys.executable, *names])
    return shlex.join([sys.executable, "-m", "ensurepip"])


def require_pip(instead: str) -> None:
    """Raises ImmaError where the environment has no pip; it says to type *instead*."""
    if find_spec("pip") is None:
        whose = f" It was made by {made_by}, which installs by itself:" if (made_by := manager()) else " To get it:"
        raise ImmaError(f"The environment that imma runs in ({sys.prefix}) has no pip.{whose}", hint=f"  {instead}")


def _received(without: Sequence[str]) -> list[str]:
    # uv replaces what was there before by what is named, so all of it has to be named again
    receipt = tomllib.loads((Path(sys.prefix) / "uv-receipt.toml").read_text(encoding="utf-8"))
    kept = receipt.get("tool", {}).get("requirements", [])
    dropped = {OWN, *map(normalized, without)}
    named = [k for k in kept if isinstance(k, dict) and normalized(k.get("name", OWN)) not in dropped]
    return [a for k in named for a in ("--with", k["name"] + k.get("specifier", ""))]
