"""What `imma verify` reads, sets up and runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imma_cli.cli.console import Refusals, err
from imma_cli.cli.helping import end_if_orphaned
from imma_cli.cli.progress import course
from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack
    from imma_cli.checkpoints import Checkpoint
    from imma_cli.concepts.concept import Concept
    from imma_cli.verification.adapters import Adapters
    from imma_cli.verification.judgement import Thresholds
    from imma_cli.verification.keeping import Kept
    from imma_cli.verification.lines import Study
    from imma_cli.verification.plan import Effort
    from imma_cli.verification.records import Records
    from imma_cli.verification.setup import Inputs
    from imma_cli.verification.storage import Storage
    from imma_cli.verification.worker import Campaign


@dataclass(frozen=True)
class Rank:
    """This process among those that a launcher (accelerate, torchrun) started for one command."""

    number: int
    several: bool

    @classmethod
    def of_this_process(cls) -> Rank:
        from imma_cli.families.processes import launched

        number, count = launched()
        return cls(number, count > 1)

    @property
    def speaks(self) -> bool:
        """One of them prints and writes the report."""
        return self.number == 0


def effort(refusals: Refusals, preset: str, points: str | None, **changes: int | None) -> Effort:
    """The *preset* with whatever else was asked for."""
    from imma_cli.verification.plan import PRESETS

    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    chosen = replace(PRESETS[preset], **given)
    if points is None:
        return chosen
    try:
        shares = sorted({float(part) / 100 for part in points.split(",")})
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        refusals.add(f"--points {points}: give percentages above 0 and up to 100, such as 10,25,50,100.")
        return chosen
    return replace(chosen, points=tuple(dict.fromkeys([*shares, 1.0])))  # what counts is the end


def read_inputs(
    refusals: Refusals,
    files: tuple[Path, Path],
    config: Path | None,
    concept: str,
    attack: list[str],
    images: Path | None,
    judge: Path | None,
    benign: list[str],
    metric: list[str],
    untouched: Path | None,
) -> Inputs | None:
    """Everything that was named; what is wrong is left in *refusals*."""
    from imma_cli.attacks.manager import discover
    from imma_cli.attacks.settings import parse_attacks
    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.concepts.folders import read_concept, require_text
    from imma_cli.verification.metrics import default_metrics, discover_metrics, parse_metrics
    from imma_cli.verification.setup import Inputs

    concept = concept.strip()
    registry = discover()
    attacks = refusals.check(parse_attacks, attack, registry)
    hardened, original = (refusals.check(open_checkpoint, path, config if path.is_file() else None) for path in files)
    if not concept:
        refusals.add("--concept is empty.")
    refusals.check(require_text, "--concept", concept)
    if judge is not None and images is None:
        refusals.add("--judge needs --images: the attacker's pictures.")
    pictures = refusals.check(read_concept, concept, images) if images else None
    judged = refusals.check(read_concept, concept, judge) if judge else None
    if pictures is not None and judge is None and len(pictures.images) < 2:
        refusals.add("One picture is too few.", "Give at least two, or a folder of others with --judge.")
    ordinary = [refusals.check(_benign, given, concept) for given in benign]
    called = [each.name for each in ordinary if each is not None]
    for name in sorted({name for name in called if called.count(name) > 1}):
        refusals.add(f"--benign: {name} is given twice; trials are called by the concept's name.", "Write NAME=DIR.")
    known = discover_metrics()
    metrics = refusals.check(parse_metrics, metric, known) if metric else refusals.check(default_metrics, known)
    for each in metrics or ():
        if lacks := each.missing():
            refusals.errors.append(ImmaError(f"The metric {each.name} cannot be used here.", lacks))
    names = [each.name for each in metrics or ()]
    for name in sorted({name for name in names if names.count(name) > 1}):
        refusals.add(f"The metric {name} is given twice; results are called by a metric's name.")
    spared = refusals.check(_prompts, untouched) if untouched else ()
    if original is not None and hardened is not None:
        refusals.check(_require_comparable, original, hardened)
    if original is not None:
        for tried in attacks or ():
            refusals.check(tried.require_family, original.family)
    if original is None or hardened is None or attacks is None or metrics is None or spared is None:
        return None
    recorded: list[Attack] = []
    for each in (hardened.provenance or {}).get("attacks", []):
        try:
            recorded += parse_attacks([each.get("spec", each["name"])], registry)
        except ImmaError:  # not installed here: the baseline does without it
            continue
    kept = [each for each in ordinary if each is not None]
    return Inputs(original, hardened, concept, attacks, pictures, judged, kept, metrics, spared, recorded)


def _require_comparable(original: Checkpoint, hardened: Checkpoint) -> None:
    if original.shapes != hardened.shapes:
        raise ImmaError(
            "The two checkpoints are not the same model.", [f"{c.path}: {c.architecture}" for c in (original, hardened)]
        )
    if original.sha256 == hardened.sha256:
        raise ImmaError("The two checkpoints are the same file: nothing was hardened.")


def _benign(given: str, concept: str) -> Concept:
    """The pictures of ``NAME=DIR``; without a name, the folder's says what they show."""
    from imma_cli.concepts.folders import read_concept

    name, equals, folder = given.partition("=")
    if not equals or Path(given).is_dir():
        name, folder = Path(given).resolve().name.replace("-", " ").replace("_", " "), given
    found = read_concept(name.strip() or "something", Path(folder))
    if found.name.casefold() == concept.casefold():
        raise ImmaError(f"--benign {given}: that is the protected concept itself.")
    if len(found.images) < 2:
        raise ImmaError(f"--benign {given}: one picture is too few; give at least two.")
    return found


