"""The bi-level loop against a plain implementation of the paper's algorithm, and what a user relies on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from imma_cli.attacks import Attack
from imma_cli.attacks.gradients import NotFiniteError
from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.attacks.testing import example_concept
from imma_cli.concepts.batches import TrainingSet, encode
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model
from imma_cli.families.recomputing import Recompute
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers import imma
from imma_cli.immunizers.imma import ImmunizerSettings, immunize

CPU = Runtime("cpu", "sdpa", "fp32")
ATTACKS = ("lora", "dreambooth", "dreambooth-lora", "textual-inversion")


def some_concept(name: str = "blue style", count: int = 3, shade: int = 0) -> Concept:
    pictures = [
        Image.effect_mandelbrot((64, 64), (-2 + i / 3, -1, 1, 1.2), 20 + shade).convert("RGB") for i in range(count)
    ]
    return Concept(name, tuple(pictures), tuple(f"a cat in {name}" for _ in pictures), "test")


def attack_named(spec: str) -> Attack:
    return parse_attacks([spec], discover())[0]


class PlainAdamW:
    """AdamW by the formulas of arXiv 1711.05101, decoupled decay 0.01."""

    def __init__(self, rate: float) -> None:
        self.rate, self.t = rate, 0
        self.m: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}

    def step(self, weights: dict[str, Tensor], gradients: dict[str, Tensor], clip: float | None) -> dict[str, Tensor]:
        if clip is not None:
            norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
            factor = min(1.0, float(clip / (norm + 1e-6)))
            gradients = {n: g * factor for n, g in gradients.items()}
        self.t += 1
        moved = dict(weights)
        for n, g in gradients.items():
            self.m[n] = 0.9 * self.m.get(n, torch.zeros_like(g)) + 0.1 * g
            self.v[n] = 0.999 * self.v.get(n, torch.zeros_like(g)) + 0.001 * g**2
            direction = (self.m[n] / (1 - 0.9**self.t)) / ((self.v[n] / (1 - 0.999**self.t)).sqrt() + 1e-8)
            moved[n] = weights[n] * (1 - self.rate * 0.01) - self.rate * direction
        return moved


def plain_imma(model: Model, attack: Attack, concept: Concept, cycles: int, seed: int) -> dict[str, Tensor]:
    """Algorithm 1 of arXiv 2311.18815 written down once more, with weights as values instead of modules."""
    rates = attack.rates(model)
    theta = {n: p.detach().clone() for n, p in model.unet.named_parameters()}
    names = [n for n in theta if ".attn" in n and any(f".{k}." in n for k in ("to_q", "to_k", "to_v", "to_out.0"))]
    scratch = copy.deepcopy(model)
    with attack.attach(scratch, concept, seed) as parameters:
        start = {n: p.detach().clone() for n, p in parameters.items()}
        stream = iter(TrainingSet(scratch, attack, concept, encode(model, concept.images), seed=seed))
        batches = [next(stream) for _ in range(2 * cycles)]
        tokenizer = copy.deepcopy(scratch.tokenizer)
    text = {n: p.detach() for n, p in model.text_encoder.named_parameters()}
    table = next(n for n in text if n.endswith("token_embedding.weight"))

    def loss(weights: dict[str, Tensor], phi: dict[str, Tensor], batch: Any) -> Tensor:
        full = dict(weights)
        conditioning = batch.conditioning
        if attack.name.endswith("lora"):
            for n in phi:
                if ".lora_A." in n:
                    base = n.split(".lora_A.")[0] + ".weight"
                    full[base] = weights[base] + phi[n.replace("lora_A", "lora_B")] @ phi[n]
        if attack.name == "textual-inversion":
            ids = tokenizer(list(batch.captions), padding="max_length", max_length=77, return_tensors="pt").input_ids
            grown = {**text, table: torch.cat([text[table], phi["new"]])}
            conditioning = functional_call(model.text_encoder, grown, (ids,))[0]
        signal = model.scheduler.alphas_cumprod.double()[batch.timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * batch.latents + (1 - signal).sqrt() * batch.noise
        predicted = functional_call(model.unet, full, (noisy, batch.timesteps, conditioning)).sample
        return F.mse_loss(predicted, batch.noise.double())

    phi = theta if attack.in_place else start
    down, up = PlainAdamW(rates.learning_rate), PlainAdamW(rates.outer_learning_rate)
    for cycle in range(cycles):
        free = {n: w.clone().requires_grad_() for n, w in phi.items()}
        value = loss(free if attack.in_place else theta, free, batches[2 * cycle])
        gradients = dict(zip(free, torch.autograd.grad(value, list(free.values())), strict=True))
        phi = down.step(phi, gradients, rates.max_grad_norm)
        if attack.in_place:
            theta = phi
        free = {n: theta[n].clone().requires_grad_() for n in names}
        value = -loss({**theta, **free}, phi, batches[2 * cycle + 1])
        gradients = dict(zip(free, torch.autograd.grad(value, list(free.values())), strict=True))
        theta = up.step(theta, gradients, rates.max_grad_norm)
        if attack.in_place:
            phi = theta
    return {n: theta[n].detach() for n in names}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_loop_is_the_papers_algorithm(tiny_model: Model, name: str) -> None:
    model = tiny_model
    for network in model.networks.values():
        network.double()  # so that what differs is the algorithm, not the rounding
    concept, attack = some_concept(), attack_named(name)
    expected = plain_imma(model, attack, concept, cycles=4, seed=3000)
    result = immunize(model, [attack], [concept], ImmunizerSettings(steps=8, seed=3), CPU)
    assert result.weights.keys() == expected.keys()
    before = dict(model.unet.named_parameters())
    moved = [key for key, weight in expected.items() if (weight - before[key]).abs().max() > 1e-5]
    assert len(moved) > 0.9 * len(expected)  # at the 1 × 1 level self-attention's queries and keys have no gradient
    for key, weight in expected.items():
        assert torch.allclose(result.weights[key], weight, atol=1e-6, rtol=0), key


@pytest.mark.parametrize("name", ATTACKS)
def test_the_model_itself_stays_as_it_was(tiny_model: Model, name: str) -> None:
    before = {part: copy.deepcopy(net.state_dict()) for part, net in tiny_model.networks.items()}
    immunize(tiny_model, [attack_named(name)], [some_concept()], ImmunizerSettings(steps=4), CPU)
    for part, network in tiny_model.networks.items():
        after = network.state_dict()
        assert after.keys() == before[part].keys()
        assert all(torch.equal(after[k], v) for k, v in before[part].items())
        assert not any(p.requires_grad for p in network.parameters())


def test_direct_maximisation_is_the_outer_step_alone(tiny_model: Model) -> None:
    result = immunize(
        tiny_model, [attack_named("lora")], [some_concept()], ImmunizerSettings("maximize", steps=40), CPU
    )
    assert all(step.inner_loss is None for step in result.steps)
    assert len(result.steps) == 20
    before = dict(tiny_model.unet.named_parameters())
    assert any(not torch.equal(w, before[n]) for n, w in result.weights.items())


def test_hardening_raises_the_loss_on_the_concept(tiny_model: Model) -> None:
    settings = ImmunizerSettings("maximize", steps=120, outer_learning_rate=1e-2)
    losses = [s.outer_loss for s in immunize(tiny_model, [attack_named("lora")], [some_concept()], settings, CPU).steps]
    assert sum(losses[-15:]) > 1.02 * sum(losses[:15])


@pytest.mark.parametrize(
    ("protect", "kept"), [("attention", ("attn1", "attn2")), ("cross-attention", ("attn2",)), ("kv", ("attn2",))]
)
def test_only_protected_weights_change(tiny_model: Model, protect: Any, kept: tuple[str, ...]) -> None:
    weights = immunize(
        tiny_model, [attack_named("lora")], [some_concept()], ImmunizerSettings(protect=protect, steps=2), CPU
    ).weights
    assert {next(part for part in n.split(".") if part.startswith("attn")) for n in weights} == set(kept)
    if protect == "kv":
        assert all(".to_k." in n or ".to_v." in n for n in weights)


@pytest.mark.parametrize("name", ATTACKS)
def test_gradients_reach_only_what_is_trained(tiny_model: Model, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, at every step, which of all the model's parameters ask for or get a gradient."""
    seen: list[tuple[set[int], set[int]]] = []
    models: list[Model] = []
    original_step = torch.optim.AdamW.step
    attach_all = imma._attach_all

    def remember(*args: Any) -> Any:
        turns = attach_all(*args)
        models.extend(t.model for t in turns)
        return turns

    def step(self: Any, *args: Any) -> Any:
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        every = {id(p): p for m in models for net in m.networks.values() for p in net.parameters()}
        touched = {i for i, p in every.items() if p.grad is not None or p.requires_grad}
        seen.append((touched, mine))
        return original_step(self, *args)

    monkeypatch.setattr(imma, "_attach_all", remember)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    immunize(tiny_model, [attack_named(name)], [some_concept()], ImmunizerSettings(steps=4), CPU)
    assert len(seen) == 4
    for touched, mine in seen:
        assert touched == mine


