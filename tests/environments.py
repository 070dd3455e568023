"""Environments that packages may be installed into without a trace in the one that runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path


class Environment:
    """A virtual environment that sees everything of the one that runs the tests, pip included, and nothing of an index.

    A truly fresh one, with a torch of its own, would take minutes and a network. What is installed here lands here.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        paths = {"base": str(folder), "platbase": str(folder)}
        self.packages = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        parents = [path for path in sys.path if path.endswith("-packages")]
        lines = [f"import site; site.addsitedir({path!r})" for path in parents]
        (self.packages / "parent.pth").write_text("\n".join(lines) + "\n")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "IMMA_"))}
        self.env |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}

    def run(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs the environment's Python; nobody sits at the keyboard."""
        return subprocess.run(
            [str(self.python), *map(str, arguments)],
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )

    def imma(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "imma_cli", *arguments, **env)


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
