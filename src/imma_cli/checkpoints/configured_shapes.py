"""Keys and shapes that a file must have to fit a configuration folder, from diffusers' own models without their memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from imma_cli.checkpoints.row_map import row_map, state_dict_shapes
from imma_cli.checkpoints.topology import PREFIXES, Shape, dimensions
from imma_cli.errors import ImmaError


def configured_shapes(config: Path) -> Mapping[str, Shape]:
    """Shape of every key of a single file of the model that *config* describes, in the file's order.

    Raises ImmaError where *config* describes networks of another topology than SD 1.x.
    """
    layers = json.loads((config / "text_encoder" / "config.json").read_text()).get("num_hidden_layers", 12)
    counts = dimensions(layers)
    found: dict[str, Shape] = {}
    reasons = []
    for part, prefix in PREFIXES.items():
        keys = {key: (1,) * count for key, count in counts.items() if key.startswith(prefix)}
        try:
            expected = state_dict_shapes(part, config)
            keys_of = row_map(part, "single-file", keys, config).renames()
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
            reasons.append(f"{part}/config.json does not describe a network of Stable Diffusion 1.x: {error}")
            continue
        if keys_of.keys() != expected.keys():
            odd = sorted(keys_of.keys() ^ expected.keys())
            reasons.append(
                f"{part}/config.json describes other layers than Stable Diffusion 1.x has: {', '.join(odd[:4])} …"
            )
            continue
        for name, key in keys_of.items():
            found[key] = (*expected[name], *(1,) * (counts[key] - len(expected[name])))
    if reasons:
        raise ImmaError(f"cannot use the configuration folder {config}", reasons)
    return {key: found[key] for key in counts}
