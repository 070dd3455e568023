"""A report folder: the raw lines that a verification wrote, and what is drawn from them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from imma_cli.checkpoints.atomic import atomic_file
from imma_cli.errors import ImmaError
from imma_cli.verification.judgement import Thresholds
from imma_cli.verification.records import Records, parse
from imma_cli.verification.results import SUMMARY_SCHEMA, summarize

TRIALS = "trials.jsonl"
PICTURES = "pictures.jsonl"
SUMMARY = "summary.json"
PAGE = "report.html"
CARD = "model-card.md"


def write_report(
    folder: Path, records: Records, thresholds: Thresholds, installed: Collection[str] = ()
) -> dict[str, Any]:
    """Write the summary, the page and the model card into *folder*, each whole or not at all; gives the summary.

    The same arguments give the same bytes. *installed* names the attacks at hand here: those that were not tried are listed.

    Raises:
        ImmaError: the records contradict each other, or *folder* cannot be written.
    """
    from imma_cli.verification.report.card import card
    from imma_cli.verification.report.page import page

    summary = summarize(records, thresholds)
    texts = {
        SUMMARY: json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        PAGE: page(summary, records, installed),
        CARD: card(summary, records, installed),
    }
    for name, text in texts.items():  # all are ready before the first is written
        with atomic_file(folder / name, force=True) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))  # a lone surrogate in a caption is no reason to fail
    return summary


def read_report(folder: Path) -> Records:
    """The raw lines in *folder*: ``trials.jsonl`` and, where there is one, ``pictures.jsonl``.

    Raises:
        ImmaError: *folder* is none, has no trials, or its lines cannot be read or contradict each other.
    """
    if not folder.is_dir():
        raise ImmaError(f"{folder} is {'not a folder' if folder.exists() else 'not there'}.", hint=_HINT)
    if not (folder / TRIALS).is_file():
        raise ImmaError(f"{folder} is no report: it has no {TRIALS}.", hint=_HINT)
    trials = read_lines(folder / TRIALS)
    if not (folder / PICTURES).exists():
        return trials
    pictures = read_lines(folder / PICTURES)
    notes = [*trials.notes, *(f"{PICTURES}: {note}" for note in pictures.notes)]
    return Records.of([*_lines(trials), *_lines(pictures)], notes)


def read_thresholds(folder: Path) -> Thresholds:
    """The thresholds that *folder*'s summary was made with; the defaults where it has none.

    Raises:
        ImmaError: there is a summary, but it cannot be read: other thresholds could mean another verdict.
    """
    path = folder / SUMMARY
    if not path.exists():
        return Thresholds()
    try:
        summary = json.loads(path.read_bytes())
        if summary["schema"] != SUMMARY_SCHEMA:
            raise ValueError(f"its schema is {summary['schema']!r}; this version of imma reads {SUMMARY_SCHEMA}")
        used = dict(summary["thresholds"])
        return Thresholds(**used | {"metrics": tuple(used["metrics"])})
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is not as imma writes it"
    hint = "Delete it to draw the report with the default thresholds."
    raise ImmaError(f"The thresholds in {path} cannot be read.", [reason], hint)


_DAMAGED = "Take back what was changed in it, or have the study measured again into another folder."
_HINT = "Give the folder that imma verify --report wrote."


def read_lines(path: Path) -> Records:
    """The raw lines in the file *path*. Raises ImmaError, with the file's name, where they cannot be read."""
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise ImmaError(f"{path} cannot be read: {error.strerror}.") from error
    except ImmaError as error:
        raise ImmaError(f"{path} cannot be used. {error.what}", error.reasons, _DAMAGED) from error


def _lines(records: Records) -> list[Any]:
    study = [] if records.study is None else [records.study]
    return [*study, *records.measurements, *records.untouched, *records.weights, *records.pictures]
