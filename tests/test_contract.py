"""The contract that is shipped finds what is wrong with an attack. That it passes for right ones: test_attacks.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from imma_cli.attacks import Attack, AttackSettings, Choice, Preset
from imma_cli.attacks.settings import spec
from imma_cli.attacks.testing import AttackContract, doubles
from imma_cli.concepts.batches import Batch
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model


@dataclass(frozen=True)
class ShiftSettings(AttackSettings):
    """Settings of Shift."""

    size: int = 1
    """How far, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError("size must be at least 1")


class Shift(Attack):
    """Trains a number that is added to what the UNet predicts: as little as an attack can be."""

    name = "shift"
    summary = "a shift of the prediction"
    trains = "a number for each channel"
    paper = "none"
    Settings = ShiftSettings
    search: ClassVar = {"size": Choice((1, 2))}
    presets: ClassVar = dict.fromkeys(("paper", "small"), Preset(learning_rate=1e-2, outer_learning_rate=1e-4, steps=4))

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        shift = nn.Parameter(0.5 * torch.randn(4, 1, 1, generator=torch.Generator().manual_seed(seed)), False)
        hook = model.unet.register_forward_hook(lambda net, args, out: (out[0] + shift,))
        try:
            yield {"shift": shift}
        finally:
            hook.remove()


class Leaks(Shift):
    """Leaves a weight changed."""

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        with super().attach(model, concept, seed) as parameters:
            yield parameters
        model.unet.conv_in.bias.data += 1e-6


class LeaksAfterAnException(Shift):
    """Cleans up only where all went well."""

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        with super().attach(model, concept, seed) as parameters:
            model.text_encoder.requires_grad_(True)
            yield parameters
            model.text_encoder.requires_grad_(False)


class Hooked(Shift):
    """Leaves its hook behind."""

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        model.vae.register_forward_hook(lambda net, args, out: None)
        with super().attach(model, concept, seed) as parameters:
            yield parameters


class Processed(Shift):
    """Leaves attention processors behind, which are no modules."""

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        with super().attach(model, concept, seed) as parameters:
            yield parameters
        model.unet.set_attn_processor(AttnProcessor())


class Patched(Shift):
    """Leaves a forward of its own behind."""

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        with super().attach(model, concept, seed) as parameters:
            yield parameters
        model.unet.conv_in.forward = model.unet.conv_in.forward


class Swallows(Shift):
    """Hides the exception of whoever trains."""

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        with super().attach(model, concept, seed) as parameters:
            try:
                yield parameters
            except Exception:  # noqa: BLE001
                return


class Unseeded(Shift):
    """Starts from the global generator."""

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        with super().attach(model, concept, int(torch.randint(1000, ()))) as parameters:
            yield parameters


class Noisy(Shift):
    """Draws random numbers in its loss."""

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return super().loss(model, batch) + torch.rand(())


class Remembers(Shift):
    """Its loss depends on how often it was trained, which no parameter tells."""

    trained = 0

    def loss(self, model: Model, batch: Batch) -> Tensor:
        self.trained += torch.is_grad_enabled()
        return super().loss(model, batch) * self.trained


class Stubborn(Shift):
    """Its loss never falls."""

    def loss(self, model: Model, batch: Batch) -> Tensor:
        loss = super().loss(model, batch)
        return loss - loss


class InPlaceUntold(Shift):
    """Trains the model's own weight and does not say so."""

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        bias = model.unet.conv_out.bias
        before = bias.detach().clone()
        try:
            yield {"bias": bias}
        finally:
            bias.data.copy_(before)


class TextUntold(Shift):
    """Changes what prompts are encoded to and does not say so."""

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        with super().attach(model, concept, seed) as parameters:
            shift = parameters["shift"]
            hook = model.text_encoder.register_forward_hook(lambda net, args, out: (out[0] + shift.sum(),))
            yield parameters
            hook.remove()


class Refuses(Shift):
    """Declares a value to search that its settings refuse."""

    search: ClassVar = {"size": Choice((0, 1))}


class Elsewhere(Shift):
    """Works on no family that is known here."""

    families = ("pixart",)


class Silent(Shift):
    """Does not say what it trains."""

    trains = ""


WITHOUT_ARGUMENTS = ("test_it_says_what_it_is", "test_every_value_of_the_search_space_can_be_set")


def run(attack: type[Attack], test: str) -> None:
    contract = type("Contract", (AttackContract,), {"attack": attack})()
    arguments: dict[str, Any] = {} if test in WITHOUT_ARGUMENTS else {"family": "sd1", "typed": ""}
    getattr(contract, test)(**arguments)


class TestTheContractOfShift(AttackContract):
    attack = Shift
    settings = ("", "size=2")


@pytest.mark.parametrize(
    ("attack", "test", "said"),
    [
        (Leaks, "test_it_attaches_parameters_and_learns", "unet: these weights have other values"),
        (Hooked, "test_a_model_can_be_verified_with_it", "vae: hooks are left behind"),
        (Processed, "test_it_attaches_parameters_and_learns", "other attention processors"),
        (Patched, "test_it_attaches_parameters_and_learns", "other attributes"),
        (LeaksAfterAnException, "test_an_exception_in_the_middle_leaves_no_trace", "asks for gradients"),
        (Swallows, "test_an_exception_in_the_middle_leaves_no_trace", "swallows"),
        (Unseeded, "test_the_same_seed_gives_the_same_parameters", "two results"),
        (Unseeded, "test_a_model_can_be_hardened_against_it", "the same seed"),
        (Remembers, "test_a_model_can_be_hardened_against_it", "after an interruption"),
        (Noisy, "test_the_loss_follows_from_the_batch_alone", "two losses"),
        (Stubborn, "test_it_attaches_parameters_and_learns", "did not fall"),
        (InPlaceUntold, "test_it_attaches_parameters_and_learns", "in_place"),
        (TextUntold, "test_it_tells_whether_it_changes_what_prompts_are_encoded_to", "trains_text"),
        (Elsewhere, "test_it_says_what_it_is", "no family"),
        (Silent, "test_it_says_what_it_is", "trains is empty"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_is_found(attack: type[Attack], test: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        run(attack, test)


def test_a_value_that_the_settings_refuse_is_found() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        run(Refuses, "test_every_value_of_the_search_space_can_be_set")


def test_the_stand_ins_do_nothing_and_say_the_same() -> None:
    for test in (
        "test_it_says_what_it_is",
        "test_an_exception_in_the_middle_leaves_no_trace",
        "test_a_model_can_be_hardened_against_it",
        "test_a_model_can_be_verified_with_it",
    ):
        run(doubles.Nothing, test)
    assert spec(doubles.Nothing(doubles.Nothing.Settings())) == "nothing"
    fixed = doubles.Fixed(doubles.FixedSettings(0.3))
    assert fixed.similarity([1, 2], [3, 4, 5]).tolist() == [[0.3] * 3] * 2
    assert not fixed.by_default


def test_pytest_is_not_needed_to_import_it() -> None:
    code = "import sys; sys.modules['pytest'] = None; from imma_cli.attacks.testing import AttackContract, doubles"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
