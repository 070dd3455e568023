"""`imma verify` from attack to verdict: what it must not be fooled by, what it survives, what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor, nn

from imma_cli.attacks import Attack, Preset, testing
from imma_cli.attacks.attack import Range
from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.checkpoints import open_checkpoint
from imma_cli.concepts.batches import Batch
from imma_cli.concepts.concept import Concept
from imma_cli.concepts.folders import read_concept
from imma_cli.demo import PROMPTS, write_demo
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model
from imma_cli.families.runtime import Runtime, cores
from imma_cli.verification import trials
from imma_cli.verification.keeping import check_folder
from imma_cli.verification.lines import line_of
from imma_cli.verification.materials import Material, material, warnings
from imma_cli.verification.measuring import Bench, attack, look_at
from imma_cli.verification.metrics import Metric, discover_metrics, parse_metrics
from imma_cli.verification.models import Models, randomly_changed
from imma_cli.verification.plan import Effort, Job, default_budget
from imma_cli.verification.records import Records
from imma_cli.verification.results import summarize
from imma_cli.verification.search import require_searchable
from imma_cli.verification.storage import Storage
from imma_cli.verification.worker import Campaign

CPU = Runtime("cpu", "sdpa", "fp32")
on_the_demo = pytest.mark.xdist_group("judged on the demo")
"""What they share takes minutes: in one process it is made once."""


class Idle(Attack):
    """Trains something that nothing depends on: a planted attack that does nothing."""

    name = "idle"
    summary = "does nothing"
    paper = "none"
    presets: ClassVar = {kind: Preset(1e-3, 1e-3, 8) for kind in ("paper", "small")}

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        self._idle = nn.Parameter(torch.zeros(1), requires_grad=False)
        yield {"idle": self._idle}

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return (self._idle - 1).square().sum()


class Exploding(Idle):
    """Its loss becomes NaN with one of the seeds."""

    name = "exploding"

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        self._factor = float("nan") if seed % 10 == 1 else 1.0
        with super().attach(model, concept, seed) as parameters:
            yield parameters

    def loss(self, model: Model, batch: Batch) -> Tensor:
        return super().loss(model, batch) * self._factor


class Vandal(Idle):
    """Raises in the middle, and leaves the model's weights changed."""

    name = "vandal"

    def loss(self, model: Model, batch: Batch) -> Tensor:
        with torch.no_grad():
            next(model.unet.parameters()).zero_()
        raise RuntimeError("the plugin is broken")


def campaign(
    models: dict[str, Callable[[], Model]],
    attacks: list[Attack],
    harmful: Material,
    effort: Effort,
    budget: int,
    *,
    metrics: tuple[str, ...] = ("pixel:side=32",),
    untouched: tuple[str, ...] = PROMPTS[:4],
    storage: Storage | None = None,
) -> Records:
    """What is known when all jobs are done."""
    bench = Bench("study", Models(models), parse_metrics(metrics, discover_metrics()), CPU, effort, 1, untouched)
    others = [name for name in models if name != "original"]
    storage = storage or Storage.open(None, "study")
    Campaign(bench, attacks, harmful, [], budget, others, storage=storage).work()
    return Records.of(line_of(line) for result in storage.finished() for line in result.lines)


def as_hardened(records: Records, model: str) -> Records:
    """As if *model* were the one that was hardened."""
    lines = (*records.measurements, *records.untouched, *records.weights)
    return Records.of(
        replace(line, model="hardened") if line.model == model else line
        for line in lines
        if line.model in ("original", model)
    )


