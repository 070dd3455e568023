"""Attacks, their settings, and how plugins are found."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from imma_cli.attacks import Choice, Preset
from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks, record
from imma_cli.attacks.testing import AttackContract, example_concept
from imma_cli.attacks.training import Attacker
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model
from imma_cli.immunizers.simulated import draw_attacker
from imma_cli.verification import search

REGISTRY = discover()
CONCEPT = example_concept()
FURTHER = {
    "lora": (
        "rank=2",
        "targets=everything,optimizer=radam,schedule=cosine,warmup=0.2",
        "targets=cross-attention,optimizer=adafactor",
    ),
    "dreambooth": ("prior_weight=1,prior_images=2",),
    "dreambooth-lora": ("token=zwx,class_noun=cat",),
    "textual-inversion": ("tokens=3,initializer=cat",),
    "text-encoder-lora": ("text_rate=2,captions=token",),
    "pivotal-tuning": ("tokens=2,word_rate=1",),
    "custom-diffusion": ("prior_weight=0,class_noun=cat",),
    "loha": ("targets=everything",),
    "lokr": ("targets=everything",),
    "oft": ("targets=transformer,block_size=4",),
    "boft": ("targets=transformer,block_size=4",),
    "peft": ("method=randlora", "method=delora", "method=gralora"),
}
"""Settings other than the defaults with which an attack has to keep the contract, too."""

for shipped, found_class in REGISTRY.found.items():
    test = f"TestTheContractOf_{shipped.replace('-', '_')}"
    globals()[test] = type(
        test, (AttackContract,), {"attack": found_class.cls, "settings": ("", *FURTHER.get(shipped, ()))}
    )


def test_the_shipped_attacks_are_found_through_entry_points() -> None:
    assert REGISTRY.broken == ()
    assert {"lora", "dreambooth", "full-finetune", "textual-inversion", "dora", "peft"} <= set(REGISTRY.found)
    assert all(found.distribution == "imma-cli" for found in REGISTRY.found.values())


def test_what_attackers_write_below_the_pictures() -> None:
    lora, dreambooth, inversion = parse_attacks(
        ["lora", "dreambooth:token=zwx", "textual-inversion:tokens=2"], REGISTRY
    )
    assert [lora.caption(CONCEPT, c) for c in CONCEPT.captions] == list(CONCEPT.captions)
    assert {dreambooth.caption(CONCEPT, c) for c in CONCEPT.captions} == {"a zwx blue style"}
    assert [inversion.caption(CONCEPT, c) for c in CONCEPT.captions] == [
        "a cat in <imma-0> <imma-1>",
        "a dog in <imma-0> <imma-1>",
        "an image of <imma-0> <imma-1>",
    ]


def test_lora_can_do_without_the_name_of_the_concept() -> None:
    nameless, token = parse_attacks(["lora:captions=nameless", "lora:captions=token,token=zwx"], REGISTRY)
    assert [nameless.caption(CONCEPT, c) for c in CONCEPT.captions] == ["a cat", "a dog", ""]
    assert [token.caption(CONCEPT, c) for c in CONCEPT.captions] == ["a cat in zwx", "a dog in zwx", "zwx"]
    assert nameless.caption(CONCEPT, "a fish") == "a fish"
    assert token.caption(CONCEPT, "a fish") == "a fish, zwx"
    (kind,) = parse_attacks(["lora:captions=kind"], REGISTRY)
    style = replace(CONCEPT, name="van gogh style")
    assert kind.caption(style, "a cat in Van Gogh style") == "a cat in style"
    assert kind.caption(replace(CONCEPT, name="guitar"), "a guitar") == "a thing"


def test_a_search_tries_captions_that_no_hardening_simulates(tiny_model: Model) -> None:
    (lora,) = parse_attacks(["lora"], REGISTRY)
    assert "kind" in search.space(lora, lora.rates(tiny_model))["captions"].choices
    rng = random.Random(0)
    drawn = {draw_attacker(lora, tiny_model, rng).settings.captions for _ in range(60)}
    assert drawn == {"named", "nameless", "token"}


def test_where_matrices_go_follows_the_targets(tiny_model: Model) -> None:
    counts = {}
    for targets in ("cross-attention", "attention", "transformer", "everything"):
        (attack,) = parse_attacks([f"lora:targets={targets}"], REGISTRY)
        with attack.attach(tiny_model, CONCEPT, 0) as parameters:
            counts[targets] = len(parameters)
            assert targets != "cross-attention" or all(".attn2." in name for name in parameters)
    assert list(counts.values()) == sorted(set(counts.values()))


@pytest.mark.parametrize("name", [n for n, found in REGISTRY.found.items() if "targets" in found.cls.search])
def test_an_attack_can_be_attached_to_every_target_that_a_search_tries(tiny_model: Model, name: str) -> None:
    space = REGISTRY.get(name).search["targets"]
    assert isinstance(space, Choice)
    for targets in space.options:
        (attack,) = parse_attacks([f"{name}:targets={targets}"], REGISTRY)
        with attack.attach(tiny_model, CONCEPT, 0) as parameters:
            assert parameters


def test_the_rate_follows_its_schedule_and_the_pictures_their_number() -> None:
    parameter = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    (attack,) = parse_attacks(["lora:schedule=linear,warmup=0.5"], REGISTRY)
    attacker = Attacker({"p": parameter}, Preset(1.0, 1.0, 8), attack.settings, 8)
    rates = []
    for _ in range(8):
        rates.append(attacker.optimizer.param_groups[0]["lr"])
        attacker.step(lambda: parameter.square().sum())
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25])
    with pytest.raises(ValueError, match="number of steps"):
        Attacker({"p": parameter}, Preset(1.0, 1.0, 8), attack.settings)
    some = CONCEPT.sample(2, seed=0)
    assert some == CONCEPT.sample(2, seed=0)
    assert len(some.images) == len(some.captions) == 2
    assert len({CONCEPT.sample(2, seed=s).hashes for s in range(20)}) > 1
    assert CONCEPT.sample(0, seed=0) is CONCEPT.sample(9, seed=0) is CONCEPT


def test_parameters_may_learn_at_rates_of_their_own(tiny_model: Model) -> None:
    (attack,) = parse_attacks(["pivotal-tuning:word_rate=20,learning_rate=0.001"], REGISTRY)
    with attack.attach(tiny_model, CONCEPT, 0) as parameters:
        attacker = Attacker(parameters, attack.rates(tiny_model), attack.settings, 1, attack.rate_of)
        rate = {id(p): group["lr"] for group in attacker.optimizer.param_groups for p in group["params"]}
        assert rate[id(parameters["new words"])] == pytest.approx(0.02)
        assert {round(rate[id(p)], 9) for name, p in parameters.items() if "lora_" in name} == {0.001}


def test_new_tokens_are_one_token_each(tiny_model: Model) -> None:
    (attack,) = parse_attacks(["textual-inversion:tokens=2"], REGISTRY)
    with attack.attach(tiny_model, CONCEPT, 0):
        ids = tiny_model.tokenizer("a cat in <imma-0> <imma-1>").input_ids
        size = tiny_model.text_encoder.get_input_embeddings().known.num_embeddings
        assert ids[-3:-1] == [size, size + 1]


def test_presets_follow_the_size_of_the_model_and_the_user(tiny_model: Model) -> None:
    auto, paper, own = parse_attacks(["lora", "lora:preset=paper", "lora:preset=paper,learning_rate=0.5"], REGISTRY)
    assert auto.rates(tiny_model) == type(auto).presets["small"]
    assert (paper.rates(tiny_model).learning_rate, paper.rates(tiny_model).outer_learning_rate) == (1e-4, 1e-5)
    assert (own.rates(tiny_model).learning_rate, own.rates(tiny_model).outer_learning_rate) == (0.5, 1e-5)


def test_everything_wrong_with_attacks_is_said_at_once() -> None:
    with pytest.raises(ImmaError) as caught:
        parse_attacks(
            [
                "hra:rank=3",
                "dreambooth:prior_weight=nan",
                "lorra",
                "lora:rnk=3",
                "lora:rank=many",
                "lora:rank=0",
                "lora:optimizer=sgd",
                "lora:rank",
                "dreambooth:prior_weight=-1",
            ],
            REGISTRY,
        )
    said = str(caught.value)
    for part in (
        "Did you mean lora",
        "no setting 'rnk'; did you mean rank",
        "rank='many' is not a whole number",
        "optimizer='sgd' is not adamw, radam or adafactor",
        "at least 1",
        "key=value",
        "negative",
        "rank must be even",
        "prior_weight must be a finite number, not nan",
    ):
        assert part in said


def test_an_unknown_preset_is_refused(tiny_model: Model) -> None:
    with pytest.raises(ImmaError, match="no preset"):
        parse_attacks(["lora:preset=nope"], REGISTRY)[0].rates(tiny_model)


def test_settings_are_recorded() -> None:
    assert record(parse_attacks(["lora:rank=8"], REGISTRY)[0])["settings"]["rank"] == 8
