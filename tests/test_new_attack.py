"""The package that ``imma new-attack`` writes is a plugin that works, from its own test to a verification."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from environments import Environment, FreshEnvironment, built

from imma_cli.attacks.manager import discover
from imma_cli.attacks.new import write_package
from imma_cli.errors import ImmaError

ROOT = Path(__file__).parents[1]

WHERE = """
import json
from importlib.metadata import distributions, entry_points
import imma_attacks, imma_cli, imma_metrics, torch
print(json.dumps({
    "modules": [module.__file__ for module in (imma_attacks, imma_cli, imma_metrics)],
    "torch": torch.__file__,
    "distributions": sorted(str(d.locate_file("")) for d in distributions() if d.name.startswith("imma")),
    "imma-cli": next(json.loads(d.read_text("direct_url.json")) for d in distributions() if d.name == "imma-cli"),
    "points": {point.name: str(point.dist.locate_file("")) for point in entry_points(group="imma")},
    "loaded": {point.name: point.load().__file__ for point in entry_points(group="imma")},
}))
"""


def test_it_is_built_installed_listed_hardened_against_and_verified_with(
    tiny_checkpoint: Path, tiny_config: Path, pictures: Path, tmp_path: Path
) -> None:
    """From nothing, as an author and a user would: imma's wheel and the plugin's in an environment that has no imma yet."""
    folder, hardened = tmp_path / "package", tmp_path / "hard.safetensors"
    own = built(ROOT, tmp_path / "imma")
    fresh = FreshEnvironment(tmp_path / "environment", own)
    done = fresh.imma("new-attack", "my-method", folder)
    assert done.returncode == 0, done.stderr
    assert f"imma install -e {folder}" in done.stdout
    done = fresh.imma("install", built(folder, tmp_path / "plugin"))
    assert done.returncode == 0, done.stderr
    assert "attack my-method" in done.stdout

    done = fresh.run("-c", WHERE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    inside = str(fresh.packages)
    assert all(file.startswith(inside) for file in [*found["modules"], *found["loaded"].values()])
    assert found["distributions"] == [inside, inside]
    assert found["imma-cli"]["url"] == own.as_uri()
    assert "my-method" in found["points"]
    assert set(found["points"].values()) == {inside}
    assert not found["torch"].startswith(inside)
    assert fresh.run("-c", "import hatchling").returncode != 0  # installed where the tests run, and required by nothing

    listed = json.loads(fresh.imma("attacks", "--json").stdout)["attacks"]
    shipped = {name for name, attack in discover().found.items() if attack.distribution == "imma-cli"}
    assert {attack["name"] for attack in listed} == {*shipped, "my-method"}
    done = fresh.imma("attacks", "my-method", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["distribution"], shown["version"]) == ("imma-attack-my-method", "0.1.0")
    assert next(s for s in shown["settings"] if s["name"] == "spread")["search"] == {"options": [0.0, 0.01, 0.1]}
    done = fresh.imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue style", "--images", pictures,
        "--attack", "my-method:spread=0.1", "--steps", 4, "--output", hardened, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = fresh.imma(
        "verify", hardened, "--against", tiny_checkpoint, "--config", tiny_config, "--concept", "blue style",
        "--images", pictures, "--attack", "my-method", "--metric", "fixed", "--preset", "quick", "--budget", 4, "--points", 100,
        "--prompts", 1, "--images-per-prompt", 1, "--json",
        IMMA_TEST_PLUGINS="1",
    )  # fmt: skip
    assert done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    verified = json.loads(done.stdout)
    assert [each["attack"]["name"] for each in verified["comparisons"]] == ["my-method"]
    assert verified["failed"] == []


def test_its_own_test_passes(tmp_path: Path) -> None:
    environment, folder = Environment(tmp_path / "venv"), tmp_path / "package"
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
    (tmp_path / "file").touch()
    code, _, err = imma("new-attack", "my-method", tmp_path / "file" / "new")
    assert code == 2
    assert "cannot be written" in err
    code, _, err = imma("new-attack", "x" * 300, tmp_path / "new" / ("x" * 300))
    assert code == 2
    assert "cannot write" in err or "cannot be written" in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "file"]


def test_without_a_folder_it_is_written_here(imma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = imma("new-attack", "my-method")
    assert code == 0
    assert "imma-attack-my-method" in out
    described = (tmp_path / "imma-attack-my-method" / "pyproject.toml").read_text()
    assert 'my-method = "imma_attack_my_method"' in described
    assert '"imma-cli>=0.1,<0.2"' in described
