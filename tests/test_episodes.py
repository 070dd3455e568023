"""Hardening in episodes: what is bounded stays bounded, attackers vary and leave nothing behind, the best state is taken."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_imma import CPU, attack_named, some_concept
from test_resume import Biases
from torch import Tensor

from imma_cli.attacks.attack import Attack
from imma_cli.attacks.gradients import NotFiniteError
from imma_cli.attacks.testing import example_concept
from imma_cli.attacks.training import Attacker
from imma_cli.concepts.batches import Batch, TrainingSet, conditioning_of, encode
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers import checking
from imma_cli.immunizers.checking import QuickCheck
from imma_cli.immunizers.defender import Defender, Episode
from imma_cli.immunizers.episodes import immunize_in_episodes
from imma_cli.immunizers.imma import Immunized
from imma_cli.immunizers.objectives import Objective
from imma_cli.immunizers.retention import NOUNS, Retention, prompts_beside, retain, vocabulary_of
from imma_cli.immunizers.settings import DRIFT, EpisodesSettings
from imma_cli.immunizers.simulated import draw_attacker

ATTACKS = ("lora", "full-finetune", "textual-inversion", "text-encoder-lora", "custom-diffusion:prior_images=1")
SHORT = EpisodesSettings(steps=8, inner_steps=1, shortest=2, longest=3, checks=0)


@pytest.fixture
def retention(tiny_model: Model) -> Retention:
    return retain(tiny_model, ["a cat", "a red tree", "moon"], noisings=8, seed=0, runtime=CPU)


def harden(model: Model, retention: Retention, *attacks: str, **settings: Any) -> Immunized:
    chosen = replace(SHORT, **settings)
    return immunize_in_episodes(model, [attack_named(a) for a in attacks], [some_concept()], chosen, CPU, retention)


def moved(model: Model, weights: dict[str, Tensor]) -> list[str]:
    before = dict(model.unet.named_parameters())
    return [name for name, weight in weights.items() if not torch.equal(weight, before[name])]


@pytest.mark.parametrize("name", ATTACKS)
def test_the_model_itself_stays_as_it_was(tiny_model: Model, retention: Retention, name: str) -> None:
    before = {part: copy.deepcopy(net.state_dict()) for part, net in tiny_model.networks.items()}
    result = harden(tiny_model, retention, name)
    assert moved(tiny_model, result.weights)
    for part, network in tiny_model.networks.items():
        after = network.state_dict()
        assert after.keys() == before[part].keys()
        assert all(torch.equal(after[k], v) for k, v in before[part].items())
        assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("name", ATTACKS)
def test_a_loss_beyond_the_margin_is_not_raised_further(
    tiny_model: Model, retention: Retention, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does what the attackers learned stay in the weights: where nothing drifts either, nothing at all has changed."""

    def none(self: Retention, model: Model, *_: Any) -> Tensor:
        return torch.stack([0 * parameter.sum() for parameter in model.unet.parameters()]).sum()

    monkeypatch.setattr(Retention, "difference", none)
    assert moved(tiny_model, harden(tiny_model, retention, name, margin=1e-6).weights) == []
    assert moved(tiny_model, harden(tiny_model, retention, name).weights)


def test_predictions_for_other_prompts_are_held(tiny_model: Model, retention: Retention) -> None:
    """The same run with next to no weight on them lets them go further."""
    assert retention.measured_drift(tiny_model) < 1e-12

    def drift(strength: Any) -> float:
        result = harden(
            tiny_model, retention, "lora", steps=40, strength=strength, outer_learning_rate=5e-3, margin=100.0
        )
        other = copy.deepcopy(tiny_model)
        other.unet.load_state_dict({**tiny_model.unet.state_dict(), **result.weights})
        return retention.measured_drift(other)

    assert drift("low") < 0.8 * drift("high")
    assert DRIFT["low"] < DRIFT["medium"] < DRIFT["high"]


def test_hardening_raises_the_attacked_models_loss(tiny_model: Model, retention: Retention) -> None:
    settings = {"vary": False, "strength": "high", "outer_learning_rate": 5e-3, "margin": 100.0}
    steps = harden(tiny_model, retention, "lora", steps=120, **settings).steps
    losses = [step.outer_loss for step in steps]
    assert sum(losses[-15:]) > 1.02 * sum(losses[:15])


