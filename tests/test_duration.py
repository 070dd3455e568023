"""How long hardening is going to take, told before it begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_imma import CPU, attack_named, some_concept

from imma_cli.concepts.drawing import draw_concept
from imma_cli.families.model import Model
from imma_cli.immunizers.duration import Passes, passes_of, seconds_of, seconds_of_prediction
from imma_cli.immunizers.episodes import immunize_in_episodes
from imma_cli.immunizers.imma import ImmunizerSettings, immunize
from imma_cli.immunizers.objectives import Aim
from imma_cli.immunizers.retention import retain
from imma_cli.immunizers.settings import EpisodesSettings, defaults_for

KEPT = ["a cat", "moon", "a red car"]


def passes_made(work: Callable[[], Any]) -> Passes:
    """How many pictures really go through a UNet while *work* is done."""
    made = {True: 0, False: 0}

    def count(network: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(network, UNet2DConditionModel):
            made[output[0].requires_grad] += len(inputs[0])

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        work()
    finally:
        hook.remove()
    return Passes(made[True], made[False])


@pytest.mark.parametrize(
    "settings",
    [
        ImmunizerSettings(steps=6, batch_size=2),
        ImmunizerSettings(method="maximize", steps=6, accumulate=3),
    ],
    ids=["published", "maximize"],
)
def test_every_step_of_the_published_loop_is_counted(tiny_model: Model, settings: ImmunizerSettings) -> None:
    attacks, concepts = [attack_named("lora"), attack_named("full-finetune")], [some_concept(), some_concept("oil")]
    told = passes_of(tiny_model, attacks, [3, 3], settings, drawn=False, kept=0)
    assert passes_made(lambda: immunize(tiny_model, attacks, concepts, settings, CPU)) == told


@pytest.mark.usefixtures("short_checks")
@pytest.mark.parametrize("aim", ["relative", "absolute", "original"])
def test_everything_that_episodes_predict_is_counted(tiny_model: Model, aim: Aim) -> None:
    """Drawing included, and the short attacks along the way."""
    settings = EpisodesSettings(steps=27, checks=2, accumulate=2, objective=aim)
    attack = attack_named("lora")
    assert settings.checks_in(settings.cycles(tiny_model)) == 1

    def work() -> None:
        concept = draw_concept(tiny_model, "blue style", role="defend", seed=0, count=5)
        noisings = defaults_for(tiny_model).noisings
        kept = retain(tiny_model, KEPT, noisings=noisings, seed=0, runtime=CPU)
        immunize_in_episodes(tiny_model, [attack], [concept], settings, CPU, kept)

    assert passes_made(work) == passes_of(tiny_model, [attack], [5], settings, drawn=True, kept=len(KEPT))


def test_several_processes_share_all_but_the_short_attacks(tiny_model: Model) -> None:
    settings, attacks = EpisodesSettings(steps=123, checks=2, accumulate=2), [attack_named("lora")]

    def made(drawn: bool, checks: int, processes: int) -> Passes:
        chosen = replace(settings, checks=checks)
        return passes_of(tiny_model, attacks, [8], chosen, drawn=drawn, kept=8, processes=processes)

    assert made(drawn=True, checks=0, processes=2) * 2 == made(drawn=True, checks=0, processes=1)
    checks = [
        made(drawn=False, checks=2, processes=n).learned - made(drawn=False, checks=0, processes=n).learned
        for n in (1, 2)
    ]
    assert checks[0] == checks[1] > 0


def test_time_follows_from_one_prediction(tiny_model: Model) -> None:
    state = torch.get_rng_state()
    assert 0 < seconds_of_prediction(tiny_model, CPU) < 5
    assert torch.equal(torch.get_rng_state(), state)  # the weights are the same with and without
    one = seconds_of(Passes(10, 4), 2.0, "nothing")
    assert seconds_of(Passes(20, 8), 2.0, "nothing") == 2 * one
    assert seconds_of(Passes(10, 4), 2.0, "blocks") > one


@pytest.fixture
def command(tiny_checkpoint: Path, tiny_config: Path, pictures: Path, tmp_path: Path) -> list[str]:
    files = [str(tiny_checkpoint), "--config", str(tiny_config), "--images", str(pictures)]
    how = ["--concept", "blue style", "--attack", "lora", "--method", "imma", "--steps", "8"]
    return ["harden", *files, *how, "--output", str(tmp_path / "out.safetensors")]


def test_large_models_are_told_the_time_before_the_first_step(
    imma: Any, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imma_cli.families.model.SMALL_MODEL", 0)
    code, _, said = imma(*command)
    assert code == 0, said
    assert 0 < said.index("in all, estimated from the time of one prediction") < said.index("Hardening, 4 cycles")


def test_a_dry_run_times_what_one_of_several_processes_does(
    imma: Any, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a launcher each gets its share of the batches."""

    def tried() -> Passes:
        return passes_made(lambda: imma(*command, "--dry-run"))

    alone = tried()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tried() == alone
    assert alone.learned > 0
