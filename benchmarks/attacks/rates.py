"""At which learning rate an attack gets most from the demo model: where the rates of the preset `small` come from.

    python benchmarks/attacks/rates.py dora rslora loha     # appended to benchmarks/attacks/results/rates.jsonl

Each attack trains for 300 steps on the attacker's pictures of the held-out style, at several multiples of its preset's
rate, and is judged by its denoising loss on pictures it never saw. A rate that is there already is not tried again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from transfer import CONCEPT, STEPS

from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.checkpoints import open_checkpoint
from imma_cli.concepts.folders import read_concept
from imma_cli.demo import CONCEPTS, write_demo
from imma_cli.families.runtime import choose_runtime
from imma_cli.verification.trials import run_trial

RESULTS = Path(__file__).parent / "results" / "rates.jsonl"
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", help="NAME[:key=value,...]; default: every attack")
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES))
    args = parser.parse_args()
    registry = discover()
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    known = {(line["attack"], line["learning_rate"]) for line in lines}
    runtime = choose_runtime("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "demo"
        write_demo(folder)
        model = runtime.apply(open_checkpoint(folder / "model.safetensors").load())
        pictures = [
            read_concept(CONCEPTS[CONCEPT].text, folder / "concepts" / CONCEPT / part) for part in ("attack", "judge")
        ]
    RESULTS.parent.mkdir(exist_ok=True)
    for name in args.attacks or registry.found:
        for rate in map(float, args.rates.split(",")):
            if (name, rate) in known:
                continue
            separator = "," if ":" in name else ":"
            (attack,) = parse_attacks([f"{name}{separator}learning_rate={rate}"], registry)
            began = time.monotonic()
            line = {"attack": name, "learning_rate": rate, "steps": STEPS, "seed": 0}
            try:
                trial = run_trial(model, "original", attack, *pictures, steps=STEPS, seed=0, runtime=runtime)
            except Exception as error:  # noqa: BLE001 - too high a rate is a result too
                line["failed"] = f"{type(error).__name__}: {error}"
            else:
                line["losses"] = {point.step: round(point.loss, 5) for point in trial.points}
            line["seconds"] = round(time.monotonic() - began, 1)
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
