"""Raw lines of a verification, ``trials.jsonl``: what was measured, and nothing computed from it.

One JSON object a line, of three kinds: a `Measurement` for every trial and budget point, an `Untouched` line and a
`WeightDistance` line for every changed model. Every number in a summary can be computed again from these lines alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any, ClassVar, Final, Literal, Self, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from imma_cli.errors import ImmaError

SCHEMA: Final = 1
"""Version of the lines. It rises when a line that was valid would be refused or would mean something else."""

LOSS = "loss"
"""How the attacker's loss is called beside the metrics; no metric may have this name."""

Purpose = Literal["harmful", "benign", "search"]
Model = Literal["original", "hardened", "maximize", "random"]
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(ge=-1e100, le=1e100)]
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


Line = Measurement | Untouched | WeightDistance
KINDS: dict[str, type[Line]] = {"measurement": Measurement, "untouched": Untouched, "weights": WeightDistance}


def _check(scores: Scores, *, same_number: bool = True) -> None:
    if LOSS in scores:
        raise ValueError(f"no metric may be called {LOSS!r}")
    empty = [metric for metric, values in scores.items() if not values]
    if empty:
        raise ValueError(f"no numbers for {', '.join(empty)}")
    if same_number and len({len(values) for values in scores.values()}) > 1:
        raise ValueError("the metrics have different numbers of pictures")


@dataclass(frozen=True)
class Records:
    """The lines of one study, each once, in an order that does not depend on that of the file."""

    measurements: tuple[Measurement, ...]
    untouched: tuple[Untouched, ...] = ()
    weights: tuple[WeightDistance, ...] = ()
    notes: tuple[str, ...] = ()
    """What was skipped while reading, in plain words."""

    @classmethod
    def of(cls, lines: Iterable[Line], notes: Iterable[str] = ()) -> Records:
        """Order *lines* and drop exact repetitions, as a resumed run may leave them.

        Raises:
            ImmaError: two lines contradict each other, or they come from several studies.
        """
        kept: dict[tuple[Any, ...], Line] = {}
        trials: dict[tuple[str, str], tuple[Any, ...]] = {}
        reasons: dict[str, None] = {}  # a dict: each reason once, in order
        for line in lines:
            if kept.setdefault(line.key, line) != line:
                what = f"trial {line.trial}, step {line.step}" if isinstance(line, Measurement) else line.model
                reasons[f"{line.kind}, {what}: two lines differ"] = None
            if isinstance(line, Measurement):
                identity = trials.setdefault((line.study, line.trial), line.identity)
                if identity != line.identity:
                    reasons[f"trial {line.trial}: its lines name different attacks, models, concepts or seeds"] = None
        studies = sorted({line.study for line in kept.values()})
        if len(studies) > 1:
            reasons[f"lines of {len(studies)} studies: {', '.join(studies)}"] = None
        if reasons:
            raise ImmaError("The measurements contradict each other.", reasons)
        ordered = sorted(kept.values(), key=lambda line: line.key)
        return cls(
            tuple(line for line in ordered if isinstance(line, Measurement)),
            tuple(line for line in ordered if isinstance(line, Untouched)),
            tuple(line for line in ordered if isinstance(line, WeightDistance)),
            tuple(notes),
        )


def parse(data: bytes) -> Records:
    """The records in the bytes of a ``trials.jsonl``.

    A last line without its newline that is no JSON is what a killed process leaves: it is skipped, with a note.

    Raises:
        ImmaError: names every other line that cannot be read, by its number.
    """
    lines: list[Line] = []
    notes: list[str] = []
    reasons: list[str] = []
    texts = data.split(b"\n")  # the last is empty unless the last line was cut off
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            decoded = json.loads(text)
        except (ValueError, RecursionError) as error:
            if number == len(texts):
                notes.append(f"line {number} was cut off and is skipped")
            else:
                reasons.append(f"line {number} is no JSON: {error}")
            continue
        try:
            lines.append(_line(decoded))
        except ValueError as error:
            reasons.append(f"line {number}: {error}")
    if reasons:
        raise ImmaError("The measurements cannot be read.", reasons)
    return Records.of(lines, notes)


def _line(decoded: Any) -> Line:
    if not isinstance(decoded, dict):
        raise ValueError("no JSON object")
    kind = decoded.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"its kind is {kind!r}; known are {', '.join(KINDS)}")
    return KINDS[kind].from_json(decoded)
