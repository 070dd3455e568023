"""What ships as the demo, and writing it out."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from PIL import Image

from imma_cli.demo import CONCEPTS, LICENSES, MODEL, ROLES, write_demo
from imma_cli.errors import ImmaError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("written") / "a" / "demo"
    write_demo(target)
    return target


def captions(folder: Path) -> dict[str, str]:
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        return {row["file_name"]: row["text"] for row in csv.DictReader(file)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_everything_it_says_is_written_and_nothing_else(tmp_path: Path) -> None:
    written = write_demo(tmp_path)

    assert written == [tmp_path / MODEL, *(tmp_path / "concepts" / name for name in CONCEPTS), tmp_path / LICENSES]
    assert all(path.exists() for path in written)
    assert {p.name for p in tmp_path.iterdir()} == {MODEL, "concepts", LICENSES}
    assert {p.name for p in (tmp_path / "concepts").iterdir()} == set(CONCEPTS)
    for name in CONCEPTS:
        assert {p.name for p in (tmp_path / "concepts" / name).iterdir()} == set(ROLES)


def test_the_model_is_small_and_has_the_tensors_of_a_single_file(demo: Path) -> None:
    model = demo / MODEL
    assert model.stat().st_size <= 25_000_000
    with model.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header.pop("__metadata__")["modelspec.license"] == "Apache-2.0"
    parts = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    assert all(any(key.startswith(part) for key in header) for part in parts)
    assert {entry["dtype"] for key, entry in header.items() if key.startswith(parts[0])} == {"F16"}


def test_what_exists_is_not_overwritten_and_every_obstacle_is_named(tmp_path: Path) -> None:
    (tmp_path / MODEL).write_text("mine")
    (tmp_path / "concepts" / "guitar").mkdir(parents=True)
    before = contents(tmp_path)

    with pytest.raises(ImmaError) as refusal:
        write_demo(tmp_path)

    assert [MODEL in reason or "guitar" in reason for reason in refusal.value.reasons] == [True, True]
    assert "--force" in str(refusal.value)
    assert contents(tmp_path) == before


def test_force_replaces_the_demo_and_leaves_other_files(tmp_path: Path, demo: Path) -> None:
    write_demo(tmp_path)
    (tmp_path / MODEL).write_text("broken")
    (tmp_path / "concepts" / "guitar" / "attack" / "old.png").write_text("from another version")
    (tmp_path / "notes.txt").write_text("mine")

    write_demo(tmp_path, force=True)

    assert contents(tmp_path) == {**contents(demo), "notes.txt": b"mine"}


@pytest.mark.parametrize("failing", [MODEL, LICENSES])
def test_a_failure_while_copying_leaves_everything_as_it_was(
    tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    import imma_cli.demo

    write_demo(tmp_path)
    copy = imma_cli.demo._copy

    def disk_fills_up(packaged: Path, target: Path) -> None:
        if target.name == failing:
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(target))
        copy(packaged, target)

    monkeypatch.setattr(imma_cli.demo, "_copy", disk_fills_up)
    with pytest.raises(ImmaError, match="No space left on device"):
        write_demo(tmp_path, force=True)

    assert contents(tmp_path) == contents(demo)


def test_a_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ImmaError, match="could not be written"):
        write_demo(tmp_path / "file")


@pytest.mark.parametrize("name", CONCEPTS)
def test_captions_name_exactly_the_pictures_that_are_there(demo: Path, name: str) -> None:
    for role in ROLES:
        folder = demo / "concepts" / name / role
        assert set(captions(folder)) == {p.name for p in folder.glob("*.png")}
        assert set(captions(folder)) | {"metadata.csv"} == {p.name for p in folder.iterdir()}
        assert all(captions(folder).values())
        for picture in folder.glob("*.png"):
            with Image.open(picture) as image:
                assert (image.size, image.mode) == ((64, 64), "RGB")


@pytest.mark.parametrize("name", CONCEPTS)
def test_roles_share_no_picture_and_repeat_none(demo: Path, name: str) -> None:
    pictures = []
    for path in sorted((demo / "concepts" / name).rglob("*.png")):
        with Image.open(path) as image:
            pictures.append(image.tobytes())
    assert len(set(pictures)) == len(pictures)


def test_every_caption_contains_the_concept(demo: Path) -> None:
    for name, concept in CONCEPTS.items():
        for role in ROLES:
            assert all(concept.text in text for text in captions(demo / "concepts" / name / role).values())


def test_the_style_has_forty_different_things_per_role(demo: Path) -> None:
    roles = [set(captions(demo / "concepts" / "high-contrast-style" / role).values()) for role in ROLES]
    assert [len(role) for role in roles] == [40, 40, 40]
    assert len(set.union(*roles)) == 120


def test_training_never_says_the_held_out_style_or_object(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py", reason="benchmarks/demo_model needs resvg_py to be imported")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "demo_model"))
    import artwork

    assert artwork.HELD_OUT_STYLE not in artwork.STYLES
    said = [artwork.caption("red-apple", style, random.Random(i)) for style in artwork.STYLES for i in range(200)]
    assert not any("contrast" in text for text in said)
    assert not any("guitar" in text for text in [*artwork.SYNONYMS, *chain(*artwork.SYNONYMS.values())])


def test_importing_the_demo_is_light() -> None:
    heavy = "import sys, imma_cli.demo; print({'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