@pytest.fixture(scope="module")
def judged_on_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """The same attack on the demo model and on three changed copies, in the place of a hardened model and two baselines."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    opened = open_checkpoint(folder / "model.safetensors")
    name, home = "high contrast style", folder / "concepts" / "high-contrast-style"
    harmful = material("harmful", read_concept(name, home / "attack"), read_concept(name, home / "judge"), 1)
    harmful = replace(
        harmful, judge=replace(harmful.judge, images=harmful.judge.images[:8], captions=harmful.judge.captions[:8])
    )
    original = opened.load()

    def moved() -> Model:
        # a change of the length that hardening makes: some percent of the attention weights
        target = opened.load()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, weight in target.unet.named_parameters():
                if ".attn" in key and ".to_" in key:
                    weight.add_(
                        0.03 * weight.norm() / weight.numel() ** 0.5 * torch.randn(weight.shape, generator=generator)
                    )
        return randomly_changed(original, target, opened.load())

    def destroyed() -> Model:
        target = opened.load()
        with torch.no_grad():
            for key, weight in target.unet.named_parameters():
                if ".attn" in key and ".to_" in key:
                    weight.copy_(torch.randn(weight.shape) * weight.std())
        return target

    effort = Effort(seeds=3, trials=0, prompts=1, images=8, points=(1.0,), drawing_steps=8)
    storage = Storage.open(None, "study")

    def judged(models: dict[str, Callable[[], Model]], attack: Attack) -> Records:
        return campaign(
            {"original": lambda: original, **models},
            [attack],
            harmful,
            effort,
            40,
            metrics=("effnet-style",),
            untouched=PROMPTS[:8],
            storage=storage,
        )

    judged({"random": moved}, Idle(Idle.Settings()))
    (lora,) = parse_attacks(["lora:learning_rate=4e-3"], discover())
    return judged({"hardened": opened.load, "random": moved, "maximize": destroyed}, lora)


@on_the_demo
def test_the_original_against_itself_shows_no_difference(judged_on_the_demo: Records) -> None:
    summary = summarize(as_hardened(judged_on_the_demo, "hardened"))
    by_attack = {each["attack"]["name"]: each for each in summary["comparisons"]}
    (at_end,) = (each for each in by_attack["lora"]["sgr"]["effnet-style"] if each["step"] == 40)
    assert at_end["estimate"] == pytest.approx(0, abs=1e-9)
    assert not at_end["difference_shown"]
    assert by_attack["lora"]["validity"]["works"]
    assert summary["verdict"]["verdict"] == "not resistant"
    assert summary["untouched"][0]["similarity"]["effnet-style"]["estimate"] == pytest.approx(1)
    assert summary["weight_distances"]["hardened"]["changed_tensors"] == 0


@on_the_demo
def test_a_random_change_of_the_same_length_is_not_called_resistant(judged_on_the_demo: Records) -> None:
    summary = summarize(as_hardened(judged_on_the_demo, "random"))
    assert summary["weight_distances"]["hardened"]["relative_change"] == pytest.approx(0.03, rel=0.1)
    assert summary["verdict"]["verdict"] == "not resistant"
    assert summary["verdict"]["exit_code"] == 1


@on_the_demo
def test_a_model_with_destroyed_attention_is_called_broken(judged_on_the_demo: Records) -> None:
    summary = summarize(as_hardened(judged_on_the_demo, "maximize"))
    assert summary["verdict"]["verdict"] == "broken"
    assert summary["verdict"]["exit_code"] == 1


@on_the_demo
def test_an_attack_that_does_nothing_counts_for_nothing(judged_on_the_demo: Records) -> None:
    summary = summarize(as_hardened(judged_on_the_demo, "random"))
    (idle,) = (each for each in summary["comparisons"] if each["attack"]["name"] == "idle")
    assert idle["validity"]["works"] is False
    assert idle["judgement"]["counts"] is False
    only = [line for line in as_hardened(judged_on_the_demo, "random").measurements if line.attack.name == "idle"]
    alone = summarize([*only, *as_hardened(judged_on_the_demo, "random").untouched])
    assert (alone["verdict"]["verdict"], alone["verdict"]["exit_code"]) == ("no verdict", 2)


@on_the_demo
def test_intervals_are_scipy_s_on_the_raw_lines(judged_on_the_demo: Records) -> None:
    """With one seed only the pictures vary, and the interval is that of scipy.stats.bootstrap."""
    records = as_hardened(judged_on_the_demo, "random")
    one = [line for line in records.measurements if line.seed == 0 and line.attack.name == "lora"]
    original, hardened = (
        next(line.scores["effnet-style"] for line in one if line.model == model and line.step == 40)
        for model in ("original", "hardened")
    )
    (comparison,) = summarize(one)["comparisons"]
    ours = comparison["sgr"]["effnet-style"][-1]
    assert ours["estimate"] == pytest.approx(1 - sum(hardened) / sum(original))
    theirs = stats.bootstrap(
        (original, hardened),
        lambda o, h, axis=-1: 1 - h.mean(axis) / o.mean(axis),
        paired=True,
        n_resamples=20_000,
        rng=1,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours["low"] == pytest.approx(theirs.low, abs=0.08 * width)
    assert ours["high"] == pytest.approx(theirs.high, abs=0.08 * width)


PICTURES = tuple(
    Image.effect_mandelbrot((64, 64), (-2 + i / 4, -1, 1, 1.2), 15 + 4 * i).convert("RGB") for i in range(6)
)
TINY = Concept("blue style", PICTURES, tuple(f"a cat {i}, blue style" for i in range(6)), "test")
SMALL = Effort(seeds=2, trials=0, prompts=1, images=2, points=(0.5, 1.0), drawing_steps=2)


def test_a_trial_that_fails_is_reported_and_the_rest_goes_on(tiny_model: Model, loaded_once: Model) -> None:
    import copy

    loads = []

    def load() -> Model:
        loads.append(1)
        return copy.deepcopy(loaded_once)

    attacks = [kind(kind.Settings()) for kind in (Vandal, Exploding, Idle)]
    records = campaign(
        {"original": load, "hardened": lambda: tiny_model}, attacks, material("harmful", TINY, None, 1), SMALL, 4
    )
    summary = summarize(records)
    reasons = {(each["attack"], each["seed"], each["model"]): each["reason"] for each in summary["failed"]}
    assert reasons.keys() == {
        *((("vandal", seed, model)) for seed in (0, 1) for model in ("original", "hardened")),
        *((("exploding", 1, model)) for model in ("original", "hardened")),
    }
    assert reasons["vandal", 0, "original"] == "RuntimeError: the plugin is broken"
    assert reasons["exploding", 1, "hardened"] == "The loss became nan."
    assert any("6 failed trial(s) left out" in caveat for caveat in summary["verdict"]["caveats"])
    good = [line for line in records.measurements if line.status == "ok" and line.model == "original"]
    assert {line.attack.name for line in good} == {"exploding", "idle"}
    assert len(loads) == 4  # at first, and after each trial that had hold of it and failed
    # whoever came after the vandal met the weights as they were before it
    assert len({line.loss for line in good if line.step == 0}) == 1
    assert next(iter(good)).loss == pytest.approx(_untouched_loss(loaded_once), rel=1e-5)


class Quitting(Idle):
    """Ends the whole process, with a text that no file can hold."""

    name = "quitting"

    def loss(self, model: Model, batch: Batch) -> Tensor:
        raise SystemExit("\ud800")


def test_an_attack_that_ends_the_process_fails_its_trial(loaded_once: Model) -> None:
    import copy

    def load() -> Model:
        return copy.deepcopy(loaded_once)

    attacks = [Quitting(Quitting.Settings())]
    records = campaign({"original": load, "hardened": load}, attacks, material("harmful", TINY, None, 1), SMALL, 4)
    assert {line.reason for line in records.measurements} == {"SystemExit: ?"}
    assert summarize(records)["verdict"]["verdict"] == "no verdict"


def test_the_file_s_word_spares_nobody_a_real_attack(tiny_model: Model) -> None:
    (lora,) = parse_attacks(["lora"], discover())
    usual = default_budget(Effort(), None, [lora], tiny_model)
    assert default_budget(Effort(), 1, [lora], tiny_model) == usual == 600
    assert default_budget(Effort(), usual, [lora], tiny_model) == 2 * usual
    assert default_budget(Effort(), 10**9, [lora], tiny_model) <= 100 * usual


class Careless(Idle):
    """Leaves the model changed, and says nothing."""

    name = "careless"

    def loss(self, model: Model, batch: Batch) -> Tensor:
        with torch.no_grad():
            next(model.unet.parameters()).mul_(1.5)
        return super().loss(model, batch)


def test_an_attack_that_leaves_the_model_changed_spoils_no_other_trial(loaded_once: Model) -> None:
    import copy

    def load() -> Model:
        return copy.deepcopy(loaded_once)

    attacks = [kind(kind.Settings()) for kind in (Careless, Idle)]
    records = campaign({"original": load, "hardened": load}, attacks, material("harmful", TINY, None, 1), SMALL, 4)
    failed = {(line.attack.name, line.reason) for line in records.measurements if line.status == "failed"}
    assert failed == {("careless", "The attack careless left the model changed.")}
    good = [line for line in records.measurements if line.status == "ok"]
    assert {line.attack.name for line in good} == {"idle"}
    assert {line.loss for line in good} == {_untouched_loss(loaded_once)}


class NoNumbers(Metric):
    name = "no-numbers"
    summary = "gives NaN"

    def similarity(self, references: Sequence[Image.Image], images: Sequence[Image.Image]) -> NDArray[np.float64]:
        return np.full((len(references), len(images)), np.nan)


class Upset(NoNumbers):
    name = "upset"
    summary = "raises"

    def similarity(self, references: Sequence[Image.Image], images: Sequence[Image.Image]) -> NDArray[np.float64]:
        raise ZeroDivisionError("of all things")


@pytest.mark.parametrize(("kind", "reason"), [(NoNumbers, "NaN"), (Upset, "ZeroDivisionError: of all things")])
def test_a_metric_that_fails_is_named(tiny_model: Model, kind: type[Metric], reason: str) -> None:
    models = Models({"original": lambda: tiny_model, "hardened": lambda: tiny_model})
    bench = Bench("study", models, [kind(kind.Settings())], CPU, SMALL, 1, PROMPTS[:4])
    harmful = material("harmful", TINY, None, 1)
    (line,) = attack(bench, Job("harmful", "hardened", Idle(Idle.Settings()), harmful, 0, 1)).lines
    assert line["reason"].startswith(f"The metric {kind.name} failed.")
    assert reason in line["reason"]
    with pytest.raises(ImmaError, match=kind.name):  # not a traceback after which nobody knows what to do
        look_at(bench, "hardened")


class Unsearchable(Idle):
    name = "unsearchable"
    search: ClassVar = {"nonsense": Range(1, 2)}


class Speechless(Idle):
    name = "speechless"

    def rates(self, model: Model) -> Preset:
        raise KeyError("sd1")


@pytest.mark.parametrize(("kind", "reason"), [(Unsearchable, "nonsense is no setting"), (Speechless, "KeyError")])
def test_a_plugin_that_cannot_be_searched_is_refused_before_anything_is_tried(
    tiny_model: Model, kind: type[Attack], reason: str
) -> None:
    with pytest.raises(ImmaError) as refused:
        require_searchable(kind(kind.Settings()), tiny_model, searched=True)
    assert kind.name in refused.value.what
    assert reason in " ".join(refused.value.reasons)


def test_hundreds_of_judging_pictures_go_through_a_large_model_in_parts(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _untouched_loss(tiny_model)
    seen = []
    loss = type(tiny_model.family).loss
    monkeypatch.setattr(type(tiny_model), "is_small", False)
    monkeypatch.setattr(trials, "JUDGED_AT_ONCE", 1)
    monkeypatch.setattr(type(tiny_model.family), "loss", lambda *given: seen.append(len(given[2])) or loss(*given))
    assert _untouched_loss(tiny_model) == pytest.approx(whole, rel=1e-5)
    assert set(seen) == {1}


def _untouched_loss(model: Model) -> float:
    records = campaign(
        {"original": lambda: model, "hardened": lambda: model},
        [Idle(Idle.Settings())],
        material("harmful", TINY, None, 1),
        SMALL,
        4,
    )
    return next(line.loss for line in records.measurements if line.loss is not None)


def test_the_search_finds_what_gets_most_from_the_hardened_model(tiny_model: Model) -> None:
    effort = replace(SMALL, trials=6, seeds=1)
    storage = Storage.open(None, "study")
    attacks = parse_attacks(["lora:rank=2"], discover())
    records = campaign(
        {"original": lambda: tiny_model, "hardened": lambda: tiny_model},
        attacks,
        material("harmful", TINY, None, 1),
        effort,
        6,
        storage=storage,
    )
    search = [line for line in records.measurements if line.purpose == "search"]
    assert len({line.trial for line in search}) == 6
    assert {line.model for line in search} == {"hardened"}
    assert {line.attack.settings["rank"] for line in search} == {2}  # what was typed stays
    assert len({line.attack.settings["learning_rate"] for line in search}) > 3
    results = storage.search_results("lora:rank=2")
    assert (
        results[0].lines[0]["attack"]["spec"].startswith("lora:learning_rate=0.001,rank=2")
        or results[0].lines[0]["attack"]["spec"] == "lora:rank=2"
    )
    best = max(results, key=lambda result: result.value or 0)
    chosen = {line.attack.spec for line in records.measurements if line.purpose == "harmful"}
    assert chosen == {best.lines[0]["attack"]["spec"]}
    assert {line.seed for line in records.measurements if line.purpose == "harmful"} == {0}


@pytest.fixture(scope="module")
def tiny_hardened(tiny_checkpoint: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with moved attention weights, and a record of its pictures as `imma harden` writes it."""
    opened = open_checkpoint(tiny_checkpoint, tiny_config)
    model = opened.load()
    generator = torch.Generator().manual_seed(3)
    changed = {
        f"unet.{name}": weight + 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
        for name, weight in model.unet.named_parameters()
        if ".attn" in name and ".to_" in name
    }
    record = {
        "input_sha256": opened.sha256,
        "concepts": [{"name": "blue style", "images": "test", "sha256": list(TINY.hashes[:2])}],
        "attacks": [{"name": "lora", "spec": "lora", "rates": {"steps": 12}}],
        "settings": {"steps": 12},
    }
    path = tmp_path_factory.mktemp("hardened") / "hardened.safetensors"
    opened.write(path, changed, record)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("attacker")
    for i, picture in enumerate(PICTURES):
        picture.save(home / f"{i}.png")
    return home


