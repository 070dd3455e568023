"""What memory a run is going to need, what fits, and what is said where it was not enough."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_imma import some_concept
from transformers import CLIPTokenizer

from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.checkpoints.row_map import described_network
from imma_cli.cli import fitting
from imma_cli.errors import ImmaError
from imma_cli.families import CONFIGS, family_named
from imma_cli.families.model import Model
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.estimate import estimate
from imma_cli.immunizers.imma import ImmunizerSettings, immunize
from imma_cli.immunizers.keeper import FileKeeper
from imma_cli.immunizers.settings import EpisodesSettings

CPU = Runtime("cpu", "sdpa", "fp32")
SETTINGS = ImmunizerSettings()

MEASURE = """
import json, sys
from pathlib import Path
import psutil, torch
# first, so that what they take is not counted
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel
torch.set_num_threads(1)
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.estimate import estimate
from imma_cli.immunizers.imma import ImmunizerSettings
from imma_cli.immunizers.memory import peak_memory
from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from test_imma import some_concept
from test_fitting import random_model
from imma_cli.immunizers.episodes import immunize_in_episodes
from imma_cli.immunizers.imma import immunize
from imma_cli.immunizers.retention import retain
from imma_cli.immunizers.settings import EpisodesSettings

config, low, again, method = Path(sys.argv[1]), sys.argv[2] == "low", sys.argv[3], sys.argv[4]
attacks = parse_attacks(["lora"], discover())
if method == "episodes":
    settings = EpisodesSettings(steps=6, checks=0)
else:
    settings = ImmunizerSettings(steps=4, batch_size=3 if method == "batch" else 1)
runtime, concepts = Runtime("cpu", "sdpa", "fp32"), [some_concept()]
imported = peak_memory(runtime)
expected = estimate(config, attacks, settings, halved=low, recomputed=again, on_cpu=True)
for_estimate = peak_memory(runtime) - imported
before = psutil.Process().memory_info().rss
model = random_model(config)
size = sum(4 * weight.numel() for weight in model.unet.parameters())
model = Runtime("cpu", "sdpa", "fp32", halved=low).apply(model, recomputed=again)
if method == "episodes":
    retention = retain(model, ["a cat", "moon", "tree", "sun"], noisings=8, seed=0, runtime=runtime)
    immunize_in_episodes(model, attacks, concepts, settings, runtime, retention, on_encoded=lambda: model.release(["text_encoder"]))
else:
    immunize(model, attacks, concepts, settings, runtime, on_encoded=lambda: model.release(()))
print(json.dumps([expected.peak + before, peak_memory(runtime), for_estimate, size]))
"""


def wider(config: Path, factor: int, folder: Path) -> Path:
    """The demo's configuration with networks so many times as wide."""
    import shutil

    shutil.copytree(config, folder)
    path = folder / "unet" / "config.json"
    described = json.loads(path.read_text())
    described["block_out_channels"] = [factor * width for width in described["block_out_channels"]]
    path.write_text(json.dumps(described))
    return folder


def random_model(config: Path) -> Model:
    """What the folder *config* describes, with random weights."""
    networks = {}
    for part in ("unet", "vae", "text_encoder"):
        networks[part] = described_network(part, config).to_empty(device="cpu")
        with torch.no_grad():
            for weight in networks[part].parameters():
                weight.normal_(0, 0.02)
            for buffer in networks[part].buffers():
                buffer.copy_(torch.arange(buffer.numel()).reshape(buffer.shape))
    tokenizer = CLIPTokenizer.from_pretrained(config / "tokenizer")
    scheduler = json.loads((config / "scheduler" / "scheduler_config.json").read_text())
    return family_named("sd1").assemble(**networks, tokenizer=tokenizer, scheduler=scheduler)


