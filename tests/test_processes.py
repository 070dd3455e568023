"""Hardening with gradients that come together from several batches, and from several processes: the same as in one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_imma import CPU, attack_named, some_concept
from torch import Tensor

from imma_cli.attacks import testing
from imma_cli.attacks.gradients import NotFiniteError, Scaling, mean_gradient
from imma_cli.cli import resuming
from imma_cli.families.model import Model
from imma_cli.families.processes import Processes
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.episodes import immunize_in_episodes
from imma_cli.immunizers.imma import ImmunizerSettings, immunize
from imma_cli.immunizers.retention import retain
from imma_cli.immunizers.settings import EpisodesSettings
from imma_cli.immunizers.state import SavedState

WEIGHT = torch.tensor([1.0, -2.0], requires_grad=True)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shared")
    checkpoint, config = testing.tiny_checkpoint(folder)
    drawn = ["--draw", "12", "--attack", "lora", "--device", "cpu", "--json"]
    return ["harden", str(checkpoint), "--config", str(config), "--concept", "blue style", *drawn]


SHORT = """
from imma_cli.cli import main
from imma_cli.immunizers import checking, settings

settings.STEPS = 8
checking.QuickCheck.__init__.__defaults__ = (8, None)
main()
"""
FAULTY = """
import os
from imma_cli.cli import main
from imma_cli.errors import ImmaError
from imma_cli.immunizers.objectives import Objective

call, calls = Objective.__call__, []

def faulty(self, attack, attacked, batch):
    calls.append(1)
    missed, loss = call(self, attack, attacked, batch)
    if os.environ["RANK"] == "1" and len(calls) >= 3:
        if os.environ["FAULT"] == "error":
            raise ImmaError("The disk is gone.")
        return missed * float("nan"), loss * float("nan")
    return missed, loss

