"""How well the time is foretold that hardening a large model takes: what the way back costs, and a short run beside its estimate.

    python benchmarks/speed/foretold.py     # raw lines to benchmarks/speed/results/foretold.jsonl, the table to docs/performance.md

SD 1.x's size, 512 × 512 pixels, float32, random weights. The way there and back is taken on one core, in processor seconds: where nothing,
activations are made again, or every block is. The run is `--method imma --attack lora`, on all cores, in seconds. Needs 5 GB of disk
under --work, and 9 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any, get_args

from imma_cli.environment import prepare_environment

prepare_environment()

import page

RESULTS = Path(__file__).parent / "results" / "foretold.jsonl"
CYCLES = 3


def passes(path: Path, turns: int) -> dict[str, Any]:
    """Seconds of a prediction, and of one with its gradient to the attention."""
    import torch

    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.families.recomputing import Recompute, recompute
    from imma_cli.immunizers.scope import protected_weights

    torch.set_num_threads(1)
    model = open_checkpoint(path).load()
    words = model.family.encode_prompts(model, ["a cat"]).detach()
    side = model.unet.config.sample_size
    latents = torch.randn(1, model.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    weights = list(protected_weights(model.unet, "attention").values())
    for weight in weights:
        weight.requires_grad_(True)

    def predicted() -> torch.Tensor:
        return model.unet(latents, torch.tensor([500]), encoder_hidden_states=words, return_dict=False)[0]

    def there() -> None:
        with torch.no_grad():
            predicted()

    def and_back() -> None:
        torch.autograd.grad(predicted().square().mean(), weights)

    def seconds(of: Any) -> float:
        began = time.process_time()
        of()
        return time.process_time() - began

    there()  # warms up
    found = []
    for _ in range(turns):
        turn = {"there": seconds(there)}
        for what in get_args(Recompute):
            recompute(model.unet.train(), what)
            turn[what] = seconds(and_back)
        found.append(turn)
    return {"passes": found}


def run(path: Path, cycles: int) -> dict[str, Any]:
    """A short run's seconds, and those that `imma harden` foretells for it."""
    from loops import concept

    from imma_cli.attacks.manager import discover
    from imma_cli.attacks.settings import parse_attacks
    from imma_cli.checkpoints import open_checkpoint
    from imma_cli.families.recomputing import usual
    from imma_cli.families.runtime import choose_runtime
    from imma_cli.immunizers.duration import passes_of, seconds_of, seconds_of_prediction
    from imma_cli.immunizers.imma import ImmunizerSettings, immunize

    runtime = choose_runtime("cpu")
    model = runtime.apply(open_checkpoint(path).load())
    attacks = parse_attacks(["lora"], discover())
    settings = ImmunizerSettings(steps=2 * cycles)
    shown = concept(model.family.resolution(model))
    counted = passes_of(model, attacks, [len(shown.images)], settings, drawn=False, kept=0)
    again = usual(on_cpu=True, small=model.is_small, halved=False)
    foretold = seconds_of(counted, seconds_of_prediction(model, runtime), again)
    began = time.monotonic()
    immunize(model, attacks, [shown], settings, runtime)
    return {"cycles": cycles, "foretold": foretold, "took": time.monotonic() - began}


def show() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    turns = [turn for line in lines for turn in line.get("passes", ())]
    runs = [line for line in lines if "took" in line]
    rows = ["| | processor seconds | as a multiple of a prediction |", "|---|---|---|"]
    names = {
        "nothing": "and back",
        "activations": "and back, activations made again",
        "blocks": "and back, every block twice",
    }
    rows.append(f"| a prediction | {median(turn['there'] for turn in turns):.1f} | 1 |")
    for what, name in names.items():
        ratios = [turn[what] / turn["there"] for turn in turns]
        seconds = median(turn[what] for turn in turns)
        rows.append(f"| {name} | {seconds:.1f} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")
    shares = [line["took"] / line["foretold"] for line in runs]
    rows += [
        "",
        f"Runs of {runs[0]['cycles']} cycles took {min(shares):.2f} to {max(shares):.2f} times what was foretold "
        f"({median(line['foretold'] for line in runs):.0f} s), encoding and the start of both optimizers included.",
    ]
    print("\n".join(rows))
    page.put("foretold.py", "\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("speed-work"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--draw", action="store_true", help="the table again, from the raw lines")
    parser.add_argument("--child", choices=("passes", "run"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw:
        show()
        return
    from models import sd1

    path = sd1(args.work, "float32")
    if args.child:
        print(json.dumps(passes(path, args.repeats) if args.child == "passes" else run(path, CYCLES)))
        return
    lines = []
    for which in ("passes", *["run"] * args.repeats):
        lines.append(page.child(__file__, "--work", args.work, "--repeats", str(args.repeats), "--child", which))
        print(lines[-1], flush=True)
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    show()


if __name__ == "__main__":
    main()
