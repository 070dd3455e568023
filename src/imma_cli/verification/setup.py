"""Everything that a verification needs, made from what was named: models, pictures, prompts, baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from imma_cli import demo
from imma_cli.attacks.settings import spec
from imma_cli.concepts.drawing import Role, draw_concept
from imma_cli.concepts.folders import read_concept
from imma_cli.errors import ImmaError
from imma_cli.verification.materials import Material, material, warnings
from imma_cli.verification.measuring import Bench
from imma_cli.verification.models import Models, changed_weights, directly_maximized, randomly_changed
from imma_cli.verification.plan import default_budget, simulated_steps, study_of
from imma_cli.verification.search import require_searchable
from imma_cli.verification.untouched import PROMPTS, unrelated
from imma_cli.verification.worker import Campaign

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.checkpoints import Checkpoint
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime
    from imma_cli.verification.adapters import Adapters
    from imma_cli.verification.lines import Study
    from imma_cli.verification.metrics import Metric
    from imma_cli.verification.plan import Effort
    from imma_cli.verification.storage import Storage


@dataclass(frozen=True)
class Inputs:
    """Everything that the user named, read and checked; no weight is loaded yet."""

    original: Checkpoint
    hardened: Checkpoint
    concept: str
    attacks: list[Attack]
    pictures: Concept | None
    judge: Concept | None
    benign: list[Concept]
    metrics: list[Metric]
    untouched: tuple[str, ...]
    recorded: list[Attack]
    """The attacks that the hardened file says it was hardened against, as far as they are installed."""


class Setup:
    """The loaded models, and what they are attacked with."""

    def __init__(
        self, inputs: Inputs, runtime: Runtime, effort: Effort, batch_size: int, *, gradient_checkpointing: bool
    ) -> None:
        """Raises ImmaError where both checkpoints hold the same weights, or an attack cannot be tried."""
        self.inputs, self.runtime, self.effort, self.batch_size = inputs, runtime, effort, batch_size
        self.gradient_checkpointing = gradient_checkpointing
        self.models: Models = Models(
            {"original": partial(self._load, inputs.original), "hardened": partial(self._load, inputs.hardened)}
        )
        record = inputs.original.provenance
        if record and record.get("input_sha256") == inputs.hardened.sha256:
            raise ImmaError(
                "The two checkpoints are swapped: the one after --against was made from the other one.",
                hint="imma verify HARDENED --against ORIGINAL",
            )
        if not changed_weights(self.models["original"], self.models["hardened"]):
            raise ImmaError("The two checkpoints hold the same weights: nothing was hardened.")
        self.pictures, self.judge = inputs.pictures, inputs.judge
        for attack in inputs.attacks:
            require_searchable(attack, self.models["original"], searched=effort.trials > 0)
        for metric in inputs.metrics:
            metric.prepare(runtime.device)

    def _load(self, checkpoint: Checkpoint) -> Model:
        return self.runtime.apply(checkpoint.load(), recomputed="blocks" if self.gradient_checkpointing else None)

    def draw_pictures(self, count: int, on_picture: Callable[[int], None]) -> None:
        """The original draws what it is attacked with and judged by, as in the paper's re-learning setting."""
        roles: tuple[Role, ...] = ("attack", "judge")
        drawn = []
        for i, role in enumerate(roles):
            advance = partial(_further, on_picture, i * count)
            concept = self.inputs.concept
            drawn.append(
                draw_concept(self.models["original"], concept, role=role, seed=0, count=count, on_picture=advance)
            )
        self.pictures, self.judge = drawn

    @property
    def is_demo(self) -> bool:
        return self.inputs.original.architecture == "demo"

    def materials(self) -> list[Material]:
        """The protected concept first, then those that nobody protected."""
        assert self.pictures is not None
        prompts = self.effort.prompts
        found = [material("harmful", self.pictures, self.judge, prompts)]
        found += [material("benign", each, None, prompts) for each in self.inputs.benign]
        if self.is_demo and not self.inputs.benign:
            found += [material("benign", *pair, prompts) for pair in _others_of_the_demo(self.inputs.concept)][
                : self.effort.benign
            ]
        return found

    def untouched(self) -> tuple[str, ...]:
        return self.inputs.untouched or unrelated(demo.PROMPTS if self.is_demo else PROMPTS, self.inputs.concept)

    def study(self, budget: int | None) -> Study:
        """What is compared. Everything that trials depend on is in it."""
        inputs = self.inputs
        materials = self.materials()
        record = inputs.hardened.provenance
        steps = budget or default_budget(self.effort, simulated_steps(record), inputs.attacks, self.models["original"])
        return study_of(
            {"original": inputs.original, "hardened": inputs.hardened},
            materials,
            self.untouched(),
            [spec(metric) for metric in inputs.metrics],
            self.effort,
            steps,
            self.runtime,
            [*warnings(record, *materials), *self._another_original()],
            batch_size=self.batch_size,
        )

    def _another_original(self) -> list[str]:
        made_from = (self.inputs.hardened.provenance or {}).get("input_sha256")
        if made_from in (None, self.inputs.original.sha256):
            return []
        return [
            "The file says that it was made from another checkpoint than the one it is compared with: the difference is not "
            "hardening's alone."
        ]

    def campaign(
        self, study: Study, storage: Storage, *, baselines: bool, adapters: Adapters | None = None
    ) -> Campaign:
        """The jobs of *study*. Baselines are made when the first trial needs them; *adapters* keeps what attacks learn."""
        harmful, *benign = self.materials()
        if baselines:
            models, inputs = self.models, self.inputs
            models.loaders["maximize"] = lambda: directly_maximized(
                self._load(inputs.original),
                inputs.recorded or inputs.attacks,
                harmful.pictures,
                inputs.hardened.provenance,
                self.runtime,
            )
            models.loaders["random"] = lambda: randomly_changed(
                models["original"], models["hardened"], self._load(inputs.original)
            )
        bench = Bench(
            study.study,
            self.models,
            self.inputs.metrics,
            self.runtime,
            self.effort,
            self.batch_size,
            study.prompts["untouched"],
            adapters,
        )
        others = [name for name in self.models if name != "original"]
        return Campaign(bench, self.inputs.attacks, harmful, benign, study.budget, others, storage=storage)


def _further(on_picture: Callable[[int], None], before: int, done: int) -> None:
    on_picture(before + done)


def _others_of_the_demo(concept: str) -> list[tuple[Concept, Concept]]:
    """Pictures to fine-tune on and to judge by, of the demo's concepts other than *concept*."""
    found = []
    for name, described in demo.CONCEPTS.items():
        if described.text != concept:
            with demo.concept_folder(name, "attack") as pictures, demo.concept_folder(name, "judge") as judge:
                found.append((read_concept(described.text, pictures), read_concept(described.text, judge)))
    return found