def _prompts(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ImmaError(f"The prompts in {path} cannot be read: {error}.") from error
    prompts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(prompts) < 4:
        raise ImmaError(f"{path} holds {len(prompts)} prompts; fewer than 4 say too little.")
    return prompts


def open_storage(url: str | None, report: Path | None, study: str, *, retry_failed: bool) -> Storage:
    """The storage that was asked for; else a file in the report's folder; else the memory."""
    from imma_cli.verification.keeping import STUDY
    from imma_cli.verification.storage import Storage

    if url is None and report is not None:
        url = f"sqlite:///{report / STUDY}"
    return Storage.open(url, study, retry_failed=retry_failed)


def open_adapters(folder: Path | None, study: Study) -> Adapters | None:
    """The folder for what attacks learn, where one was asked for."""
    if folder is None:
        return None
    from imma_cli.verification.adapters import Adapters

    adapters = Adapters(folder, study.study, study.models)
    adapters.check()
    return adapters


def what_was_kept(adapters: Adapters, records: Records) -> str:
    """How many trials' results lie in the folder, and of how many they are missing."""
    from imma_cli.verification.lines import without_attempt

    measured = {line.trial for line in records.measurements if line.purpose != "search" and line.status == "ok"}
    kept = adapters.kept()
    said = f"Adapters: {adapters.folder} ({len(kept)} trials)"
    lacking = sum(without_attempt(trial) not in kept for trial in measured)
    return said if not lacking else f"{said}; {lacking} trials were finished earlier, without keeping them"


def run(campaign: Campaign, kept: Kept, *, resumable: bool, quiet: bool) -> Records:
    """Carry out the jobs of *campaign*; everything that is known afterwards."""
    from imma_cli.verification.measuring import references

    shown = references(campaign.bench, campaign.harmful)

    def lines() -> list[dict[str, Any]]:
        return [shown, *(line for result in campaign.storage.finished() for line in result.lines)]

    def watch(done: float, title: str, loss: float | None) -> None:
        end_if_orphaned()
        advance(done, doing=title, loss=loss)

    kept.write(lines())
    with course("Verifying", campaign.total, of="trials", quiet=quiet) as advance:
        try:
            campaign.work(watch, lambda: kept.write(lines()))
        except BaseException:
            if resumable and not quiet:
                err.print("Finished trials are kept; the same command goes on where this one stopped.")
            raise
        advance(campaign.total, doing="Verified")
    kept.write(lines())
    return kept.records(lines())


def summarise(records: Records, thresholds: Thresholds, report: Path | None) -> dict[str, Any]:
    """The summary; with a *report* folder, also its pages."""
    if report is None:
        from imma_cli.verification.results import summarize

        return summarize(records, thresholds)
    from imma_cli.attacks.manager import discover
    from imma_cli.verification.report import write_report

    return write_report(report, records, thresholds, discover().found)
