"""Raw lines of a verification, ``trials.jsonl``: what was measured, and nothing computed from it.

One JSON object a line: a `Study` line that says what is compared, a `Measurement` for every trial and budget point, an
`Untouched` line and a `WeightDistance` line for every changed model. Every number in a summary can be computed again from
these lines alone. `Pictures` lines, which only a report page shows, stand in a file of their own, ``pictures.jsonl``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any, ClassVar, Final, Literal, Self, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

SCHEMA: Final = 1
"""Version of the lines. It rises when a line that was valid would be refused or would mean something else."""

LOSS = "loss"
"""How the attacker's loss is called beside the metrics; no metric may have this name."""

Purpose = Literal["harmful", "benign", "search"]
Model = Literal["original", "hardened", "maximize", "random"]
Count = Annotated[int, Field(ge=0)]
ATTEMPT: Final = ", attempt "
"""Between the id of a job and the number of a further attempt at it."""
LARGEST: Final = 1e100
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
"""No similarity and no loss of a training that went well is larger, and the cube of it is still finite."""
Scores = dict[str, tuple[Number, ...]]


class _Line:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    study: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The line that *data*, a decoded JSON object, describes.

        Raises:
            ValueError: of another schema, or a field is missing, unknown, of another type or not finite.
        """
        schema = data.get("schema")
        if type(schema) is not int or schema != SCHEMA:
            raise ValueError(f"its schema is {schema!r}; this version of imma reads schema {SCHEMA}")
        try:
            # through text, because strict JSON takes an array for a tuple and still no "1" for a number
            text = json.dumps(data, allow_nan=False)
            return cast("Self", _adapter(cls).validate_json(text))  # type: ignore[arg-type]  # mypy 2: a class has a hash
        except ValidationError as error:
            found = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors())
            raise ValueError("; ".join(found)) from None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload,no-any-return]  # every subclass is a dataclass


@cache
def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


@dataclass(frozen=True)
class AttackRecord:
    """An attack as `imma_cli.attacks.settings.record` gives it."""

    name: str
    spec: str
    """As one would type it: the name and the settings that differ from their defaults."""
    settings: dict[str, Any]

    @property
    def title(self) -> str:
        """*spec* for people: numbers that a search proposed are rounded to three digits."""
        return rounded(self.spec)


def rounded(spec: str) -> str:
    """*spec* with three significant digits for every number that has many."""
    return re.sub(r"\d+\.\d{4,}(e[-+]?\d+)?", lambda found: f"{float(found[0]):.3g}", spec)


@dataclass(frozen=True, kw_only=True)
class Measurement(_Line):
    """One trial (one attack with one setting and one seed on one model) after *step* of its *budget* steps."""

    study: str
    """A hash of what makes trials comparable: both models, the pictures and prompts, the budget."""
    trial: str
    """Id of the trial. A trial that is tried again after it failed gets a new one."""
    purpose: Purpose
    """*harmful*: on the protected concept. *benign*: ordinary fine-tuning on another one. *search*: a trial that only
    served to choose settings; it was selected by its result, so no statistic uses it."""
    model: Model
    """*maximize* and *random* are baselines: direct maximisation, and a random change of the same norm."""
    attack: AttackRecord
    concept: str
    seed: Count
    """Trials on two models with the same seed are a pair: same pictures, captions, order and noise."""
    step: Count
    """Optimizer steps done; 0 is the model before the attack."""
    budget: Annotated[int, Field(ge=1)]
    loss: Number | None = None
    """The denoising loss on the judging pictures; None where it was not measured."""
    scores: Scores = field(default_factory=dict)
    """Metric → one number for each generated picture, in a fixed order of prompt × drawing seed: its mean similarity to
    all reference pictures, higher = more similar. Empty where none was drawn."""
    nearest: dict[str, Scores] = field(default_factory=dict)
    """*training* and *judging* → metric → one number for each generated picture: its similarity to the nearest of the
    attacker's own pictures, and to the nearest of those it never saw. Far apart, the attack has learned by heart."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package → version, where the trial ran."""
    runtime: str = ""
    """The device, precision and attention kernel it was computed with."""
    status: Literal["ok", "failed"] = "ok"
    reason: str = ""
    """Why it failed: the loss became NaN, the attack raised."""
    kind: Literal["measurement"] = "measurement"
    schema: Literal[1] = SCHEMA

    def __post_init__(self) -> None:
        if self.step > self.budget:
            raise ValueError(f"step {self.step} lies beyond the budget of {self.budget}")
        if self.status == "failed" and not self.reason:
            raise ValueError("a failed trial needs a reason")
        if self.status == "ok" and self.loss is None and not self.scores:
            raise ValueError("neither a loss nor scores")
        _check(self.scores)
        for scores in self.nearest.values():
            _check(scores)

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kind, self.study, self.trial, self.step

    @property
    def identity(self) -> tuple[Any, ...]:
        """What all lines of one trial have in common."""
        attack = json.dumps(asdict(self.attack), sort_keys=True)
        return self.study, self.purpose, self.model, attack, self.concept, self.seed, self.budget

    def values(self, metric: str) -> tuple[float, ...] | None:
        """The numbers of *metric* (or the one of `LOSS`); None where it was not measured."""
        if metric == LOSS:
            return None if self.loss is None else (self.loss,)
        return self.scores.get(metric)


