"""An interrupted run that is continued ends with the same bytes as one that was not interrupted."""

from __future__ import annotations

import copy
import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from imma_attacks._in_place import given_back
from imma_attacks.full_finetune import FullFinetune
from PIL.Image import Image
from test_erasing import UCE
from test_imma import CPU, attack_named, some_concept
from torch import Tensor, nn

from imma_cli.attacks import Attack
from imma_cli.cli import hardening, resuming
from imma_cli.concepts import drawing
from imma_cli.concepts.concept import Concept
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model
from imma_cli.families.stable_diffusion_1 import StableDiffusion1
from imma_cli.immunizers import erasing, state
from imma_cli.immunizers.checking import QuickCheck
from imma_cli.immunizers.episodes import immunize_in_episodes
from imma_cli.immunizers.imma import Immunized, ImmunizerSettings, Step, immunize
from imma_cli.immunizers.keeper import FileKeeper
from imma_cli.immunizers.retention import Retention, retain
from imma_cli.immunizers.settings import EpisodesSettings
from imma_cli.immunizers.state import SavedState, State, write_state

ATTACKS = (
    "lora:schedule=linear,warmup=0.3,optimizer=radam",
    "dreambooth:prior_weight=1,prior_images=1,optimizer=adafactor",
    "textual-inversion:tokens=2,schedule=cosine",
)


class Biases(FullFinetune):
    """Trains some of the weights in place: the rest of its copies moves by the defender's steps alone."""

    name = "biases"

    def attach(self, model: Model, concept: Concept, seed: int) -> AbstractContextManager[dict[str, nn.Parameter]]:
        return given_back({name: p for name, p in model.unet.named_parameters() if name.endswith(".bias")})


CYCLES = 6
ONE_AT_A_TIME = EpisodesSettings(
    steps=2 * CYCLES, inner_steps=1, shortest=2, longest=2, checks=3, outer_batch=1, keep_batch=1
)
"""Every episode has two cycles, and there is a check after each."""
SIDE_BY_SIDE = replace(ONE_AT_A_TIME, side_by_side=True)


class EveryCycle(FileKeeper):
    """Saves after every cycle, and leaves all these states."""

    def __init__(self, path: Path, saved: SavedState | None = None) -> None:
        super().__init__(path, {}, 0, saved)

    def _write(self, run: State) -> None:
        super()._write(run)
        shutil.copy(self.path, self.after(len(run["run"]["result"]["steps"])))

    def after(self, cycle: int) -> Path:
        return self.path.with_name(f"{self.path.name}-{cycle}")


@pytest.fixture(autouse=True)
def drawn_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = StableDiffusion1.draw

    def few_steps(*args: Any, **options: Any) -> list[Image]:
        return draw(*args, **options | {"steps": 2})

    monkeypatch.setattr(StableDiffusion1, "draw", few_steps)


@pytest.fixture(scope="module")
def retention(loaded_once: Model) -> Retention:
    return retain(copy.deepcopy(loaded_once), ["a cat", "moon"], noisings=4, seed=0, runtime=CPU)


