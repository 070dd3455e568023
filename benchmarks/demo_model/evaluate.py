"""Measure the demo model: does it draw what is asked for, in the style that is asked for?

    python benchmarks/demo_model/evaluate.py WORK            # results/ and docs/images/demo-contact-sheet.png
    python benchmarks/demo_model/evaluate.py WORK --sweep    # guidance scales, on the first 60 prompts

200 prompts, each of another seen concept, every trained style in turn; one seed each, nothing is drawn twice and
nothing is left out. Two questions per picture, both answered by EfficientNet-Lite0, which saw no emoji in training:

- concept: is the most similar of 60 real pictures in the prompted style the prompted concept's? The 59 others are
  other seen concepts, fixed by a seed. Chance is 1.7 %. To compare with: the same question asked of the concept's real
  pictures in the three other styles, and of the real picture after the autoencoder.
- style: does a linear classifier of feature statistics name the prompted style? It learned from real pictures of the
  concepts that are in no prompt, in all five styles, as they are and after the model's own autoencoder: what the
  autoencoder takes away from every picture is no question of style. What a classifier says that saw them only as they
  are is given beside it, and what both say of the prompts' real pictures, before and after the autoencoder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F
from artwork import HELD_OUT_STYLE, STYLES, Artwork, prompt
from PIL import Image
from sheets import contact_sheet
from torch import Tensor

from imma_cli.checkpoints import open_checkpoint
from imma_cli.families.model import Model
from imma_cli.verification.effnet import content_features, cosine, style_features

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "src" / "imma_cli" / "demo" / "model.safetensors"
RESULTS = Path(__file__).parent / "results"
SHEET = ROOT / "docs" / "images" / "demo-contact-sheet.png"
PROMPTS, GALLERY, ON_SHEET, BATCH = 200, 60, 80, 20
ALL_STYLES = [*STYLES, HELD_OUT_STYLE]

BLOCKS = 7
"""Down to 1/8 of the resolution: of 3 and 7 blocks' statistics, these name real pictures' styles best."""


@dataclass
class Real:
    """The real pictures of all seen concepts, and their features, by (concept, style)."""

    art: Artwork
    content: dict[tuple[str, str], Tensor]
    """All seen concepts in the trained styles."""
    style: dict[tuple[str, str], Tensor]
    """The concepts that are in no prompt, in all five styles."""

    @classmethod
    def load(cls, work: Path) -> Real:
        """Features are computed once per work folder: about five minutes."""
        art = Artwork(work / "npm")
        prompted = {case.name for case in cases(art)}
        content = [(name, package) for package in STYLES for name in art.seen]
        style = [(name, package) for package in ALL_STYLES for name in art.seen if name not in prompted]
        path = work / "features.pt"
        if not path.exists():
            features = {
                "content": content_features([art.draw(*key) for key in content]),
                "style": style_features([art.draw(*key) for key in style], BLOCKS),
            }
            torch.save(features, path)
        features = torch.load(path, weights_only=True)
        return cls(
            art,
            dict(zip(content, features["content"], strict=True)),
            dict(zip(style, features["style"], strict=True)),
        )


@dataclass
class Case:
    """One prompt and what its picture is compared with."""

    name: str
    package: str
    seed: int
    gallery: list[str]
    """60 concepts; the first is the right one."""

    @property
    def prompt(self) -> str:
        return prompt(self.name, self.package)

    def rank(self, features: Tensor, real: Real) -> tuple[int, str]:
        """How many of the wrong pictures are more similar than the right one, and the most similar concept."""
        similarity = cosine(features[None], torch.stack([real.content[n, self.package] for n in self.gallery]))[0]
        return int((similarity > similarity[0]).sum()), self.gallery[int(similarity.argmax())]


def cases(art: Artwork) -> list[Case]:
    rng = random.Random(0)
    names = rng.sample(art.seen, PROMPTS)
    packages = list(STYLES)
    return [
        Case(
            name,
            packages[i % len(packages)],
            seed=1000 + i,
            gallery=[name, *rng.sample([n for n in art.seen if n != name], GALLERY - 1)],
        )
        for i, name in enumerate(names)
    ]


class StyleClassifier:
    """Multinomial logistic regression on standardised style features.

    The penalty was chosen among powers of ten by what it makes of real pictures.
    """

    def __init__(self, features: Tensor, labels: Tensor, penalty: float = 1e-4) -> None:
        self.mean, self.std = features.mean(0), features.std(0) + 1e-6
        self.layer = torch.nn.Linear(features.shape[1], len(ALL_STYLES)).double()
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        inputs = self._standardised(features)
        optimizer = torch.optim.LBFGS(self.layer.parameters(), max_iter=500, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(self.layer(inputs), labels) + penalty * self.layer.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    def _standardised(self, features: Tensor) -> Tensor:
        return ((features - self.mean) / self.std).double()

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """[N, styles]"""
        return self.layer(self._standardised(features)).softmax(-1)


def train_classifiers(real: Real, model: Model) -> dict[str, StyleClassifier]:
    """The classifier that also knows what the autoencoder does to pictures, and the one that does not."""
    labels = torch.tensor([ALL_STYLES.index(package) for _, package in real.style])
    sharp = torch.stack(list(real.style.values()))
    coded = style_features(reconstructed(model, [real.art.draw(*key) for key in real.style]), BLOCKS)
    return {
        "style": StyleClassifier(torch.cat([sharp, coded]), labels.repeat(2)),
        "style_by_sharp": StyleClassifier(sharp, labels),
    }


@torch.no_grad()
def reconstructed(model: Model, pictures: list[Image.Image]) -> list[Image.Image]:
    """The pictures after the autoencoder."""
    result = []
    for start in range(0, len(pictures), BATCH):
        arrays = np.stack([np.asarray(p) for p in pictures[start : start + BATCH]])
        pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, _ = model.family.encode_images(model, pixels)
        decoded = model.vae.decode(mean / model.vae.config.scaling_factor).sample
        array = ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        result += [Image.fromarray(a) for a in array]
    return result


def drawn(model: Model, chosen: list[Case], steps: int, guidance_scale: float) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    for start in range(0, len(chosen), BATCH):
        batch = chosen[start : start + BATCH]
        prompts, seeds = [c.prompt for c in batch], [c.seed for c in batch]
        pictures += model.family.draw(model, prompts, seeds, steps=steps, guidance_scale=guidance_scale)
    return pictures


def judged(
    chosen: list[Case], pictures: list[Image.Image], real: Real, classifiers: dict[str, StyleClassifier]
) -> list[dict[str, object]]:
    content, style = content_features(pictures), style_features(pictures, BLOCKS)
    named = {key: classifier.probabilities(style) for key, classifier in classifiers.items()}
    lines = []
    for i, (case, features) in enumerate(zip(chosen, content, strict=True)):
        rank, nearest = case.rank(features, real)
        line: dict[str, object] = {
            "prompt": case.prompt,
            "concept": case.name,
            "style": case.package,
            "seed": case.seed,
            "concept_found": rank == 0,
            "concept_rank": rank,
            "nearest_concept": nearest,
            "similarity": round(cosine(features[None], real.content[case.name, case.package][None]).item(), 4),
        }
        for key, probabilities in named.items():
            nearest_style = ALL_STYLES[int(probabilities[i].argmax())]
            line |= {f"{key}_found": nearest_style == case.package, f"{key}_nearest": nearest_style}
        lines.append(line)
    return lines


def rate(hits: list[bool]) -> dict[str, object]:
    """The share of hits with its 95 % Wilson interval."""
    n, p, z = len(hits), sum(hits) / len(hits), 1.96
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return {"rate": round(p, 4), "n": n, "ci95": [round(low, 4), round(high, 4)]}


def found(lines: list[dict[str, object]], key: str, package: str | None = None) -> dict[str, object]:
    return rate([bool(line[key]) for line in lines if package in (None, line["style"])])


def evaluate(model: Model, real: Real, args: argparse.Namespace) -> dict[str, object]:
    """Writes the raw lines and the contact sheet, returns the summary."""
    chosen = cases(real.art)
    classifiers = train_classifiers(real, model)
    originals = [real.art.draw(c.name, c.package) for c in chosen]
    began = time.monotonic()
    pictures = drawn(model, chosen, args.steps, args.guidance_scale)
    seconds = time.monotonic() - began
    lines = judged(chosen, pictures, real, classifiers)
    sharp = judged(chosen, originals, real, classifiers)
    coded = judged(chosen, reconstructed(model, originals), real, classifiers)
    ceiling = [
        c.rank(real.content[c.name, other], real)[0] == 0 for c in chosen for other in STYLES if other != c.package
    ]
    for name, raw in (("prompts", lines), ("autoencoder", coded)):
        (args.results / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in raw))
    cells = [(c.prompt, [a, b]) for c, a, b in zip(chosen, originals, pictures, strict=True)]
    heading = (
        f"Left: real artwork. Right: drawn by the demo model. The first {ON_SHEET} of {PROMPTS} prompts, unselected."
    )
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(cells[:ON_SHEET], 8, heading=heading).save(args.sheet, optimize=True)
    return {
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "concept_found": found(lines, "concept_found"),
        "concept_in_top_5": rate([int(str(line["concept_rank"])) < 5 for line in lines]),
        "concept_found_in_real_pictures_of_another_style": rate(ceiling),
        "concept_found_after_autoencoder": found(coded, "concept_found"),
        **{
            f"{key}_found{of}": found(raw, f"{key}_found")
            for key in classifiers
            for of, raw in (("", lines), ("_in_real_pictures", sharp), ("_after_autoencoder", coded))
        },
        "by_style": {
            package: {key: found(lines, key, package)["rate"] for key in ("concept_found", "style_found")}
            for package in STYLES
        },
        "seconds_per_picture": round(seconds / len(pictures), 2),
    }


def sweep(model: Model, real: Real, args: argparse.Namespace) -> list[dict[str, object]]:
    """The same two rates for several guidance scales, on the first prompts."""
    chosen = cases(real.art)
    classifiers = train_classifiers(real, model)
    some = chosen[: args.sweep_prompts]
    rows = []
    for scale in (1.0, 2.0, 3.0, 5.0, 7.5):
        lines = judged(some, drawn(model, some, args.steps, scale), real, classifiers)
        rows.append(
            {
                "guidance_scale": scale,
                "concept_found": found(lines, "concept_found"),
                "style_found": found(lines, "style_found"),
                "similarity": round(sum(float(str(line["similarity"])) for line in lines) / len(lines), 4),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--sheet", type=Path, default=SHEET)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--sweep", action="store_true", help="compare guidance scales instead")
    parser.add_argument("--sweep-prompts", type=int, default=60)
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    real = Real.load(args.work)
    model = open_checkpoint(args.model).load()
    if args.sweep:
        (args.results / "guidance.json").write_text(json.dumps(sweep(model, real, args), indent=2) + "\n")
        return
    summary = evaluate(model, real, args)
    summary["model_sha256"] = hashlib.sha256(args.model.read_bytes()).hexdigest()
    text = json.dumps(summary, indent=2)
    (args.results / "summary.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
