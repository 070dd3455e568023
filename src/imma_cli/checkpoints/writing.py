"""Changed weights back into the layout that they came from; everything else stays byte for byte."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from imma_cli.checkpoints.atomic import atomic_file, atomic_folder, flush
from imma_cli.checkpoints.checkpoint import PROVENANCE, Checkpoint, WeightFile, WriteReport
from imma_cli.checkpoints.folder import WEIGHTS, part_files
from imma_cli.checkpoints.row_map import convert, row_map, state_dict_shapes
from imma_cli.checkpoints.safetensors_file import Header, read_header, rewrite
from imma_cli.checkpoints.tensors import Scattered, all_finite, portions, read_tensor
from imma_cli.checkpoints.topology import PREFIXES, dimensions
from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    from imma_cli.families.model import Model

NAMED = 8
PORTION = 10_000_000
"""Values that are read at a time, to be compared."""
Portion: TypeAlias = tuple[list[str], range | None]
"""Names of weights, and which of their rows; None: all of them."""


def write(
    checkpoint: Checkpoint, output: Path, changed: Mapping[str, Tensor], provenance: Mapping[str, Any], *, force: bool
) -> WriteReport:
    """See ``Checkpoint.write``."""
    record = json.dumps(provenance, sort_keys=True, ensure_ascii=False)
    by_part = _by_part(checkpoint, changed)
    # whatever is made below is made for one key at a time: a model may be as large as the memory
    replaced = {part: Scattered(checkpoint, part, weights) for part, weights in by_part.items()}
    differing = Differing(replaced)

    def rewrite_file(file: WeightFile, target: Path) -> None:
        own = {key: part for part, keys in replaced.items() for key in keys if replaced[part].place(key)[0] is file}
        metadata = {**file.header.metadata, PROVENANCE: record}
        with _flushing(target):
            rewrite(
                file.path,
                file.header,
                target,
                lambda key: differing.note(own[key], key) if key in own else None,
                frozenset(checkpoint.ema_keys),
                metadata,
            )

    if checkpoint.layout == "single-file":
        dropped = checkpoint.ema_keys
        with atomic_file(output, force=force) as temporary:
            rewrite_file(checkpoint.files[0], temporary)
            differing.require_finite()
            _verify(checkpoint, {checkpoint.files[0]: temporary}, replaced)
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
            differing.require_finite()
            _verify(checkpoint, places, replaced)
    return WriteReport(output, differing.tensors, differing.parameters, dropped)


@contextmanager
def _flushing(path: Path) -> Iterator[None]:
    """Inside, what is written to *path* goes to the disk while more is being made."""
    done = Event()

    def flush_now_and_then() -> None:
        while not done.wait(0.5):
            if path.exists():
                flush(path)

    with ThreadPoolExecutor(max_workers=1) as beside:
        flushed = beside.submit(flush_now_and_then)
        try:
            yield
        finally:
            done.set()
        flushed.result()


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
        elif not all_finite(weight):
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


class Differing:
    """In how many tensors and single values the new ones differ, counted as each is written: making them twice takes its time."""

    def __init__(self, replaced: Mapping[str, Scattered]) -> None:
        self.replaced = replaced
        self.tensors = self.parameters = 0
        self.reasons: list[str] = []

    def note(self, part: str, key: str) -> Tensor:
        """The new tensor of *key*, counted, and checked for values that its dtype cannot hold."""
        keys = self.replaced[part]
        tensor = keys[key]
        if keys.cast(key) and not all_finite(tensor):  # as given, all are
            dtype, largest = keys.place(key)[1].dtype, torch.finfo(tensor.dtype).max
            self.reasons.append(f"{key} has values that do not fit its dtype {dtype}, whose largest is {largest:g}")
        differing = 0
        for rows in portions(tuple(tensor.shape), PORTION):
            own = tensor if rows is None else tensor[rows.start : rows.stop]
            differing += int(torch.count_nonzero(own != keys.original(key, rows)))
        self.tensors += differing > 0
        self.parameters += differing
        return tensor

    def require_finite(self) -> None:
        """Raises ImmaError where values were finite in float32, and are no longer in the file's dtype."""
        if self.reasons:
            raise ImmaError(
                "cannot write the changed weights",
                self.reasons[:NAMED],
                hint="Harden the model's float32 release instead.",
            )


def _verify(checkpoint: Checkpoint, written: Mapping[WeightFile, Path], replaced: Mapping[str, Scattered]) -> None:
    """Reads the written files as diffusers will: each changed weight must come out as it was given, in the file's dtype.

    Raises RuntimeError otherwise: that is a fault of this program, not of its input.
    """
    headers = {file: read_header(path) for file, path in written.items()}
    with ThreadPoolExecutor(max_workers=1) as beside:  # the disk writes, the processor compares
        flushed = [beside.submit(flush, path) for path in written.values()]
        _compare(checkpoint, written, headers, replaced)
    for each in flushed:
        each.result()


def _compare(
    checkpoint: Checkpoint,
    written: Mapping[WeightFile, Path],
    headers: Mapping[WeightFile, Header],
    replaced: Mapping[str, Scattered],
) -> None:
    for part, keys in replaced.items():
        # the others stand in, and take no memory
        absent = {key: torch.zeros(()).expand(entry.shape) for key, (_, entry) in checkpoint.entries[part].items()}
        compare = partial(_compare_portion, checkpoint, written, headers, part, keys, absent)
        with ThreadPoolExecutor(max_workers=2) as threads:  # one reads while the other compares
            deque(threads.map(compare, _portions(keys)), maxlen=0)


def _compare_portion(
    checkpoint: Checkpoint,
    written: Mapping[WeightFile, Path],
    headers: Mapping[WeightFile, Header],
    part: str,
    keys: Scattered,
    absent: Mapping[str, Tensor],
    portion: Portion,
) -> None:
    names, rows = portion
    tensors = dict(absent)
    for key in {key for name in names for key in keys.rows.sources(name)}:
        file, _ = keys.place(key)
        tensors[key] = read_tensor(written[file], headers[file], headers[file].entries[key], rows)
    converted = convert(part, checkpoint.layout, tensors, checkpoint.config)
    for name in names:
        weight = keys.weights[name].detach()
        if not _same(converted[name], weight if rows is None else weight[rows.start : rows.stop]):
            raise RuntimeError(f"{part}.{name} does not read back as it was written; nothing was kept")


def _portions(keys: Scattered) -> Iterator[Portion]:
    """The weights, so many at a time that they are at most `PORTION` values, or one that lies in several keys."""
    names: list[str] = []
    values = 0
    for name, weight in keys.weights.items():
        if weight.numel() > PORTION and keys.rows.whole(name):
            yield from (([name], rows) for rows in portions(tuple(weight.shape), PORTION))
            continue
        if names and values + weight.numel() > PORTION:
            yield names, None
            names, values = [], 0
        names.append(name)
        values += weight.numel()
    if names:
        yield names, None


def _same(found: Tensor, given: Tensor) -> bool:
    """Whether both hold the same bits once *given* is cast. As integers: floats of 16 bits are compared slowly."""
    cast = given.cpu().to(found.dtype)
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.dtype.itemsize]
    return torch.equal(found.view(as_bits), cast.view(as_bits))


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
