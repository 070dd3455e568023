"""``imma install`` and ``imma uninstall``: with pip itself, in an environment that may be thrown away, without a network."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from environments import Environment, wheel

from imma_cli import __version__
from imma_cli.errors import ImmaError
from imma_cli.packages import pip
from imma_cli.packages.installed import constraints, needed_by_imma
from imma_cli.packages.sources import source_of

CODE = """
from imma_attacks.lora import Lora
from imma_cli.attacks import hookimpl
from imma_cli.attacks.testing.doubles import Fixed

class Mine(Lora):
    name = "mine"
    summary = "my own"

class Alike(Fixed):
    name = "alike"
    summary = "always alike"

@hookimpl
def imma_attacks():
    return [Mine]

@hookimpl
def imma_metrics():
    return [Alike]
"""
ENTRY = "[imma]\nmine = imma_attack_mine\n"
BACKEND = '''
"""Builds by copying a wheel, and leaves a mark: building runs code."""
import shutil
from pathlib import Path

HERE = Path(__file__).parent
WHEEL = "imma_attack_built-3.0-py3-none-any.whl"

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    (HERE / "was-run").touch()
    shutil.copy(HERE / WHEEL, wheel_directory)
    return WHEEL

build_editable = build_wheel
'''


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment") / "venv")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A package as a folder, whose build leaves a mark."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "imma-attack-built"\nversion = "3.0"\n'
    )
    (folder / "backend.py").write_text(BACKEND)
    wheel(folder, "imma-attack-built", "3.0")
    return folder


def test_a_wheel_comes_and_goes(environment: Environment, tmp_path: Path) -> None:
    old, new = (
        wheel(tmp_path, "imma-attack-mine", version, CODE, ENTRY, requires=("imma-cli", "torch")) for version in "12"
    )
    done = environment.imma("install", old)
    assert done.returncode == 0, done.stderr
    assert f"from the wheel {old}" in done.stderr
    assert "attack mine: my own (imma-attack-mine)" in done.stdout
    assert "metric alike: always alike (imma-attack-mine)" in done.stdout
    listed = json.loads(environment.imma("attacks", "mine", "--json").stdout)
    assert (listed["distribution"], listed["version"]) == ("imma-attack-mine", "1")

    done = environment.imma("install", "-U", "imma-attack-mine", PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"imma-attack-mine 2: the wheel {new.as_uri()}" in done.stderr
    assert "attack mine" in done.stdout
    # once more, by name: nothing is left to be installed, but it is said what is there
    done = environment.imma("install", "imma-attack-mine")
    assert done.returncode == 0, done.stderr
    assert "attack mine" in done.stdout

    done = environment.imma("uninstall", "mine")
    assert done.returncode == 2
    assert "mine comes in the package imma-attack-mine" in done.stderr
    done = environment.imma("uninstall", "Imma_Attack.mine")
    assert done.returncode == 0, done.stderr
    assert "Removed imma-attack-mine with the plugins mine" in done.stdout
    assert not list(environment.packages.glob("imma_attack_mine*"))


def test_a_package_without_plugins_and_one_that_is_broken_are_told(environment: Environment, tmp_path: Path) -> None:
    nothing = wheel(tmp_path, "brings-nothing", "1")
    broken = wheel(
        tmp_path, "imma-attack-broken", "1", "raise OSError('no library')", "[imma]\nx = imma_attack_broken\n"
    )
    done = environment.imma("install", nothing)
    assert done.returncode == 0, done.stderr
    assert "brings-nothing brings no attack and no metric" in done.stdout
    done = environment.imma("install", broken)
    assert done.returncode == 2
    assert "x of imma-attack-broken: OSError: no library" in done.stderr
    assert environment.imma("uninstall", "brings-nothing", "imma-attack-broken").returncode == 0


@pytest.mark.parametrize("given", ["folder", "editable", "archive", "name"])
def test_what_has_to_be_built_needs_consent(environment: Environment, source: Path, given: str) -> None:
    arguments: tuple[object, ...] = (source,)
    env = {}
    mark = source / "was-run"
    if given == "editable":
        arguments = ("-e", source)
    if given in ("archive", "name"):
        archive = source.parent / "imma_attack_built-3.0.zip"
        with zipfile.ZipFile(archive, "w") as packed:
            for file in source.iterdir():
                if file.name != "backend.py":
                    packed.write(file, f"imma_attack_built-3.0/{file.name}")
            # what is unpacked somewhere leaves its mark here
            marked = (source / "backend.py").read_text().replace('HERE / "was-run"', f"Path({str(mark)!r})")
            packed.writestr("imma_attack_built-3.0/backend.py", marked)
            packed.writestr("imma_attack_built-3.0/PKG-INFO", "Metadata-Version: 2.1\nName: imma-attack-built\nVersion: 3.0\n")  # fmt: skip
        arguments = (archive,) if given == "archive" else ("imma-attack-built",)
        env = {"PIP_FIND_LINKS": str(source.parent)}
    done = environment.imma("install", *arguments, **env)
    assert done.returncode == 2
    assert "code runs while it is built" in done.stderr
    assert "--yes" in done.stderr
    assert not mark.exists()
    done = environment.imma("install", "--yes", *arguments, **env)
    assert done.returncode == 0, done.stderr
    assert "brings no attack and no metric" in done.stdout
    assert mark.exists()
    assert environment.imma("uninstall", "imma-attack-built").returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX terminals")
@pytest.mark.parametrize(("answer", "code"), [("n", 2), ("y", 0)])
def test_on_a_terminal_it_asks(environment: Environment, source: Path, answer: str, code: int) -> None:
    controller, terminal = pty.openpty()
    os.write(controller, f"{answer}\n".encode())
    done = subprocess.run(
        [environment.python, "-m", "imma_cli", "install", source],
        env=environment.env, stdin=terminal, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    os.close(controller)
    os.close(terminal)
    assert done.returncode == code, done.stderr
    assert "Go on?" in done.stderr
    assert (source / "was-run").exists() == (code == 0)
    if code == 0:
        assert environment.imma("uninstall", "imma-attack-built").returncode == 0


def test_pip_may_not_change_what_imma_is_built_on(environment: Environment, tmp_path: Path) -> None:
    greedy = wheel(tmp_path, "imma-attack-greedy", "1", requires=("typer>=900",))
    wheel(tmp_path, "typer", "901")
    done = environment.imma("install", greedy, PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 2
    assert "imma keeps the versions of what it is built on" in done.stderr
    assert not list(environment.packages.glob("typer*"))
    done = environment.imma("install", "-U", "typer", PIP_FIND_LINKS=str(tmp_path))
    assert not list(environment.packages.glob("typer*"))
    pinned = dict(line.split("==") for line in constraints())
    assert {"imma-cli", "torch", "diffusers", "transformers", "peft"} <= set(pinned)
    assert pinned["imma-cli"] == __version__
    assert "pytest" not in pinned


def test_the_users_own_constraints_hold_as_well(environment: Environment, tmp_path: Path) -> None:
    wheel(tmp_path, "imma-attack-mine", "2", CODE, ENTRY)
    (tmp_path / "mine.txt").write_text("imma-attack-mine==1\n")
    done = environment.imma(
        "install", "imma-attack-mine", PIP_FIND_LINKS=str(tmp_path), PIP_CONSTRAINT=str(tmp_path / "mine.txt")
    )
    assert done.returncode == 2
    assert not list(environment.packages.glob("imma_attack_mine*"))


def test_imma_and_what_it_needs_stay(imma) -> None:
    code, _, err = imma("uninstall", "Imma_CLI", "torch", "markupsafe", "pip", "no-such-package", "")
    assert code == 2
    assert "empty name" in err
    for name in ("imma-cli", "torch", "markupsafe", "pip"):
        assert f"imma needs {name}" in err
    assert "no package no-such-package" in err
    assert "pytest" not in needed_by_imma()


def test_everything_wrong_is_said_at_once(imma, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").touch()
    code, _, err = imma(
        "install",
        tmp_path / "no.whl",
        tmp_path / "empty",
        tmp_path / "text.txt",
        "imma-cli>=1",
        "two words",
        "-e",
        "name",
    )
    assert code == 2
    for part in ("no.whl", "no pyproject.toml", "no wheel or archive", "does not replace itself", "two words", "name"):
        assert part in err
    code, _, err = imma("install", "--", "--index-url=http://x")
    assert code == 2
    assert "is no package" in err
    assert imma("install")[0] == 2


def test_where_a_package_comes_from_is_read_off_its_name(tmp_path: Path) -> None:
    made = wheel(tmp_path, "imma-attack-mine", "1")
    (tmp_path / "pyproject.toml").touch()
    told = {
        "imma_Attack.x[extra]>=1,<2": ("the package index", False, "imma-attack-x"),
        str(made): (f"the wheel {made}", False, "imma-attack-mine"),
        f"{tmp_path}[test]": (f"the folder {tmp_path}", True, None),
        "https://me:secret@host/a/x-1-py3-none-any.whl": ("https://host/a/x-1-py3-none-any.whl", False, None),
        "https://host/x-1.tar.gz": ("https://host/x-1.tar.gz", True, None),
        "git+https://host/x.git@main": ("git+https://host/x.git@main", True, None),
        "git+ssh://git@host/x.git": ("git+ssh://host/x.git", True, None),
        "git+https://host/x.whl": ("git+https://host/x.whl", True, None),
        "x @ https://host/x-1.tar.gz": ("https://host/x-1.tar.gz", True, "x"),
    }
    for text, (origin, builds, name) in told.items():
        source = source_of(text)
        assert (source.origin, source.builds, source.name) == (origin, builds, name), text
    editable = source_of("git+https://host/x.git", editable=True)
    assert (editable.builds, editable.editable) == (True, True)
    secret = source_of("x @ https://me:sec@ret@host/x-1.tar.gz")
    assert (secret.shown, secret.origin) == ("x @ https://host/x-1.tar.gz", "https://host/x-1.tar.gz")
    for text in ("", "-r x", "a b", "./nowhere", "http://[x/a.whl"):
        with pytest.raises(ImmaError):
            source_of(text)


def test_without_pip_the_right_command_is_told(imma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    made = tmp_path / "imma-cli"
    made.mkdir()
    monkeypatch.setattr(sys, "prefix", str(made))

    def told(*arguments: str) -> str:
        code, _, err = imma(*arguments)
        assert code == 2
        assert "has no pip" in err
        return err.strip().splitlines()[-1].strip()

    monkeypatch.setattr("imma_cli.packages.installed.version_of", lambda name: "1")
    assert told("install", "x") == f"{sys.executable} -m ensurepip"
    (made / "pyvenv.cfg").write_text("home = /usr\nuv = 0.5\n")
    assert told("install", "x", "-U") == f"uv pip install -U --python {sys.executable} x"
    assert told("uninstall", "x") == f"uv pip uninstall --python {sys.executable} x"
    (made / "uv-receipt.toml").write_text(
        '[tool]\nrequirements = [{ name = "imma-cli" }, { name = "other", specifier = ">=2" }, { name = "x" }]\n'
    )
    assert told("install", "x") == "uv tool install imma-cli --with 'other>=2' --with x"
    assert told("install", "x>1", "-U") == "uv tool install imma-cli --with 'other>=2' --with 'x>1' --upgrade-package x"
    assert told("uninstall", "x") == "uv tool install imma-cli --with 'other>=2'"
    (made / "uv-receipt.toml").unlink()
    (made / "pipx_metadata.json").write_text("{}")
    assert told("install", "x") == "pipx inject imma-cli x"
    assert told("uninstall", "x") == "pipx uninject imma-cli x"
    assert pip.manager() == "pipx"
