"""What hardening against each attack does to the demo model: how the defender's rates of the preset `small` were chosen.

    python benchmarks/attacks/defend.py              # raw lines to benchmarks/attacks/results/defend.jsonl

`imma harden --method imma` with default settings against one attack after the other; then the same attack for 300 steps, one seed, on
pictures that hardening never saw, and unrelated prompts drawn by both models. What the attack gets from the original is
in transfer.jsonl. An attack that is there already is not measured again; --part 1/2 and --part 2/2 share the work.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transfer import CONCEPT, RESULTS, STEPS, Judge, checkpoint, harden, read, shipped

from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.checkpoints import open_checkpoint
from imma_cli.concepts.folders import read_concept
from imma_cli.demo import CONCEPTS
from imma_cli.families.runtime import choose_runtime
from imma_cli.verification.trials import run_trial

LINES = RESULTS / "defend.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", help="NAME; default: all that ship")
    parser.add_argument("--outer-learning-rate", type=float, help="default: the preset's")
    parser.add_argument("--work", type=Path, default=Path("transfer-work"))
    parser.add_argument("--part", default="1/1", metavar="I/N")
    args = parser.parse_args()
    part, parts = map(int, args.part.split("/"))
    runtime = choose_runtime("cpu")
    demo = checkpoint(args.work, "original", [])
    folder = demo.parent / "concepts" / CONCEPT
    pictures, judging = (read_concept(CONCEPTS[CONCEPT].text, folder / role) for role in ("attack", "judge"))
    original, judge = runtime.apply(open_checkpoint(demo).load()), Judge(judging)
    for name in (args.attacks or shipped())[part - 1 :: parts]:
        known = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
        (attack,) = parse_attacks([name], discover())
        outer = args.outer_learning_rate or attack.rates(original).outer_learning_rate
        if any((line["attack"], line["outer_learning_rate"]) == (name, outer) for line in known):
            continue
        output = args.work / f"against-{name}.safetensors"
        said = harden(demo.parent, [name], output, "--force", "--outer-learning-rate", outer)
        hardened = runtime.apply(open_checkpoint(output).load())
        trial = run_trial(hardened, "hardened", attack, pictures, judging, steps=STEPS, seed=0, runtime=runtime)
        (before,) = (
            line["losses"]
            for line in read()
            if (line["model"], line.get("attack"), line.get("seed")) == ("original", name, 0)
        )
        courses = {"original": before, "hardened": [round(point.loss, 5) for point in trial.points]}
        line = {
            "attack": name, "outer_learning_rate": outer, "relative_change": round(said["relative_change"], 4),
            "unreached": len(said["unreached"]), "untouched": judge.untouched(hardened, original), "losses": courses,
        }  # fmt: skip
        with LINES.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)
        output.unlink()


if __name__ == "__main__":
    main()