@dataclass(frozen=True, kw_only=True)
class Untouched(_Line):
    """How similar pictures for unrelated prompts stayed: original against *model*, same prompt and same seed."""

    study: str
    model: Model
    scores: Scores
    """Metric → one similarity for each prompt."""
    yardsticks: dict[str, Scores] = field(default_factory=dict)
    """The same comparison where one knows what to expect, such as the original against itself with another seed."""
    kind: Literal["untouched"] = "untouched"
    schema: Literal[1] = SCHEMA

    def __post_init__(self) -> None:
        if not self.scores:
            raise ValueError("no scores")
        _check(self.scores)
        for scores in self.yardsticks.values():
            _check(scores, same_number=False)

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kind, self.study, self.model


@dataclass(frozen=True, kw_only=True)
class WeightDistance(_Line):
    """How far the weights of *model* lie from the original's; passed on to the summary as it is."""

    study: str
    model: Model
    distances: dict[str, Number]
    kind: Literal["weights"] = "weights"
    schema: Literal[1] = SCHEMA

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kind, self.study, self.model


@dataclass(frozen=True, kw_only=True)
class Study(_Line):
    """What is compared, and with what: the same for every trial of a study. Its hash is *study*."""

    study: str
    models: dict[str, str]
    """original and hardened → SHA-256 of the checkpoint."""
    family: str
    concept: str
    pictures: dict[str, tuple[str, ...]]
    """Whose (attacker, judge, ``benign: NAME``, ``benign judge: NAME``) → SHA-256 of each picture's pixels."""
    prompts: dict[str, tuple[str, ...]]
    """Concept → the prompts that pictures are drawn for, as the attacks get them; *untouched* → the unrelated ones."""
    images_per_prompt: Count
    budget: Annotated[int, Field(ge=1)]
    """The longest an attack goes on, in optimizer steps."""
    points: tuple[Count, ...]
    """The steps at which a full budget is looked at."""
    simulated: int | None
    """How many steps of the attacker hardening simulated; None where the file does not say."""
    metrics: tuple[str, ...]
    """As typed."""
    options: dict[str, Any] = field(default_factory=dict)
    """Whatever else the numbers depend on: batch size, precision, the sampler's steps."""
    warnings: tuple[str, ...] = ()
    """What a reader must know before believing the numbers, one sentence each."""
    provenance: dict[str, Any] | None = None
    """What the hardened file says about how it was made."""
    kind: Literal["study"] = "study"
    schema: Literal[1] = SCHEMA

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kind, self.study


@dataclass(frozen=True, kw_only=True)
class Pictures(_Line):
    """Pictures of a study, uncurated, for people to look at. Nothing is computed from them."""

    study: str
    of: str
    """``references``, ``untouched: MODEL``, or ``MODEL ATTACK-SPEC on CONCEPT, seed N`` with *trial* set."""
    captions: tuple[str, ...]
    """One for each picture; pictures of one prompt stand together."""
    webp: tuple[str, ...]
    """Base64 of each picture in WebP, at most 256 pixels wide and high."""
    trial: str | None = None
    """The trial at whose end they were drawn."""
    step: Count = 0
    kind: Literal["pictures"] = "pictures"
    schema: Literal[1] = SCHEMA

    def __post_init__(self) -> None:
        if len(self.captions) != len(self.webp):
            raise ValueError(f"{len(self.captions)} captions for {len(self.webp)} pictures")

    @property
    def key(self) -> tuple[Any, ...]:
        return self.kind, self.study, self.of, self.trial, self.step


Line = Study | Measurement | Untouched | WeightDistance | Pictures
KINDS: dict[str, type[Line]] = {
    "study": Study,
    "measurement": Measurement,
    "untouched": Untouched,
    "weights": WeightDistance,
    "pictures": Pictures,
}


def _check(scores: Scores, *, same_number: bool = True) -> None:
    if LOSS in scores:
        raise ValueError(f"no metric may be called {LOSS!r}")
    empty = [metric for metric, values in scores.items() if not values]
    if empty:
        raise ValueError(f"no numbers for {', '.join(empty)}")
    if same_number and len({len(values) for values in scores.values()}) > 1:
        raise ValueError("the metrics have different numbers of pictures")


def line_of(decoded: Any) -> Line:
    """The line that *decoded* JSON describes.

    Raises:
        ValueError: it is none; says why.
    """
    if not isinstance(decoded, dict):
        raise ValueError("no JSON object")
    kind = decoded.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"its kind is {kind!r}; known are {', '.join(KINDS)}")
    return KINDS[kind].from_json(decoded)


def without_attempt(trial: str) -> str:
    """The id of the job that *trial* was an attempt at."""
    return trial.partition(ATTEMPT)[0]
