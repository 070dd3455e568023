"""Environments that packages may be installed into without a trace in the one that runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


class Environment:
    """A virtual environment that sees everything of the one that runs the tests, pip included, and nothing of an index.

    A truly fresh one, with a torch of its own, would take minutes and a network. What is installed here lands here.
    """

    def __init__(self, folder: Path) -> None:
        self._make(folder)
        parents = [path for path in sys.path if path.endswith("-packages")]
        lines = [f"import site; site.addsitedir({path!r})" for path in parents]
        (self.packages / "parent.pth").write_text("\n".join(lines) + "\n")

    def _make(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        paths = {"base": str(folder), "platbase": str(folder)}
        self.packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        self.scripts = Path(sysconfig.get_path("scripts", "venv", vars=paths))
        self.python = self.scripts / ("python.exe" if os.name == "nt" else "python")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "IMMA_"))}
        self.env |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}

    def run(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs the environment's Python; nobody sits at the keyboard."""
        return self._run(self.python, *arguments, **env)

    def _run(self, *command: object, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, command)],
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )

    def imma(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "imma_cli", *arguments, **env)


class FreshEnvironment(Environment):
    """A virtual environment into which pip installed *wheel*, and nothing of what runs the tests but pip and what it requires.

    Of the environment that runs the tests it sees the distributions that *wheel* declares, what those declare, and so on,
    by links: torch and the like are gigabytes, and tests need no network. pip takes them for installed, so that it installs
    *wheel* with its requirements as it would for anyone, and refuses if one is not declared rightly. Whatever else is there,
    imma's editable installation, pytest or an undeclared dependency, cannot be imported.
    """

    def __init__(self, folder: Path, wheel: Path) -> None:
        self._make(folder / "venv")
        # as if the tests' PYTHONPATH, which may lead to imma's source, had never been set
        self.env = {k: v for k, v in self.env.items() if not k.startswith("PYTHON")} | {"PYTHONIOENCODING": "utf-8"}
        links = folder / "requirements"
        links.mkdir()
        for found in (*required_by(wheel), distribution("pip")):
            for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
                if not (links / top).exists():  # parts of a namespace come from several distributions
                    (links / top).symlink_to(Path(str(found.locate_file(top))).resolve())
        (self.packages / "requirements.pth").write_text(f"{links}\n")
        done = self.run("-m", "pip", "install", wheel)
        assert done.returncode == 0, done.stdout + done.stderr

    def imma(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs the installed command itself."""
        return self._run(self.scripts / "imma", *arguments, **env)


def required_by(wheel: Path) -> list[Distribution]:
    """What *wheel* requires without extras, what that requires, and so on, as it is installed here.

    Raises PackageNotFoundError where something of it is not installed.
    """
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        waiting = [(line, "") for line in PathDistribution(zipfile.Path(archive, name).parent).requires or ()]
    found: dict[tuple[str, str], Distribution] = {}
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (requirement.name, wanted) not in found:
                installed = found[requirement.name, wanted] = distribution(requirement.name)
                waiting += [(each, wanted) for each in installed.requires or ()]
    return list(found.values())


def built(source: Path, folder: Path) -> Path:
    """The wheel of the project in *source*, built by the environment that runs the tests, which has the build backend."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", folder, source], check=True)
    (made,) = folder.glob("*.whl")
    return made


def wheel(
    folder: Path, name: str, version: str, code: str = "", entry_points: str = "", requires: tuple[str, ...] = ()
) -> Path:
    """A wheel of one module, packed by hand as the format's specification (PEP 427) says."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    files = {
        f"{module}.py": code,
        f"{info}/METADATA": "\n".join(metadata) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": entry_points,
    }
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"]))
    return path
