"""What a summary leaves out and people want to see: pictures, the search, package versions; from the raw lines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from imma_cli.verification.lines import Measurement, Pictures, rounded
from imma_cli.verification.records import Records

BEST = 5


@dataclass(frozen=True)
class Tile:
    """One picture, and what stands in its place for those who cannot see it."""

    uri: str
    alt: str


@dataclass(frozen=True)
class Side:
    """What one model drew after an attack."""

    model: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Shot:
    """What an attack in one setting gets for one prompt, model by model, all with the same seed."""

    name: str
    spec: str
    seed: int
    step: int
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Row:
    """One prompt: the reference pictures that have it as their caption, and what each attack gets."""

    prompt: str
    references: tuple[Tile, ...]
    shots: tuple[Shot, ...]


@dataclass(frozen=True)
class Gallery:
    """All pictures of one concept, prompt by prompt."""

    concept: str
    references: tuple[Tile, ...]
    """Those whose captions are no prompts."""
    rows: tuple[Row, ...]


def galleries(records: Records, purpose: str) -> list[Gallery]:
    """The pictures at the end of every attack of *purpose*, for its first seed with pictures of both models."""
    sets = _last_of_each_trial(records, purpose)
    references = next((line for line in records.pictures if line.of == "references"), None)
    shown: dict[str, dict[str, list[Shot]]] = {}  # concept → prompt → shots
    for (spec, concept), seeds in sorted(_by_attack(sets).items()):
        seed = min(seeds, key=lambda s: (not {"original", "hardened"} <= seeds[s].keys(), s))
        models = sorted(seeds[seed], key=lambda model: (model != "original", model != "hardened", model))
        prompts = shown.setdefault(concept, {})
        for prompt in dict.fromkeys(caption for model in models for caption in seeds[seed][model][1].captions):
            sides = tuple(
                Side(model, _tiles(seeds[seed][model][1], f"{rounded(spec)} on the {model} model", prompt))
                for model in models
            )
            step = seeds[seed][models[0]][1].step
            shot = Shot(spec.partition(":")[0], rounded(spec), seed, step, tuple(side for side in sides if side.tiles))
            prompts.setdefault(prompt, []).append(shot)
    harmful = purpose == "harmful"  # the reference pictures are of the protected concept
    if harmful and references is not None and not shown:
        return [Gallery("" if records.study is None else records.study.concept, _tiles(references, "reference"), ())]
    return [
        Gallery(concept, *_with_references(prompts, references if harmful else None))
        for concept, prompts in shown.items()
    ]


def untouched(records: Records) -> list[tuple[str, list[Side]]]:
    """Prompt → what every model draws for it, unattacked, for the prompts that have nothing to do with the concept."""
    prefix = "untouched: "
    lines = {line.of.removeprefix(prefix): line for line in records.pictures if line.of.startswith(prefix)}
    models = sorted(lines, key=lambda model: (model != "original", model != "hardened", model))
    prompts = dict.fromkeys(caption for model in models for caption in lines[model].captions)
    return [
        (prompt, [Side(model, _tiles(lines[model], f"{model} model", prompt)) for model in models])
        for prompt in prompts
    ]


def strays(records: Records) -> int:
    """How many sets of pictures name a trial that was not measured."""
    known = {line.trial for line in records.measurements}
    return sum(line.trial is not None and line.trial not in known for line in records.pictures)


def _last_of_each_trial(records: Records, purpose: str) -> list[tuple[Measurement, Pictures]]:
    trials = {line.trial: line for line in records.measurements if line.purpose == purpose}
    failed = {line.trial for line in records.measurements if line.status == "failed"}
    last: dict[str, Pictures] = {}
    for line in sorted(records.pictures, key=lambda line: line.step):
        if line.trial in trials and line.trial not in failed:
            last[line.trial] = line
    return [(trials[trial], line) for trial, line in sorted(last.items())]


Seeds = dict[int, dict[str, tuple[Measurement, Pictures]]]


def _by_attack(sets: Iterable[tuple[Measurement, Pictures]]) -> dict[tuple[str, str], Seeds]:
    """(spec, concept) → seed → model → what was measured and drawn."""
    found: dict[tuple[str, str], Seeds] = {}
    for trial, pictures in sets:
        seeds = found.setdefault((trial.attack.spec, trial.concept), {})
        seeds.setdefault(trial.seed, {})[trial.model] = trial, pictures
    return found


def _with_references(
    prompts: dict[str, list[Shot]], references: Pictures | None
) -> tuple[tuple[Tile, ...], tuple[Row, ...]]:
    def of(captions: Iterable[str]) -> tuple[Tile, ...]:
        if references is None:
            return ()
        return tuple(tile for caption in dict.fromkeys(captions) for tile in _tiles(references, "reference", caption))

    others = of(c for c in references.captions if c not in prompts) if references is not None else ()
    return others, tuple(Row(prompt, of([prompt]), tuple(shots)) for prompt, shots in prompts.items())


def _tiles(line: Pictures, what: str, caption: str | None = None) -> tuple[Tile, ...]:
    chosen = [
        (text, picture)
        for text, picture in zip(line.captions, line.webp, strict=True)
        if caption is None or text == caption
    ]
    return tuple(
        Tile(f"data:image/webp;base64,{picture}", f"{what}: {text}, picture {number} of {len(chosen)}")
        for number, (text, picture) in enumerate(chosen, 1)
    )


@dataclass(frozen=True)
class Searched:
    """How the search for one attack's settings went."""

    name: str
    tried: int
    failed: int
    best: tuple[tuple[Measurement, float | None], ...]
    """The best few: the last line of each trial, and the mean over metrics of its mean similarity."""


def search(records: Records) -> list[Searched]:
    """For each attack, the settings that get the most out of the hardened model."""
    trials: dict[str, dict[str, list[Measurement]]] = {}
    for line in records.measurements:
        if line.purpose == "search":
            trials.setdefault(line.attack.name, {}).setdefault(line.trial, []).append(line)
    found = []
    for name, lines in sorted(trials.items()):
        failed = sum(any(line.status == "failed" for line in trial) for trial in lines.values())
        last = [max(trial, key=lambda line: line.step) for trial in lines.values()]
        values = [(line, _value(line)) for line in last if line.status == "ok"]
        best = sorted(values, key=lambda pair: (-_or_least(pair[1]), pair[0].loss or 0, pair[0].trial))
        found.append(Searched(name, len(lines), failed, tuple(best[:BEST])))
    return found


def _value(line: Measurement) -> float | None:
    return fmean(fmean(values) for values in line.scores.values()) if line.scores else None


def _or_least(value: float | None) -> float:
    return -1e101 if value is None else value


def versions(records: Records) -> dict[str, str]:
    """Package → the versions that trials ran with."""
    found: dict[str, set[str]] = {}
    for line in records.measurements:
        for package, version in line.versions.items():
            found.setdefault(package, set()).add(version)
    return {package: " and ".join(sorted(seen)) for package, seen in sorted(found.items())}


def runtimes(records: Records) -> list[str]:
    """On what trials were computed: device, precision, attention kernel."""
    return sorted({line.runtime for line in records.measurements if line.runtime})


def settings(records: Records) -> dict[str, dict[str, Any]]:
    """Spec → all settings, for every attack outside the search."""
    lines = (line for line in records.measurements if line.purpose != "search")
    return dict(sorted({line.attack.spec: dict(sorted(line.attack.settings.items())) for line in lines}.items()))
