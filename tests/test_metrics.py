"""Metrics: what they measure, what they were given to see, and how plugins bring them."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from imma_cli.attacks import manager, points
from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import describe, record
from imma_cli.cli import main
from imma_cli.concepts.folders import read_concept
from imma_cli.errors import ImmaError
from imma_cli.verification.metrics import discover_metrics, parse_metrics

POINTS = [EntryPoint(n, f"imma_metrics.{n}", "imma") for n in ("effnet", "pixels", "clip", "dino", "lpips")]
REGISTRY = discover_metrics(POINTS)
NAMES = ["effnet", "effnet-style", "pixel", "ssim", "clip", "dino", "dinov2", "lpips", "lpips-vgg"]
CONCEPTS = Path(manager.__file__).parents[1] / "demo" / "concepts"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A few soft blobs of colour."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


PICTURES = [picture(0), picture(1, (80, 48)), picture(2, (48, 70))]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random models of the real classes, as their own save_pretrained and torch.save write them."""
    from imma_metrics.lpips import NETS, Conv, _build
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config={**SMALL, "vocab_size": 99}, projection_dim=12))
    clip.half().save_pretrained(root / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(root / "clip")
    # as DINO's file: without a pooler
    ViTModel(ViTConfig(**vision), add_pooling_layer=False).save_pretrained(root / "dino")
    mean, std = IMAGENET
    ViTImageProcessorPil(size=32, image_mean=mean, image_std=std, resample=2).save_pretrained(root / "dino")
    Dinov2Model(Dinov2Config(**vision)).save_pretrained(root / "dinov2")
    BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=32, image_mean=mean, image_std=std).save_pretrained(
        root / "dinov2"
    )
    for name, net in NETS.items():
        network = _build(net)
        state = {f"features.{key}": value for key, value in network.state_dict().items()}
        torch.save(state | {"classifier.6.bias": torch.zeros(3)}, root / f"{name}-backbone.pth")
        channels = [layer.channels for layer in net.layers if isinstance(layer, Conv) and layer.tapped]
        linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) / c for i, c in enumerate(channels)}
        torch.save(linear, root / f"{name}.pth")
    return root


def spec(name: str, weights: Path) -> str:
    if name.startswith("lpips"):
        net = "vgg" if name.endswith("vgg") else "alex"
        return f"lpips:net={net},side=64,backbone={weights / f'{net}-backbone.pth'},linear={weights / f'{net}.pth'}"
    if name.startswith(("clip", "dino")):
        return f"{name[:4]}:model={weights / name}"
    return name


def measure(text: str, references: list[Image.Image], images: list[Image.Image]) -> NDArray[np.float64]:
    (metric,) = parse_metrics([text], REGISTRY)
    metric.prepare()
    assert metric.missing() == []
    return metric.similarity(references, images)


@pytest.mark.parametrize("name", NAMES)
def test_every_reference_is_compared_with_every_picture(name: str, weights: Path) -> None:
    (metric,) = parse_metrics([spec(name, weights)], REGISTRY)
    metric.prepare()
    table = metric.similarity(PICTURES[:2], PICTURES)
    assert table.shape == (2, 3)
    assert table.dtype == np.float64
    assert np.isfinite(table).all()
    np.testing.assert_allclose(table[[0, 1], [0, 1]], 1, atol=1e-6)
    assert (table[~np.eye(2, 3, dtype=bool)] < 1 - 1e-6).all()
    # a number depends on its two pictures alone, whichever of them is the reference
    np.testing.assert_allclose(metric.similarity(PICTURES[2:], PICTURES[1:2]), table[1:, 2:], atol=1e-5)
    np.testing.assert_array_equal(metric.nearest(PICTURES[:2], PICTURES), table.max(0))
    assert metric.similarity([], PICTURES).shape == (0, 3)
    assert metric.similarity(PICTURES, []).shape == (3, 0)
    with pytest.raises(ValueError, match="no references"):
        metric.nearest([], PICTURES)
    gray = [image.convert("L") for image in PICTURES[:1]]
    assert metric.similarity(gray, [gray[0].convert("RGB")]).item() == pytest.approx(1, abs=1e-6)


