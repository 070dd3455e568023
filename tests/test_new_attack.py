"""The package that ``imma new-attack`` writes is a plugin that works, from its own test to a verification."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from environments import Environment

from imma_cli.attacks.manager import discover
from imma_cli.attacks.new import write_package
from imma_cli.errors import ImmaError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A fresh environment with imma's own wheel, as somebody has it who is no developer of imma.

    Only what imma requires (torch alone is gigabytes) comes from the environment that runs the tests.
    """
    pytest.importorskip("hatchling", reason="pip install 'imma-cli[test]' brings it")
    folder = tmp_path_factory.mktemp("environment")
    environment = Environment(folder / "venv")
    built = environment.run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("imma_cli-*.whl")
    # the developer's imma is seen from here, too: pip must neither be content with it nor remove it
    done = environment.run("-m", "pip", "install", "--no-deps", "--ignore-installed", wheel)
    assert done.returncode == 0, done.stderr
    return environment


def test_the_wheel_is_what_runs_there(environment: Environment) -> None:
    places = "import imma_cli, imma_attacks, importlib.metadata as m; print(imma_cli.__file__, imma_attacks.__file__, m.distribution('imma-cli').locate_file(''), sep='\\n')"
    done = environment.run("-c", places)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(environment.packages) for line in done.stdout.splitlines())
    listed = environment.imma("attacks", "--json")
    assert {attack["name"] for attack in json.loads(listed.stdout)["attacks"]} == set(discover().found)


def test_it_is_built_installed_listed_hardened_against_and_verified_with(
    environment: Environment, tiny_checkpoint: Path, tiny_config: Path, pictures: Path, tmp_path: Path
) -> None:
    folder, hardened = tmp_path / "package", tmp_path / "hard.safetensors"
    done = environment.imma("new-attack", "my-method", folder)
    assert done.returncode == 0, done.stderr
    assert f"imma install -e {folder}" in done.stdout
    done = environment.run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, folder)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    done = environment.imma("install", wheel)
    assert done.returncode == 0, done.stderr
    assert "attack my-method" in done.stdout
    done = environment.imma("attacks", "my-method", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["distribution"], shown["version"]) == ("imma-attack-my-method", "0.1.0")
    assert next(s for s in shown["settings"] if s["name"] == "spread")["search"] == {"options": [0.0, 0.01, 0.1]}
    done = environment.imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue style", "--images", pictures,
        "--attack", "my-method:spread=0.1", "--steps", 4, "--output", hardened, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = environment.imma(
        "verify", hardened, "--against", tiny_checkpoint, "--config", tiny_config, "--concept", "blue style",
        "--images", pictures, "--attack", "my-method", "--metric", "fixed", "--preset", "quick", "--budget", 4, "--seeds", 2,
        "--prompts", 1, "--images-per-prompt", 1, "--json",
        IMMA_TEST_PLUGINS="1",
    )  # fmt: skip
    assert done.stdout, done.stderr
    assert "my-method" in done.stdout
    assert "Traceback" not in done.stderr


def test_its_own_test_passes(environment: Environment, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    written = write_package("model", folder, taken=())  # a name that stands in the template, too
    assert {path.relative_to(folder).as_posix() for path in written} == {
        "pyproject.toml", "imma_attack_model.py", "tests/test_model.py", "README.md",
    }  # fmt: skip
    assert len((folder / "imma_attack_model.py").read_text().splitlines()) <= 60
    done = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", folder, PYTHONPATH=_path(environment, folder))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def _path(environment: Environment, folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), environment.env.get("PYTHONPATH", "")]))


def test_what_is_wrong_is_said_and_nothing_is_written(imma, tmp_path: Path) -> None:
    for name in ("", "My", "a_b", "1st", "-x", "a--b", "x-", "../x", "é", "a:b"):
        with pytest.raises(ImmaError, match="no name for it"):
            write_package(name, tmp_path / "new", taken=())
    with pytest.raises(ImmaError) as caught:
        write_package("lora", tmp_path, taken=discover().found)
    assert "an attack called lora already" in str(caught.value)
    assert f"{tmp_path} exists" in str(caught.value)
    code, _, err = imma("new-attack", "textual-inversion", tmp_path / "new")
    assert code == 2
    assert "already" in err
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_it_is_written_here(imma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = imma("new-attack", "my-method")
    assert code == 0
    assert "imma-attack-my-method" in out
    described = (tmp_path / "imma-attack-my-method" / "pyproject.toml").read_text()
    assert 'my-method = "imma_attack_my_method"' in described
    assert '"imma-cli>=0.1,<0.2"' in described
