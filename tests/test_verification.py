"""Trials are paired, start from nothing that hardening used, and are summarised as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.imma import ImmunizerSettings, immunize
from imma_cli.verification.trials import Trial, run_trial

CPU = Runtime("cpu", "sdpa", "fp32")
CONCEPT = Concept(
    "blue style", tuple(Image.new("RGB", (64, 64), (40 * i, 40, 200)) for i in range(4)), ("a cat",) * 4, "test"
)


def trial(model: Model, spec: str = "lora", **changes: Any) -> Trial:
    (attack,) = parse_attacks([spec], discover())
    return run_trial(model, "original", attack, CONCEPT, CONCEPT, **{"steps": 4, "seed": 0, "runtime": CPU, **changes})


def test_the_same_seed_is_the_same_trial(tiny_model: Model) -> None:
    first, again, other = trial(tiny_model), trial(tiny_model), trial(tiny_model, seed=1)
    assert first == again
    assert first.points[0] == other.points[0]  # before any step only the yardstick counts, and it is fixed
    assert first.points[-1] != other.points[-1]
    assert [p.step for p in first.points] == [0, 1, 2, 4]


def test_attackers_start_from_nothing_that_hardening_simulated(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    (attack,) = parse_attacks(["lora"], discover())
    started: list[torch.Tensor] = []
    noises: list[torch.Tensor] = []
    attach, loss = type(attack).attach, type(attack).loss

    def watch_attach(self: Any, model: Model, concept: Concept, seed: int) -> Any:
        started.append(torch.tensor(seed))
        return attach(self, model, concept, seed)

    def watch_loss(self: Any, model: Model, batch: Any) -> Any:
        noises.append(batch.noise.clone())
        return loss(self, model, batch)

    monkeypatch.setattr(type(attack), "attach", watch_attach)
    monkeypatch.setattr(type(attack), "loss", watch_loss)
    immunize(tiny_model, [attack], [CONCEPT], ImmunizerSettings(steps=4, seed=0), CPU)
    simulated = len(noises)
    trial(tiny_model)
    assert started[0] != started[1]
    assert not any(torch.equal(a, b) for a in noises[:simulated] for b in noises[simulated:])


def test_mixed_precision_sees_the_weights_of_the_moment(tiny_model: Model) -> None:
    """Autocast keeps copies of weights; one that outlived the inner step would hide it from the outer step."""
    runtime = Runtime("cpu", "sdpa", "bf16")
    attacks = parse_attacks(["dreambooth:learning_rate=0.05"], discover())
    (slow,) = immunize(tiny_model, attacks, [CONCEPT], ImmunizerSettings(steps=2), runtime).steps
    (exact,) = immunize(tiny_model, attacks, [CONCEPT], ImmunizerSettings(steps=2), CPU).steps
    assert slow.inner_loss == pytest.approx(exact.inner_loss, rel=0.02)
    assert slow.outer_loss == pytest.approx(exact.outer_loss, rel=0.05)
