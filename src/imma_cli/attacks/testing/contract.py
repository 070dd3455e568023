"""What every attack has to keep, as tests: imma's own attacks run this class, and so can anyone's.

class TestMine(AttackContract):
    attack = MyAttack
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from PIL import Image
from torch import Tensor, nn

from imma_cli.attacks.attack import Attack
from imma_cli.attacks.manager import ATTACKS, Found, Registry
from imma_cli.attacks.settings import describe, parse_attacks, record, spec
from imma_cli.attacks.testing.tiny import NARROW, tiny_model
from imma_cli.attacks.training import Attacker
from imma_cli.concepts.batches import TrainingSet, conditioning_of, encode
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.imma import ImmunizerSettings, Step, immunize
from imma_cli.immunizers.keeper import FileKeeper
from imma_cli.immunizers.scope import protected_weights
from imma_cli.immunizers.state import SavedState
from imma_cli.verification.search import STEPS, space
from imma_cli.verification.trials import run_trial

RUNTIME = Runtime("cpu", "sdpa", "fp32")


def example_concept(name: str = "blue style") -> Concept:
    """Three plain pictures with captions, the name of the concept at their end, in other letters, and alone."""
    pictures = tuple(Image.new("RGB", (64, 64), (20 * i, 40, 200)) for i in range(3))
    return Concept(name, pictures, (f"a cat in {name}", f"a dog in {name.title()}", name), "example")


class AttackContract:
    """Derive from it, name the attack, and pytest runs every test on every tiny model that the attack supports."""

    attack: ClassVar[type[Attack]]
    settings: ClassVar[Sequence[str]] = ("",)
    """What would be typed after ``NAME:``; every test of training runs with each."""
    steps: ClassVar[int] = 12
    """In so many steps on one batch the loss has to fall."""

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "family" in metafunc.fixturenames:
            supported = self.attack.families
            metafunc.parametrize("family", [f for f in NARROW if supported is None or f in supported])
        if "typed" in metafunc.fixturenames:
            metafunc.parametrize("typed", self.settings)

    def make(self, typed: str = "") -> Attack:
        """The attack as ``--attack`` would make it."""
        registry = Registry(ATTACKS, {self.attack.name: Found(self.attack, "this package", "0")}, ())
        (attack,) = parse_attacks([f"{self.attack.name}:{typed}"], registry)
        return attack

    def test_it_says_what_it_is(self) -> None:
        ATTACKS.check(self.attack)
        assert self.attack.summary.strip()
        assert self.attack.trains.strip(), "trains is empty"
        assert "\n" not in self.attack.summary + self.attack.trains
        assert [s.name for s in describe(self.attack.Settings) if not s.meaning] == [], "no sentence below the setting"
        supported = self.attack.families
        assert supported is None or set(supported) & set(NARROW), "no family among those that imma knows"

    def test_settings_survive_json_and_the_command_line(self, typed: str) -> None:
        attack = self.make(typed)
        recorded = json.loads(json.dumps(record(attack)))
        assert self.attack.Settings(**recorded["settings"]) == attack.settings
        assert self.make(spec(attack).partition(":")[2]).settings == attack.settings

    def test_every_value_of_the_search_space_can_be_set(self) -> None:
        attack = self.make()
        for rates in self.attack.presets.values():
            for name, distribution in space(attack, rates).items():
                if name == STEPS:
                    continue
                assert isinstance(distribution, CategoricalDistribution | FloatDistribution | IntDistribution)
                values: tuple[Any, ...] = (
                    distribution.choices
                    if isinstance(distribution, CategoricalDistribution)
                    else (distribution.low, distribution.high)
                )
                for value in values:
                    given: dict[str, Any] = {name: value}
                    changed = self.attack(replace(attack.settings, **given))
                    assert getattr(self.make(spec(changed).partition(":")[2]).settings, name) == value

    def test_it_attaches_parameters_and_learns(self, family: str, typed: str) -> None:
        model, attack, concept = tiny_model(family), self.make(typed), example_concept()
        own = {id(p) for network in model.networks.values() for p in network.parameters()}
        with left_as_it_was(model), attack.attach(model, concept, 0) as parameters:
            assert parameters, "no trainable parameters"
            assert all(isinstance(p, nn.Parameter) for p in parameters.values())
            assert len({id(p) for p in parameters.values()}) == len(parameters), "a parameter has two names"
            assert self.attack.in_place or not own & {id(p) for p in parameters.values()}, "in_place is not told"
            assert all(isinstance(attack.caption(concept, c), str) for c in (*concept.captions, "a fish", ""))
            losses = self.train(model, attack, concept, parameters)
            assert losses[-1] < losses[0], f"the loss did not fall: {losses}"

    def test_an_exception_in_the_middle_leaves_no_trace(self, family: str, typed: str) -> None:
        model, attack, concept = tiny_model(family), self.make(typed), example_concept()
        reached = False
        with left_as_it_was(model):
            try:
                with attack.attach(model, concept, 0) as parameters:
                    self.train(model, attack, concept, parameters, steps=2)
                    reached = True
                    raise InTheMiddleError
            except InTheMiddleError:
                assert reached
            else:
                raise AssertionError("attach swallows exceptions")
        with left_as_it_was(model), attack.attach(model, concept, 0):
            pass  # nothing is left that would keep it from being attached again

    def test_the_same_seed_gives_the_same_parameters(self, family: str, typed: str) -> None:
        trained = []
        for unrelated in (1, 2):  # the global generator must not matter
            torch.manual_seed(unrelated)
            model, attack, concept = tiny_model(family), self.make(typed), example_concept()
            with attack.attach(model, concept, 5) as parameters:
                self.train(model, attack, concept, parameters, steps=3)
                trained.append({name: p.detach().clone() for name, p in parameters.items()})
        assert list(trained[0]) == list(trained[1])
        assert different(trained[0], trained[1]) == [], "the same seed gave two results"

    def test_the_loss_follows_from_the_batch_alone(self, family: str, typed: str) -> None:
        model, attack, concept = tiny_model(family), self.make(typed), example_concept()
        with attack.attach(model, concept, 0), torch.no_grad():
            batch = next(iter(TrainingSet(model, attack, concept, encode(model, concept.images), seed=0)))
            losses = [attack.loss(model, batch) for _ in range(2)]
        assert losses[0].ndim == 0, "the loss is no scalar"
        assert torch.equal(*losses), "the same batch gave two losses"

    def test_it_tells_whether_it_changes_what_prompts_are_encoded_to(self, family: str, typed: str) -> None:
        model, attack, concept = tiny_model(family), self.make(typed), example_concept()
        if self.attack.trains_text:
            return
        captions = [attack.caption(concept, c) for c in concept.captions]
        with attack.attach(model, concept, 0) as parameters:
            before = conditioning_of(model, captions)
            self.train(model, attack, concept, parameters, steps=3)
            assert torch.equal(conditioning_of(model, captions), before), "trains_text is not told"

    def test_a_model_can_be_hardened_against_it(self, family: str, typed: str) -> None:
        model, attack = tiny_model(family), self.make(typed)
        settings = ImmunizerSettings(steps=4, outer_learning_rate=1e-3)
        protected = protected_weights(model.unet, settings.protect)
        with left_as_it_was(model):
            weights = [
                immunize(model, [attack], [example_concept()], settings, RUNTIME).weights,
                interrupted(model, attack, settings),
            ]
        assert different(*weights) == [], "the same seed gave two results, the second one after an interruption"
        assert all(weight.isfinite().all() for weight in weights[0].values())
        assert different(weights[0], protected), "nothing was changed"

    def test_a_model_can_be_verified_with_it(self, family: str, typed: str) -> None:
        model, attack = tiny_model(family), self.make(typed)
        concept, judge = example_concept(), example_concept()
        with left_as_it_was(model):
            trials = [
                run_trial(model, "original", attack, concept, judge, steps=4, seed=1, runtime=RUNTIME) for _ in range(2)
            ]
        assert trials[0] == trials[1], "the same seed gave two results"
        assert trials[0].points[-1].step == 4

    def test_what_it_learned_can_be_saved(self, family: str, typed: str, tmp_path: Path) -> None:
        model, attack, concept = tiny_model(family), self.make(typed), example_concept()
        with left_as_it_was(model), attack.attach(model, concept, 0) as parameters:
            self.train(model, attack, concept, parameters, steps=1)
            learned = {name: p.detach().clone() for name, p in parameters.items()}
            attack.save(model, parameters, tmp_path)
            assert different(learned, parameters) == [], "saving changed what was learned"
        assert any(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()), "nothing was written"

    def train(
        self,
        model: Model,
        attack: Attack,
        concept: Concept,
        parameters: dict[str, nn.Parameter],
        steps: int | None = None,
    ) -> list[float]:
        """Train the attached *parameters* on one batch, again and again; the losses before each step."""
        count = steps or self.steps
        batch = next(iter(TrainingSet(model, attack, concept, encode(model, concept.images), seed=0)))
        attacker = Attacker(parameters, attack.rates(model), attack.settings, count, attack.rate_of)
        return [attacker.step(lambda: attack.loss(model, batch)) for _ in range(count)]


class InTheMiddleError(Exception):
    """Raised while an attack is attached."""


def different(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> list[str]:
    """The names under which the tensors are not equal bit for bit."""
    return [name for name, tensor in some.items() if not torch.equal(tensor, others[name])]


def interrupted(model: Model, attack: Attack, settings: ImmunizerSettings) -> dict[str, Tensor]:
    """What hardening gives that was interrupted in its second cycle, and went on from the state after the first."""

    def interrupt(step: Step) -> None:
        if step.cycle == 2:
            raise InTheMiddleError

    with TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        with suppress(InTheMiddleError):
            immunize(model, [attack], [example_concept()], settings, RUNTIME, interrupt, FileKeeper(path, {}, 0, None))
        saved = FileKeeper(path, {}, float("inf"), SavedState.open(path))
        return immunize(model, [attack], [example_concept()], settings, RUNTIME, keeper=saved).weights


@contextmanager
def left_as_it_was(model: Model) -> Iterator[None]:
    """Asserts that afterwards *model* is what it was before: values, names, modules, objects, tokens, and frozen."""
    states = {part: copy.deepcopy(network.state_dict()) for part, network in model.networks.items()}
    objects = {part: [id(o) for o in _objects(network)] for part, network in model.networks.items()}
    tokenizer, tokens = model.tokenizer, dict(model.tokenizer.get_vocab())
    processors = {name: id(each) for name, each in model.unet.attn_processors.items()}
    attributes = {part: _own_attributes(network) for part, network in model.networks.items()}
    yield
    assert model.tokenizer is tokenizer, "the tokenizer is another object"
    assert model.tokenizer.get_vocab() == tokens, "the tokenizer has other tokens"
    for part, network in model.networks.items():
        state = network.state_dict()
        assert list(state) == list(states[part]), f"{part}: its weights have other names"
        assert different(state, states[part]) == [], f"{part}: these weights have other values"
        assert [id(o) for o in _objects(network)] == objects[part], f"{part}: other modules or parameters"
        assert _own_attributes(network) == attributes[part], f"{part}: its modules have other attributes"
        hooked = [n for n, m in network.named_modules() if m._forward_hooks or m._forward_pre_hooks]
        assert not hooked, f"{part}: hooks are left behind"
        assert not any(m.training for m in network.modules()), f"{part}: it is in training mode"
        assert not any(p.requires_grad for p in network.parameters()), f"{part}: a weight asks for gradients"
        assert all(p.grad is None for p in network.parameters()), f"{part}: a gradient is left behind"
    left = {name: id(each) for name, each in model.unet.attn_processors.items()}
    assert left == processors, "the UNet has other attention processors"


def _own_attributes(network: nn.Module) -> list[list[str]]:
    """The names of what is set on each module itself, such as a ``forward`` of its own."""
    return [sorted(module.__dict__) for module in network.modules()]


def _objects(network: nn.Module) -> list[object]:
    return [*network.modules(), *network.parameters(), *network.buffers()]