def test_pixel_is_the_mean_absolute_difference_over_the_full_range() -> None:
    black, white, gray = (Image.new("RGB", (20, 10), c) for c in ("black", "white", (51, 51, 51)))
    np.testing.assert_allclose(measure("pixel", [black], [black, white, gray]), [[1, 0, 0.8]], atol=1e-6)
    # the middle square is looked at, not the whole picture squeezed
    wide = Image.new("RGB", (192, 64), "black")
    wide.paste("white", (64, 0, 128, 64))
    np.testing.assert_allclose(measure("pixel:side=64", [wide], [white]), [[1]], atol=1e-6)


def test_ssim_is_the_published_formula() -> None:
    a, b = (np.asarray(picture(i, (32, 32)), np.float64).transpose(2, 0, 1) / 255 for i in (3, 4))
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    likeness = []
    for x, y in zip(a, b, strict=True):
        for i in range(22):
            for j in range(22):
                u, v = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mu, mv = (window * u).sum(), (window * v).sum()
                su, sv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
                covariance = (window * (u - mu) * (v - mv)).sum()
                likeness.append(
                    (2 * mu * mv + 1e-4) * (2 * covariance + 9e-4) / ((mu**2 + mv**2 + 1e-4) * (su + sv + 9e-4))
                )
    measured = measure("ssim:side=32", [picture(3, (32, 32))], [picture(4, (32, 32))]).item()
    assert measured == pytest.approx(np.mean(likeness), abs=1e-6)


def pixel_values(
    image: Image.Image, shortest: int | None, resample: Image.Resampling, mean: Any, std: Any
) -> torch.Tensor:
    """A picture for a model of 32 pixels, by the plain formula: scaled (cut to the middle, or squeezed), then standardised."""
    if shortest is None:
        image = image.resize((32, 32), resample)
    else:
        width, height = (int(shortest * n / min(image.size)) for n in image.size)
        left, top = (width - 32) // 2, (height - 32) // 2
        image = image.resize((width, height), resample).crop((left, top, left + 32, top + 32))
    scaled = torch.tensor(np.asarray(image) / 255).float()
    return ((scaled - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None]


def cosines(embeddings: list[torch.Tensor]) -> NDArray[Any]:
    unit = F.normalize(torch.cat(embeddings).detach(), dim=-1)
    return (unit @ unit.T).numpy()


def test_clip_sees_what_clip_was_trained_to_see(weights: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(weights / "clip", dtype=torch.float32).eval()
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    seen = [pixel_values(image, 32, Image.Resampling.BICUBIC, mean, std) for image in PICTURES]
    expected = cosines([model.visual_projection(model.vision_model(pixel_values=x).pooler_output) for x in seen])
    np.testing.assert_allclose(measure(spec("clip", weights), PICTURES, PICTURES), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shortest", "resample"),
    [("dino", None, Image.Resampling.BILINEAR), ("dinov2", 36, Image.Resampling.BICUBIC)],
)
def test_dino_compares_class_tokens(name: str, shortest: int | None, resample: Image.Resampling, weights: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(weights / name).eval()
    seen = [pixel_values(image, shortest, resample, *IMAGENET) for image in PICTURES]
    expected = cosines([model(pixel_values=x).last_hidden_state[:, 0] for x in seen])
    np.testing.assert_allclose(measure(spec(name, weights), PICTURES, PICTURES), expected, atol=1e-5)


def test_lpips_is_the_published_formula(weights: Path) -> None:
    state, linear = (torch.load(weights / f) for f in ("alex-backbone.pth", "alex.pth"))

    def features(image: Image.Image) -> list[torch.Tensor]:
        x = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            1, 3, 1, 1
        )
        taken = []
        for index, stride, padding, pooled in (
            (0, 4, 2, False),
            (3, 1, 2, True),
            (6, 1, 1, True),
            (8, 1, 1, False),
            (10, 1, 1, False),
        ):
            x = F.max_pool2d(x, 3, 2) if pooled else x
            x = F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], stride, padding).relu()
            taken.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return taken

    pairs = zip(features(picture(5)), features(picture(6)), strict=True)
    distance = sum(
        F.conv2d((a - b) ** 2, linear[f"lin{i}.model.1.weight"]).mean().item() for i, (a, b) in enumerate(pairs)
    )
    measured = measure(spec("lpips", weights), [picture(5)], [picture(6)]).item()
    assert measured == pytest.approx(1 - distance, abs=1e-5)
    assert distance > 1e-3


