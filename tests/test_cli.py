"""The commands as a user types them, on the tiny model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from imma_cli.checkpoints.safetensors_file import read_header
from imma_cli.cli import progress

Run = "subprocess.CompletedProcess[str]"


def blocks(path: Path) -> dict[str, bytes]:
    header, raw = read_header(path), path.read_bytes()
    return {n: raw[header.data_start + e.start : header.data_start + e.end] for n, e in header.entries.items()}


def test_harden_writes_a_file_that_differs_in_attention_alone(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path
) -> None:
    target = tmp_path / "hard.safetensors"
    code, out, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue style", "--images", pictures,
        "--attack", "lora:rank=2", "--attack", "dreambooth", "--steps", 8, "--outer-learning-rate", 0.01, "--output", target, "--seed", 4,
    )  # fmt: skip
    assert code == 0, err
    assert "imma verify" in out
    before, after = blocks(tiny_checkpoint), blocks(target)
    assert list(before) == list(after)
    changed = [n for n in before if before[n] != after[n]]
    assert len(changed) > 100
    assert all(".attn1.to_" in n or ".attn2.to_" in n for n in changed)
    code, out, _ = imma("inspect", target, "--config", tiny_config, "--json")
    record = json.loads(out)["provenance"]
    assert [a["name"] for a in record["attacks"]] == ["lora", "dreambooth"]
    assert record["attacks"][0]["settings"]["rank"] == 2
    assert (record["settings"]["seed"], record["concepts"][0]["name"]) == (4, "blue style")
    assert len(record["concepts"][0]["sha256"]) == 6
    code, out, _ = imma("inspect", target, "--config", tiny_config)
    assert (
        "hardened for blue style against lora, dreambooth (method episodes, strength medium, at most 8 steps)"
        in " ".join(out.replace("│", "").split())
    )

    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_single_file(str(target), config=str(tiny_config), local_files_only=True)
    assert pipeline("a cat", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)


def test_inspect_says_how_a_checkpoint_was_hardened(imma, tiny_checkpoint, tiny_config, pictures, tmp_path) -> None:
    files = [tiny_checkpoint, "--config", tiny_config, "--concept", "blue style"]
    ways = {
        "hardened for blue style against lora (method imma, at most 4 steps)": ["--method", "imma", "--attack", "lora", "--steps", 4, "--images", pictures],
        "blue style erased by uce": ["--method", "none", "--erase", "uce"],
    }  # fmt: skip
    for number, (expected, how) in enumerate(ways.items()):
        target = tmp_path / f"{number}.safetensors"
        code, _, err = imma("harden", *files, *how, "--output", target)
        assert code == 0, err
        _, out, _ = imma("inspect", target, "--config", tiny_config)
        assert expected in " ".join(out.replace("│", "").split())


def test_the_same_seed_gives_the_same_file(imma, tiny_checkpoint, tiny_config, pictures, tmp_path) -> None:
    targets = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for target, seed in zip(targets, (1, 1, 2), strict=True):
        code, _, err = imma(
            "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue style", "--images", pictures,
            "--attack", "lora", "--steps", 6, "--output", target, "--seed", seed,
        )  # fmt: skip
        assert code == 0, err
    first, again, other = (target.read_bytes() for target in targets)
    assert first == again
    assert first != other


def test_where_nobody_names_an_attack_strong_ones_are_simulated(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path
) -> None:
    code, out, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue style", "--images", pictures, "--steps", 18,
        "--output", tmp_path / "hard.safetensors", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    marked = {a["name"] for a in json.loads(imma("attacks", "--json")[1])["attacks"] if a["simulated"]}
    record = report["provenance"]
    assert {a["name"] for a in record["attacks"]} == marked == {step["attack"] for step in report["steps"]}
    assert len(marked) > 1
    assert record["settings"]["method"] == "episodes"
    assert record["simulated_steps"] == record["settings"]["inner_steps"] * 6 / len(marked)
    assert len(report["steps"]) == 6
    assert record["settings"]["steps"] == 18
    assert record["settings"]["outer_learning_rate"] > 0
    assert "outer_learning_rate" not in record["attacks"][0]["rates"]


def test_by_default_a_large_model_is_not_copied(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("imma_cli.families.model.SMALL_MODEL", 0)
    code, out, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue style", "--images", pictures, "--steps", 6, "--dry-run",
        "--output", tmp_path / "hard.safetensors",
    )  # fmt: skip
    assert code == 0, err
    assert "against lora" in out
    assert "against full-finetune" not in out
    assert "second copy of all weights: full-finetune" in " ".join(err.split())


def test_without_pictures_the_model_draws_them(imma, tiny_checkpoint, tiny_config, tmp_path) -> None:
    target = tmp_path / "hard.safetensors"
    code, out, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue style", "--draw", 2, "--steps", 3, "--attack", "lora",
        "--output", target, "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["provenance"]["concepts"][0]["images"] == "drawn by the model"
    assert [s["cycle"] for s in report["steps"]] == [1]
    assert target.exists()


def test_everything_wrong_is_said_at_once_and_nothing_is_written(imma, tiny_checkpoint, tiny_config, tmp_path) -> None:
    target = tmp_path / "hard.safetensors"
    target.write_bytes(b"mine")
    code, out, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "a", "--concept", "a", "--images", tmp_path / "none",
        "--attack", "lorra", "--attack", "lora:rnk=1", "--output", target, "--device", "tpu9", "--attention", "xformers",
    )  # fmt: skip
    assert code == 2
    assert out == ""
    for part in ("lorra", "Did you mean lora", "rnk", "given twice", "2 --concept but 1 --images", "none is not a folder",
                 "exists", "tpu9", "xformers"):  # fmt: skip
        assert part in err, part
    assert target.read_bytes() == b"mine"


def test_a_fault_of_the_program_is_no_verdict(imma, monkeypatch, tiny_checkpoint) -> None:
    """Exit code 1 of `imma verify` says "not resistant"; a traceback must not."""
    from imma_cli.checkpoints import checkpoint

    def broken(*_: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(checkpoint, "read_header", broken)
    code, _, err = imma("verify", tiny_checkpoint, "--against", tiny_checkpoint, "--concept", "x", "--attack", "lora")
    assert code == 70
    assert "KeyError: 'a fault'" in err


def test_names_that_are_no_text_are_refused(imma, tiny_checkpoint, tiny_config, tmp_path) -> None:
    code, _, err = imma(
        "harden",
        tiny_checkpoint,
        "--config",
        tiny_config,
        "--concept",
        "caf\udce9",
        "--output",
        tmp_path / "o.safetensors",
    )
    assert code == 2
    assert "not text" in err


def test_a_missing_checkpoint_is_one_line(imma, tmp_path) -> None:
    code, _, err = imma("harden", tmp_path / "no.safetensors", "--concept", "x", "--attack", "lora")
    assert code == 2
    assert "no such file" in err
    assert "Traceback" not in err


def test_an_existing_output_needs_force(imma, tiny_checkpoint, tiny_config, pictures, tmp_path) -> None:
    target = tmp_path / "hard.safetensors"
    target.write_bytes(b"mine")
    arguments = (
        "harden", tiny_checkpoint, "--config", tiny_config, "--method", "imma", "--concept", "x", "--attack", "lora", "--images", pictures, "--steps", 2, "--output", target,
    )  # fmt: skip
    assert imma(*arguments)[0] == 2
    assert target.read_bytes() == b"mine"
    assert imma(*arguments, "--force")[0] == 0
    assert read_header(target)


def test_rates_that_end_in_nan_write_nothing(imma, tiny_checkpoint, tiny_config, pictures, tmp_path) -> None:
    before = tiny_checkpoint.read_bytes()
    code, _, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "x", "--attack", "lora", "--images", pictures, "--steps", 60,
        "--outer-learning-rate", 1e30, "--output", tmp_path / "hard.safetensors",
    )  # fmt: skip
    assert code == 2
    assert "Lower the learning rates" in err
    assert list(tmp_path.iterdir()) == []
    assert tiny_checkpoint.read_bytes() == before


def test_hardening_what_imma_wrote_is_said(imma, tiny_checkpoint, tiny_config, pictures, tmp_path) -> None:
    def run(source: Path, *more: object) -> str:
        code, _, err = imma(
            "harden", source, "--config", tiny_config, "--concept", "blue style", "--images", pictures, "--steps", 2,
            "--method", "imma", "--attack", "lora", "--device", "cpu", "--output", tmp_path / "hard.safetensors", *more,
        )  # fmt: skip
        assert code == 0, err
        return " ".join(err.split())

    assert "imma wrote this" not in run(tiny_checkpoint)
    again = tmp_path / "again.safetensors"
    (tmp_path / "hard.safetensors").rename(again)
    assert "imma wrote this checkpoint (for blue style)" in run(again, "--dry-run")


def test_a_dry_run_says_what_would_happen(imma, tiny_checkpoint, tiny_config, pictures, tmp_path) -> None:
    code, out, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "x", "--attack", "lora", "--images", pictures, "--dry-run",
        "--output", tmp_path / "hard.safetensors",
    )  # fmt: skip
    assert code == 0, err
    assert "cpu" in out
    assert "sdpa" in out
    assert "160 tensors" in out
    assert list(tmp_path.iterdir()) == []


def test_too_few_steps_are_refused_before_anything_is_drawn(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path
) -> None:
    for more in ((), ("--dry-run",)):
        code, out, err = imma(
            "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "x", "--images", pictures, "--steps", 8,
            "--output", tmp_path / "hard.safetensors", *more,
        )  # fmt: skip
        assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
        assert "Give --steps 9 at least" in " ".join(err.split())
        assert "Drawing" not in err


def test_the_quick_preset_makes_a_quarter_of_the_steps_and_no_checks(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path
) -> None:
    def planned(*options: object) -> tuple[int, int]:
        code, out, err = imma(
            "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "x", "--images", pictures, "--attack", "lora", "--dry-run", "--json",
            "--output", tmp_path / "hard.safetensors", *options,
        )  # fmt: skip
        assert code == 0, err
        plan = json.loads(out)
        return int(plan["cycles"]), int(plan["settings"]["checks"])

    cycles, checks = planned()
    assert checks > 0
    assert planned("--preset", "quick") == (cycles // 4, 0)


def test_a_diffusers_folder_is_hardened_into_a_folder(imma, tiny_folder, pictures, tmp_path) -> None:
    target = tmp_path / "hard"
    code, _, err = imma(
        "harden",
        tiny_folder,
        "--method",
        "imma",
        "--concept",
        "x",
        "--attack",
        "lora",
        "--images",
        pictures,
        "--steps",
        4,
        "--output",
        target,
    )
    assert code == 0, err
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    for path in (p for p in tiny_folder.rglob("*") if p.is_file()):
        same = path.read_bytes() == (target / path.relative_to(tiny_folder)).read_bytes()
        assert same == (path.relative_to(tiny_folder) != weights), path


def test_attacks_are_listed_and_explained(imma) -> None:
    code, out, _ = imma("attacks", "--json")
    assert code == 0
    assert {a["name"] for a in json.loads(out)["attacks"]} >= {"lora", "dreambooth"}
    code, out, _ = imma("attacks", "textual-inversion")
    assert code == 0
    assert "initializer" in out
    code, _, err = imma("attacks", "dreamboth")
    assert code == 2
    assert "dreambooth" in err


def test_no_value_that_is_to_be_typed_is_cut_off_on_a_narrow_terminal(imma, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = imma("attacks", "lora")
    assert code == 0
    assert "…" not in out


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_leaves_everything_as_it_was(tiny_checkpoint, tiny_config, pictures, tmp_path) -> None:
    before = tiny_checkpoint.read_bytes()
    command = [
        sys.executable, "-m", "imma_cli", "harden", "--method", "imma", str(tiny_checkpoint), "--config", str(tiny_config), "--concept", "x", "--attack", "lora",
        "--images", str(pictures), "--steps", "1000000", "--output", str(tmp_path / "hard.safetensors"), "--save-every", "0.01",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "hard.safetensors.imma-state"
    while process.poll() is None and not state.exists():  # then the steps have begun, however busy the machine is
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "No half file was left" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["hard.safetensors.imma-state"]
    assert tiny_checkpoint.read_bytes() == before


def test_a_log_says_how_long_it_takes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody watches a bar there. Here, a step takes seven seconds, and the first one thirty."""
    clock = iter([0.0, *range(30, 1000, 7)])
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "err", Console(file=sys.stderr))
    with progress.course("Hardening", 100, quiet=False) as advance:
        for done in range(1, 101):
            advance(done, attacker_loss=1.0)
    begun, *said = capsys.readouterr().err.splitlines()
    assert (begun, said[0]) == ("Hardening, 100 steps ...", "  about 0:11:26 left")
    assert said[1:3] == ["  12 done, about 0:10:16 left", "  22 done, about 0:09:06 left"]
    assert len(said) == 10
    assert "92 done" in said[-1]


def test_a_short_log_stays_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, *(30 + 0.1 * step for step in range(500))])
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "err", Console(file=sys.stderr))
    with progress.course("Hardening", 500, quiet=False) as advance:
        for done in range(1, 501):
            advance(done)
    assert len(capsys.readouterr().err.splitlines()) == 2