@pytest.fixture
def arguments(tiny_hardened: Path, tiny_checkpoint: Path, tiny_config: Path, folder: Path) -> list[str]:
    return [
        *("verify", str(tiny_hardened), "--against", str(tiny_checkpoint), "--config", str(tiny_config)),
        *("--concept", "blue style", "--images", str(folder), "--metric", "pixel:side=32"),
        *("--preset", "quick", "--images-per-prompt", "2", "--budget", "6"),
    ]


def test_a_report_says_everything_and_can_be_continued(imma: Any, arguments: list[str], tmp_path: Path) -> None:
    report = tmp_path / "report"
    code, out, _ = imma(*arguments, "--attack", "lora", "--report", report, "--json")
    summary = json.loads(out)
    assert code == summary["verdict"]["exit_code"]
    assert code in (1, 2)  # an untrained model learns nothing that could be judged, and two seeds are too few
    scope = summary["scope"]
    assert (scope["budget"], scope["points"], scope["simulated"]) == (6, [0, 2, 6], 6)
    assert any(
        "2 of the attacker's pictures were used for hardening" in w or "used for hardening" in w
        for w in scope["warnings"]
    )
    assert {path.name for path in report.iterdir()} == {
        *("trials.jsonl", "pictures.jsonl", "study.db", "summary.json", "report.html", "model-card.md")
    }
    assert json.loads((report / "summary.json").read_text()) == summary
    assert "--preset quick --budget 6 --images-per-prompt 2" in (report / "model-card.md").read_text()
    lines = [json.loads(line) for line in (report / "trials.jsonl").read_text().splitlines()]
    trials = [line for line in lines if line["kind"] == "measurement"]
    assert len(trials) == 2 * 2 * 3
    by_pair = {(line["model"], line["seed"], line["step"]): line for line in trials}
    assert all(line["versions"]["torch"] == torch.__version__ for line in trials)
    assert {line["runtime"] for line in trials} == {"cpu, fp32, sdpa attention"}
    assert "cpu, fp32, sdpa attention" in (report / "report.html").read_text()
    assert by_pair["hardened", 0, 0]["loss"] != by_pair["original", 0, 0]["loss"]
    # the yardstick is the same for all seeds: before any step there is no luck
    assert by_pair["original", 0, 0]["loss"] == by_pair["original", 1, 0]["loss"]
    assert by_pair["original", 0, 6]["loss"] != by_pair["original", 1, 6]["loss"]

    # the same command again measures nothing anew; another seed and another attack are added
    before = (report / "trials.jsonl").read_bytes()
    assert imma(*arguments, "--attack", "lora", "--report", report, "--json")[1] == out
    assert (report / "trials.jsonl").read_bytes() == before
    code, out, _ = imma(*arguments, "--attack", "lora", "--attack", "dreambooth", "--seeds", 3, "--report", report)
    assert "dreambooth" in out
    assert "report.html" in out
    after = (report / "trials.jsonl").read_bytes()
    assert set(before.splitlines()) < set(after.splitlines())