def test_effnet_knows_a_concept_again_and_its_style_metric_a_style() -> None:
    guitar, adventurer, style = (
        {part: list(read_concept("x", CONCEPTS / name / part).images[:4]) for part in ("defend", "judge")}
        for name in ("guitar", "adventurer", "high-contrast-style")
    )
    content = measure("effnet", guitar["defend"] + adventurer["defend"], guitar["judge"] + adventurer["judge"])
    assert content[:4, :4].mean() > content[:4, 4:].mean() + 0.2
    assert content[4:, 4:].mean() > content[4:, :4].mean() + 0.2
    drawn = measure("effnet-style", style["defend"], style["judge"] + guitar["judge"])
    assert drawn[:, :4].min() > drawn[:, 4:].max()
    assert drawn.min() >= 0


PLUGIN = """
from imma_cli.verification.metrics import Metric, PluginSettings, hookimpl
from imma_cli.attacks import Attack
class M(Metric):
    name = 'm'; summary = 's'
    def similarity(self, references, images): ...
"""
BROKEN = {
    "raises": ("raise OSError('no library')", "no library"),
    "misspelt": (f"{PLUGIN}\n@hookimpl\ndef imma_metric():\n    return [M]", "imma_metric"),
    "nothing": ("", "no attack and no metric"),
    "empty": (f"{PLUGIN}\n@hookimpl\ndef imma_metrics():\n    return []", "no attack and no metric"),
    "nameless": (f"{PLUGIN}del M.name\n@hookimpl\ndef imma_metrics():\n    return [M]", "name"),
    "untypable": (f"{PLUGIN}M.name = 3\n@hookimpl\ndef imma_metrics():\n    return [M]", "cannot be typed"),
    "abstract": (f"{PLUGIN}class N(Metric):\n  name = summary = 'n'\n@hookimpl\ndef imma_metrics():\n    return [N]", "simila"),
    "settings": (f"{PLUGIN}M.Settings = dict\n@hookimpl\ndef imma_metrics():\n    return [M]", "PluginSettings"),
    "foreign": (f"{PLUGIN}\n@hookimpl\ndef imma_metrics():\n    return [Attack]", "Metric"),
    "twin": (f"{PLUGIN}M.name = 'pixel'\n@hookimpl\ndef imma_metrics():\n    return [M]", "already"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_reported_and_the_rest_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, reason = BROKEN[name]
    (tmp_path / f"metric_{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    registry = discover_metrics([POINTS[1], EntryPoint(f"z-{name}", f"metric_{name}", "imma")])
    assert set(registry.found) == {"pixel", "ssim"}
    (broken,) = registry.broken
    assert broken.plugin == f"z-{name}"
    assert reason in broken.reason


def test_a_plugin_may_bring_attacks_metrics_or_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = f"{PLUGIN}\nfrom imma_attacks.lora import imma_attacks\n@hookimpl\ndef imma_metrics():\n    return [M]"
    (tmp_path / "brings_both.py").write_text(both)
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("both", "brings_both", "imma"), EntryPoint("pixels", "imma_metrics.pixels", "imma")]
    attacks, metrics = discover(points), discover_metrics(points)
    assert (set(attacks.found), attacks.broken) == ({"lora"}, ())
    assert (set(metrics.found), metrics.broken) == ({"m", "pixel", "ssim"}, ())


def test_everything_wrong_with_metrics_is_said_at_once() -> None:
    wrong = {
        "efnet": "Did you mean effnet",
        "clip:modle=x": "no setting 'modle'; did you mean model",
        "pixel:side=wide": "side='wide' is not a whole number",
        "ssim:side=8": "side must be from 32 to 2048, not 8",
        "lpips:net=resnet": "net must be alex or vgg",
        "effnet:size=3": "no setting 'size'; there are: none",
    }
    with pytest.raises(ImmaError) as caught:
        parse_metrics([*wrong, "pixel", "pixel"], REGISTRY)
    said = str(caught.value)
    assert [part for part in (*wrong.values(), "pixel is given twice") if part not in said] == []
    assert "imma metrics NAME" in said


def test_settings_are_described_and_recorded() -> None:
    for found in REGISTRY.found.values():
        assert all(s.meaning for s in describe(found.cls.Settings)), found.cls.name
    (metric,) = parse_metrics(["ssim:side=64"], REGISTRY)
    assert record(metric) == {"name": "ssim", "spec": "ssim:side=64", "settings": {"side": 64}}


def test_missing_weights_are_refused_before_anything_is_measured(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights / "clip", tmp_path / "torn")
    file = tmp_path / "torn" / "model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if k != "visual_projection.weight"}, file, {"format": "pt"})
    shutil.copytree(weights / "clip", tmp_path / "nan")
    save_file({**whole, "visual_projection.weight": torch.full((12, 16), torch.nan)}, tmp_path / "nan/model.safetensors", {"format": "pt"})  # fmt: skip
    shutil.copytree(weights / "clip", tmp_path / "misfit")
    save_file({**whole, "visual_projection.weight": torch.zeros(9, 16)}, tmp_path / "misfit/model.safetensors", {"format": "pt"})  # fmt: skip
    shutil.copytree(weights / "clip", tmp_path / "cut")
    (tmp_path / "cut/model.safetensors").write_bytes(file.read_bytes()[:500])
    shutil.copytree(weights / "clip", tmp_path / "unprepared")
    (tmp_path / "unprepared/preprocessor_config.json").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("no tensors")
    torch.save([1, 2], tmp_path / "list.pth")
    alex = f"backbone={weights / 'alex-backbone.pth'}"
    refused = {
        "clip:model=no/such/folder": "no folder",
        "clip:model=": "is empty",
        f"clip:model={tmp_path / 'empty'}": "no config.json",
        f"clip:model={tmp_path / 'unprepared'}": "no preprocessor_config.json",
        f"clip:model={tmp_path / 'torn'}": "visual_projection.weight",
        f"clip:model={tmp_path / 'nan'}": "NaN",
        f"clip:model={tmp_path / 'misfit'}": "visual_projection.weight has another shape",
        f"clip:model={tmp_path / 'cut'}": "cannot be used",
        f"clip:model={weights / 'dino'}": "type vit, not clip",
        f"dino:model={weights / 'clip'}": "type clip, not dino",
        "dino": "hf download facebook/dino-vits16",
        "lpips": "lpips:linear=FILE is not set; download alex.pth",
        f"lpips:{alex},linear=nowhere.pth": "no file nowhere.pth",
        f"lpips:{alex},linear={tmp_path / 'text.pth'}": "holds no weights",
        f"lpips:{alex},linear={tmp_path / 'list.pth'}": "holds a list",
        f"lpips:{alex},linear={weights / 'vgg.pth'}": "lin1.model.1.weight has shape (1, 128, 1, 1), not (1, 192, 1, 1)",
        f"lpips:net=vgg,{alex},linear={weights / 'vgg.pth'}": "no tensor features.2.weight",
    }
    for text, reason in refused.items():
        (metric,) = parse_metrics([text], REGISTRY)
        with pytest.raises(ImmaError) as caught:
            metric.prepare()
        assert reason in str(caught.value), text
        with pytest.raises(ImmaError):  # nor is anything half loaded used afterwards
            metric.similarity(PICTURES, PICTURES)


def test_the_command_lists_metrics_and_what_they_lack(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = EntryPoint("gone", "no_such_module_of_metrics", "imma")
    monkeypatch.setattr(points, "entry_points", lambda group: [*POINTS, broken])

    def imma(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["imma", "metrics", *arguments])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as left:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return int(left.value.code or 0), *capsys.readouterr()

    code, out, _ = imma("--json")
    listed = json.loads(out)
    ready = {m["name"]: m["ready"] for m in listed["metrics"]}
    assert code == 0
    assert ready == dict.fromkeys(REGISTRY.found, True) | {"clip": False, "dino": False, "lpips": False}
    assert [b["plugin"] for b in listed["broken"]] == ["gone"]
    code, out, err = imma()
    assert code == 0
    assert "effnet-style" in out
    assert "gone" in err
    assert "no settings" in imma("effnet")[1]
    code, out, _ = imma("lpips")
    assert "backbone" in out
    assert "download" in out
    code, _, err = imma("lpisp")
    assert code == 2
    assert "lpips" in err