Objective.__call__ = faulty
main()
"""


def harden(
    command: Sequence[str], output: Path, rank: int = 0, several: int = 1, port: int = 0, fault: str = ""
) -> Any:
    """Starts a process of its own. Its short attacks along the way are shorter than a user's; with a *fault* it has none."""
    launched = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": several,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({k: str(v) for k, v in launched.items()} if port else {})}
    return subprocess.Popen(
        [sys.executable, "-c", FAULTY if fault else SHORT, *command, "--output", str(output)],
        env=environment | {"FAULT": fault}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize(
    "how",
    [["--method", "imma", "--attack", "full-finetune", "--steps", "8"], ["--steps", "30"]],
    ids=["published", "in episodes, with a check"],
)
def test_two_processes_end_with_the_weights_of_one(command: list[str], how: list[str], tmp_path: Path) -> None:
    """As `accelerate launch` and torchrun start them; one writes, and speaks."""
    alone = harden([*command, *how, "--accumulate", "2"], tmp_path / "alone.safetensors")
    said, complaint = alone.communicate(timeout=600)
    assert alone.returncode == 0, complaint
    assert len(json.loads(said)["checks"]) == (0 if "imma" in how else 1)
    port = free_port()
    together = [harden([*command, *how], tmp_path / "together.safetensors", rank, 2, port) for rank in range(2)]
    answers = [process.communicate(timeout=600) for process in together]
    assert [process.returncode for process in together] == [0, 0], answers
    assert answers[0][0].replace("together", "alone") == said
    assert answers[1][0] == ""
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("alone", "together"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    original = load_file(command[1])
    assert any(not torch.equal(original[name], one[name]) for name in one)


@pytest.mark.parametrize(
    ("fault", "first_says", "second_says"),
    [
        ("nan", "The loss became nan.", "The loss became nan."),
        ("error", "Another process of this command has ended", "The disk is gone."),
    ],
)
def test_what_fails_in_one_process_ends_all(
    command: list[str], tmp_path: Path, fault: str, first_says: str, second_says: str
) -> None:
    port = free_port()
    how, output = [*command, "--steps", "30"], tmp_path / "never.safetensors"
    together = [harden(how, output, rank, 2, port, fault) for rank in range(2)]
    complaints = [" ".join(process.communicate(timeout=300)[1].split()) for process in together]
    assert [process.returncode for process in together] == [2, 2]
    assert first_says in complaints[0]
    assert second_says in complaints[1]
    assert not output.exists()


def saved_steps(output: Path) -> int:
    """How many cycles the state beside *output* holds."""
    path = resuming.state_path(output)
    run = SavedState.open(path).tree.get("run") if path.exists() else None
    return len(run["result"]["steps"]) if run else 0


def test_ctrl_c_ends_all_after_the_same_cycle_and_the_state_goes_on(command: list[str], tmp_path: Path) -> None:
    port = free_port()
    how, output = (
        [*command, "--method", "imma", "--steps", "90", "--save-every", "1e-9"],
        tmp_path / "later.safetensors",
    )
    how.remove("--json")
    alone = harden([*how, "--accumulate", "2"], tmp_path / "alone.safetensors")
    complaint = alone.communicate(timeout=600)[1]
    assert alone.returncode == 0, complaint
    together = [harden(how, output, rank, 2, port) for rank in range(2)]
    while not saved_steps(output):
        assert together[0].poll() is None
        time.sleep(0.1)
    for process in together:  # as a terminal does
        process.send_signal(signal.SIGINT)
    complaints = [process.communicate(timeout=120)[1] for process in together]
    assert [process.returncode for process in together] == [130, 130], complaints
    assert 0 < saved_steps(output) < 45
    port = free_port()
    again = [harden([*how, "--resume"], output, rank, 2, port) for rank in range(2)]
    complaints = [process.communicate(timeout=600)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], complaints
    one, two = load_file(tmp_path / "alone.safetensors"), load_file(output)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("rank", "count"), [("0", "two"), ("2", "2"), ("-1", "2"), ("0", "0")])
def test_an_environment_that_is_no_launchers_is_refused(
    imma: Any, command: list[str], monkeypatch: pytest.MonkeyPatch, rank: str, count: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    code, _, complaint = imma(*command)
    assert code == 2
    assert f"RANK={rank} of WORLD_SIZE={count}" in complaint


@pytest.mark.parametrize(("count", "parts"), [(2, 5), (3, 5), (3, 2), (2, 0)])
def test_what_each_has_made_comes_back_in_its_order(monkeypatch: pytest.MonkeyPatch, count: int, parts: int) -> None:
    everything = [f"part {number}" for number in range(parts)]
    several = [Processes(rank, count) for rank in range(count)]

    def exchange(made: list[Any], own: Sequence[str]) -> None:
        made[:] = [each.share(everything) for each in several]

    monkeypatch.setattr("torch.distributed.all_gather_object", exchange)
    for each in several:
        assert each.gathered(each.share(everything), parts) == everything


def test_batches_that_processes_cannot_share_are_refused(
    imma: Any, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, complaint = imma(*command, "--accumulate", "3")
    assert code == 2
    assert "--accumulate 3 cannot be shared by 2 processes" in " ".join(complaint.split())


@pytest.mark.parametrize("method", ["imma", "episodes"])
def test_moments_in_8_bits_make_nearly_the_same_steps(tiny_model: Model, method: str) -> None:
    """And they are in 8 bits: what is trained is large enough for it."""
    original = {name: weight.clone() for name, weight in tiny_model.unet.named_parameters()}
    moved = []
    for eight_bit in (False, True):
        attacks, concepts = [attack_named("lora")], [some_concept()]
        if method == "imma":
            settings = ImmunizerSettings(steps=8, eight_bit=eight_bit)
            result = immunize(tiny_model, attacks, concepts, settings, CPU)
        else:
            retention = retain(tiny_model, ["a cat", "moon"], noisings=4, seed=0, runtime=CPU)
            in_episodes = EpisodesSettings(steps=12, checks=0, eight_bit=eight_bit)
            result = immunize_in_episodes(tiny_model, attacks, concepts, in_episodes, CPU, retention)
        moved.append(torch.cat([(w - original[n]).flatten() for n, w in result.weights.items()]))
    plain, rounded = moved
    assert not torch.equal(plain, rounded)
    assert float(torch.cosine_similarity(plain, rounded, dim=0)) > 0.9


def test_8_bits_without_the_package_are_refused(imma: Any, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, complaint = imma(*command, "--8bit")
    assert code == 2
    assert "pip install 'imma-cli[8bit]'" in " ".join(complaint.split())


def losses() -> Iterator[Any]:
    for target in (0.0, 3.0):
        yield lambda target=target: (WEIGHT - target).square().sum()


def test_the_gradient_is_that_of_the_mean() -> None:
    mean, (gradient,) = mean_gradient(list(losses()), [WEIGHT])
    whole = sum(loss() for loss in losses()) / 2
    torch.testing.assert_close(mean, whole.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(whole, WEIGHT)[0])


def test_a_loss_that_is_not_finite_is_none_of_them() -> None:
    with pytest.raises(NotFiniteError):
        mean_gradient([*losses(), lambda: (WEIGHT * float("nan")).sum()], [WEIGHT])


def test_what_is_scaled_up_is_scaled_back() -> None:
    _, (plain,) = mean_gradient(list(losses()), [WEIGHT])
    _, (scaled,) = mean_gradient(list(losses()), [WEIGHT], scaling=Scaling())
    assert plain is not None
    torch.testing.assert_close(scaled, plain)


def test_a_scale_that_is_too_high_falls_and_one_that_fits_rises() -> None:
    scaling, infinite = Scaling(4.0), [torch.tensor(float("inf")), None]
    assert not scaling.fits(infinite)
    assert scaling.scale == 2
    fine: list[Tensor | None] = [torch.ones(3), None]
    assert all(scaling.fits(fine) for _ in range(Scaling.GROWTH))
    assert scaling.scale == 4
    scaling.scale = 1.0
    with pytest.raises(NotFiniteError, match="not finite in float16"):
        scaling.fits(infinite)


@pytest.mark.parametrize("method", ["imma", "episodes"])
def test_losses_in_float16_are_scaled_until_their_gradients_fit(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """At first none does, as the scale is far too high: no step is made until it has fallen."""
    monkeypatch.setattr(Scaling.__init__, "__defaults__", (2.0**24,))
    runtime, attacks, concepts = Runtime("cpu", "sdpa", "fp16"), [attack_named("lora")], [some_concept()]
    fits, found = Scaling.fits, []

    def noted(self: Scaling, gradients: Sequence[Tensor | None]) -> bool:
        found.append(fits(self, gradients))
        return found[-1]

    monkeypatch.setattr(Scaling, "fits", noted)
    if method == "imma":
        result = immunize(tiny_model, attacks, concepts, ImmunizerSettings(steps=40), runtime)
    else:
        retention = retain(tiny_model, ["a cat", "moon"], noisings=4, seed=0, runtime=runtime)
        settings = EpisodesSettings(steps=45, checks=0, shortest=40, longest=40)
        result = immunize_in_episodes(tiny_model, attacks, concepts, settings, runtime, retention)
    assert not any(found[:2])
    assert sum(found[-8:]) > 4
    original = dict(tiny_model.unet.named_parameters())
    assert any(not torch.equal(weight, original[name]) for name, weight in result.weights.items())
    assert all(bool(torch.isfinite(weight).all()) for weight in result.weights.values())
