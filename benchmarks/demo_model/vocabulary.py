"""CLIP's byte-pair vocabulary, whole for SD 1.x or cut down to what captions need.

The cut keeps every merge that CLIP itself applies to the captions' words, so those words are split exactly as CLIP
splits them, plus CLIP's most frequent merges; anything else falls apart into shorter pieces or letters.

    python benchmarks/demo_model/vocabulary.py bpe_simple_vocab_16e6.txt.gz CACHE
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import sys
from pathlib import Path

from artwork import STYLES, SYNONYMS, Artwork, words

CONFIGS = Path(__file__).parents[2] / "src" / "imma_cli" / "families" / "configs"
FREQUENT = 1200
CLIP_MERGES = 49152 - 256 - 2


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def applied_merges(word: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges byte-pair encoding applies to *word*."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    used = set()
    while len(pieces) > 1:
        pairs = list(itertools.pairwise(pieces))
        best = min(pairs, key=lambda p: ranks.get(p, len(ranks)))
        if best not in ranks:
            break
        used.add(best)
        merged = []
        i = 0
        while i < len(pieces):
            if i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == best:
                merged.append(pieces[i] + pieces[i + 1])
                i += 2
            else:
                merged.append(pieces[i])
                i += 1
        pieces = merged
    return used


def write(folder: Path, merges: list[tuple[str, str]]) -> None:
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "add_prefix_space": False,
        "bos_token": "<|startoftext|>",
        "do_lower_case": True,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    bpe, cache_dir = Path(sys.argv[1]), Path(sys.argv[2])
    lines = gzip.decompress(bpe.read_bytes()).decode("utf-8").split("\n")[1 : CLIP_MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    art = Artwork(cache_dir)
    texts = [words(n) for n in art.concepts]
    texts += [s for many in SYNONYMS.values() for s in many]
    texts += [s for _, many in STYLES.values() for s in many]
    texts += [
        "high contrast black and white silhouette",
        "an emoji of a picture in the style, a photo image artwork by",
    ]
    texts += ["pixel cartoon character adventurer walking standing jumping falling climbing"]
    ranks = {m: i for i, m in enumerate(merges)}
    needed = {m for text in texts for w in re.findall(r"[a-z]+|[0-9]", text.lower()) for m in applied_merges(w, ranks)}
    kept = [m for i, m in enumerate(merges) if i < FREQUENT or m in needed]
    write(CONFIGS / "sd1" / "tokenizer", merges)
    write(CONFIGS / "demo" / "tokenizer", kept)
    print(f"CLIP: {len(merges)} merges; kept {len(kept)}, vocabulary {512 + len(kept) + 2}")


if __name__ == "__main__":
    main()
