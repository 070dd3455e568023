"""How plugins are found: broken ones, ones that are switched off, and what the listing says of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from imma_cli import __version__
from imma_cli.attacks.manager import discover
from imma_cli.attacks.points import DISABLE, DOUBLES, ONLY_OWN, plugin_points
from imma_cli.attacks.settings import parse_attacks
from imma_cli.errors import ImmaError
from imma_cli.verification.metrics import discover_metrics

ATTACK = """
from dataclasses import dataclass
from imma_cli.attacks import Attack, AttackSettings, Preset, hookimpl

class Mine(Attack):
    name = "mine"; summary = "an attack"; trains = "a number"; paper = "arXiv 0000.00000"; families = ("sd1",)
    presets = dict.fromkeys(("paper", "small"), Preset(1e-3, 1e-4, 10))
    def attach(self, model, concept, seed): ...
"""
HOOK = "\n@hookimpl\ndef imma_attacks():\n    return [Mine]\n"
BROKEN = {
    "raises": ("raise OSError('no library')", "OSError: no library"),
    "exits": ("raise SystemExit(3)", "SystemExit"),
    "syntax": ("def", "SyntaxError"),
    "imports": ("import no_such_library_at_all", "No module named 'no_such_library_at_all'"),
    "misspelt": (f"{ATTACK}\n@hookimpl\ndef imma_atacks():\n    return [Mine]", "imma_atacks"),
    "signature": (f"{ATTACK}\n@hookimpl\ndef imma_attacks(model):\n    return [Mine]", "model"),
    "no_list": (f"{ATTACK}\n@hookimpl\ndef imma_attacks():\n    return Mine", "no list of classes"),
    "instance": (f"{ATTACK}\n@hookimpl\ndef imma_attacks():\n    return [Mine(None)]", "no subclass"),
    "no_dataclass": (f"{ATTACK}\nMine.Settings = dict{HOOK}", "no dataclass"),
    "not_frozen": (f"{ATTACK}\n@dataclass\nclass S: ...\nMine.Settings = S{HOOK}", "no dataclass derived"),
    "nameless": (f"{ATTACK}\ndel Mine.name{HOOK}", "does not state its name"),
    "no_presets": (f"{ATTACK}\nMine.presets = {{}}{HOOK}", "lacks paper and small"),
    "other_presets": (f"{ATTACK}\nMine.presets = {{'paper': 1, 'small': 2}}{HOOK}", "no Preset"),
    "other_search": (f"{ATTACK}\nMine.search = {{'learning_rate': 3}}{HOOK}", "no Range"),
    "families": (f"{ATTACK}\nMine.families = 'sd1'{HOOK}", "no tuple of families"),
    "twin": ("from imma_attacks.lora import imma_attacks", "the attack lora is already registered by imma-cli"),
    "twice": (f"{ATTACK}\n@hookimpl\ndef imma_attacks():\n    return [Mine, Mine]", "registers the attack mine twice"),
}  # fmt: skip

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts packages with an entry point each beside those that are installed."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, code: str, entry: str = "") -> None:
        module = f"plugin_{name}_of_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"imma_attack_{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: imma-attack-{name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[imma]\n{entry or name} = {module}\n")

    return install


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_listed_and_the_rest_works(name: str, install: Install, imma) -> None:
    code, reason = BROKEN[name]
    install(name, code)
    install("good", ATTACK.replace('"mine"', '"good"') + HOOK)
    code, out, _ = imma("attacks", "--json")
    listed = json.loads(out)
    assert code == 0
    assert {"lora", "good"} <= {a["name"] for a in listed["attacks"]}
    assert next(a for a in listed["attacks"] if a["name"] == "lora")["distribution"] == "imma-cli"
    (broken,) = listed["broken"]
    assert (broken["plugin"], broken["distribution"], broken["version"]) == (name, f"imma-attack-{name}", "1.2")
    assert reason in broken["reason"]
    code, out, err = imma("attacks")
    assert code == 0
    assert f"imma-attack-{name} 1.2 cannot be used" in err
    with pytest.raises(ImmaError, match=f"imma-attack-{name} could not be used"):
        discover().get("mine")


def test_nobody_takes_the_name_of_what_ships_with_imma(install: Install) -> None:
    install("aaa", "from imma_attacks.lora import imma_attacks")
    registry = discover()
    assert registry.found["lora"].distribution == "imma-cli"
    assert [b.plugin for b in registry.broken] == ["aaa"]


def test_a_package_with_broken_metadata_is_a_broken_plugin(install: Install, tmp_path: Path) -> None:
    install("torn", "raise OSError")
    (tmp_path / "imma_attack_torn-1.2.dist-info" / "METADATA").unlink()
    registry = discover()
    assert "lora" in registry.found
    assert [b.plugin for b in registry.broken] == ["torn"]


def test_what_a_plugin_prints_stays_out_of_the_json(install: Install, imma) -> None:
    install("loud", f"print('hello')\n{ATTACK}{HOOK}")
    code, out, err = imma("attacks", "mine", "--json")
    assert code == 0
    assert json.loads(out)["name"] == "mine"
    assert "hello" in err


def test_plugins_are_switched_off_by_name(install: Install, imma, monkeypatch: pytest.MonkeyPatch) -> None:
    install("mine", ATTACK + HOOK)
    install("broken", "raise OSError")
    monkeypatch.setenv(DISABLE, "mine, broken,lora,nonsense")
    code, out, _ = imma("attacks", "--json")
    listed = json.loads(out)
    assert code == 0
    assert not {"mine", "lora"} & {a["name"] for a in listed["attacks"]}
    assert listed["broken"] == []
    assert {(d["plugin"], d["distribution"]) for d in listed["disabled"]} == {
        ("mine", "imma-attack-mine"), ("broken", "imma-attack-broken"), ("lora", "imma-cli"),
    }  # fmt: skip
    _, _, err = imma("attacks")
    assert "mine of imma-attack-mine 1.2 is switched off by IMMA_DISABLE_PLUGINS" in err
    assert "names no plugin here: nonsense" in err
    code, _, err = imma("attacks", "mine")
    assert code == 2
    assert "switched off by IMMA_DISABLE_PLUGINS" in err


def test_no_plugins_means_only_those_of_imma(install: Install, imma) -> None:
    install("mine", ATTACK + HOOK)
    install("broken", "raise OSError")
    code, out, _ = imma("--no-plugins", "attacks", "--json")
    listed = json.loads(out)
    assert code == 0
    assert {a["distribution"] for a in listed["attacks"]} == {"imma-cli"}
    assert listed["broken"] == []
    assert ONLY_OWN not in os.environ
    assert "mine" in {a["name"] for a in json.loads(imma("attacks", "--json")[1])["attacks"]}
    code, _, err = imma("--no-plugins", "attacks", "mine")
    assert code == 2
    assert "switched off by --no-plugins" in err


def test_stand_ins_appear_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing" not in discover().found
    assert "fixed" not in discover_metrics().found
    monkeypatch.setenv(DOUBLES, "1")
    monkeypatch.setenv(ONLY_OWN, "1")
    found = discover().found["nothing"]
    assert (found.distribution, found.version, found.plugin) == ("imma-cli", __version__, "testing")
    assert "fixed" in discover_metrics().found


def test_an_attack_is_shown_with_all_that_it_states(install: Install, imma) -> None:
    install("mine", ATTACK + HOOK, entry="the-entry")
    code, out, _ = imma("attacks", "--json")
    (mine,) = (a for a in json.loads(out)["attacks"] if a["name"] == "mine")
    assert mine == {
        "name": "mine", "summary": "an attack", "trains": "a number", "paper": "arXiv 0000.00000", "families": ["sd1"],
        "distribution": "imma-attack-mine", "version": "1.2", "plugin": "the-entry", "simulated": False,
    }  # fmt: skip
    code, out, _ = imma("attacks", "mine", "--json")
    shown = json.loads(out)
    assert code == 0
    assert {k: shown[k] for k in mine} == mine
    settings = {s["name"]: s for s in shown["settings"]}
    assert settings["learning_rate"]["search"] == {"low": 0.1, "high": 10, "log": True, "of_preset": True}
    assert settings["optimizer"]["search"] == {"options": ["adamw", "radam", "adafactor"]}
    assert settings["preset"]["search"] is None
    assert settings["pictures"]["type"] == "int"
    assert "how many" in settings["pictures"]["meaning"].lower()
    assert shown["presets"]["small"]["steps"] == 10
    code, out, _ = imma("attacks", "lora")
    assert code == 0
    for part in ("arXiv 2106.09685", "trains LoRA matrices", "families: all", "0.1 to 10", "1, 4, 16"):
        assert part in " ".join(out.split()), part


def test_an_attack_on_a_family_it_does_not_support_is_refused(
    install: Install, imma, tiny_checkpoint, tiny_config, pictures, tmp_path
) -> None:
    install("mine", ATTACK.replace('("sd1",)', '("pixart",)') + HOOK)
    code, _, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "x", "--images", pictures, "--attack", "mine",
        "--output", tmp_path / "hard.safetensors",
    )  # fmt: skip
    assert code == 2
    assert "mine does not work on Stable Diffusion 1.x" in err
    assert "pixart" in err


def test_entry_points_given_by_hand_are_asked_in_the_same_way() -> None:
    registry = discover([EntryPoint("lora", "imma_attacks.lora", "imma"), EntryPoint("x", "no_such_module", "imma")])
    assert set(registry.found) == {"lora"}
    assert [b.plugin for b in registry.broken] == ["x"]
    assert parse_attacks(["lora:rank=2"], registry)[0].settings.rank == 2
    assert any(point.entry.name == "lora" for point in plugin_points())


def test_the_variable_reaches_a_fresh_process() -> None:
    code = "from imma_cli.attacks.manager import discover; print(*discover().found)"
    env = {**os.environ, ONLY_OWN: "1", DISABLE: "lora"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert "lora" not in done.stdout.split()
    assert "dreambooth" in done.stdout.split()