@pytest.mark.parametrize(
    ("factor", "saving", "again", "method"),
    [
        (1, "plain", "nothing", "published"),
        (2, "plain", "nothing", "published"),
        (4, "plain", "activations", "published"),
        (4, "low", "activations", "published"),
        (2, "plain", "blocks", "batch"),
        (2, "plain", "nothing", "episodes"),
    ],
)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(
    tmp_path: Path, factor: int, saving: str, again: str, method: str
) -> None:
    config = wider(CONFIGS / "demo", factor, tmp_path / "config")
    command = [sys.executable, "-c", MEASURE, str(config), saving, again, method]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0, done.stderr
    expected, measured, for_estimate, size = json.loads(done.stdout.strip().split("\n")[-1])
    assert expected == pytest.approx(measured, rel=0.15)
    # the rest of the run would come on top of what the estimate itself has taken
    assert for_estimate < max(size / 4, 150e6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("saving", fitting.LADDER, ids=lambda saving: saving.options or "nothing saved")
def test_the_estimate_is_within_15_percent_of_the_measured_peak_on_a_gpu(
    tmp_path: Path, precision: str, saving: fitting.Saving
) -> None:
    """What torch's allocator gives out: the driver's own share is not in either number."""
    config = wider(CONFIGS / "demo", 8, tmp_path / "config")
    runtime = Runtime("cuda", "sdpa", precision, halved=saving.low_memory)
    attacks, settings = parse_attacks(["lora"], discover()), replace(SETTINGS, steps=4)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = runtime.apply(random_model(config), recomputed=saving.recomputed)
    immunize(model, attacks, [some_concept()], settings, runtime, on_encoded=lambda: model.release(()))
    measured = torch.cuda.max_memory_allocated() - before
    assert fitting.expected(config, attacks, settings, runtime, saving).peak == pytest.approx(measured, rel=0.15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
def test_what_a_gpu_would_need_is_estimated_where_there_is_none(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path
) -> None:
    command = [
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue", "--images", pictures, "--attack", "lora",
        "--output", tmp_path / "hard.safetensors", "--dry-run", "--device",
    ]  # fmt: skip

    def needed(*more: str) -> int:
        code, out, err = imma(*command, "cuda:1", "--json", *more)
        assert code == 0, err
        plan = json.loads(out)
        assert plan["runtime"]["device"] == "cuda:1"
        return int(plan["estimated_peak_bytes"])

    assert needed("--low-memory") < needed()
    code, out, _ = imma(*command, "cuda")
    assert code == 0
    assert "estimated on this machine, which has no CUDA device" in " ".join(out.split())
    (tmp_path / "hard.safetensors").touch()
    code, out, _ = imma(*command, "cuda", "--erase", "uce")
    assert "erase first, by uce: what that needs is not estimated" in " ".join(out.split())
    assert "it exists: give --force" in " ".join(out.split())
    (tmp_path / "hard.safetensors").unlink()
    code, _, err = imma(*command, "cuda", "--steps", 2)
    assert code == 2
    assert "cannot all be simulated in 2 steps" in " ".join(err.split())
    code, _, err = imma(*command, "cuda", "--profile", tmp_path / "trace.json")
    assert code == 2
    assert "writes nothing, and so no --profile" in " ".join(err.split())
    code, _, err = imma(*command, "cuda", "--fit")
    assert code == 2
    assert "--fit has to know what is free" in err
    code, _, err = imma(*command, "cuda of mine")
    assert code == 2
    assert "choose auto, cpu, cuda or cuda:N" in " ".join(err.split())
    assert not list(tmp_path.iterdir())


def test_saving_memory_is_worth_it(tmp_path: Path) -> None:
    attacks, config = parse_attacks(["lora"], discover()), wider(CONFIGS / "demo", 4, tmp_path / "config")

    def peak(*saving: bool) -> int:
        return fitting.expected(config, attacks, ImmunizerSettings(), CPU, fitting.Saving(*saving)).peak

    assert peak(True) < 0.8 * peak()


def test_fit_takes_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    attacks = parse_attacks(["lora"], discover())
    needs = [fitting.expected(CONFIGS / "demo", attacks, SETTINGS, CPU, saving).peak for saving in fitting.LADDER]

    def chosen(free: float) -> fitting.Saving:
        monkeypatch.setattr(fitting, "free_memory", lambda runtime: free / fitting.SPARE)
        return fitting.plan(CONFIGS / "demo", attacks, SETTINGS, CPU, fitting.Saving(), fit=True, named=True)[0]

    assert chosen(needs[0] + 1) == fitting.Saving()
    assert chosen(needs[0] - 1) != fitting.Saving()
    assert chosen(min(needs) + 1).low_memory


def test_fit_goes_on_as_the_interrupted_run_began(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path, monkeypatch
) -> None:
    """Memory that has become free since then, or scarce, is no reason to lose the saved state."""
    attacks = parse_attacks(["lora"], discover())
    needs = [fitting.expected(tiny_config, attacks, SETTINGS, CPU, saving).peak for saving in fitting.LADDER]
    command = [
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue", "--images", pictures, "--fit", "--method", "imma",
        "--attack", "lora", "--device", "cpu", "--steps", 12, "--output", tmp_path / "hard.safetensors",
    ]  # fmt: skip

    def run(free: float, *more: str) -> str:
        monkeypatch.setattr(fitting, "free_memory", lambda runtime: free / fitting.SPARE)
        code, _, err = imma(*command, *more)
        assert code == 0, err
        return " ".join(err.split())

    offer = FileKeeper.offer

    def interrupted(self: FileKeeper, state: Any) -> None:
        self.due = 0  # saves at once
        offer(self, state)
        raise ImmaError("The power fails.")

    with monkeypatch.context() as failing:
        failing.setattr(FileKeeper, "offer", interrupted)
        failing.setattr(fitting, "free_memory", lambda runtime: (needs[1] + 1) / fitting.SPARE)
        code, _, err = imma(*command)
        assert (code, "The power fails." in err) == (2, True), err
    code, _, err = imma(*command, "--resume", "--batch-size", 2, "--seed", 3)
    assert code == 2
    assert [
        part for part in ("settings.batch_size: 1 then, 2 now", "settings.seed: 0 then, 3 now") if part not in err
    ] == []
    assert "GB with --low-memory" in run(needs[0] + 1, "--resume", "--dry-run")
    said = run(needs[0] + 1, "--resume")
    assert "GB with --low-memory" in said
    assert "after cycle 1" in said


def test_where_saving_is_not_enough_moments_take_8_bits_and_batches_are_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attacks, asked = parse_attacks(["lora"], discover()), ImmunizerSettings(batch_size=64)
    config, everything = CONFIGS / "demo", fitting.LADDER[-1]

    def need(settings: ImmunizerSettings) -> int:
        return fitting.expected(config, attacks, settings, CPU, everything).peak

    def chosen(free: float) -> ImmunizerSettings:
        monkeypatch.setattr(fitting, "free_memory", lambda runtime: free / fitting.SPARE)
        found = fitting.plan(config, attacks, asked, CPU, everything, fit=True, named=True)[1]
        assert isinstance(found, ImmunizerSettings)
        return found

    eight_bit = replace(asked, eight_bit=True)
    split = replace(asked, batch_size=1, accumulate=64)
    assert need(asked) > need(eight_bit) > need(split) > need(replace(split, eight_bit=True))
    assert chosen(need(asked) + 1) == asked
    assert chosen(need(asked) - 1) == eight_bit
    assert chosen(need(eight_bit) - 1) == split
    assert chosen(need(split) - 1) == replace(split, eight_bit=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # not installed: not chosen
    assert chosen(need(asked) - 1) == split


def test_what_fits_nowhere_is_refused_with_what_it_needs(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(fitting, "free_memory", lambda runtime: 1000)
    output = tmp_path / "never.safetensors"
    code, _, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue", "--images", pictures, "--fit",
        "--method", "imma", "--attack", "lora", "--output", output,
    )  # fmt: skip
    assert code == 2
    assert "No settings fit: 0.0 GB are free on cpu" in " ".join(err.split())
    assert not output.exists()


def test_fit_leaves_out_what_takes_too_much(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path, monkeypatch
) -> None:
    """The attacks that are simulated by default include one that trains a copy of all weights."""
    attacks = parse_attacks(["lora", "loha"], discover())
    low = fitting.expected(tiny_config, attacks, EpisodesSettings(), CPU, fitting.Saving(low_memory=True)).peak
    monkeypatch.setattr(fitting, "free_memory", lambda runtime: (low + 1) / fitting.SPARE)
    code, _, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue", "--images", pictures, "--fit",
        "--steps", 12, "--device", "cpu", "--output", tmp_path / "hard.safetensors",
    )  # fmt: skip
    said = " ".join(err.split())
    assert code == 0, err
    assert "GB with --low-memory" in said
    assert "Left out, as it takes a second copy of all weights: full-finetune" in said


def test_a_dry_run_says_what_it_expects(imma, tiny_checkpoint, tiny_config, pictures) -> None:
    code, out, _ = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue", "--images", pictures, "--dry-run",
        "--attack", "lora", "--steps", 12, "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["estimated_peak_bytes"] > 0


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
)  # fmt: skip
def test_running_out_of_memory_says_what_to_change(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path, monkeypatch, error
) -> None:
    from imma_cli.cli import hardening

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(hardening, "carry_out", full)
    output = tmp_path / "never.safetensors"
    code, _, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue", "--images", pictures, "--output", output,
    )  # fmt: skip
    assert code == 2
    assert "ran out. Nothing was written" in err
    assert "--fit" in err
    assert "Traceback" not in err
    assert not output.exists()


def test_the_estimate_counts_what_an_attack_in_place_copies() -> None:
    def peak(name: str) -> int:
        attacks = parse_attacks([name], discover())
        settings = ImmunizerSettings()
        return estimate(CONFIGS / "demo", attacks, settings, halved=False, recomputed="nothing", on_cpu=True).peak

    assert peak("full-finetune") > 2 * peak("lora")
