"""A report's statistics beside scipy's, called directly on the lines of its trials.jsonl.

    python benchmarks/verification/check_statistics.py benchmarks/verification/results/standard

SGR over all seeds is recomputed with numpy alone. scipy's bootstrap knows one factor, so intervals are compared for each
seed by itself, over pictures: `scipy.stats.bootstrap(paired=True, method="BCa")`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from imma_cli.verification.records import parse
from imma_cli.verification.results import summarize


def sgr(original: NDArray[np.float64], hardened: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    return 1 - hardened.mean(axis=axis) / original.mean(axis=axis)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    raw = [json.loads(line) for line in (args.results / "trials.jsonl").read_text().splitlines()]
    lines = [line for line in raw if line["kind"] == "measurement" and line["status"] == "ok"]
    records = parse((args.results / "trials.jsonl").read_bytes())
    points, bounds = [], []
    for each in summarize(records)["comparisons"]:
        own = [
            line
            for line in lines
            if (line["purpose"], line["concept"], line["budget"], line["step"])
            == (each["purpose"], each["concept"], each["budget"], each["budget"])
            and line["attack"] == each["attack"]
        ]
        for metric, found in each["sgr"].items():
            grids = {
                model: np.array(
                    [line["scores"][metric] for line in sorted(own, key=lambda x: x["seed"]) if line["model"] == model]
                )
                for model in ("original", each["model"])
            }
            mine = sgr(grids["original"].ravel(), grids[each["model"]].ravel())
            points.append(abs(found[-1]["estimate"] - float(mine)))
            for seed, (o, h) in enumerate(zip(grids["original"], grids[each["model"]], strict=True)):
                theirs = stats.bootstrap(
                    (o, h), sgr, paired=True, vectorized=True, method="BCa", n_resamples=50_000, rng=0
                ).confidence_interval
                alone = [
                    line
                    for line in records.measurements
                    if line.seed == seed
                    and line.attack.spec == each["attack"]["spec"]
                    and line.purpose == each["purpose"]
                ]
                alone = [line for line in alone if line.concept == each["concept"] and line.budget == each["budget"]]
                (one,) = [
                    c
                    for c in summarize([replace(line) for line in alone])["comparisons"]
                    if c["model"] == each["model"]
                ]
                ours = one["sgr"][metric][-1]
                width = theirs.high - theirs.low
                bounds += [abs(ours["low"] - theirs.low) / width, abs(ours["high"] - theirs.high) / width]
    print(f"{len(points)} SGRs over all seeds: largest difference to numpy's {max(points):.1e}")
    print(
        f"{len(bounds)} bounds of intervals for single seeds: largest difference to scipy's {max(bounds):.1%} of the interval's width, median {np.median(bounds):.1%}"
    )


if __name__ == "__main__":
    main()