@pytest.mark.parametrize("together", [True, False], ids=["side by side", "one at a time"])
def test_every_attack_on_every_concept_has_its_turn(tiny_model: Model, retention: Retention, together: bool) -> None:
    concepts = [some_concept("blue style"), some_concept("red style", shade=5)]
    attacks = [attack_named("lora"), attack_named("dreambooth")]
    settings = replace(SHORT, steps=24, shortest=3, side_by_side=together)
    result = immunize_in_episodes(tiny_model, attacks, concepts, settings, CPU, retention)
    attackers = [(step.attack, step.concept) for step in result.steps]
    assert len(set(attackers)) == 4
    assert [step.cycle for step in result.steps] == list(range(1, 13))
    # one after the other in every cycle, or each until its episode ends
    assert len(set(attackers[:4])) == (4 if together else 2)
    assert result.simulated_steps == 3


def test_attackers_side_by_side_go_on_where_they_were(
    tiny_model: Model, retention: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is attached once; and copies of the weights move with them, whoever's turn it is."""
    episodes: list[Episode] = []
    step = Defender.step

    def seen(self: Defender, episode: Episode, done: float, beside: Any = ()) -> tuple[float, float]:
        now = [episode, *beside]
        episodes.extend(each for each in now if not any(each is other for other in episodes))
        found = step(self, episode, done, beside)
        (copies,) = (each.weights for each in now if each.apart)
        for (name, weight), copied in zip(self.named.items(), copies, strict=True):
            if not name.endswith(".bias"):  # these the attacker trains
                torch.testing.assert_close(copied, weight, rtol=0, atol=1e-6)
        return found

    monkeypatch.setattr(Defender, "step", seen)
    attacks = [attack_named("lora"), Biases(Biases.Settings())]
    together = replace(SHORT, side_by_side=True)
    result = immunize_in_episodes(tiny_model, attacks, [some_concept()], together, CPU, retention)
    assert len(episodes) == 2
    assert len(moved(tiny_model, result.weights)) > 1


def test_same_seed_same_weights_other_seed_others(tiny_model: Model, retention: Retention) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        return harden(tiny_model, retention, "lora", seed=seed).weights

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize(("protect", "part"), [("attention", ".attn"), ("kv", ".attn2."), ("unet", "")])
def test_only_protected_weights_change(tiny_model: Model, retention: Retention, protect: Any, part: str) -> None:
    changed = moved(tiny_model, harden(tiny_model, retention, "lora", protect=protect).weights)
    assert changed
    assert all(part in name for name in changed)
    assert protect != "unet" or any("resnets" in name for name in changed)


def test_attackers_vary_in_what_the_user_left_open(tiny_model: Model) -> None:
    attack = attack_named("lora:rank=2")
    drawn = [draw_attacker(attack, tiny_model, random.Random(seed)).settings for seed in range(30)]
    assert {each.rank for each in drawn} == {2}
    assert len({each.learning_rate for each in drawn}) == 30
    assert len({each.captions for each in drawn}) == 3
    assert len({each.targets for each in drawn}) > 2
    rate = attack.rates(tiny_model).learning_rate
    assert all(rate / 2 <= each.learning_rate <= rate * 2 for each in drawn)
    assert drawn[3] == draw_attacker(attack, tiny_model, random.Random(3)).settings


def test_what_stays_is_asked_for_without_the_concepts_words(tiny_model: Model) -> None:
    words = vocabulary_of(tiny_model)
    assert words
    prompts = prompts_beside([f"the {NOUNS[0]} {words[0]}"], words, 400, seed=0)
    assert len(prompts) == 400
    assert not any({NOUNS[0], words[0]} & set(prompt.split()) for prompt in prompts)
    assert prompts == prompts_beside([f"the {NOUNS[0]} {words[0]}"], words, 400, seed=0)


def test_a_short_attack_tells_how_hard_it_has_become(tiny_model: Model, retention: Retention) -> None:
    check = QuickCheck(tiny_model, [attack_named("lora:learning_rate=1e-2")], [example_concept()], retention, CPU, 0)
    assert check.reached < check.start
    same = check.run(1, limit=1.0)
    assert same.prevented == pytest.approx(0)
    assert same.drift < 1e-12
    with torch.no_grad():
        tiny_model.unet.conv_out.weight.mul_(3)
    worse = check.run(2, limit=1e9)
    assert worse.prevented > 0.2
    assert worse.drift > 0
    assert check.best is worse


def test_a_state_that_went_too_far_is_not_taken_and_no_progress_within_the_limit_ends_the_run(
    tiny_model: Model, retention: Retention
) -> None:
    check = QuickCheck(tiny_model, [attack_named("lora")], [example_concept()], retention, CPU, 0)
    with torch.no_grad():
        tiny_model.unet.conv_out.weight.mul_(1.1)
    good = check.run(1, limit=1.0)
    with torch.no_grad():
        tiny_model.unet.conv_out.weight.mul_(3)
    for cycle in range(2 * checking.PATIENCE):
        check.run(2 + cycle, limit=1e-9)
    assert check.best is good
    assert not check.exhausted  # what went too far may come back
    with torch.no_grad():
        tiny_model.unet.conv_out.weight.mul_(1 / 3.3)
    for cycle in range(checking.PATIENCE):
        assert not check.exhausted
        check.run(9 + cycle, limit=1.0)
    assert check.best is good
    assert check.exhausted


def test_as_long_as_every_state_went_too_far_the_nearest_is_the_best(tiny_model: Model, retention: Retention) -> None:
    check = QuickCheck(tiny_model, [attack_named("lora")], [example_concept()], retention, CPU, 0)
    found = []
    for factor in (1.1, 3):
        with torch.no_grad():
            tiny_model.unet.conv_out.weight.mul_(factor)
        found.append(check.run(len(found), limit=1e-9))
    near, far = found
    assert far.drift > near.drift
    assert check.best is near
    assert not near.within


def test_fewer_cycles_than_attacks_are_refused(tiny_model: Model, retention: Retention) -> None:
    with pytest.raises(ImmaError, match="2 attacks on concepts cannot all be simulated in 2 steps"):
        harden(tiny_model, retention, "lora", "dreambooth", steps=2)


def test_no_attack_is_left_out_where_episodes_would_be_longer_than_the_run(
    tiny_model: Model, retention: Retention
) -> None:
    names = ["lora", "dora", "ia3", "oft", "loha"]
    steps = harden(tiny_model, retention, *names, steps=20, shortest=200, longest=300).steps
    assert {step.attack for step in steps} == set(names)


def test_the_best_state_is_what_is_kept(
    tiny_model: Model, retention: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second check is made the best one: the weights are those of then, not those at the end."""
    seen: list[dict[str, Tensor]] = []

    def attack(self: QuickCheck) -> tuple[float, float]:
        seen.append({n: p.detach().clone() for n, p in self.model.unet.named_parameters()})
        return 1.0, {3: 0.9}.get(len(seen), 0.5)

    monkeypatch.setattr(QuickCheck, "_attack", attack)
    monkeypatch.setattr("imma_cli.immunizers.settings.STEPS", 1)  # a run this short is not checked otherwise
    result = harden(tiny_model, retention, "lora", steps=40, checks=10)
    assert [check.prevented for check in result.checks] == pytest.approx([0, 0.8, 0])
    assert result.taken is result.checks[1]
    assert len(result.steps) < 20  # the check after it ended the run
    assert all(torch.equal(weight, seen[2][name]) for name, weight in result.weights.items())


def test_as_it_comes_a_run_ends_early_where_attacks_get_no_less(
    tiny_model: Model, retention: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuickCheck, "_attack", lambda self: (1.0, 0.5))
    monkeypatch.setattr("imma_cli.immunizers.settings.STEPS", 1)  # a run this short is not checked otherwise
    result = harden(tiny_model, retention, "lora", steps=24, checks=EpisodesSettings().checks)
    assert result.taken is result.checks[0]
    assert [check.cycle for check in result.checks] == [4, 8]
    assert len(result.steps) == 8


def test_a_setting_that_was_typed_is_not_drawn_even_where_it_is_the_default(tiny_model: Model) -> None:
    attack = attack_named("lora:schedule=constant")
    drawn = [draw_attacker(attack, tiny_model, random.Random(seed)).settings for seed in range(20)]
    assert {each.schedule for each in drawn} == {"constant"}
    assert len({each.captions for each in drawn}) > 1


def test_attackers_whose_training_blows_up_are_replaced(
    tiny_model: Model, retention: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    step = Attacker.step

    def blowing_up(self: Attacker, loss_of: Any) -> float:
        calls.append(self)
        if len(calls) in failing:
            raise NotFiniteError("The loss became nan.")
        return step(self, loss_of)

    monkeypatch.setattr(Attacker, "step", blowing_up)
    failing: Any = (2, 5)
    assert len(harden(tiny_model, retention, "lora", steps=16).steps) == 8
    calls.clear()
    failing = range(3, 99)
    with pytest.raises(NotFiniteError):
        harden(tiny_model, retention, "lora")
    calls.clear()
    failing = (2,)
    with pytest.raises(NotFiniteError):  # an attacker as the user set it is what the user wants to hear of
        harden(tiny_model, retention, "lora", vary=False)


def objective(model: Model, aim: Any, margin: float) -> Objective:
    return Objective(aim, margin, model, list(model.unet.parameters()), CPU)


def a_batch(model: Model, attack: Attack) -> Batch:
    concept = some_concept()
    return TrainingSet(model, attack, concept, encode(model, concept.images), seed=0).batch([0, 1, 2])


def test_relative_asks_for_nothing_where_the_attacker_gained_nothing(tiny_model: Model) -> None:
    """And for as much as it gained where it gained something; then the original stays what it was."""
    attack = attack_named("full-finetune")
    relative, batch = objective(tiny_model, "relative", 1.0), a_batch(tiny_model, attack)
    aim, loss = relative(attack, tiny_model, batch)
    assert float(aim) == 0
    with torch.no_grad():
        tiny_model.unet.conv_out.weight.mul_(0.9)
    aim, other = relative(attack, tiny_model, batch)
    assert float(aim) == pytest.approx(max(0.0, float(loss - other)))
    twice, _ = objective(tiny_model, "relative", 2.0)(attack, tiny_model, batch)
    assert float(twice) == pytest.approx(float(other))


def test_absolute_and_original_are_what_they_say(tiny_model: Model) -> None:
    attack = attack_named("full-finetune")
    batch = a_batch(tiny_model, attack)
    away, loss = objective(tiny_model, "absolute", 5.0)(attack, tiny_model, batch)
    assert float(away) == pytest.approx(5 - float(loss))
    steered = objective(tiny_model, "original", 0.0)
    unprompted = replace(batch, conditioning=conditioning_of(tiny_model, [""] * 3))
    assert float(steered(attack, tiny_model, unprompted)[0]) < 1e-10
    assert float(steered(attack, tiny_model, batch)[0]) > 1e-10


def test_what_is_held_is_what_guidance_makes_of_both_predictions(tiny_model: Model, retention: Retention) -> None:
    """A shift of both alike counts once; with the prompts alone it is multiplied by guidance."""
    scale = retention.guidance[:, None, None, None]
    weight = scale.square() + (scale - 1).square()
    rows = torch.arange(len(retention.noise))

    def drift(with_prompt: float, without: float) -> float:
        shift = torch.tensor([with_prompt, without])[:, None, None, None, None]
        shifted = replace(retention, predicted=retention.predicted + shift)
        return float(shifted.difference(tiny_model, rows))

    assert drift(0.1, 0.1) == pytest.approx(float((0.01 / weight).mean()), rel=1e-3)
    assert drift(0.1, 0.0) == pytest.approx(float((0.01 * scale.square() / weight).mean()), rel=1e-3)
    assert retention.guidance.min() >= 1
    assert retention.guidance.max() <= 7


def test_checking_stays_cheap(tiny_model: Model, retention: Retention) -> None:
    attacks = [attack_named(name) for name in ("lora", "dora", "ia3", "oft")]
    check = QuickCheck(tiny_model, attacks, [example_concept()], retention, CPU, 0, steps=1)
    assert len(check.pairs) == checking.PAIRS
    assert SHORT.checks_in(1000) == 0
    assert EpisodesSettings().checks_in(1000) == 3
    assert EpisodesSettings().checks_in(checking.STEPS - 1) == 0


def test_without_an_attack_there_is_nothing_to_harden(tiny_model: Model, retention: Retention) -> None:
    with pytest.raises(ImmaError, match="no attack to immunize against"):
        harden(tiny_model, retention)


def test_gradients_that_are_not_finite_change_no_weight(
    tiny_model: Model, retention: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite where its gradient is not; the run ends, since it is no attacker's fault."""

    def spoilt(self: Retention, model: Model, *_: Any) -> Tensor:
        return torch.stack(
            [(0 * p).sum().abs().sqrt() for p in model.unet.parameters()]
        ).sum()  # 0, with slope infinite

    monkeypatch.setattr(Retention, "difference", spoilt)
    before = copy.deepcopy(tiny_model.unet.state_dict())
    with pytest.raises(NotFiniteError):
        harden(tiny_model, retention, "lora", steps=40)
    assert all(torch.equal(before[name], weight) for name, weight in tiny_model.unet.state_dict().items())


def test_a_second_core_changes_the_time_and_no_weight(
    tiny_model: Model, retention: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = harden(tiny_model, retention, "lora", "full-finetune").weights
    monkeypatch.setattr(Runtime, "core_to_spare", lambda self, model: True)
    beside = harden(tiny_model, retention, "lora", "full-finetune").weights
    assert all(torch.equal(alone[name], weight) for name, weight in beside.items())


def test_a_thread_of_its_own_hides_no_error(
    tiny_model: Model, retention: Retention, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(self: Retention, model: Model, *_: Any) -> Tensor:
        return torch.tensor(float("nan"))

    monkeypatch.setattr(Runtime, "core_to_spare", lambda self, model: True)
    monkeypatch.setattr(Retention, "difference", spoilt)
    with pytest.raises(NotFiniteError):
        harden(tiny_model, retention, "lora", steps=40)
