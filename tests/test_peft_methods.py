"""Every method of the installed PEFT either goes into a model and out again, or is refused with the reason."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch
from imma_attacks.further_peft_methods import further_methods
from peft.tuners.hra import HRALinear

from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.attacks.testing import example_concept, left_as_it_was, tiny_model
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.imma import Immunized, ImmunizerSettings, immunize

REGISTRY = discover()
PAGE = Path(__file__).parents[1] / "docs" / "attacks" / "peft.md"


@pytest.mark.filterwarnings("ignore")
def test_whatever_peft_can_inject_is_an_attack() -> None:
    model = tiny_model("sd1")
    batch = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 16))
    works, refused = set(), {}
    for method in further_methods():
        (attack,) = parse_attacks([f"peft:method={method}"], REGISTRY)
        with left_as_it_was(model):
            try:
                with attack.attach(model, example_concept(), 0) as parameters:
                    if parameters and torch.isfinite(model.unet(*batch).sample).all():
                        works.add(method)
            except ImmaError as error:
                refused[method] = error.reasons
    assert works | set(refused) == set(further_methods())
    assert not works & set(refused)
    assert all(refused.values())
    documented = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8").split("## Methods")[1], re.MULTILINE)
    assert set(documented) == works, f"with PEFT {peft.__version__}"


def test_weights_that_an_attack_only_copies_are_told() -> None:
    model = tiny_model("sd1")
    with pytest.raises(ImmaError, match="instead of copies"):
        hardened(model, "peft:method=ln_tuning")
    assert hardened(model, "peft:method=shira,rank=1").unreached
    assert not hardened(model, "peft:method=shira,rank=1", "lora").unreached


@pytest.mark.parametrize("name", [name for name, found in REGISTRY.found.items() if found.distribution == "imma-cli"])
def test_hardening_reaches_all_protected_weights_through_every_attack(name: str) -> None:
    few = "" if "prior_images" not in {f.name for f in fields(REGISTRY.get(name).Settings)} else ":prior_weight=0"
    assert not hardened(tiny_model("sd1"), name + few).unreached


def hardened(model: Model, *specs: str) -> Immunized:
    runtime = Runtime("cpu", "sdpa", "fp32")
    return immunize(model, parse_attacks(specs, REGISTRY), [example_concept()], ImmunizerSettings(steps=2), runtime)


def test_reflections_are_those_of_peft() -> None:
    (attack,) = parse_attacks(["hra"], REGISTRY)
    model = tiny_model("sd1")
    with attack.attach(model, example_concept(), 0) as parameters, torch.no_grad():
        for parameter in parameters.values():
            parameter += torch.randn_like(parameter)
        for layer in model.unet.modules():
            if isinstance(layer, HRALinear):
                inputs = torch.randn(2, 3, layer.in_features)
                assert torch.allclose(layer(inputs), HRALinear.forward(layer, inputs), atol=1e-4)


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(ImmaError, match=r"no method 'dorra' for layers; it has .*miss"):
        parse_attacks(["peft:method=dorra"], REGISTRY)


def test_a_method_with_an_attack_of_its_own_is_called_by_its_name() -> None:
    with pytest.raises(ImmaError, match="--attack oft"):
        parse_attacks(["peft:method=oft"], REGISTRY)


def test_blocks_that_do_not_fit_are_refused() -> None:
    (attack,) = parse_attacks(["oft:block_size=7"], REGISTRY)
    model = tiny_model("sd1")
    with (
        left_as_it_was(model),
        pytest.raises(ImmaError, match="cannot put OFT into these layers"),
        attack.attach(model, example_concept(), 0),
    ):
        pass
