"""What each part of hardening in episodes is worth: one changed, the others as they are.

    python benchmarks/resistance/ablation.py            # raw lines to benchmarks/resistance/results/ablation.jsonl; the table to docs/resistance.md

On the held-out style, with a budget of 300 steps: enough to see how long an attacker is held up, too short to say what
is left at the end of a long attack (run.py does). Several processes may share the work, --part 1/2 and --part 2/2.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from cases import CASES, SIMULATED, UNDEFENDED, UNSEEN, keeps, pictures
from figures import Figures, comparison, figures
from lines import DOCS, RESULTS, Lines, put_on_page
from plots import trade_off
from trials import Plan, Trials

from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks, spec
from imma_cli.checkpoints import open_checkpoint
from imma_cli.cli.hardening import kept_prompts
from imma_cli.demo import write_demo
from imma_cli.families.model import Model
from imma_cli.families.runtime import choose_runtime
from imma_cli.immunizers.episodes import immunize_in_episodes
from imma_cli.immunizers.imma import Immunized, ImmunizerSettings, immunize
from imma_cli.immunizers.memory import peak_memory
from imma_cli.immunizers.retention import retain
from imma_cli.immunizers.settings import EpisodesSettings, defaults_for

CASE = "style"
ATTACKERS = (SIMULATED[0], "full-finetune", UNSEEN[1])
NO_LIMIT = 1e9

ATTACKS = ("full-finetune", "loha", "lora")
"""Whom `imma harden` simulates by default."""

VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "with checks": {"checks": 5},
    "attackers as given, not drawn": {"vary": False},
    "one attack simulated: lora": {"attacks": ("lora",)},
    "five attacks simulated": {"attacks": (*ATTACKS, "dreambooth", "lokr")},
    "attackers side by side, as given, who never begin anew": {
        "side_by_side": True,
        "vary": False,
        "inner_steps": 1,
        "margin": 2.0,
        "attacks": SIMULATED,
    },
    "short episodes (40 to 100 steps)": {"shortest": 40, "longest": 100},
    "one step of the attacker to each outer step": {"inner_steps": 1, "steps": 1000},
    "four steps of the attacker to each outer step": {"inner_steps": 4, "steps": 2500},
    "a margin of 1 times the original's loss": {"margin": 1.0},
    "a margin of 2.5 times": {"margin": 2.5},
    "an absolute margin of 2": {"objective": "absolute", "margin": 2.0},
    "no margin": {"objective": "absolute", "margin": NO_LIMIT},
    "steered to the original's prediction": {"objective": "original"},
    "nothing held on to": {"keep_batch": 0},
    "held without guidance": {"held": {"guidance": (1.0, 1.0)}},
    "held on the model's own pictures only": {"held": {"unfamiliar": 0.0}},
    "no prompts of the publisher's": {"keep": ()},
    "rate not falling": {"anneal": False},
    "cross-attention only": {"protect": "cross-attention"},
    "the whole UNet": {"protect": "unet", "outer_learning_rate": 1e-4},
    "three times as long": {"steps": 4500},
    "strength low": {"strength": "low"},
    "strength high": {"strength": "high"},
    "drift of 0.016": {"drift": 0.016},
    "drift of 0.03": {"drift": 0.03},
    "as published, lora": {"published": ("lora",)},
    "as published, lora, half the outer rate": {"published": ("lora",), "outer_learning_rate": 5e-5},
    "as published, lora, twice the outer rate": {"published": ("lora",), "outer_learning_rate": 2e-4},
    "as published, several in turns": {"published": SIMULATED},
    "as published, several, outer rate of 0.00005": {"published": SIMULATED, "outer_learning_rate": 5e-5},
    "as published, several, outer rate of 0.000025": {"published": SIMULATED, "outer_learning_rate": 2.5e-5},
    "as published, several, outer rate of 0.00001": {"published": SIMULATED, "outer_learning_rate": 1e-5},
}
"""What is changed; `checks` are off unless they are what is changed, since they choose among states."""
AMONG_THE_DEFAULTS = (
    "attackers as given, not drawn",
    "one attack simulated: lora",
    "one step of the attacker to each outer step",
    "no margin",
)
"""Too near to have names of their own."""
NAMES = {row: row for row in VARIANTS if row not in AMONG_THE_DEFAULTS} | {
    "as it is": "default",
    "attackers side by side, as given, who never begin anew": "side by side",
    "as published, lora": "published, lora",
    "as published, several in turns": "published, several",
    "as published, several, outer rate of 0.000025": "published, several, a quarter of the rate",
}
"""In the picture."""


class Variants:
    """Models hardened in this process, as no option of the command line reaches every part; kept as files."""

    def __init__(self, work: Path, lines: Lines) -> None:
        self.work, self.lines = work, lines
        self.runtime = choose_runtime("cpu")
        self.home = work / "demo"
        if not (self.home / "model.safetensors").exists():
            write_demo(self.home, force=True)

    def model(self, case: str, row: str, seed: int) -> Model:
        model = self.runtime.apply(open_checkpoint(self.home / "model.safetensors").load())
        if row == UNDEFENDED:
            return model
        kept = self.work / f"{re.sub('[^a-z0-9]+', '-', row)}-{seed}.pt"
        if not kept.exists():
            began = time.monotonic()
            result = self._harden(model, row, seed)
            line = {"kind": "defence", "case": case, "row": row, "defence_seed": seed}
            line |= {"seconds": round(time.monotonic() - began, 1), "peak_bytes": peak_memory(self.runtime)}
            self.lines.add(line | {"checks": [asdict(check) for check in result.checks], "changes": VARIANTS[row]})
            torch.save(result.weights, kept)
        model.unet.load_state_dict({**model.unet.state_dict(), **torch.load(kept)})
        return model

    def _harden(self, model: Model, row: str, seed: int) -> Immunized:
        changes = dict(VARIANTS[row])
        concept = pictures(self.home, CASES[CASE], "defend")
        if published := changes.pop("published", None):
            attacks = parse_attacks(published, discover())
            published_settings = replace(ImmunizerSettings(seed=seed), **changes)
            return immunize(model, attacks, [concept], published_settings, self.runtime)
        attacks = parse_attacks(changes.pop("attacks", ATTACKS), discover())
        keep, held = changes.pop("keep", keeps(CASES[CASE])), changes.pop("held", {})
        settings = replace(EpisodesSettings(seed=seed, checks=0), **changes)
        prompts = kept_prompts(model, [concept], settings, keep)
        noisings = defaults_for(model).noisings
        retention = retain(model, prompts, noisings=noisings, seed=seed, runtime=self.runtime, **held)
        return immunize_in_episodes(model, attacks, [concept], settings, self.runtime, retention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("ablation-work"))
    parser.add_argument("--part", default="1/1", metavar="I/N")
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by semicolons")
    parser.add_argument("--defence-seeds", type=int, default=1)
    parser.add_argument("--attack-seeds", type=int, default=2)
    parser.add_argument("--draw", action="store_true", help="the tables again, from the raw lines")
    args = parser.parse_args()
    if args.draw:
        show(Lines(RESULTS / "ablation.jsonl"))
        return
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    lines = Lines(RESULTS / "ablation.jsonl")
    trials = Trials(
        Variants(args.work, lines), lines, Plan(budget=300, attack_seeds=args.attack_seeds, search=0, images=4)
    )
    part, parts = map(int, args.part.split("/"))
    for variant in args.variants.split(";")[part - 1 :: parts]:
        for seed in range(args.defence_seeds):
            trials.untouched(CASE, variant, seed)
            for attack in parse_attacks(ATTACKERS, discover()):
                trials.attack(CASE, UNDEFENDED, 0, attack, "default")
                trials.attack(CASE, variant, seed, attack, "default")
            (ordinary,) = parse_attacks(["lora"], discover())
            trials.ordinary(CASE, UNDEFENDED, 0, ordinary)
            trials.ordinary(CASE, variant, seed, ordinary)
    show(lines)


def show(lines: Lines) -> None:
    found, before = figures(lines, VARIANTS), explored()
    published = [each for each in found if "published" in VARIANTS[each.row]]
    groups = {"as published": published, "hardening in episodes": [each for each in found if each not in published]}
    path = DOCS / "images" / "resistance-trade-off.svg"
    trade_off({**groups, "on the way there, one seed": before}, NAMES, path)
    put_on_page(
        "ablation",
        f"{comparison(found, attackers())}\n![What every variant prevents against what it costs](images/{path.name})",
    )
    put_on_page("exploration", comparison(before, attackers()))


def attackers() -> list[str]:
    """As the raw lines name them."""
    return [spec(attack) for attack in parse_attacks(ATTACKERS, discover())]


def explored() -> list[Figures]:
    """How the defaults were found: one seed each, by the code as it then was, which is not all there any more."""
    lines = Lines(RESULTS / "exploration.jsonl")
    return figures(lines, dict.fromkeys(line["row"] for line in lines if line["row"] != UNDEFENDED))


if __name__ == "__main__":
    main()
