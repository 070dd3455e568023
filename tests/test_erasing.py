"""Erasing concepts: against a second formulation, what stays stays, and what the command writes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_cli import blocks
from test_imma import CPU
from torch import Tensor

from imma_cli.checkpoints import open_checkpoint
from imma_cli.concepts.batches import conditioning_of
from imma_cli.demo import write_demo
from imma_cli.families.model import Model
from imma_cli.immunizers import erasing
from imma_cli.immunizers.erasing import Settings, erase
from imma_cli.immunizers.esd import EsdSettings
from imma_cli.immunizers.naming import prompts_with
from imma_cli.immunizers.retention import prompts_beside, vocabulary_of
from imma_cli.immunizers.scope import protected_weights
from imma_cli.immunizers.uce import UceSettings

NAME = "blue style"
UCE = UceSettings(nouns=3, preserved=24)
ESD = EsdSettings(seed=0, steps=4, learning_rate=1e-3, batch_size=2, nouns=1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The demo model: what trained weights do cannot be seen on random ones."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder)
    return open_checkpoint(folder / "model.safetensors").load()


def erased(model: Model, settings: Settings, *names: str, keep: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return erase(model, names or (NAME,), settings, CPU, keep)


def with_weights(model: Model, weights: dict[str, Tensor]) -> Model:
    other = copy.deepcopy(model)
    other.unet.load_state_dict(weights, strict=False)
    return other


def distance(model: Model, original: Model, prompt: str, target: str, first: int = 0) -> float:
    """Mean squared distance of *model*'s keys and values for *prompt* from *original*'s for *target*."""
    tokens, wanted = conditioning_of(model, [prompt, target])[:, first:]
    own, others = (protected_weights(m.unet, "kv") for m in (model, original))
    return sum(float(F.mse_loss(tokens @ own[n].T, wanted @ others[n].T)) for n in own)


def test_uce_is_the_least_squares_solution(tiny_model: Model) -> None:
    """Every term of the objective as rows of one linear system, solved without normal equations."""
    settings = replace(UCE, weight=2.0, ridge=0.3, seed=3)
    keep = ("a red tree in green style",)
    edited = erased(tiny_model, settings, NAME, "round thing", keep=keep)
    old, new = [], []
    for prompt, start, neutral in prompts_with([NAME, "round thing"], settings.nouns, 3):
        for at in range(77):
            if at > len(tiny_model.tokenizer.tokenize(start)):
                pair = tiny_model.family.encode_prompts(tiny_model, [prompt, neutral])
                old.append(pair[0, at].double())
                new.append(pair[1, at].double())
    others = [*keep, *prompts_beside([NAME, "round thing"], vocabulary_of(tiny_model), settings.preserved, 3)]
    kept = [token.double() for text in others for token in tiny_model.family.encode_prompts(tiny_model, [text])[0]]
    square = torch.stack(kept).square().mean()
    parts = [
        (2 / len(old), torch.stack(old), torch.stack(new)),
        (1 / len(kept), torch.stack(kept), torch.stack(kept)),
        (0.3 * square, torch.eye(16), torch.eye(16)),
    ]
    left, right = (torch.cat([part[side].double() * part[0] ** 0.5 for part in parts]) for side in (1, 2))
    for name, weight in protected_weights(tiny_model.unet, "kv").items():
        solution = torch.linalg.lstsq(left, right @ weight.double().T).solution.T
        torch.testing.assert_close(edited[name].double(), solution, rtol=1e-4, atol=1e-6)


def test_uce_gives_the_concept_the_neutral_prompts_keys_and_values_and_others_keep_theirs(demo: Model) -> None:
    other = with_weights(demo, erased(demo, UceSettings(), "flat style"))
    for prompt, start, neutral in [
        ("a cat in flat style", "a cat in", "a cat"),
        ("flat style", "", ""),
        ("a wolf in flat style", "a wolf in", "a wolf"),  # a noun that is in no list of ours
    ]:
        first = len(demo.tokenizer.tokenize(start)) + 1
        before, after = (distance(m, demo, prompt, neutral, first) for m in (demo, other))
        assert after < 0.25 * before, prompt
        for kept in (neutral, prompt.replace("flat", "noto"), "a red car"):
            assert distance(other, demo, kept, kept) < 0.2 * before, kept


def test_a_prompt_that_is_kept_moves_less(demo: Model) -> None:
    text = "a ghost in retro style"
    moved = [
        distance(with_weights(demo, erased(demo, UCE, "flat style", keep=keep)), demo, text, text)
        for keep in ((), (text,) * 20)
    ]
    assert moved[1] < 0.5 * moved[0]


def test_esd_gets_closer_to_its_target_in_cross_attention_alone(tiny_model: Model) -> None:
    """The target is written down once more, on noise that training did not have."""
    settings = replace(ESD, steps=60, learning_rate=3e-3)
    weights = erased(tiny_model, settings)
    assert weights.keys() == protected_weights(tiny_model.unet, "cross-attention").keys()
    before = dict(tiny_model.unet.named_parameters())
    assert all(not torch.equal(weight, before[name]) for name, weight in weights.items())
    other = with_weights(tiny_model, weights)
    generator = torch.Generator().manual_seed(9)
    noisy = torch.randn((24, 4, 8, 8), generator=generator)
    timesteps = torch.randint(1000, (24,), generator=generator)
    prompts = [NAME, "an image of blue style", "a picture of blue style"] * 8

    def predicted(model: Model, texts: list[str]) -> Tensor:
        conditioning = model.family.encode_prompts(model, texts)
        return model.unet(noisy, timesteps, encoder_hidden_states=conditioning).sample

    with torch.no_grad():
        named = predicted(tiny_model, prompts)
        neutral = predicted(tiny_model, ["", "an image", "a picture"] * 8)
        target = 2 * neutral - named
        assert F.mse_loss(predicted(other, prompts), target) < 0.6 * F.mse_loss(named, target)


@pytest.mark.parametrize("settings", [UCE, ESD], ids=["uce", "esd"])
def test_the_model_itself_stays_as_it_was(tiny_model: Model, settings: Settings) -> None:
    before = {part: copy.deepcopy(net.state_dict()) for part, net in tiny_model.networks.items()}
    assert erased(tiny_model, settings)
    for part, network in tiny_model.networks.items():
        after = network.state_dict()
        assert after.keys() == before[part].keys()
        assert all(torch.equal(after[k], v) for k, v in before[part].items())
        assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("settings", [UCE, ESD], ids=["uce", "esd"])
def test_same_seed_same_weights_other_seed_others(tiny_model: Model, settings: Settings) -> None:
    first, again, other = (erased(tiny_model, replace(settings, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("settings", [UCE, ESD], ids=["uce", "esd"])
def test_every_step_is_told(tiny_model: Model, settings: Settings) -> None:
    told: list[tuple[int, str]] = []
    erase(tiny_model, [NAME], settings, CPU, on_step=lambda done, doing, distance: told.append((done, doing)))
    assert [done for done, doing in told if doing == "Erasing"][-1] == erasing.steps_of(tiny_model, [NAME], settings)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_the_nouns_of_a_concept_are_not_put_beside_it(tiny_model: Model) -> None:
    prompts = prompts_with(["a cat in blue", "guitar"], 1000, 0)
    assert not [p for p in prompts if p.prompt.startswith("a cat in a cat in blue")]
    assert [p for p in prompts if p.prompt == "a cat in guitar" and p.neutral == "a cat"]


@pytest.fixture
def harden(imma, tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs ``imma harden`` on the tiny model with short erasing; gives the file's changed tensors and its record."""

    def short(model: Model, method: str, seed: int) -> Settings:
        return replace(UCE if method == "uce" else ESD, seed=seed)

    monkeypatch.setattr(erasing, "settings_for", short)

    def run(*arguments: object, name: str = "hard") -> tuple[dict[str, bytes], dict[str, Any]]:
        target = tmp_path / f"{name}.safetensors"
        code, _, err = imma(
            "harden", tiny_checkpoint, "--config", tiny_config, "--concept", NAME, "--output", target, *arguments
        )
        assert code == 0, err
        before, after = blocks(tiny_checkpoint), blocks(target)
        assert list(before) == list(after)
        code, out, _ = imma("inspect", target, "--config", tiny_config, "--json")
        return {n: after[n] for n in before if before[n] != after[n]}, json.loads(out)["provenance"]

    return run


