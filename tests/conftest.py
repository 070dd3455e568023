"""What every test may use: a tiny Stable Diffusion 1.x from the real classes, as a file, as a folder and loaded."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# tests run beside each other, and so do the processes that they start: one thread each
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from imma_cli.attacks import testing
from imma_cli.checkpoints import open_checkpoint
from imma_cli.cli import main
from imma_cli.families.model import Model

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration folder of the tiny model, with the demo's tokenizer (2858 tokens)."""
    return testing.tiny_config(tmp_path_factory.mktemp("tiny") / "config")


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_config: Path) -> Any:
    """The tiny model as a diffusers pipeline, fp16, with seeded random weights."""
    return testing.tiny_pipeline(tiny_config)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as one ``.safetensors`` file in SD 1.x's layout. Never write to it: copy it first."""
    return testing.tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))[0]


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a diffusers folder. Never write to it: copy it first."""
    path = tmp_path_factory.mktemp("folder") / "tiny"
    tiny_pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def loaded_once(tiny_checkpoint: Path, tiny_config: Path) -> Model:
    return open_checkpoint(tiny_checkpoint, tiny_config).load()


@pytest.fixture
def tiny_model(loaded_once: Model) -> Model:
    """The tiny model, loaded, float32, frozen; a fresh copy for each test."""
    return copy.deepcopy(loaded_once)


@pytest.fixture
def short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short attacks along a hardening in episodes have 8 steps, and every 8 outer steps are worth one."""
    from imma_cli.cli import planning
    from imma_cli.immunizers import checking, duration, settings

    monkeypatch.setattr(checking.QuickCheck.__init__, "__defaults__", (8, None))
    monkeypatch.setattr(settings, "STEPS", 8)
    monkeypatch.setattr(duration, "CHECK_STEPS", 8)
    monkeypatch.setattr(planning, "CHECK_STEPS", 8)


@pytest.fixture
def imma(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs ``imma`` with arguments in this process; gives exit code, output and messages."""

    def run(*arguments: object) -> tuple[int, str, str]:
        handler = signal.getsignal(signal.SIGINT)
        monkeypatch.setattr(sys, "argv", ["imma", *map(str, arguments)])
        try:
            with pytest.raises(SystemExit) as left:
                main()
        finally:
            signal.signal(signal.SIGINT, handler)
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        Image.effect_mandelbrot((64, 64), (-2 + i / 4, -1, 1, 1.2), 15 + 4 * i).convert("RGB").save(folder / f"{i}.png")
    return folder
