"""Changed weights back into the layout that they came from; everything else stays byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imma_cli.checkpoints.atomic import atomic_file, atomic_folder
from imma_cli.checkpoints.checkpoint import PROVENANCE, Checkpoint, WeightFile, WriteReport
from imma_cli.checkpoints.folder import WEIGHTS, part_files
from imma_cli.checkpoints.row_map import convert, row_map, state_dict_shapes
from imma_cli.checkpoints.safetensors_file import Entry, Header, read_header, rewrite
from imma_cli.checkpoints.topology import PREFIXES, dimensions
from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    from imma_cli.families.model import Model

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
NAMED = 8


def write(
    checkpoint: Checkpoint, output: Path, changed: Mapping[str, Tensor], provenance: Mapping[str, Any], *, force: bool
) -> WriteReport:
    """See ``Checkpoint.write``."""
    record = json.dumps(provenance, sort_keys=True, ensure_ascii=False)
    by_part = _by_part(checkpoint, changed)
    replaced: dict[str, dict[str, Tensor]] = {}
    tensors = parameters = 0
    for part, weights in by_part.items():
        original = partial(_original, checkpoint, part)
        rows = row_map(part, checkpoint.layout, checkpoint.shapes[part], checkpoint.config)
        replaced[part] = rows.scatter(weights, original)
        for key, tensor in replaced[part].items():
            differing = int((tensor != original(key)).sum())
            tensors += differing > 0
            parameters += differing
    _require_finite(checkpoint, replaced)

    def rewrite_file(file: WeightFile, target: Path) -> None:
        own = {
            key: tensor
            for part in replaced
            for key, tensor in replaced[part].items()
            if checkpoint.entries[part][key][0] is file
        }
        metadata = {**file.header.metadata, PROVENANCE: record}
        rewrite(file.path, file.header, target, own, frozenset(checkpoint.ema_keys), metadata)

    if checkpoint.layout == "single-file":
        dropped = checkpoint.ema_keys
        with atomic_file(output, force=force) as temporary:
            rewrite_file(checkpoint.files[0], temporary)
            _verify(checkpoint, {checkpoint.files[0]: temporary}, by_part, replaced)
    else:
        dropped = tuple(_unhardened_files(checkpoint, by_part))
        rewritten = {file for part in by_part for file, _ in checkpoint.entries[part].values()}
        with atomic_folder(output, force=force) as temporary:
            places = {file: temporary / file.path.relative_to(checkpoint.path) for file in rewritten}
            for source in _kept_files(checkpoint, set(dropped), places.values(), temporary):
                target = temporary / source.relative_to(checkpoint.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
            for file, target in places.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                rewrite_file(file, target)
            _verify(checkpoint, places, by_part, replaced)
    return WriteReport(output, tensors, parameters, dropped)


def _by_part(checkpoint: Checkpoint, changed: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """*changed* per part, once every name and shape was checked."""
    by_part: dict[str, dict[str, Tensor]] = {}
    unknown, misshapen, broken = [], [], []
    shapes = {
        part: state_dict_shapes(part, checkpoint.config)
        for part in {full.partition(".")[0] for full in changed} & set(PREFIXES)
    }
    for full, weight in changed.items():
        part, _, name = full.partition(".")
        expected = shapes.get(part, {}).get(name)
        if expected is None:
            unknown.append(full)
        elif tuple(weight.shape) != expected:
            misshapen.append(f"{full} is {list(weight.shape)} instead of {list(expected)}")
        elif not bool(weight.isfinite().all()):
            broken.append(full)
        else:
            by_part.setdefault(part, {})[name] = weight
    reasons = [
        *(f"the model has no weight {name}" for name in unknown[:NAMED]),
        *misshapen[:NAMED],
        *(f"NaN or Inf in the new value of {name}" for name in broken[:NAMED]),
    ]
    if reasons:
        more = len(unknown) + len(misshapen) + len(broken) - len(reasons)
        raise ImmaError("cannot write the changed weights", [*reasons, *([f"and {more} more"] if more else [])])
    return by_part


def _require_finite(checkpoint: Checkpoint, replaced: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The values were finite in float32; in the file's dtype they may be no longer."""
    reasons = [
        f"{key} has values that do not fit its dtype {checkpoint.entries[part][key][1].dtype}, whose largest is {torch.finfo(tensor.dtype).max:g}"
        for part, tensors in replaced.items()
        for key, tensor in tensors.items()
        if not bool(tensor.isfinite().all())
    ]
    if reasons:
        raise ImmaError(
            "cannot write the changed weights", reasons[:NAMED], hint="Harden the model's float32 release instead."
        )


