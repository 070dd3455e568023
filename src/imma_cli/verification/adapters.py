"""What every attack learned, kept as files, so that somebody else can load it and look at the pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imma_cli.attacks.settings import record, spec
from imma_cli.checkpoints.atomic import atomic_folder, make_writable
from imma_cli.errors import ImmaError
from imma_cli.verification.judging import named

if TYPE_CHECKING:
    from torch import nn

    from imma_cli.attacks.attack import Attack
    from imma_cli.families.model import Model
    from imma_cli.verification.plan import Job

ABOUT = "trial.json"
LEARNED = "learned"
LONGEST = 80
"""Characters of a folder's name; settings may be many."""


class CannotKeepError(ImmaError):
    """What was asked for cannot be kept. It says nothing about what the attack achieves: the trial does not count as failed."""


@dataclass(frozen=True)
class Adapters:
    """A folder with one for every measured trial of *study*: ATTACK/CONCEPT/MODEL-seed-N."""

    folder: Path
    study: str
    models: Mapping[str, str]
    """SHA-256 of the checkpoints by the model's name."""

    def check(self) -> None:
        """Raises ImmaError where the folder holds what another verification kept."""
        if {about.get("study") for about in self._trials()} - {self.study}:
            raise ImmaError(
                f"{self.folder} holds what attacks of another verification learned.",
                hint="Choose another folder for --save-adapters.",
            )

    def kept(self) -> set[str]:
        """The ids of the jobs whose results lie in the folder."""
        return {str(about.get("trial")) for about in self._trials()}

    def _trials(self) -> Iterator[dict[str, Any]]:
        """What is written beside everything kept; nothing for what cannot be read."""
        for path in self.folder.glob(f"*/*/*/{ABOUT}"):
            try:
                about = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, OSError):
                about = None
            yield about if isinstance(about, dict) else {}

    def place(self, job: Job) -> Path:
        """The folder of *job*."""
        return self.folder / _name(spec(job.attack)) / _name(job.material.name) / f"{job.model}-seed-{job.seed}"

    def keep(self, job: Job, attack: Attack, model: Model, parameters: Mapping[str, nn.Parameter]) -> None:
        """Write what *attack*, attached to *model*, learned in *job*; the folder appears whole or not at all.

        Raises:
            CannotKeepError: it cannot be written, or saving fails.
        """
        place = self.place(job)
        about = json.dumps(self._about(job, attack), indent=1, ensure_ascii=False)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(place, force=True) as temporary:
                (temporary / LEARNED).mkdir()
                attack.save(model, parameters, temporary / LEARNED)
                (temporary / ABOUT).write_text(about + "\n", encoding="utf-8")
        except Exception as error:  # whatever the attack raises; safetensors' own error of a full disk is no OSError
            reasons = [error.what, *error.reasons] if isinstance(error, ImmaError) else [named(error)]
            raise CannotKeepError(f"What {attack.name} learned cannot be kept.", reasons) from error

    def _about(self, job: Job, attack: Attack) -> dict[str, Any]:
        prompts = job.material.prompts
        return {
            "study": self.study,
            "trial": job.id,
            "attack": record(attack),
            "model": job.model,
            "sha256": self.models.get(job.model),
            "concept": job.material.name,
            "prompts": [attack.caption(job.material.pictures, prompt) for prompt in prompts],
            "seed": job.seed,
            "steps": job.steps,
        }


def make_folder(folder: Path) -> None:
    """Make *folder*.

    Raises:
        ImmaError: it cannot be written to, or holds something else.
    """
    hint = "Choose another folder for --save-adapters."
    try:
        make_writable(folder)
        foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and not _is_ours(path))
    except OSError as error:
        raise ImmaError(f"{folder} cannot be written: {error.strerror}.", hint=hint) from error
    if foreign:
        raise ImmaError(f"{folder} holds other files: {', '.join(foreign[:5])}.", hint=hint)


def _is_ours(path: Path) -> bool:
    """Whether *path* is the folder of an attack, also of one that is just being written."""
    return (
        path.is_dir()
        and all(
            trial.is_dir() and (trial.name.startswith(".") or (trial / ABOUT).is_file()) for trial in path.glob("*/*")
        )
        and all(concept.is_dir() for concept in path.iterdir())
    )


def _name(text: str) -> str:
    """*text* as a folder's name on every system; where that changes something, with digits that tell it from others."""
    plain = re.sub(r"[^a-z0-9_.=+-]+", "-", text.lower(), flags=re.ASCII).strip("-.")[:LONGEST]
    return plain if plain == text else f"{plain}-{sha256(text.encode()).hexdigest()[:8]}".strip("-")