@pytest.mark.parametrize("method", ["uce", "esd"])
def test_erasing_alone_writes_what_was_erased(harden, imma, tmp_path, tiny_config, method) -> None:
    changed, record = harden("--method", "none", "--erase", method, "--seed", 5)
    parts = ("to_k", "to_v") if method == "uce" else ("to_q", "to_k", "to_v", "to_out.0")
    assert all(any(f".attn2.{part}." in n for part in parts) for n in changed)
    assert len(changed) > 0.9 * 16 * (2 if method == "uce" else 5)  # a bias may be too small to change in float16
    assert (record["attacks"], record["settings"]) == ([], {"method": "none", "seed": 5})
    assert (record["erase"]["method"], record["erase"]["seed"]) == (method, 5)
    code, out, _ = imma("inspect", tmp_path / "hard.safetensors", "--config", tiny_config)
    assert code == 0
    assert f"erased by {method}" in " ".join(out.split())


def test_both_changes_are_written_and_hardening_begins_with_the_erased_model(harden, pictures) -> None:
    """ESD changes all of cross-attention, hardening its keys and values alone."""
    arguments = ("--method", "imma", "--attack", "lora", "--images", pictures, "--steps", 2, "--protect", "kv")
    hardening = (*arguments, "--outer-learning-rate", 1e-2)
    erased_alone, _ = harden("--method", "none", "--erase", "esd", name="erased")
    hardened_alone, plain = harden(*hardening, name="hardened")
    both, record = harden(*hardening, "--erase", "esd", name="both")
    assert both.keys() == erased_alone.keys() | hardened_alone.keys()
    assert hardened_alone.keys() < both.keys()
    for name, block in both.items():
        assert (block == erased_alone[name]) == (name not in hardened_alone), name
        assert block != hardened_alone.get(name)
    assert record == plain | {"erase": record["erase"]}


