"""What an installed imma consists of, and how lightly it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from importlib.resources import files
from typing import Any

import pytest

from imma_cli.attacks.manager import Registry, discover
from imma_cli.verification.metrics import discover_metrics

COMMANDS = ("demo", "harden", "verify", "report", "attacks", "metrics", "install", "uninstall", "new-attack", "inspect")
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "xformers",
    "numpy",
    "PIL",
    "matplotlib",
    "jinja2",
    "bitsandbytes",
    "psutil",
}
# stdout belongs to the help text, so the modules go to stderr
REPORT = """
import json, sys
from imma_cli.cli import main
try:
    code = main()
except SystemExit as stop:
    code = stop.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda c: " ".join(("imma", *c)))
def test_help_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    env = os.environ | {"COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", REPORT, *command, "--help"], capture_output=True, encoding="utf-8", env=env, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Usage" in done.stdout
    imported = set(json.loads(done.stderr.splitlines()[-1]))
    assert not imported & HEAVY


def test_every_command_is_listed() -> None:
    import typer.main

    from imma_cli.cli import app

    assert set(typer.main.get_command(app).commands) == set(COMMANDS)


def test_the_attacks_are_found_through_entry_points() -> None:
    assert discover().broken == ()
    assert _shipped(discover()) == {
        *("lora", "dora", "rslora", "loha", "lokr", "oft", "boft", "ia3", "hra", "peft", "text-encoder-lora"),
        *("dreambooth", "dreambooth-lora", "full-finetune", "textual-inversion", "custom-diffusion", "pivotal-tuning"),
    }


def test_the_metrics_are_found_through_entry_points() -> None:
    assert _shipped(discover_metrics()) == {"effnet", "effnet-style", "pixel", "ssim", "clip", "dino", "lpips"}


def _shipped(registry: Registry[Any]) -> set[str]:
    return {name for name, found in registry.found.items() if found.distribution == "imma-cli"}


@pytest.mark.parametrize(
    "path",
    [
        "py.typed",
        "families/configs/sd1/model_index.json",
        "families/configs/sd1/tokenizer/vocab.json",
        "families/configs/demo/unet/config.json",
        "families/configs/demo/tokenizer/merges.txt",
        "demo/model.safetensors",
        "demo/LICENSES.txt",
        "demo/concepts/high-contrast-style/defend/metadata.csv",
        "demo/concepts/guitar/attack/metadata.csv",
        "demo/concepts/adventurer/judge/metadata.csv",
        "verification/report/templates/page.html",
        "verification/report/templates/macros.html",
        "verification/report/templates/style.css",
        "attacks/template/attack.py.in",
        "attacks/template/pyproject.toml.in",
    ],
)
def test_package_data_is_there(path: str) -> None:
    assert files("imma_cli").joinpath(path).is_file()


def test_the_demo_model_stays_small() -> None:
    assert len(files("imma_cli").joinpath("demo/model.safetensors").read_bytes()) <= 25_000_000


def test_licence_and_notice_are_installed() -> None:
    metadata = distribution("imma-cli").metadata
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("License-File") or []) == {"LICENSE", "NOTICE"}
