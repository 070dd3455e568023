"""The raw lines of a verification in its report folder, written anew and whole after every finished trial."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from imma_cli.checkpoints.atomic import atomic_file, make_writable
from imma_cli.errors import ImmaError
from imma_cli.verification.lines import Line, Measurement, Study, line_of, without_attempt
from imma_cli.verification.plan import differences
from imma_cli.verification.records import Records
from imma_cli.verification.report.folder import CARD, PAGE, PICTURES, SUMMARY, TRIALS, read_lines

STUDY = "study.db"
PAGES = (SUMMARY, PAGE, CARD)


def check_folder(folder: Path) -> None:
    """Make *folder* if it is not there.

    Raises:
        ImmaError: it cannot be made or written to, or holds files that a report would overwrite and that are none of its own.
    """
    if "?" in str(folder):  # SQLAlchemy would take it for the end of the path
        raise ImmaError(f"{folder} has a ? in its path.", hint="Choose another --report.")
    try:
        make_writable(folder)
    except OSError as error:
        raise ImmaError(f"{folder} cannot be written: {error.strerror}.", hint="Choose another --report.") from error
    foreign = [name for name in (PICTURES, *PAGES) if (folder / name).exists()]
    if foreign and not (folder / TRIALS).exists():
        raise ImmaError(
            f"{folder} holds {', '.join(foreign)}, but no {TRIALS}: they would be overwritten.",
            hint="Choose another folder for --report.",
        )


class Kept:
    """What is known of *study*: what its *folder* held before, and what its storage holds now."""

    def __init__(self, study: Study, folder: Path | None, *, writes: bool = True) -> None:
        """One of several processes *writes*. Raises ImmaError where *folder* holds the trials of another study (says in what it differs) or damaged lines."""
        self.study = study
        self.folder = folder
        self._earlier = Records(())
        self.writes = writes
        if folder is not None and (folder / TRIALS).exists():
            self._earlier = self._read(folder)

    def _read(self, folder: Path) -> Records:
        known = read_lines(folder / TRIALS)
        there = known.study
        if there is None and known.measurements:
            raise ImmaError(
                f"{folder / TRIALS} does not say what its trials compare.", hint="Choose another folder for --report."
            )
        if there is not None and there.study != self.study.study:
            raise ImmaError(
                f"{folder} is the report of another verification.",
                differences(there, self.study) or ["it was written by another version of imma"],
                "Choose another folder for --report, or give the same models, pictures and settings to go on with it.",
            )
        shown = folder / PICTURES
        pictures = read_lines(shown).pictures if shown.exists() else ()
        return replace(known, pictures=pictures)

    def records(self, lines: Iterable[Mapping[str, Any]]) -> Records:
        """Everything: the raw *lines* of the storage, and of the folder what the storage does not have."""
        new = [line_of(line) for line in lines]
        # an attempt that the storage has lost was made again as the first one
        trials = {without_attempt(line.trial) for line in new if isinstance(line, Measurement)}
        keys = {line.key for line in new}
        before: tuple[Line, ...] = (
            *(line for line in self._earlier.measurements if without_attempt(line.trial) not in trials),
            *(
                line
                for line in self._earlier.pictures
                if line.key not in keys and without_attempt(line.trial or "") not in trials
            ),
            *(line for line in self._earlier.untouched if line.key not in keys),
            *(line for line in self._earlier.weights if line.key not in keys),
        )
        return Records.of([self.study, *before, *new])

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """``trials.jsonl`` and ``pictures.jsonl``, each whole or not at all; the same lines give the same bytes."""
        if self.folder is None or not self.writes:
            return
        records = self.records(lines)
        numbers = (self.study, *records.weights, *records.untouched, *records.measurements)
        _write(self.folder / TRIALS, (line.as_json() for line in numbers))
        _write(self.folder / PICTURES, (line.as_json() for line in records.pictures))


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    with atomic_file(path, force=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
