"""The documentation says what the program does today."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import describe, parse_attacks
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


def test_every_attack_that_ships_has_a_page_with_its_settings_and_rates() -> None:
    shipped = {name: found.cls for name, found in discover().found.items() if found.distribution == "imma-cli"}
    folder = DOCS / "attacks"
    assert {path.stem for path in folder.glob("*.md")} == {"index", *shipped}
    common = (folder / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[`(.+?)`\]\(\1\.md\)", common, re.MULTILINE)) == set(shipped)
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name, cls in shipped.items():
        page = (folder / f"{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# `{name}`\n")
        assert f"attacks/{name}.md" in navigation
        assert cls.paper in page
        documented = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page + common, re.MULTILINE))
        for setting in describe(cls.Settings):
            assert setting.name in documented, f"{name}: {setting.name}"
            if isinstance(setting.default, int | float):
                assert documented[setting.name] == f"{setting.default:g}", f"{name}: {setting.name}"
        for preset, rates in cls.presets.items():
            row = f"| `{preset}` | {rates.learning_rate:.0e} | {rates.outer_learning_rate:.0e} | {rates.steps} |"
            assert row.replace("e-0", "e-") in page, f"{name}: the page has no row {row}"


def test_the_rates_come_from_the_raw_data() -> None:
    raw = (ROOT / "benchmarks" / "attacks" / "results" / "rates.jsonl").read_text(encoding="utf-8")
    page = (DOCS / "attacks" / "index.md").read_text(encoding="utf-8")
    head, *rows = re.search(r"^\| attack \| 3e-5.*?\n\n", page, re.MULTILINE | re.DOTALL)[0].strip().splitlines()
    rates = [float(cell) for cell in head.split(" | ")[1:-1]]
    shown = {}
    for row in rows[1:]:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        shown |= {(name.strip("`"), rate): cell for rate, cell in zip(rates, cells, strict=False) if cell}
    measured = {
        (j["attack"], j["learning_rate"]): f"{j['losses']['300']:.3f}" for j in map(json.loads, raw.splitlines())
    }
    assert shown == measured


def test_the_transfer_table_comes_from_the_raw_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "attacks"))
    transfer = importlib.import_module("transfer")
    table = transfer.table(transfer.read()).split("\n\n")[0]
    assert table in (DOCS / "attacks" / "index.md").read_text(encoding="utf-8")
    assert table in transfer.TABLE.read_text(encoding="utf-8")


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


def test_the_tutorial_leads_to_a_plugin_that_works(imma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "writing-an-attack.md").read_text(encoding="utf-8")
    folder = tmp_path / "imma-attack-bitfit"
    monkeypatch.chdir(tmp_path)
    assert "\nimma new-attack bitfit\n" in page
    assert imma("new-attack", "bitfit")[0] == 0
    (tree,) = re.findall(r"^```text\nimma-attack-bitfit/\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert {line.split()[0] for line in tree.splitlines()} == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    }
    (entry,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert entry in (folder / "pyproject.toml").read_text(encoding="utf-8")
    snippets = re.findall(r'^```python title="(.+?)"\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    assert len(snippets) == page.count("```python") == 2
    for file, code in snippets:
        assert (folder / file).is_file()
        (folder / file).write_text(code, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", str(folder)],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(str(folder))
    registry = discover([EntryPoint("bitfit", "imma_attack_bitfit", "imma")])
    assert registry.broken == ()
    assert parse_attacks(["bitfit:layers=attention,token=sks"], registry)[0].settings.token == "sks"


def test_every_command_in_the_pages_on_plugins_exists() -> None:
    import typer.main

    from imma_cli.cli import app

    known = set(typer.main.get_command(app).commands)
    for name in ("plugins.md", "writing-an-attack.md"):
        page = (DOCS / name).read_text(encoding="utf-8")
        typed = re.findall(r"^(?:IMMA_\w+=\S+ )?imma (\S+)", page, re.MULTILINE)
        assert typed
        assert set(typed) <= known


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))], ids=str)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
