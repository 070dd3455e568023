"""From a file's keys to diffusers' names and back, read off diffusers' own converters.

diffusers can read many layouts and write one. Its converters rename, split, join and reorder **rows**, and nothing else; so a
converter that is run on row *numbers* says from which rows of which keys each weight comes, and a changed weight can be
scattered back into them. This is the only module that touches diffusers' private table of converters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from imma_cli.checkpoints.topology import Shape

Layout = Literal["single-file", "folder"]


@dataclass(frozen=True)
class RowMap:
    """Where the weights of one network lie in a file."""

    rows: Mapping[str, Tensor]
    """Per diffusers name: int64 [rows], numbers of rows in all keys laid end to end."""
    keys: tuple[str, ...]
    starts: Tensor
    """Number of each key's first row, and at the end the number of all rows: int64 [keys + 1]."""
    _found: dict[str, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict, repr=False, compare=False)

    def sources(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Per key that the weight *name* comes from: row numbers in the key, and in the weight."""
        if name not in self._found:  # every weight is asked for several times
            self._found[name] = self._sources(name)
        return self._found[name]

    def whole(self, name: str) -> str | None:
        """The key that is the weight *name*, row for row, if there is one."""
        sources = self.sources(name)
        if len(sources) > 1:
            return None
        ((key, (taken, _)),) = sources.items()
        number = self.keys.index(key)
        length = int(self.starts[number + 1] - self.starts[number])
        return key if torch.equal(taken, torch.arange(length)) else None

    def _sources(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        numbers = self.rows[name]
        owners = torch.searchsorted(self.starts, numbers, right=True) - 1
        found = {}
        for owner in sorted(set(owners.tolist())):
            within = (owners == owner).nonzero()[:, 0]
            found[self.keys[owner]] = (numbers[within] - self.starts[owner], within)
        return found

    def renames(self) -> dict[str, str]:
        """The key of each weight. Raises ValueError where a weight is joined from several keys."""
        found = {}
        for name in self.rows:
            (found[name],) = self.sources(name)
        return found

    def scatter(self, weights: Mapping[str, Tensor], present: Tensor, key: str) -> Tensor:
        """The tensor of *key* after the *weights* took their places in it, cast to its dtype.

        *present* is what the key holds now: its shape and dtype, and the values of rows that no given weight covers.
        """
        found = present.clone(memory_format=torch.contiguous_format)
        target = found.view(found.shape[0], -1)
        for name, weight in weights.items():
            if key in (sources := self.sources(name)):
                into, within = sources[key]
                values = weight.detach().reshape(weight.shape[0], -1)
                target[into] = values[within.to(values.device)].to(target)
        return found


def row_map(part: str, layout: Layout, shapes: Mapping[str, Shape], config: Path) -> RowMap:
    """The map of one *part* ("unet", "vae", "text_encoder") whose file keys have the given *shapes*.

    *config* is the configuration folder, which the converters follow. Raises ValueError where rows are lost, doubled or transposed.
    """
    keys = tuple(shapes)
    starts = torch.tensor([0, *(shapes[key][0] for key in keys)]).cumsum(0)
    numbered = {
        key: torch.arange(int(starts[i]), int(starts[i + 1])).view(-1, *[1] * (len(shapes[key]) - 1))
        for i, key in enumerate(keys)
    }
    converted = convert(part, layout, numbered, config)
    rows = {name: numbers.flatten() for name, numbers in converted.items() if numbers is not None}
    covered = torch.cat(list(rows.values())).sort().values if rows else torch.empty(0)
    if not torch.equal(covered, torch.arange(int(starts[-1]))):
        raise ValueError(f"diffusers does not take every row of the {part}'s keys exactly once")
    return RowMap(rows, keys, starts)


def convert(part: str, layout: Layout, tensors: Mapping[str, Tensor], config: Path) -> dict[str, Tensor]:
    """The *tensors* of a file under the names of the model's state dict, as diffusers itself would read them."""
    if part == "text_encoder":
        return _text_encoder_names(layout, dict(tensors), config)
    if layout == "folder":
        renamed = dict(tensors)
        _kept_network(part, config)._fix_state_dict_keys_on_load(renamed)  # attention names of before 2023
        return renamed
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    described = _described(part, config)
    mapping = SINGLE_FILE_LOADABLE_CLASSES[described["_class_name"]]["checkpoint_mapping_fn"]
    converted: dict[str, Tensor] = mapping(config=described, checkpoint=dict(tensors))
    return converted


def _text_encoder_names(layout: Layout, tensors: dict[str, Tensor], config: Path) -> dict[str, Tensor]:
    if layout == "single-file":
        from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

        tensors = convert_ldm_clip_checkpoint(tensors)
    # transformers took the inner model's name out of the state dict in 5.6; files have it or not
    nested = hasattr(_kept_network("text_encoder", config), "text_model")
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return {f"text_model.{name}": tensor for name, tensor in bare.items()} if nested else bare


def _described(part: str, config: Path) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(_text_of(part, config))
    return described


def _text_of(part: str, config: Path) -> str:
    return (config / part / "config.json").read_text()


def empty_network(part: str, config: Path) -> Any:
    """The network that *config* describes, on the meta device: shapes and names without memory."""
    with torch.device("meta"):
        return described_network(part, config)


def described_network(part: str, config: Path) -> Any:
    """The network that *config* describes, with weights as torch makes them where nothing else is said."""
    return _network(part, _described(part, config))


def _kept_network(part: str, config: Path) -> Any:
    """As `empty_network`, for those who only look at it. Files are converted in portions, and making it takes longer than one of them."""
    return _kept(part, _text_of(part, config))


@lru_cache(maxsize=3)
def _kept(part: str, text: str) -> Any:
    with torch.device("meta"):
        return _network(part, json.loads(text))


def _network(part: str, described: dict[str, Any]) -> Any:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    if part == "text_encoder":
        return CLIPTextModel(CLIPTextConfig.from_dict(described))
    # pipelines take a sample_size under 64 in a configuration of an early version for a mistake, and set 64
    described.pop("_diffusers_version", None)
    return {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(described)


def state_dict_shapes(part: str, config: Path) -> dict[str, Shape]:
    """Shape of every weight in the state dict of the network that *config* describes."""
    return {name: tuple(tensor.shape) for name, tensor in empty_network(part, config).state_dict().items()}
