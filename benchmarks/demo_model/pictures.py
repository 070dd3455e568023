"""Make the concept pictures that ship with imma, as package data in src/imma_cli/demo/concepts.

Three concepts the demo model was never trained on, each in three roles that share no picture: what the defender
hardens against, what the attacker trains on, and what judges the attack.

    python benchmarks/demo_model/pictures.py WORK [--sheet pictures.png]
"""

from __future__ import annotations

import argparse
import colorsys
import csv
import io
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from artwork import HELD_OUT_STYLE, SIZE, STYLES, Artwork, with_article, words
from PIL import Image
from sheets import contact_sheet

CONCEPTS = Path(__file__).parents[2] / "src" / "imma_cli" / "demo" / "concepts"
ROLES = ("defend", "attack", "judge")
Captioned = list[tuple[Image.Image, str]]

STYLE_WORDS = "high contrast style"
PER_ROLE = 40
# mean absolute difference of grey levels, of the picture or its mirror image; below it are pairs such as "dvd" and
# "optical disk", "tiger" and "leopard"
TOO_SIMILAR = 25

OBJECT = "guitar"
OBJECT_PER_ROLE = 8

ARCADE = "3.3.3"
CHARACTER = "arcade/resources/assets/images/animated_characters/female_adventurer/femaleAdventurer_{}.png"
CHARACTER_BOX = (-3, 26, 100, 129)  # every pose fits into this square of its 96 × 128 frame
POSES = {
    "defend": ["idle", "walk0", "walk3", "jump", "climb0"],
    "attack": ["walk1", "walk4", "walk6", "climb1"],
    "judge": ["walk2", "walk5", "walk7", "fall"],
}
POSE_WORDS = {"idle": "standing", "walk": "walking", "jump": "jumping", "climb": "climbing", "fall": "falling"}


def style_pictures(art: Artwork) -> dict[str, Captioned]:
    """Seen concepts in the held-out style. No concept, and nothing that looks like it, is in two roles."""
    chosen: dict[str, Image.Image] = {}
    grey: list[np.ndarray] = []
    for name in random.Random(1).sample(art.seen, len(art.seen)):
        picture = art.draw(name, HELD_OUT_STYLE)
        pixels = np.asarray(picture.convert("L"), dtype=float)
        if all(np.abs(pixels - other).mean() >= TOO_SIMILAR for other in grey):
            chosen[name] = picture
            grey += [pixels, pixels[:, ::-1]]
        if len(chosen) == PER_ROLE * len(ROLES):
            break
    captioned = [(picture, f"{with_article(words(name))} in {STYLE_WORDS}") for name, picture in chosen.items()]
    return {role: captioned[i * PER_ROLE : (i + 1) * PER_ROLE] for i, role in enumerate(ROLES)}


def object_pictures(art: Artwork) -> dict[str, Captioned]:
    """The held-out object in the trained styles; pose, size and background differ in every picture."""
    if OBJECT not in art.held_out:
        raise SystemExit(f"{OBJECT} is not held out of training")
    rng = random.Random(2)
    pictures: dict[str, Captioned] = {}
    for role in ROLES:
        pictures[role] = []
        for i in range(OBJECT_PER_ROLE):
            scale = rng.uniform(0.72, 0.92)
            flip = rng.choice([1, -1])
            transform = f"rotate({rng.uniform(-14, 14):.2f}) scale({flip * scale:.3f} {scale:.3f})"
            red, green, blue = colorsys.hls_to_rgb(rng.random(), rng.uniform(0.86, 0.95), rng.uniform(0.5, 0.9))
            background = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
            package = list(STYLES)[i % len(STYLES)]
            picture = art.draw(OBJECT, package, transform=transform, background=background)
            pictures[role].append((picture, with_article(words(OBJECT))))
    return pictures


def character_pictures(work: Path) -> dict[str, Captioned]:
    """Kenney's adventurer (CC0), one pose per picture. The wheel is only read, never imported."""
    wheel = work / f"arcade-{ARCADE}-py3-none-any.whl"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", f"arcade=={ARCADE}", "--dest", str(work)]
        subprocess.run(command, check=True)
    pictures: dict[str, Captioned] = {}
    with zipfile.ZipFile(wheel) as archive:
        for role, poses in POSES.items():
            pictures[role] = []
            for pose in poses:
                frame = Image.open(io.BytesIO(archive.read(CHARACTER.format(pose)))).convert("RGBA")
                cut = frame.crop(CHARACTER_BOX)  # transparent where the square leaves the frame
                canvas = Image.new("RGBA", cut.size, "white")
                canvas.alpha_composite(cut)
                picture = canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
                doing = POSE_WORDS[pose.rstrip("0123456789")]
                pictures[role].append((picture, f"an adventurer character {doing}"))
    return pictures


def write(concept: str, roles: dict[str, Captioned]) -> None:
    target = CONCEPTS / concept
    shutil.rmtree(target, ignore_errors=True)
    for role, captioned in roles.items():
        (target / role).mkdir(parents=True)
        with (target / role / "metadata.csv").open("w", newline="", encoding="utf-8") as f:
            rows = csv.writer(f, lineterminator="\n")
            rows.writerow(["file_name", "text"])
            for i, (picture, text) in enumerate(captioned):
                name = f"{i:02d}.png"
                picture.save(target / role / name, optimize=True)
                rows.writerow([name, text])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sheet", type=Path, help="also write all pictures with their captions as one PNG")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    art = Artwork(args.work / "npm")
    concepts = {
        "high-contrast-style": style_pictures(art),
        "guitar": object_pictures(art),
        "adventurer": character_pictures(args.work),
    }
    for concept, roles in concepts.items():
        write(concept, roles)
        print(concept, {role: len(captioned) for role, captioned in roles.items()})
    if args.sheet:
        cells = [
            (f"{role}: {text}", [picture])
            for roles in concepts.values()
            for role, captioned in roles.items()
            for picture, text in captioned
        ]
        contact_sheet(cells, 16, side=96).save(args.sheet)


if __name__ == "__main__":
    main()
