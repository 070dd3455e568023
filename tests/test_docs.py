"""The documentation says what the program does today."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import describe, parse_attacks
from imma_cli.attacks.training import Attacker
from imma_cli.concepts.batches import TrainingSet, encode
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model
from imma_cli.verification.metrics import discover_metrics, parse_metrics

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_cli", DOCS / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_reference_is_what_help_prints(generator: ModuleType) -> None:
    written = generator.PAGE.read_text(encoding="utf-8")
    assert written == generator.reference(), "run: python docs/generate_cli.py"


def test_every_attack_that_ships_has_a_section() -> None:
    page = (DOCS / "attacks.md").read_text(encoding="utf-8")
    shipped = {name for name, found in discover().found.items() if found.distribution == "imma-cli"}
    assert shipped
    assert shipped == set(re.findall(r"^## `(.+)`$", page, re.MULTILINE))


def test_every_setting_and_every_rate_of_an_attack_is_documented() -> None:
    page = (DOCS / "attacks.md").read_text(encoding="utf-8")
    common, *rest = re.split(r"^## `", page, flags=re.MULTILINE)
    sections = dict(section.split("`\n", 1) for section in rest)
    for name, found in discover().found.items():
        if found.distribution != "imma-cli":
            continue
        text = common + sections[name]
        undocumented = [s.name for s in describe(found.cls.Settings) if f"| `{s.name}` |" not in text]
        assert not undocumented, f"{name}: {undocumented}"
        for preset, rates in found.cls.presets.items():
            row = f"| `{preset}` | {rates.learning_rate:.0e} | {rates.outer_learning_rate:.0e} | {rates.steps} |"
            assert row.replace("e-0", "e-") in sections[name], f"{name}: the page has no row {row}"


def test_every_metric_that_ships_has_a_section_with_its_settings() -> None:
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    sections = dict(section.split("`\n", 1) for section in re.split(r"^## `", page, flags=re.MULTILINE)[1:])
    shipped = {name: found for name, found in discover_metrics().found.items() if found.distribution == "imma-cli"}
    assert shipped
    assert set(shipped) == set(sections)
    for name, found in shipped.items():
        undocumented = [s.name for s in describe(found.cls.Settings) if f"| `{s.name}` |" not in sections[name]]
        assert not undocumented, f"{name}: {undocumented}"


def test_the_example_metric_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "imma_palette.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = discover_metrics([EntryPoint("palette", "imma_palette", "imma")])
    assert not registry.broken
    (metric,) = parse_metrics(["palette:bins=4"], registry)
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (16, 8), "blue")
    assert metric.similarity([red, blue], [red, red, blue]).tolist() == [[1, 1, 0], [0, 0, 1]]


def test_the_example_plugin_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Model) -> None:
    page = (DOCS / "writing-an-attack.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "imma_custom_diffusion.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = discover([EntryPoint("custom-diffusion", "imma_custom_diffusion", "imma")])
    assert not registry.broken
    (attack,) = parse_attacks(["custom-diffusion:token=xyz"], registry)
    picture = Image.new("RGB", (64, 64), "teal")
    concept = Concept("apple", (picture,), ("an apple",), "test")
    before = {name: weight.clone() for name, weight in tiny_model.unet.state_dict().items()}
    with attack.attach(tiny_model, concept, 0) as parameters:
        batch = next(iter(TrainingSet(tiny_model, attack, concept, encode(tiny_model, concept.images), seed=0)))
        assert batch.captions == ("a xyz apple",)
        Attacker(parameters, attack.rates(tiny_model)).step(lambda: attack.loss(tiny_model, batch))
        changed = {n for n, w in tiny_model.unet.state_dict().items() if not w.equal(before[n])}
        assert changed == set(parameters)
    assert all(weight.equal(before[name]) for name, weight in tiny_model.unet.state_dict().items())


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))], ids=str)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
