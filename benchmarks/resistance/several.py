"""Several concepts in one model: 1, 3 and 10 of them, hardened against in three ways.

    python benchmarks/resistance/several.py      # raw lines to benchmarks/resistance/results/several.jsonl; the table to docs/resistance.md

*In turns* is what imma does. *One after another* hardens against each by itself, starting from what the last one left.
*Merged* follows MIMA (arXiv 2412.15320): attackers of all concepts at once, whose keys and values are merged in closed
form before every outer step.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from ablation import ATTACKS
from cases import CASES, SIMULATED, UNDEFENDED, keeps, pictures
from figures import figures, table
from lines import RESULTS, Lines, put_on_page
from torch import Tensor
from trials import Plan, Trials

from imma_cli.attacks.attack import Attack
from imma_cli.attacks.gradients import NotFiniteError
from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.checkpoints import open_checkpoint
from imma_cli.cli.hardening import Task, retention_for
from imma_cli.concepts.batches import conditioning_of, encode
from imma_cli.concepts.concept import Concept
from imma_cli.concepts.drawing import draw_concept
from imma_cli.demo import write_demo
from imma_cli.families.model import Model
from imma_cli.families.runtime import Runtime, choose_runtime
from imma_cli.immunizers.defender import Defender, Episode
from imma_cli.immunizers.episodes import episode_of, immunize_in_episodes
from imma_cli.immunizers.memory import peak_memory
from imma_cli.immunizers.retention import Retention, prompts_beside, vocabulary_of
from imma_cli.immunizers.scope import protected_weights
from imma_cli.immunizers.settings import EpisodesSettings

HELD_OUT = ("style", "object", "character")
KNOWN = ("snowman", "pumpkin", "violin", "owl", "trophy", "peach", "whale")
"""Seven more, which the model draws itself; they are in no prompt that is judged."""
HOW = ("in turns", "one after another", "merged")
"""With the same number of outer steps in all, whatever the number of concepts."""
ROWS = {f"{count} {how}": (count, how) for count in (1, 3, 10) for how in HOW if count > 1 or how == "in turns"}
ATTACKERS = (SIMULATED[0], "full-finetune")
MERGED_EPISODE = 100
REGULAR = 200
RIDGE = 1e-4
"""Of the embeddings' mean square: the tokens of a concept's prompts are nearly the same vectors."""


class Several:
    """Models hardened against several concepts at once; each is the same in all cases."""

    def __init__(self, work: Path, lines: Lines) -> None:
        self.work, self.lines = work, lines
        self.runtime = choose_runtime("cpu")
        self.home = work / "demo"
        work.mkdir(parents=True, exist_ok=True)
        if not (self.home / "model.safetensors").exists():
            write_demo(self.home, force=True)

    def model(self, case: str, row: str, seed: int) -> Model:
        model = self.runtime.apply(open_checkpoint(self.home / "model.safetensors").load())
        if row == UNDEFENDED:
            return model
        kept = self.work / f"{row.replace(' ', '-')}-{seed}.pt"
        if not kept.exists():
            began = time.monotonic()
            weights = self._harden(model, *ROWS[row], seed)
            line = {"case": HELD_OUT[0], "row": row, "defence_seed": seed, "peak_bytes": peak_memory(self.runtime)}
            self.lines.add({"kind": "defence", **line, "seconds": round(time.monotonic() - began, 1)})
            torch.save(weights, kept)
        model.unet.load_state_dict({**model.unet.state_dict(), **torch.load(kept)})
        return model

    def _harden(self, model: Model, count: int, how: str, seed: int) -> dict[str, Tensor]:
        concepts = [pictures(self.home, CASES[case], "defend") for case in HELD_OUT[:count]]
        for name in KNOWN[: max(0, count - len(HELD_OUT))]:
            concepts.append(draw_concept(model, name, role="defend", seed=seed, count=10))
        attacks = parse_attacks(ATTACKS, discover())
        settings = EpisodesSettings(seed=seed, checks=0)
        names = [concept.name for concept in concepts]
        keep = [prompt for prompt in keeps(CASES["style"]) if not any(name in prompt for name in names)]

        def held(of: Sequence[Concept], settings: EpisodesSettings) -> Retention:
            return retention_for(Task(model, (), of, settings, self.runtime, keep), quiet=True)

        if how == "in turns":
            everything = held(concepts, settings)
            return immunize_in_episodes(model, attacks, concepts, settings, self.runtime, everything).weights
        if how == "merged":
            return merged(model, attacks, concepts, settings, self.runtime, held(concepts, settings))
        short = replace(settings, steps=settings.cycles(model) * (1 + settings.inner_steps) // count)
        for concept in concepts:  # each is a run of its own, to which what the last one left is the original
            alone = held([concept], short)
            found = immunize_in_episodes(model, attacks, [concept], short, self.runtime, alone).weights
            model.unet.load_state_dict(found, strict=False)
        return {name: w.detach().clone() for name, w in protected_weights(model.unet, settings.protect).items()}


def merged(
    model: Model,
    attacks: Sequence[Attack],
    concepts: Sequence[Concept],
    settings: EpisodesSettings,
    runtime: Runtime,
    retention: Retention,
) -> dict[str, Tensor]:
    """MIMA's loop with imma's margin and retention: a step of every attacker, the merge, an outer step through it.

    As in the released code, gradients do not go through the merge. Cheaper than it: the outer loss is one concept's, in turns, and the
    attackers are those that add parameters.
    """
    rng = random.Random(settings.seed)
    defender = Defender(model, settings, retention, runtime)
    latents = [encode(model, concept.images) for concept in concepts]
    regular = prompts_beside([c.name for c in concepts], vocabulary_of(model), REGULAR, settings.seed)
    merge = Merge(model, concepts, regular)
    cycles = settings.cycles(model)
    steps = MERGED_EPISODE * settings.inner_steps
    for first in range(0, cycles, MERGED_EPISODE):
        with ExitStack() as stack:
            attack = rng.choice([attack for attack in attacks if not attack.in_place])
            episodes = [
                stack.enter_context(episode_of(model, attack, c, z, steps, settings, defender, rng))
                for c, z in zip(concepts, latents, strict=True)
            ]
            try:
                for cycle in range(first, min(first + MERGED_EPISODE, cycles)):
                    for episode in episodes:
                        for _ in range(settings.inner_steps):
                            episode.attacker_step(runtime)
                    merge(episodes)
                    of_merged = dict(merge.model.unet.named_parameters())
                    weights = [of_merged[name] for name in defender.named]
                    attacked = replace(episodes[cycle % len(episodes)], model=merge.model, weights=weights)
                    defender.step(attacked, cycle / cycles)
            except NotFiniteError:  # as in turns: the next attackers begin anew
                continue
    return {name: weight.detach().clone() for name, weight in defender.named.items()}


class Merge:
    """W' = W + (V*ᵀ − W Cᵀ)(d Cᵀ)⁻¹ d with d = C (C_regᵀ C_reg)⁻¹, for the keys and values of cross-attention.

    C are the embeddings of the tokens of every concept's name, V* what its own attacked model makes of them.
    """

    def __init__(self, model: Model, concepts: Sequence[Concept], regular: Sequence[str]) -> None:
        names = list(protected_weights(model.unet, "kv"))
        parameters = dict(model.unet.named_parameters())
        self.original = [parameters[name] for name in names]
        self.model = model.sharing(private=self.original)
        own = dict(self.model.unet.named_parameters())
        self.own = [own[name] for name in names]
        self.modules = [name.removesuffix(".weight") for name in names]
        with torch.no_grad():
            self.tokens = [self._name_tokens(model, concept.name) for concept in concepts]
            plain = conditioning_of(model, regular).flatten(0, 1).double()
        c = torch.cat(self.tokens).double()
        covariance = plain.T @ plain / len(plain)
        ridge = RIDGE * plain.square().mean() * torch.eye(len(covariance)).double()
        d = torch.linalg.solve(covariance + ridge, c.T).T
        gram = d @ c.T
        self.step = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).double(), d)
        self.c = c

    @staticmethod
    def _name_tokens(model: Model, name: str) -> Tensor:
        length = len(model.tokenizer(name).input_ids) - 1  # without the start sign, with the end sign
        return conditioning_of(model, [name])[0, 1 : 1 + length]

    @torch.no_grad()
    def __call__(self, episodes: Sequence[Episode]) -> None:
        for name, weight, own in zip(self.modules, self.original, self.own, strict=True):
            pairs = zip(episodes, self.tokens, strict=True)
            outputs = torch.cat([e.model.unet.get_submodule(name)(tokens) for e, tokens in pairs]).double()
            missing = outputs - self.c @ weight.double().T
            own.copy_(weight + (missing.T @ self.step).to(weight.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("several-work"))
    parser.add_argument("--part", default="1/1", metavar="I/N")
    parser.add_argument("--rows", default=";".join(ROWS), help="separated by semicolons")
    parser.add_argument("--attack-seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = Lines(RESULTS / "several.jsonl")
    plan = Plan(budget=200, attack_seeds=args.attack_seeds, search=0, images=4)
    trials = Trials(Several(args.work, lines), lines, plan)
    part, parts = map(int, args.part.split("/"))
    for row in args.rows.split(";")[part - 1 :: parts]:
        for case in HELD_OUT[: ROWS[row][0]]:
            trials.untouched(case, row, 0)
            for attack in parse_attacks(ATTACKERS, discover()):
                trials.attack(case, UNDEFENDED, 0, attack, "default")
                trials.attack(case, row, 0, attack, "default")
    put_on_page("several", table(figures(lines, ROWS)))


if __name__ == "__main__":
    main()
