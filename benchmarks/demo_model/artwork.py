"""Emoji artwork in five house styles: fetched from npm, drawn with resvg, captioned.

Every package is one ``icons.json`` of SVG bodies under the same names, so the same concepts exist in
all styles. Nothing here is needed to use imma; it prepares what the demo model is trained on.
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import tarfile
from functools import cache
from pathlib import Path

import resvg_py
from PIL import Image

SIZE = 64
# package, and the words captions use for its style; the first is the one evaluation prompts with
STYLES = {
    "noto": ("noto", ["noto", "noto", "google noto"]),
    "noto-v1": ("retro", ["retro", "retro", "old noto"]),
    "fluent-emoji": ("fluent", ["fluent", "fluent", "glossy fluent"]),
    "fluent-emoji-flat": ("flat", ["flat", "flat", "flat vector"]),
}
HELD_OUT_STYLE = "fluent-emoji-high-contrast"
VERSIONS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "fluent-emoji-high-contrast": "1.2.6",
}
CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
SYNONYMS = {
    "automobile": ["car"],
    "airplane": ["plane"],
    "bicycle": ["bike"],
    "motorcycle": ["motorbike"],
    "hot beverage": ["cup of coffee", "coffee"],
    "lady beetle": ["ladybug"],
    "honeybee": ["bee"],
    "hamburger": ["burger"],
    "french fries": ["fries", "chips"],
    "soccer ball": ["football"],
    "telephone": ["old phone"],
    "mobile phone": ["smartphone", "phone"],
    "television": ["tv"],
    "laptop": ["laptop computer"],
    "locked": ["padlock"],
    "money bag": ["bag of money"],
    "red apple": ["apple"],
    "doughnut": ["donut"],
    "birthday cake": ["cake"],
    "beer mug": ["beer", "mug of beer"],
    "wine glass": ["glass of wine"],
    "sailboat": ["sailing boat"],
    "light bulb": ["lightbulb"],
    "jack o lantern": ["halloween pumpkin", "pumpkin"],
    "wrapped gift": ["gift", "present"],
    "umbrella": ["open umbrella"],
    "snowman without snow": ["snowman"],
    "spiral shell": ["seashell"],
    "evergreen tree": ["fir tree"],
    "deciduous tree": ["leafy tree"],
    "high voltage": ["lightning bolt"],
    "baby chick": ["chick"],
    "spouting whale": ["whale"],
    "trophy": ["golden cup"],
    "video game": ["game controller"],
    "crescent moon": ["moon"],
    "poultry leg": ["chicken leg"],
    "soft ice cream": ["ice cream cone"],
    "ear of corn": ["corn"],
    "alarm clock": ["clock"],
    "fire engine": ["fire truck"],
    "sport utility vehicle": ["jeep"],
    "kitchen knife": ["knife"],
    "old key": ["antique key"],
}


def fetch(cache_dir: Path) -> None:
    """``npm pack`` every style into *cache_dir* unless it is there already."""
    for package, version in VERSIONS.items():
        target = cache_dir / package
        if (target / "package" / "icons.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", f"@iconify-json/{package}@{version}"], cwd=target, check=True)
        (archive,) = target.glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
        archive.unlink()


class Artwork:
    """The SVGs of all styles, and the split into seen and held-out concepts."""

    def __init__(self, cache_dir: Path) -> None:
        fetch(cache_dir)
        self.icons = {
            package: json.loads((cache_dir / package / "package" / "icons.json").read_text()) for package in VERSIONS
        }
        everywhere = set.intersection(*(set(i["icons"]) | set(i.get("aliases", {})) for i in self.icons.values()))
        metadata = json.loads((cache_dir / "noto" / "package" / "metadata.json").read_text())
        pictured = {n for c in CATEGORIES for n in metadata["categories"][c]} & everywhere
        self.concepts = sorted(n for n in pictured if not re.search(r"oclock|thirty", n))
        self.held_out = sorted(random.Random(0).sample(self.concepts, 60))
        self.seen = sorted(set(self.concepts) - set(self.held_out))
        # the autoencoder alone also sees people, faces and signs: it has to code any picture
        self.extra = sorted(everywhere - set(self.concepts))

    def draw(
        self, name: str, package: str, *, transform: str = "", background: str = "#ffffff", size: int = SIZE
    ) -> Image.Image:
        """The icon as RGB of *size* × *size*, on *background*, after an SVG *transform* of the unit-less body."""
        icons = self.icons[package]
        icon = icons["icons"].get(name)
        if icon is None:
            icon = icons["icons"][icons["aliases"][name]["parent"]]
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        left, top = icon.get("left", 0), icon.get("top", 0)
        body = icon["body"].replace("currentColor", "#000000")
        if transform:
            cx, cy = left + width / 2, top + height / 2
            body = f'<g transform="translate({cx} {cy}) {transform} translate({-cx} {-cy})">{body}</g>'
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{4 * size}" height="{4 * size}">{body}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, background=background, width=4 * size, height=4 * size)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
        return image.resize((size, size), Image.Resampling.LANCZOS)


@cache
def words(name: str) -> str:
    return name.replace("-", " ")


def with_article(noun: str) -> str:
    last = noun.split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us")):
        return noun  # plurals: "grapes"
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def caption(name: str, package: str, rng: random.Random) -> str:
    """One of the many ways to say it; empty in a tenth of the cases, for classifier-free guidance."""
    if rng.random() < 0.1:
        return ""
    noun = words(name)
    if noun in SYNONYMS and rng.random() < 0.4:
        noun = rng.choice(SYNONYMS[noun])
    style = rng.choice(STYLES[package][1])
    if rng.random() < 0.1:
        return rng.choice([f"an emoji of {with_article(noun)}", noun, with_article(noun)])
    return rng.choice(
        [
            f"{with_article(noun)} in {style} style",
            f"{with_article(noun)} in {style} style",
            f"{noun}, {style} style",
            f"an emoji of {with_article(noun)} in {style} style",
            f"{style} emoji of {with_article(noun)}",
        ]
    )


def prompt(name: str, package: str) -> str:
    """The one caption that evaluation uses."""
    return f"{with_article(words(name))} in {STYLES[package][0]} style"
