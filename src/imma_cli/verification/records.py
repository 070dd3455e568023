"""The raw lines of one study, read and put in order."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from imma_cli.errors import ImmaError
from imma_cli.verification.lines import Line, Measurement, Pictures, Study, Untouched, WeightDistance, line_of


@dataclass(frozen=True)
class Records:
    """The lines of one study, each once, in an order that does not depend on that of the file."""

    measurements: tuple[Measurement, ...]
    untouched: tuple[Untouched, ...] = ()
    weights: tuple[WeightDistance, ...] = ()
    pictures: tuple[Pictures, ...] = ()
    study: Study | None = None
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
                reasons[f"{line.kind}, {_title(line)}: two lines differ"] = None
            if isinstance(line, Measurement):
                identity = trials.setdefault((line.study, line.trial), line.identity)
                if identity != line.identity:
                    reasons[f"trial {line.trial}: its lines name different attacks, models, concepts or seeds"] = None
        studies = sorted({line.study for line in kept.values()})
        if len(studies) > 1:
            reasons[f"lines of {len(studies)} studies: {', '.join(studies)}"] = None
        if reasons:
            raise ImmaError("The measurements contradict each other.", reasons)
        ordered = sorted(kept.values(), key=lambda line: [str(part).zfill(12) for part in line.key])
        return cls(
            tuple(line for line in ordered if isinstance(line, Measurement)),
            tuple(line for line in ordered if isinstance(line, Untouched)),
            tuple(line for line in ordered if isinstance(line, WeightDistance)),
            tuple(line for line in ordered if isinstance(line, Pictures)),
            next((line for line in ordered if isinstance(line, Study)), None),
            tuple(notes),
        )


def _title(line: Line) -> str:
    if isinstance(line, Measurement):
        return f"trial {line.trial}, step {line.step}"
    return str(line.key[2] if len(line.key) > 2 else line.study)


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
            lines.append(line_of(decoded))
        except ValueError as error:
            reasons.append(f"line {number}: {error}")
    if reasons:
        raise ImmaError("The measurements cannot be read.", reasons)
    return Records.of(lines, notes)