def test_pictures_are_drawn_before_erasing(harden) -> None:
    arguments = ("--attack", "lora", "--draw", 2, "--steps", 3)
    _, plain = harden(*arguments, name="plain")
    _, record = harden(*arguments, "--erase", "uce", "--keep", "a red tree", name="both")
    assert record["concepts"] == plain["concepts"]
    assert len(record["concepts"][0]["sha256"]) == 2
    assert record["settings"]["keep"] == ["a red tree"]


def test_the_report_and_the_words_say_what_was_erased(imma, tiny_checkpoint, tiny_config, harden, tmp_path) -> None:
    target = tmp_path / "erased.safetensors"
    arguments = ("harden", tiny_checkpoint, "--config", tiny_config, "--concept", NAME, "--method", "none", "--force",
                 "--output", target)  # fmt: skip
    code, out, err = imma(*arguments, "--erase", "esd", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert len(report["erasing_distances"]) == ESD.steps
    assert report["changed_tensors"] == 16 * 5
    assert report["relative_change"] > 0
    code, out, err = imma(*arguments, "--erase", "uce")
    assert code == 0, err
    assert "erased with UCE" in out
    assert "--attack NAME" in out


@pytest.mark.parametrize("method", ["uce", "esd"])
@pytest.mark.parametrize(
    "hardening", [("--method", "none"), ("--method", "imma", "--attack", "lora", "--protect", "kv")]
)
def test_a_dry_run_counts_both(imma, tiny_checkpoint, tiny_config, harden, tmp_path, method, hardening) -> None:
    code, out, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", NAME, "--erase", method, *hardening, "--dry-run",
        "--output", tmp_path / "hard.safetensors", "--json",
    )  # fmt: skip
    assert code == 0, err
    plan = json.loads(out)
    assert plan["would_change_tensors"] == (32 if method == "uce" else 80)
    assert plan["erase"]["method"] == method
    assert plan["estimated_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_go_together_is_refused_at_once(imma, tiny_checkpoint, tiny_config, pictures, tmp_path) -> None:
    def refused(*arguments: object) -> str:
        code, out, err = imma(
            "harden", tiny_checkpoint, "--config", tiny_config, "--concept", NAME, "--output", tmp_path / "x.safetensors", *arguments
        )  # fmt: skip
        assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
        return " ".join(err.split())

    assert "There is no --attack" in refused("--method", "imma")
    assert "There is no --attack" in refused("--method", "maximize", "--erase", "esd")
    published = ("--method", "imma", "--attack", "lora")
    assert "--keep belongs to" in refused(*published, "--erase", "esd", "--keep", "a cat")
    assert "esdd" in refused("--attack", "lora", "--erase", "esdd")
    said = refused("--method", "none", "--attack", "lora", "--images", pictures, "--steps", 4, "--strength", "high",
                   "--protect", "kv", "--batch-size", 2, "--outer-learning-rate", 0.1, "--preset", "quick")  # fmt: skip
    for part in ("--preset quick belongs", "both say how many steps", "without --erase changes nothing", "leave out --attack", "--strength belongs",
                 "leave out --images, --steps, --outer-learning-rate, --batch-size, --protect"):  # fmt: skip
        assert part in said, part