def _original(checkpoint: Checkpoint, part: str, key: str) -> Tensor:
    file, entry = checkpoint.entries[part][key]
    return read_tensor(file.path, file.header, entry)


def read_tensor(path: Path, header: Header, entry: Entry) -> Tensor:
    """One tensor of a safetensors file, in the file's dtype."""
    with path.open("rb") as file:
        file.seek(header.data_start + entry.start)
        data = bytearray(file.read(entry.end - entry.start))
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)


def _verify(
    checkpoint: Checkpoint,
    written: Mapping[WeightFile, Path],
    by_part: Mapping[str, Mapping[str, Tensor]],
    replaced: Mapping[str, Collection[str]],
) -> None:
    """Reads the written files as diffusers will: each changed weight must come out as it was given, in the file's dtype.

    Raises RuntimeError otherwise: that is a fault of this program, not of its input.
    """
    headers = {file: read_header(path) for file, path in written.items()}
    for part, weights in by_part.items():
        tensors = {}
        for key, (file, entry) in checkpoint.entries[part].items():
            if key in replaced[part]:
                tensors[key] = read_tensor(written[file], headers[file], headers[file].entries[key])
            else:
                tensors[key] = torch.zeros(()).expand(entry.shape)  # stands in, takes no memory
        converted = convert(part, checkpoint.layout, tensors, checkpoint.config)
        for name, weight in weights.items():
            if not torch.equal(converted[name], weight.detach().cpu().to(converted[name].dtype)):
                raise RuntimeError(f"{part}.{name} does not read back as it was written; nothing was kept")


def _unhardened_files(checkpoint: Checkpoint, by_part: Mapping[str, object]) -> Iterator[str]:
    """Weight files beside the ones that are rewritten: other formats and precisions of the same, unchanged weights."""
    used = {file.path for file in checkpoint.files}
    used |= {index for part in PREFIXES if (index := part_files(checkpoint.path, part).index)}
    for path in sorted(checkpoint.path.rglob("*")):
        inside = path.relative_to(checkpoint.path)
        whole_model = len(inside.parts) == 1
        if (
            path.is_file()
            and path not in used
            and WEIGHTS.fullmatch(path.name)
            and (whole_model or inside.parts[0] in by_part)
        ):
            yield inside.as_posix()


def _kept_files(
    checkpoint: Checkpoint, dropped: set[str], rewritten: Collection[Path], temporary: Path
) -> Iterator[Path]:
    """Every other file of the folder. A repository's hidden folders (.git, .cache) hold the unchanged weights again, and stay behind."""
    for path in sorted(checkpoint.path.rglob("*")):
        inside = path.relative_to(checkpoint.path)
        hidden = any(name.startswith(".") for name in inside.parts[:-1])
        if path.is_file() and not hidden and inside.as_posix() not in dropped and temporary / inside not in rewritten:
            yield path


def composed(model: Model, config: Path) -> dict[str, Tensor]:
    """See ``imma_cli.checkpoints.compose_single_file``."""
    counts = dimensions(int(model.text_encoder.config.num_hidden_layers))
    found: dict[str, Tensor] = {}
    for part, network in model.networks.items():
        keys = {key: (1,) * count for key, count in counts.items() if key.startswith(PREFIXES[part])}
        keys_of = row_map(part, "single-file", keys, config).renames()
        weights = network.state_dict()
        if weights.keys() != keys_of.keys():
            raise ValueError(
                f"the {part} is not that of Stable Diffusion 1.x: {sorted(weights.keys() ^ keys_of.keys())[:4]} …"
            )
        for name, key in keys_of.items():
            weight = weights[name]
            found[key] = weight.reshape(*weight.shape, *(1,) * (counts[key] - weight.ndim))
    return {key: found[key] for key in counts}