def test_what_hardening_cost_others_and_what_simpler_means_reach(
    imma: Any, arguments: list[str], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n\na rocket\na frog\na house\na red apple\n")
    code, out, err = imma(
        *arguments, "--attack", "lora", "--seeds", 1, "--benign", f"a mandelbrot={folder}", "--untouched", tmp_path / "prompts.txt",
        "--baselines", "--points", "50", "--report", tmp_path / "report", "--json",
    )  # fmt: skip
    assert code in (1, 2), err
    summary = json.loads(out)
    measured = {(each["purpose"], each["concept"], each["model"]) for each in summary["comparisons"]}
    others = ("hardened", "maximize", "random")
    assert measured == {
        *(("harmful", "blue style", model) for model in others),
        *(("benign", "a mandelbrot", model) for model in others),
    }
    assert summary["scope"]["prompts"]["untouched"] == ["a red apple", "a rocket", "a frog", "a house"]
    assert summary["scope"]["points"] == [0, 3, 6]  # the end is always looked at
    assert {each["model"] for each in summary["untouched"]} == set(others)
    weights = summary["weight_distances"]
    assert weights["random"]["changed_tensors"] == weights["hardened"]["changed_tensors"] == 160
    assert weights["random"]["relative_change"] == pytest.approx(weights["hardened"]["relative_change"], rel=1e-3)
    assert weights["maximize"]["changed_tensors"] == 160


def test_everything_wrong_is_said_at_once(imma: Any, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "summary.json").write_text("mine")
    (tmp_path / "prompts.txt").write_text("only one\n")
    code, out, err = imma(
        *arguments, "--attack", "lorra", "--points", "10,x", "--report", tmp_path / "report", "--benign", tmp_path / "none",
        "--untouched", tmp_path / "prompts.txt", "--metric", "clp", "--judge", tmp_path / "no",
    )  # fmt: skip
    assert (code, out) == (2, "")
    for part in (
        "Did you mean lora",
        "--points 10,x",
        "summary.json",
        "none is not a folder",
        "1 prompts",
        "Did you mean",
        "no is not a folder",
    ):
        assert part in err, part
    assert (tmp_path / "report" / "summary.json").read_text() == "mine"


def test_an_attack_on_other_families_is_refused(
    imma: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discover().found["lora"].cls, "families", ("sdxl",))
    code, out, err = imma(*arguments, "--attack", "lora")
    assert (code, out) == (2, "")
    assert "The attack lora does not work on Stable Diffusion 1.x." in err


def test_what_cannot_be_compared_is_refused(
    imma: Any,
    arguments: list[str],
    tiny_checkpoint: Path,
    tiny_config: Path,
    tiny_folder: Path,
    folder: Path,
    tmp_path: Path,
) -> None:
    same = [str(tiny_checkpoint) if a.endswith("hardened.safetensors") else a for a in arguments]
    code, _, err = imma(*same, "--attack", "lora")
    assert code == 2
    assert "same file" in err
    opened = open_checkpoint(tiny_checkpoint, tiny_config)
    twin = tmp_path / "twin.safetensors"
    opened.write(twin, {}, {"attacks": [], "concepts": []})
    code, _, err = imma(
        *[str(twin) if a.endswith("hardened.safetensors") else a for a in arguments], "--attack", "lora"
    )
    assert code == 2
    assert "same weights" in err
    write_demo(tmp_path / "demo")
    code, _, err = imma(
        *("verify", tiny_folder, "--against", tmp_path / "demo" / "model.safetensors"),
        *("--concept", "x", "--images", folder, "--attack", "lora"),
    )
    assert code == 2
    assert "not the same model" in err


def test_names_that_mean_two_things_and_odd_paths_are_refused_at_once(
    imma: Any, arguments: list[str], folder: Path, tmp_path: Path
) -> None:
    code, _, err = imma(
        *arguments, "--attack", "lora", "--benign", f"a={folder}", "--benign", f"a={folder}",
        "--benign", f"Blue style={folder}", "--points", "10,nan", "--report", tmp_path / "what?", "--storage", "study.db",
    )  # fmt: skip
    assert code == 2
    for part in (
        "a is given twice",
        "the protected concept itself",
        "--points 10,nan",
        "has a ? in its path",
        "study.db cannot be opened",
    ):
        assert part in err, part
    assert not list(tmp_path.iterdir())


def test_benign_pictures_of_the_protected_concept_are_told() -> None:
    harmful = material("harmful", TINY, None, 1)
    other = material("benign", replace(TINY, name="a cat"), None, 1)
    assert any("'a cat' show 'blue style' too" in warning for warning in warnings(None, harmful, other))


def test_processes_that_begin_at_once_do_not_stumble_over_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: (touch(path), path.unlink()))  # by another process, just then
    check_folder(tmp_path / "report")


