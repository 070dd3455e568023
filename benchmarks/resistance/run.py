"""The measuring stick: what attackers still get from the demo model, defended in every way.

    python benchmarks/resistance/run.py                 # everything; goes on where it was stopped
    python benchmarks/resistance/run.py --quick         # a taste, in a quarter of an hour
    python benchmarks/resistance/run.py --draw          # the table and the plots again, from the raw lines

Several processes may share the work: --part 1/2 and --part 2/2. Raw lines go to benchmarks/resistance/results/trials.jsonl,
checkpoints to --work. What the raw lines hold is not measured again, so the work can be spread over many sittings.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from cases import CASES, ROWS, SIMULATED, UNDEFENDED, UNSEEN, first_party
from defences import Defences
from figures import attack_table, figures, table
from lines import DOCS, RESULTS, Lines, put_on_page
from plots import plot
from trials import Plan, Trials
from undoing import UNDOING

from imma_cli.attacks.attack import Attack
from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks, spec

KINDS = ("default", "simulated", "unseen", "undoing", "long", "price")
UNDOER = "full-finetune"
"""Who tries to undo the first defence of each row."""
ORDINARY = ("lora", "full-finetune")
LONG = (SIMULATED[0], "full-finetune")
TIMES_AS_LONG = 5
"""Who goes on for so many times the budget, which is what an episode of hardening's simulates at most."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("resistance-work"))
    parser.add_argument("--part", default="1/1", metavar="I/N")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rows", default=";".join(ROWS), help="separated by semicolons")
    parser.add_argument("--attacks", help="separated by spaces; default: every attack that comes with imma")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of attackers; price: ordinary fine-tuning")
    parser.add_argument("--defence-seeds", type=int, default=3)
    parser.add_argument("--attack-seeds", type=int, default=3)
    parser.add_argument("--search", type=int, default=5, help="settings of each attack that are searched for each row")
    parser.add_argument("--budget", type=int, default=300)
    parser.add_argument("--images", type=int, default=4, help="pictures for each of two prompts")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = Lines((args.work / "quick" if args.quick else RESULTS) / "trials.jsonl")
    if args.draw:
        show(lines, docs=not args.quick)
        return
    if args.quick:
        args.cases, args.rows, args.attacks = "style", "imma;episodes", "lora full-finetune"
        args.defence_seeds = args.attack_seeds = 1
        args.search, args.budget, args.kinds = 0, 150, "default,price"
        defences = Defences(args.work / "quick", lines, ("--steps", "300"))
    else:
        defences = Defences(args.work, lines)
    plan = Plan(args.budget, args.attack_seeds, args.search, args.images)
    trials = Trials(defences, lines, plan)
    part, parts = map(int, args.part.split("/"))
    attacks = parse_attacks(args.attacks.split() if args.attacks else first_party(), discover())
    others = [a for a in parse_attacks([*SIMULATED, *UNSEEN], discover()) if spec(a) not in map(spec, attacks)]
    (undoer,) = parse_attacks([UNDOER], discover())
    jobs: list[tuple[str, str, Attack | None, str, str]] = []
    for case in args.cases.split(","):
        for row in args.rows.split(";"):
            jobs += [(case, row, attack, "default", "") for attack in attacks]
            jobs += [(case, row, a, "simulated" if spec(a) in SIMULATED else "unseen", "") for a in others]
            jobs += [(case, row, undoer, "undoing", how) for how in UNDOING]
            jobs += [(case, row, each, "long", "") for each in parse_attacks(LONG, discover())]
            jobs.append((case, row, None, "price", ""))
    jobs = [job for job in jobs if job[3] in args.kinds.split(",")]
    for case, row, attack, found, how in jobs[part - 1 :: parts]:
        seeds = range(args.defence_seeds)
        if attack is None:
            for seed in seeds:
                trials.untouched(case, row, seed)
                for each in parse_attacks(ORDINARY, discover()):
                    trials.ordinary(case, UNDEFENDED, 0, each)
                    trials.ordinary(case, row, seed, each)
            continue
        if found == "undoing":
            trials.attack(case, UNDEFENDED, 0, attack, "default")
            trials.attack(case, row, 0, attack, found, undoing=how)
            continue
        if found == "long":
            for which in (UNDEFENDED, row):
                trials.attack(case, which, 0, attack, found, steps=TIMES_AS_LONG * args.budget)
            continue
        settings = {spec(attack): (attack, found)}
        if found == "default":
            best = trials.strongest(case, row, attack)
            settings.setdefault(spec(best), (best, "searched"))
        for setting, origin in settings.values():
            trials.attack(case, UNDEFENDED, 0, setting, origin)
            for seed in seeds:
                trials.attack(case, row, seed, setting, origin)
    show(lines, docs=not args.quick)


def show(lines: Lines, *, docs: bool) -> None:
    found = figures(lines)
    details = "".join(f"\n### {each.case}, {each.row}\n\n{attack_table(each)}" for each in found)
    pictures = plot(found, lines, DOCS / "images" if docs else lines.path.parent)
    if docs:
        links = "".join(f"\n![{path.stem}](images/{path.name})\n" for path in pictures)
        put_on_page("results", table(found) + links + details)
    print(table(found))


if __name__ == "__main__":
    main()
