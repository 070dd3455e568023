"""Settings of hardening in episodes, each by what it changes."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from test_episodes import harden, retention
from test_imma import CPU
from torch import Tensor

from imma_cli.attacks.gradients import NotFiniteError
from imma_cli.attacks.training import adamw, gradient_step
from imma_cli.cli import hardened
from imma_cli.families.model import Model
from imma_cli.immunizers.checking import Check
from imma_cli.immunizers.defender import Defender
from imma_cli.immunizers.imma import Immunized
from imma_cli.immunizers.looks import with_other_look
from imma_cli.immunizers.retention import GUIDANCE, Retention, retain
from imma_cli.immunizers.settings import DRIFT, EpisodesSettings

__all__ = ["retention"]
FAR: dict[str, Any] = {"steps": 40, "outer_learning_rate": 5e-3, "margin": 100.0}
"""Settings under which weights move as far as they are let."""


@pytest.mark.parametrize("anneal", [True, False])
def test_the_outer_rate_falls_to_zero_unless_told_otherwise(
    tiny_model: Model, retention: Retention, anneal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    descend = Defender._descend

    def seen(self: Defender, *gradients: Any) -> None:
        rates.append(self.optimizer.param_groups[0]["lr"])
        descend(self, *gradients)

    monkeypatch.setattr(Defender, "_descend", seen)
    harden(tiny_model, retention, "lora", anneal=anneal, outer_learning_rate=1e-4)
    assert rates == pytest.approx([1e-4, 0.75e-4, 0.5e-4, 0.25e-4] if anneal else [1e-4] * 4)


def drift(model: Model, retention: Retention, weights: dict[str, Tensor]) -> float:
    model.unet.load_state_dict({**model.unet.state_dict(), **weights})
    return retention.measured_drift(model)


def test_a_limit_of_drift_takes_the_strengths_place(tiny_model: Model, retention: Retention) -> None:
    assert EpisodesSettings().limit == DRIFT["medium"]
    assert EpisodesSettings(strength="low", drift=0.5).limit == 0.5
    with pytest.raises(ValueError, match="drift is above 0"):
        EpisodesSettings(drift=0.0)
    near, far = (harden(tiny_model, retention, "lora", drift=limit, **FAR).weights for limit in (1e-3, 1.0))
    assert drift(tiny_model, retention, near) < 0.8 * drift(tiny_model, retention, far)


def test_without_pictures_to_keep_nothing_is_held(tiny_model: Model, retention: Retention) -> None:
    free, held = (harden(tiny_model, retention, "lora", keep_batch=batch, **FAR) for batch in (0, 4))
    assert {step.drift for step in free.steps} == {0.0}
    assert held.steps[-1].drift
    assert drift(tiny_model, retention, free.weights) > 1.2 * drift(tiny_model, retention, held.weights)


def test_a_share_of_what_is_kept_gets_another_look(tiny_model: Model) -> None:
    def latents(unfamiliar: float) -> Tensor:
        return retain(tiny_model, ["a cat", "moon"], noisings=2, seed=0, runtime=CPU, unfamiliar=unfamiliar).latents

    none, all_of_them = latents(0.0), latents(1.0)
    assert all(not torch.equal(a, b) for a, b in zip(none, all_of_them, strict=True))
    assert torch.equal(none, latents(0.0))
    assert torch.equal(all_of_them, latents(1.0))


def test_other_looks_differ_from_each_other_and_follow_the_seed() -> None:
    bands = [Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1 + i / 4), 20) for i in range(3)]
    image = Image.merge("RGB", bands)
    looks = [with_other_look(image, random.Random(seed)).tobytes() for seed in range(8)]
    assert len({image.tobytes(), *looks}) == 9
    assert looks[3] == with_other_look(image, random.Random(3)).tobytes()
    assert with_other_look(image, random.Random(0)).size == image.size


def test_half_of_the_predictions_are_held_without_guidance_and_the_others_as_people_draw(tiny_model: Model) -> None:
    scales = retain(tiny_model, ["a cat", "moon"], noisings=100, seed=0, runtime=CPU).guidance
    plain = scales == 1.0
    assert 0.4 < float(plain.float().mean()) < 0.6
    low, high = GUIDANCE
    assert float(scales.min()) >= low
    assert float(scales.max()) <= high
    assert float(scales[~plain].std()) > 1


@pytest.mark.parametrize(("encoding", "block"), [("utf-8", "█"), ("ascii", "#")])
def test_the_course_of_short_attacks_stands_beside_the_original_in_80_columns(
    encoding: str, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = Check(41, 0.4, 0.2, 1.0, 0.0036, within=True), Check(82, 0.3, 0.2, 0.5, 0.0081, within=False)
    written = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(hardened, "out", Console(file=written, width=80, highlight=False))
    hardened.say_checks(Immunized({}, checks=[near, far], taken=near))
    written.seek(0)
    _, original, first, second = written.read().splitlines()
    assert original.split() == ["original", "0.2000", 6 * block]
    assert first.split() == ["cycle", "41", "0.4000", 12 * block, "0.0036,", "taken"]
    assert second.split() == ["cycle", "82", "0.3000", 9 * block, "0.0081,", "too", "far"]


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_gradient_that_is_not_finite_moves_nothing_even_where_the_loss_is_finite(max_grad_norm: float | None) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = adamw([weight], 0.1)
    with pytest.raises(NotFiniteError, match="The gradient became"):
        gradient_step(optimizer, [weight], [lambda: (weight * 0).sum().sqrt()], max_grad_norm)
    assert torch.equal(weight, torch.ones(3))
    assert not optimizer.state