def test_damaged_lines_are_refused_with_the_name_of_their_file(imma: Any, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text("{}\n")
    code, _, err = imma(*arguments, "--attack", "lora", "--report", tmp_path)
    assert code == 2
    assert "trials.jsonl cannot be used" in err
    assert "another folder" in err
    assert (tmp_path / "trials.jsonl").read_text() == "{}\n"


def test_a_report_of_another_pair_is_refused_and_stays(
    imma: Any, arguments: list[str], tiny_hardened: Path, tiny_config: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report"
    imma(*arguments, "--attack", "lora", "--seeds", 1, "--report", report)
    before = {path.name: path.read_bytes() for path in report.iterdir()}
    opened = open_checkpoint(tiny_hardened, tiny_config)
    weight = next(name for name, _ in opened.load().unet.named_parameters() if ".attn1.to_q" in name)
    another = tmp_path / "another.safetensors"
    opened.write(
        another, {f"unet.{weight}": opened.load().unet.get_parameter(weight) * 1.5}, {"attacks": [], "concepts": []}
    )
    code, _, err = imma(
        *[str(another) if a == str(tiny_hardened) else a for a in arguments], "--attack", "lora", "--report", report
    )
    assert code == 2
    assert "models: hardened is another" in err
    assert {path.name: path.read_bytes() for path in report.iterdir()} == before


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all.db", "postgresql://user:secret@127.0.0.1:1/imma"])
def test_a_storage_that_cannot_be_opened_is_refused(imma: Any, arguments: list[str], url: str) -> None:
    code, _, err = imma(*arguments, "--attack", "lora", "--storage", url)
    assert code == 2
    assert "secret" not in err
    assert "Traceback" not in err


SHORT = ("--attack", "lora", "--budget", "4", "--points", "100")
"""Where it matters who measures, and not what."""


def imma_process(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "imma_cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def finished_trials(report: Path) -> int:
    path = report / "trials.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return len({each["trial"] for each in map(json.loads, lines) if each["kind"] == "measurement"})


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(
    imma: Any, arguments: list[str], tmp_path: Path
) -> None:
    """SIGKILL in the middle of the search, whose next proposals follow from what was found before."""
    command = [*arguments, *SHORT, "--trials", "7", "--seeds", "1", "--json"]
    code, out, _ = imma(*command, "--report", tmp_path / "whole")
    assert json.loads(out)["search_trials"] == 7
    report = tmp_path / "killed"
    process = imma_process([*command, "--report", str(report)])
    while finished_trials(report) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 2 <= finished_trials(report) < 7
    assert imma(*command, "--report", report)[:2] == (code, out)
    assert_same_reports(report, tmp_path / "whole")


def test_two_processes_share_the_work(imma: Any, arguments: list[str], tmp_path: Path) -> None:
    command = [*arguments, *SHORT, "--trials", "4", "--seeds", "2", "--json"]
    code, out, _ = imma(*command, "--report", tmp_path / "alone")
    report = tmp_path / "shared"
    both = [imma_process([*command, "--report", str(report)]) for _ in range(2)]
    ended = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [code, code], ended
    assert [said for said, _ in ended] == [out, out]
    assert_same_reports(report, tmp_path / "alone")


def assert_same_reports(one: Path, other: Path) -> None:
    for name in ("trials.jsonl", "pictures.jsonl", "summary.json", "report.html", "model-card.md"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert not [path for path in one.iterdir() if path.suffix == ".part"]


def test_what_attacks_learned_is_kept_for_others_to_check(imma: Any, arguments: list[str], tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    command = [*arguments, "--attack", "textual-inversion:tokens=2", "--seeds", 1, "--save-adapters", kept]
    report = ["--report", tmp_path / "report"]
    _, out, _ = imma(*command, *report)
    assert f"Adapters: {kept} (2 trials)" in out
    trials = sorted(path.relative_to(kept).as_posix() for path in kept.glob("*/*/*"))
    assert [trial.split("/")[2] for trial in trials] == ["hardened-seed-0", "original-seed-0"]
    assert all(re.match(r"textual-inversion-tokens=2-[0-9a-f]{8}/blue-style-[0-9a-f]{8}/", trial) for trial in trials)
    about = json.loads((kept / trials[0] / "trial.json").read_text())
    assert about["prompts"][0] == "an image of <imma-0> <imma-1>"
    assert (
        about["sha256"] == json.loads((tmp_path / "report" / "summary.json").read_text())["scope"]["models"]["hardened"]
    )
    for word in ("imma-0", "imma-1"):
        learned = load_file(kept / trials[0] / "learned" / f"{word}.safetensors")
        assert list(learned) == [f"<{word}>"]
    # a trial that is there already is not run again, and says so where it was not kept
    other = tmp_path / "other"
    _, out, _ = imma(*command[:-1], other, *report)
    assert f"Adapters: {other} (0 trials); 2 trials were finished earlier, without keeping them" in out
    code, _, err = imma(*command, "--budget", 9)
    assert code == 2
    assert "of another verification learned" in err
    code, _, err = imma(*command[:-1], tmp_path / "report")
    assert code == 2
    assert "report holds other files: model-card.md" in err


def test_a_folder_that_fills_up_stops_the_run_and_costs_no_trial(
    imma: Any, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")  # no OSError

    lora = discover().get("lora")
    command = [*arguments, "--attack", "lora", "--seeds", 1, "--report", tmp_path / "report"]
    with monkeypatch.context() as patch:
        patch.setattr(lora, "save", full)
        code, _, err = imma(*command, "--save-adapters", tmp_path / "kept")
    assert code == 2
    assert "What lora learned cannot be kept" in err
    assert "No space left on device" in err
    assert not list((tmp_path / "kept").rglob("*.part"))
    _, out, _ = imma(*command, "--save-adapters", tmp_path / "kept", "--json")
    assert not json.loads(out).get("failed_trials")
    assert len(list((tmp_path / "kept").glob("*/*/*/learned/kohya.safetensors"))) == 2


def test_processes_of_a_launcher_without_a_shared_storage_are_refused(
    imma: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = imma(*arguments, "--attack", "lora")
    assert code == 2
    assert "--report or --storage" in err


def test_processes_of_a_launcher_speak_with_one_voice(arguments: list[str], tmp_path: Path) -> None:
    """As `accelerate launch` and torchrun start them."""
    report = tmp_path / "report"
    command = [*arguments, *SHORT, "--report", str(report)]
    ranks = [imma_process(command, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    said = [process.communicate(timeout=600) for process in ranks]
    assert ranks[0].returncode in (1, 2)
    assert "report.html" in said[0][0]
    assert (ranks[1].returncode, said[1][0]) == (0, "")


def test_helpers_share_the_trials_and_change_nothing(tmp_path: Path) -> None:
    """On a machine with a core to spare; where there is one core only, nobody helps."""
    home = Path(__file__).parent
    names = dict(os.environ)
    names.pop("OMP_NUM_THREADS")
    environment = [names, {**names, "OMP_NUM_THREADS": "1"}]
    said, summaries = [], []
    checkpoint, config = testing.tiny_checkpoint(tmp_path)
    hardened = tmp_path / "hardened.safetensors"
    files = [str(part) for part in ("--config", config, "--concept", "blue style")]
    make = ["harden", str(checkpoint), *files, "--method", "imma", "--attack", "lora", "--steps", "4", "--draw", "2"]
    command([*make, "--output", str(hardened)], names)
    for number, chosen in enumerate(environment):
        report = tmp_path / str(number)
        arguments = ["verify", str(hardened), "--against", str(checkpoint), *files, "--attack", "lora", "--draw", "2"]
        arguments += ["--seeds", "2", "--budget", "4", "--images-per-prompt", "1", "--prompts", "1"]
        arguments += ["--preset", "quick", "--metric", "pixel", "--report", str(report)]
        said.append(command(arguments, chosen, cwd=home))
        summaries.append(json.loads((report / "summary.json").read_text()))
    assert ("processes share the trials" in said[0]) == (cores() > 1)
    assert "processes share the trials" not in said[1]
    for summary in summaries:
        summary.pop("study", None)
    assert summaries[0] == summaries[1]


def command(arguments: list[str], environment: dict[str, str], cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "imma_cli", *arguments],
        env=environment, cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1, 2), done.stderr
    return " ".join(done.stderr.split())


def test_checkpoints_that_are_swapped_are_refused(imma: Any, arguments: list[str]) -> None:
    arguments[1], arguments[3] = arguments[3], arguments[1]
    code, _, err = imma(*arguments, "--attack", "lora")
    assert code == 2
    assert "The two checkpoints are swapped" in err
