"""Concepts: folders of pictures, drawing, and the stream of batches."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.concepts import caches
from imma_cli.concepts.batches import Batch, TrainingSet, encode, pixels
from imma_cli.concepts.drawing import ROLES, draw_concept, drawing_seeds
from imma_cli.concepts.folders import read_concept
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model


def paint(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (80, 60), (30 * i, 90, 200)).save(folder / name)
    return folder


def test_captions_come_from_metadata_else_from_the_concept(tmp_path: Path) -> None:
    folder = paint(tmp_path / "a", "1.png", "2.jpg")
    assert read_concept("a cat", folder).captions == ("a cat", "a cat")
    (folder / "metadata.csv").write_text('file_name,text\n2.jpg,"one, two"\n1.png,\n')
    assert read_concept("a cat", folder).captions == ("a cat", "one, two")
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "only this"}\n')
    concept = read_concept("a cat", folder)
    assert concept.captions == ("only this",)
    assert len(concept.images) == 1


def test_transparency_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_concept("x", tmp_path).images[0].getpixel((3, 3)) == (255, 255, 255)


def test_bad_folders_are_refused_with_every_reason(tmp_path: Path) -> None:
    with pytest.raises(ImmaError, match="not a folder"):
        read_concept("x", tmp_path / "missing")
    with pytest.raises(ImmaError, match="holds no picture"):
        read_concept("x", tmp_path)
    folder = paint(tmp_path / "b", "1.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "metadata.csv").write_text("file_name,text\n1.png,a\n1.png,b\nbroken.png,c\ngone.png,d\n")
    with pytest.raises(ImmaError) as caught:
        read_concept("x", folder)
    for part in ("broken.png cannot be read", "gone.png, which is not there", "named twice"):
        assert part in str(caught.value)
    (folder / "metadata.csv").write_text("name,caption\n1.png,a\n")
    with pytest.raises(ImmaError, match="no file_name"):
        read_concept("x", folder)


def test_captions_may_name_pictures_in_subfolders_and_nothing_outside(tmp_path: Path) -> None:
    folder = paint(tmp_path / "c", "1.png")
    paint(folder / "more", "2.png")
    (folder / "metadata.csv").write_text("file_name,text\n1.png,one\nmore/2.png,two\n")
    assert read_concept("x", folder).captions == ("one", "two")
    (folder / "metadata.csv").write_text("file_name,text\n../c/1.png,one\n")
    with pytest.raises(ImmaError, match="outside the folder"):
        read_concept("x", folder)


def test_a_thousand_mistakes_of_one_kind_stay_readable(tmp_path: Path) -> None:
    folder = paint(tmp_path / "d", "1.png")
    (folder / "metadata.csv").write_text("file_name,text\n" + "1.png,again\n" * 1000)
    with pytest.raises(ImmaError, match="and 991 more") as caught:
        read_concept("x", folder)
    assert len(caught.value.reasons) < 12


def test_drawn_pictures_of_the_roles_never_share_a_seed() -> None:
    seeds = [set(drawing_seeds(role, seed, 500)) for role in ROLES for seed in (0, 1, 7)]  # type: ignore[arg-type]
    assert sum(len(s) for s in seeds) == len(set().union(*seeds))


def test_the_model_draws_a_concept_without_pictures(tiny_model: Model) -> None:
    a = draw_concept(tiny_model, "blue style", role="defend", seed=0, count=3)
    again = draw_concept(tiny_model, "blue style", role="defend", seed=0, count=3, batch=1)
    other = draw_concept(tiny_model, "blue style", role="attack", seed=0, count=3)
    assert all("blue style" in caption for caption in a.captions)
    assert {image.size for image in a.images} == {(64, 64)}
    assert not set(a.hashes) & set(other.hashes)
    # a picture depends on its seed, not on its neighbours in the batch (up to rounding)
    difference = (pixels(a.images, 64) - pixels(again.images, 64)).abs().mean()
    assert difference < 0.02


def test_a_stream_is_its_seed_and_covers_every_picture(tiny_model: Model, tmp_path: Path) -> None:
    folder = paint(tmp_path, *(f"{i}.png" for i in range(5)))
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,picture {i}\n" for i in range(5)))
    concept = read_concept("blue style", folder)
    (attack,) = parse_attacks(["lora"], discover())
    latents = encode(tiny_model, concept.images)
    streams = [iter(TrainingSet(tiny_model, attack, concept, latents, seed=s)) for s in (1, 1, 2)]
    first, again, other = ([next(s) for _ in range(10)] for s in streams)
    assert all(
        torch.equal(a.noise, b.noise) and torch.equal(a.latents, b.latents) for a, b in zip(first, again, strict=True)
    )
    assert not torch.equal(first[0].noise, other[0].noise)
    assert {int(b.timesteps) for b in first} != {int(b.timesteps) for b in other}
    shown = [b.captions[0] for b in first]
    assert sorted(shown[:5]) == sorted(shown[5:]) == sorted(concept.captions)


def test_what_memory_has_no_room_for_is_read_from_the_disk_to_the_same_batches(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = paint(tmp_path / "pictures", *(f"{i}.png" for i in range(11)))
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,picture {i % 3}\n" for i in range(11)))
    concept = read_concept("blue style", folder)
    (attack,) = parse_attacks(["lora"], discover())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def batches() -> list[Batch]:
        latents = encode(tiny_model, concept.images)
        stream = iter(TrainingSet(tiny_model, attack, concept, latents, seed=1, batch_size=3))
        assert stream.conditioning is not None
        assert len(stream.conditioning) == 3  # captions that are the same are kept once
        return [next(stream) for _ in range(4)]

    in_memory = batches()
    monkeypatch.setattr(caches, "IN_MEMORY", 100)
    mapped: list[int] = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: mapped.append(1) or from_file(*a, **k))
    on_disk = batches()
    assert len(mapped) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["pictures"]  # and nothing is left of it
    for one, other in zip(in_memory, on_disk, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert one.conditioning is not None
        assert other.conditioning is not None
        assert torch.equal(one.conditioning, other.conditioning)