def test_attacks_and_concepts_take_turns(tiny_model: Model) -> None:
    concepts = [some_concept("blue style"), some_concept("red style", shade=5)]
    attacks = [attack_named("lora"), attack_named("dreambooth")]
    steps = immunize(tiny_model, attacks, concepts, ImmunizerSettings(steps=4), CPU).steps
    assert [(s.attack, s.concept) for s in steps[:4]] == [
        ("lora", "blue style"),
        ("dreambooth", "blue style"),
        ("lora", "red style"),
        ("dreambooth", "red style"),
    ]
    assert len(steps) == 8


def test_same_seed_same_weights_other_seed_others(tiny_model: Model) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        return immunize(
            tiny_model, [attack_named("lora")], [some_concept()], ImmunizerSettings(steps=4, seed=seed), CPU
        ).weights

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_model(tiny_model: Model) -> None:
    before = copy.deepcopy(tiny_model.unet.state_dict())
    settings = ImmunizerSettings(steps=40, outer_learning_rate=1e30)
    with pytest.raises(NotFiniteError, match="Lower the learning rates"):
        immunize(tiny_model, [attack_named("lora")], [some_concept()], settings, CPU)
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.unet.state_dict().items())


@pytest.mark.parametrize("recomputed", ["activations", "blocks"])
def test_what_is_computed_again_changes_nothing_but_memory(tiny_model: Model, recomputed: Recompute) -> None:
    plain = immunize(tiny_model, [attack_named("lora")], [some_concept()], ImmunizerSettings(steps=2), CPU).weights
    CPU.apply(tiny_model, recomputed=recomputed)
    saved = immunize(tiny_model, [attack_named("lora")], [some_concept()], ImmunizerSettings(steps=2), CPU).weights
    assert all(torch.equal(plain[n], saved[n]) for n in plain)


def test_what_an_attacker_holds_on_to_is_not_taken_away(tiny_model: Model) -> None:
    """Prior preservation is minimised by the attacker, and never maximised by hardening."""
    (attack,) = parse_attacks(["dreambooth-lora:prior_weight=5,prior_images=1"], discover())
    concept = example_concept()
    with attack.attach(tiny_model, concept, 0), torch.no_grad():
        batch = next(iter(TrainingSet(tiny_model, attack, concept, encode(tiny_model, concept.images), seed=0)))
        plain = tiny_model.family.loss(
            tiny_model, batch.latents, batch.conditioning, batch.noise, batch.timesteps
        ).mean()
        assert attack.loss(tiny_model, batch) > 2 * plain
        assert torch.equal(attack.concept_loss(tiny_model, batch), plain)
    raised: list[str] = []
    cls = type(attack)
    watched = type(
        "Watched", (cls,), {"concept_loss": lambda s, m, b: raised.append("up") or cls.concept_loss(s, m, b)}
    )
    immunize(tiny_model, [watched(attack.settings)], [concept], ImmunizerSettings(steps=6), CPU)
    assert raised == ["up"] * 3
