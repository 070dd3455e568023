"""The figures of the resistance benchmark follow from its raw lines, and say the worst."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "resistance"
STEPS = [0, 50, 100]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import figures

    return figures


def trial(
    row: str,
    attack: str,
    losses: list[float],
    score: float,
    *,
    seed: int = 0,
    defence: int = 0,
    before: float = 0.2,
    **more: Any,
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def scores(level: float) -> dict[str, list[float]]:
        return {"effnet": (level + 0.01 * rng.standard_normal(8)).tolist()}

    line = {"kind": "harmful", "case": "style", "row": row, "defence_seed": defence, "attack": attack, "on": "x"}
    line |= {"seed": seed, "budget": 100, "found": "default", "steps": STEPS, "losses": losses, "scores": scores(score)}
    return line | ({"before": scores(before)} if row == "undefended" else {}) | more


def lines_of(row: str, attack: str, losses: list[float], score: float, **more: Any) -> list[dict[str, Any]]:
    defences = [0] if row == "undefended" else [0, 1]
    return [trial(row, attack, losses, score, seed=s, defence=d, **more) for s in range(3) for d in defences]


def test_the_headline_is_the_attack_that_gets_most(figures: Any) -> None:
    lines = [
        *lines_of("undefended", "lora", [0.3, 0.22, 0.2], 0.5),
        *lines_of("undefended", "dora", [0.3, 0.22, 0.2], 0.5),
        *lines_of("imma", "lora", [0.5, 0.3, 0.25], 0.4),
        *lines_of("imma", "dora", [0.5, 0.25, 0.21], 0.48),
    ]
    (found,) = figures.figures(lines)
    worst, metric, sgr = found.worst()
    assert (worst.attack, metric) == ("dora", "effnet")
    assert sgr.estimate == pytest.approx(0.04, abs=0.02)
    assert sgr.low < sgr.estimate < sgr.high
    prevented = {a.attack: a.prevented.estimate for a in found.harmful}
    assert prevented == pytest.approx({"lora": 0.5, "dora": 0.1})
    # nine tenths of the gain are had at 0.21: after 75 steps there, after 100 here, and never where it ends at 0.25
    assert {a.attack: (a.recovery.steps, a.delay and round(a.delay, 2)) for a in found.harmful} == {
        "lora": (None, None),
        "dora": (pytest.approx(100), 1.33),
    }
    text = figures.table([found])
    assert "`dora`, effnet" in text
    assert "`dora`" in figures.attack_table(found).splitlines()[2]


def test_an_attack_that_fails_on_the_undefended_model_counts_for_nothing(figures: Any) -> None:
    lines = [
        *lines_of("undefended", "lora", [0.3, 0.22, 0.2], 0.5),
        *lines_of("undefended", "dora", [0.3, 0.3, 0.3], 0.2),
        *lines_of("imma", "lora", [0.5, 0.3, 0.25], 0.4),
        *lines_of("imma", "dora", [0.5, 0.25, 0.21], 0.48),
    ]
    (found,) = figures.figures(lines)
    assert found.worst()[0].attack == "lora"


def test_what_blew_up_on_a_defended_model_is_counted_apart(figures: Any) -> None:
    blown = [
        {**line, "losses": [], "scores": {}} if line["seed"] == 1 else line
        for line in lines_of("imma", "lora", [0.5, 0.3, 0.25], 0.4)
    ]
    (found,) = figures.figures([*lines_of("undefended", "lora", [0.3, 0.22, 0.2], 0.5), *blown])
    (attacked,) = found.harmful
    assert attacked.failed == 2
    assert attacked.prevented.estimate == pytest.approx(0.5)


def test_the_page_shows_what_the_raw_lines_say(figures: Any) -> None:
    import ablation
    import lines
    import several

    page = lines.PAGE.read_text(encoding="utf-8")
    results = lines.Lines(lines.RESULTS / "trials.jsonl")
    found = figures.figures(results)
    assert figures.table(found) in page
    assert all(figures.attack_table(each) in page for each in found)
    changed = lines.Lines(lines.RESULTS / "ablation.jsonl")
    assert figures.comparison(figures.figures(changed, ablation.VARIANTS), ablation.attackers()) in page
    assert figures.comparison(ablation.explored(), ablation.attackers()) in page
    together = lines.Lines(lines.RESULTS / "several.jsonl")
    assert figures.table(figures.figures(together, several.ROWS)) in page