@pytest.fixture
def checked(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Short attacks that cost nothing, and get more the further the weights have moved; gives what they got.

    So the first check is the best one, and two after it end the run: what is kept of both belongs to the state.
    """
    got: list[float] = []
    original = copy.deepcopy(dict(tiny_model.unet.named_parameters()))

    def attack(self: QuickCheck) -> tuple[float, float]:
        moved = [(w - original[n]).abs().mean() for n, w in self.model.unet.named_parameters()]
        got.append(0.5 - float(sum(moved)))
        return 1.0, got[-1]

    monkeypatch.setattr(QuickCheck, "_attack", attack)
    monkeypatch.setattr("imma_cli.immunizers.checking.PATIENCE", 2)
    monkeypatch.setattr("imma_cli.immunizers.settings.STEPS", 1)  # a run this short is not checked otherwise
    return got


@pytest.fixture
def harden(tiny_model: Model, retention: Retention) -> Callable[..., Immunized]:
    """Hardens the tiny model by one method, and lets the keeper save after every cycle."""

    def run(method: Any, attacks: Sequence[Attack], keeper: EveryCycle) -> Immunized:
        concepts = [some_concept()]
        drawn: list[float] = []

        def on_step(step: Step) -> None:
            drawn.append(float(torch.rand(1)))  # a library may draw from the global generator, which goes on, too

        torch.manual_seed(1 if keeper.saved else 0)
        if isinstance(method, EpisodesSettings):
            found = immunize_in_episodes(tiny_model, attacks, concepts, method, CPU, retention, on_step, keeper=keeper)
        else:
            settings = ImmunizerSettings(method, steps=2 * CYCLES // len(attacks))
            found = immunize(tiny_model, attacks, concepts, settings, CPU, on_step, keeper)
        return replace(found, simulated_steps=int(1e6 * drawn[-1]))

    return run


@pytest.mark.parametrize(
    ("method", "attacks", "cuts"),
    [
        ("imma", ATTACKS, (3,)),
        ("maximize", ATTACKS, (3,)),
        (SIDE_BY_SIDE, ATTACKS, (1, 4)),
        (SIDE_BY_SIDE, (*ATTACKS, Biases), (5,)),
        (ONE_AT_A_TIME, ATTACKS, (1, 3, 5)),
        (ONE_AT_A_TIME, (Biases,), (5,)),
        (replace(ONE_AT_A_TIME, eight_bit=True, accumulate=2), ("lora:rank=32,targets=everything",), (3,)),
    ],
)
def test_a_run_that_goes_on_ends_as_if_it_had_not_been_interrupted(
    harden: Callable[..., Immunized],
    checked: list[float],
    tiny_model: Model,
    method: str | EpisodesSettings,
    attacks: Sequence[str | type[Attack]],
    cuts: Sequence[int],
    tmp_path: Path,
) -> None:
    """With the same weights, course and checks; and with the same last state, in which both players are whole.

    One at a time, every cut is in the middle of another attack's episode; else, every attack has a step before the cut or one
    after.
    """
    attackers = [attack_named(a) if isinstance(a, str) else a(a.Settings()) for a in attacks]
    before = copy.deepcopy(tiny_model.unet.state_dict())
    first = EveryCycle(tmp_path / "first")
    whole = harden(method, attackers, first)
    assert len(whole.steps) == CYCLES
    assert {step.attack for step in whole.steps} == {attack.name for attack in attackers}
    for cut in cuts:
        checked.clear()
        path = tmp_path / f"second-{cut}"
        shutil.copy(first.after(cut), path)
        continued = harden(method, attackers, EveryCycle(path, SavedState.open(path)))
        assert continued.weights.keys() == whole.weights.keys()
        assert all(torch.equal(weight, whole.weights[name]) for name, weight in continued.weights.items())
        assert replace(continued, weights={}) == replace(whole, weights={})
        assert path.read_bytes() == first.path.read_bytes()
        # neither the original nor what was checked is attacked again
        assert [check.loss for check in whole.checks if check.cycle > cut] == checked
    assert [check.cycle for check in whole.checks] == ([2, 4, 6] if isinstance(method, EpisodesSettings) else [])
    assert whole.taken is next(iter(whole.checks), None)
    assert all(torch.equal(before[name], weight) for name, weight in tiny_model.unet.state_dict().items())


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_state(path, {"seed": 1}, {"run": {"weights": [torch.arange(6.0).view(2, 3), torch.tensor(3)], "empty": None}})
    whole = path.read_bytes()
    saved = SavedState.open(path)
    assert saved.command == {"seed": 1}
    assert torch.equal(saved.read("run")["weights"][0], torch.arange(6.0).view(2, 3))
    last = torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last).fill_(1)
    write_state(path, {}, {"run": {"weight": last}})
    assert SavedState.open(path).read("run", "weight").stride() == last.stride()
    assert saved.read("run", "empty") is saved.read("work", "drawn") is None
    for damaged in (b"", b"rubbish, and more of it", whole[:-1], whole[:40], whole.replace(b"seed", b"need")):
        path.write_bytes(damaged)
        with pytest.raises(ImmaError, match="Delete it, or leave out --resume"):
            SavedState.open(path)
    for position in (-1, -20, whole.index(b"weights")):  # a bit of a tensor, and of what says which is which
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ImmaError, match="cannot be used"):
            SavedState.open(path)


def test_a_failed_write_leaves_the_older_state_and_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[ImmaError | None] = []
    keeper = FileKeeper(tmp_path / "state", {}, 0, None, failures.append)
    keeper.offer(lambda: {"cycle": 1, "weight": torch.zeros(1)})

    def full(tensor: Tensor) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(state, "as_bytes", full)
        keeper.offer(lambda: {"cycle": 2, "weight": torch.zeros(1)})
    assert SavedState.open(keeper.path).read("run", "cycle") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    keeper.offer(lambda: {"cycle": 3, "weight": torch.zeros(1)})
    assert SavedState.open(keeper.path).read("run", "cycle") == 3
    assert [failure is None for failure in failures] == [True, False, True]
    assert "the disk is full" in str(failures[1])


@pytest.fixture
def command(tiny_checkpoint: Path, tiny_config: Path) -> list[object]:
    return ["harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue style", "--attack", "lora"]


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has Ctrl-C pressed during the given cycle of the next run."""
    curves = hardening._curves

    def press(cycle: int) -> None:
        def pressed(step: Step) -> dict[str, float | None]:
            if step.cycle == cycle:
                signal.raise_signal(signal.SIGINT)
            return curves(step)

        monkeypatch.setattr(hardening, "_curves", pressed)

    return press


def test_ctrl_c_saves_and_the_same_command_goes_on(
    imma, command, ctrl_c, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasing, "settings_for", lambda model, method, seed: replace(UCE, seed=seed))
    monkeypatch.setattr(hardening, "FEWEST_KEPT", 2)
    command += ["--erase", "uce", "--draw", 1, "--steps", 9, "--json"]
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    saved = tmp_path / "cut.safetensors.imma-state"
    code, said, err = imma(*command, "--output", whole)
    assert code == 0, err
    assert list(tmp_path.iterdir()) == [whole]  # a short run leaves nothing

    ctrl_c(2)
    code, _, err = imma(*command, "--output", cut)
    assert code == 130
    assert "--resume goes on" in " ".join(err.split())
    assert sorted(tmp_path.iterdir()) == [saved, whole]
    state_before = saved.read_bytes()

    ctrl_c(1)  # who forgot --resume can still turn back
    code, _, err = imma(*command[:-1], "--output", cut)
    assert code == 130
    assert "--resume goes on from it" in " ".join(err.split())
    assert saved.read_bytes() == state_before

    code, _, err = imma(*command, "--output", cut, "--seed", 3, "--strength", "low", "--resume")
    assert code == 2
    for part in ("settings.seed: 0 then, 3 now", "erase.seed: 0 then, 3 now", 'settings.strength: "medium" then'):
        assert part in err
    with monkeypatch.context() as older:  # a state that another version of imma has written
        older.setattr(resuming, "LAYOUT", 1)
        code, _, err = imma(*command, "--output", cut, "--resume")
    assert (code, f"layout: {resuming.LAYOUT} then, 1 now" in err) == (2, True)
    saved.write_bytes(state_before[:-1])
    code, _, err = imma(*command, "--output", cut, "--resume")
    assert (code, "leave out --resume" in err) == (2, True)
    saved.write_bytes(state_before)

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("this was done before")

    for module, name in ((drawing, "draw_concept"), (erasing, "erase"), (hardening, "retention_for")):
        monkeypatch.setattr(module, name, again)
    ctrl_c(0)
    code, continued, err = imma(*command, "--output", cut, "--resume")
    assert code == 0, err
    assert cut.read_bytes() == whole.read_bytes()
    assert json.loads(continued) == json.loads(said) | {"output": str(cut)}
    assert sorted(tmp_path.iterdir()) == [cut, whole]


def test_ctrl_c_before_the_first_cycle_keeps_the_finished_work(
    imma, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(hardening, "retention_for", pressed)
    arguments = [*command, "--draw", 1, "--steps", 3, "--output", tmp_path / "hard.safetensors"]
    assert imma(*arguments, "--save-every", 0)[0] == 130
    assert list(tmp_path.iterdir()) == []
    assert imma(*arguments)[0] == 130
    monkeypatch.setattr(drawing, "draw_concept", pressed)
    monkeypatch.setattr(hardening, "retention_for", lambda *_, **__: sys.exit(7))
    assert imma(*arguments, "--resume")[0] == 7


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("how", "after", "within"),
    [
        (["--method", "imma", "--steps", 12, "--images"], "Hardening, 6 cycles ...", 1.5),
        (["--steps", 15, "--draw", 2], "Drawing blue style, 2 pictures ...", 6.0),
    ],
    ids=["hardening", "drawing and hardening in episodes"],
)
def test_whenever_it_is_killed_it_ends_with_the_same_bytes(
    imma, command, pictures: Path, tmp_path: Path, how: list[object], after: str, within: float, monkeypatch
) -> None:
    monkeypatch.undo()  # drawing takes its time here as it does in the process that is killed
    command += [*how, pictures] if how[-1] == "--images" else how
    whole, cut = tmp_path / "whole" / "hard.safetensors", tmp_path / "cut" / "hard.safetensors"
    whole.parent.mkdir()
    cut.parent.mkdir()
    code, _, err = imma(*command, "--output", whole)
    assert code == 0, err
    command += ["--output", cut, "--save-every", 1e-9, "--resume"]
    delay = random.uniform(0, within)
    sys.stderr.write(f"killed {delay} s after {after}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "imma_cli", *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = list(iter(lambda: next(process.stderr), f"{after}\n"))
    assert "starting from the beginning" in said[-1]
    time.sleep(delay)
    process.kill()
    process.communicate()
    if not cut.exists():
        code, _, err = imma(*command)
        assert code == 0, err
    assert cut.read_bytes() == whole.read_bytes()
    assert list(cut.parent.iterdir()) == [cut]
