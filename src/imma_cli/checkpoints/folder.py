"""A diffusers folder: which weight files it holds, and whether they fit its own configuration."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from imma_cli.checkpoints.configuration import configuration_faults
from imma_cli.checkpoints.file_kinds import CONVERT
from imma_cli.checkpoints.safetensors_file import Header, read_header
from imma_cli.checkpoints.single_file import Match, dtype_faults, known_as, named
from imma_cli.checkpoints.topology import PREFIXES, Shape
from imma_cli.errors import ImmaError

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
WEIGHTS = re.compile(r".+\.(safetensors|bin|pt|pth|ckpt|msgpack|h5|onnx|onnx_data|pb|gguf|pkl|index(\.\w+)?\.json)")
POSITION_IDS = "embeddings.position_ids"


@dataclass(frozen=True)
class PartFiles:
    """The files with one part's weights: one, or the shards that an index names."""

    paths: tuple[Path, ...]
    variant: str | None = None
    index: Path | None = None


def part_files(folder: Path, part: str) -> PartFiles:
    """The files from which diffusers would load *part*. Raises ImmaError where there is none that is safe to load."""
    stem, place = STEMS[part], folder / part
    if (whole := place / f"{stem}.safetensors").is_file():
        return PartFiles((whole,))
    if (index := place / f"{stem}.safetensors.index.json").is_file():
        return PartFiles(_shards(index), index=index)
    if (half := place / f"{stem}.fp16.safetensors").is_file():
        return PartFiles((half,), variant="fp16")
    pickles = sorted(path.name for path in place.glob("*") if path.suffix in {".bin", ".pt", ".ckpt", ".pth"})
    if pickles:
        reason = f"{part}/ holds only {', '.join(pickles)}: a Python pickle, which can run code when it is loaded"
        raise ImmaError(f"cannot use {folder}", [reason], hint=CONVERT)
    raise ImmaError(f"cannot use {folder}", [f"{part}/{stem}.safetensors is missing"])


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImmaError(f"cannot read {index}", [f"it is no index of shards: {error}"]) from error
    paths = tuple(index.parent / str(name) for name in names)
    faults = [f"{path.name} is missing" for path in paths if not path.is_file()]
    faults += [f"it names {name!r} outside its folder" for name in names if Path(str(name)).name != name]
    if faults or not paths:
        raise ImmaError(f"cannot read {index}", faults or ["it names no shards"])
    return paths


def find_parts(folder: Path) -> dict[str, PartFiles]:
    """Each part's weight files. Raises ImmaError with every reason that speaks against the folder."""
    reasons, hint = list(configuration_faults(folder)), None
    found: dict[str, PartFiles] = {}
    for part in PREFIXES:
        try:
            found[part] = part_files(folder, part)
        except ImmaError as error:
            reasons += error.reasons
            hint = error.hint or hint
    reasons += [
        f"{path.relative_to(folder)}/ is a link to a folder"
        for path in folder.rglob("*")
        if path.is_symlink() and path.is_dir()
    ]
    if reasons:
        raise ImmaError(f"cannot use {folder} as a diffusers folder", reasons, hint=hint)
    return found


def match_folder(folder: Path, headers: dict[str, list[Header]]) -> Match:
    """Checks the weight files' *headers*, per part, against the folder's own configuration. Raises ImmaError, with all reasons."""
    from imma_cli.checkpoints.configured_shapes import configured_shapes
    from imma_cli.checkpoints.row_map import row_map, state_dict_shapes

    architecture = known_as(configured_shapes(folder))  # refuses other topologies
    reasons: list[str] = []
    shapes: dict[str, dict[str, Shape]] = {}
    for part, files in headers.items():
        entries = {
            key: entry for header in files for key, entry in header.entries.items() if not key.endswith(POSITION_IDS)
        }
        if sum(len(header.entries) for header in files) > len({key for header in files for key in header.entries}):
            reasons.append(f"{part}: a tensor stands in more than one shard")
        shapes[part] = {key: entry.shape for key, entry in entries.items()}
        expected = state_dict_shapes(part, folder)
        # the map needs rows and may meet keys of any file: give it one row per key
        keys_of = row_map(part, "folder", dict.fromkeys(entries, (1,)), folder).renames()
        wrong = [
            f"{keys_of[name]} is {list(entries[keys_of[name]].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in keys_of and entries[keys_of[name]].shape != shape
        ]
        faults = [
            *named("missing", [name for name in expected if name not in keys_of]),
            *named("not part of the model", [key for name, key in keys_of.items() if name not in expected]),
            *named("misshapen", wrong),
            *dtype_faults({key: entry.dtype for key, entry in entries.items()}),
        ]
        reasons += [f"{part}: {fault}" for fault in faults]
    if reasons:
        raise ImmaError(f"cannot use {folder}", reasons)
    return Match(architecture, folder, shapes)


def read_headers(parts: dict[str, PartFiles]) -> dict[str, list[Header]]:
    """The headers of every part's files. Raises one ImmaError for all broken ones."""
    reasons: list[str] = []
    found: dict[str, list[Header]] = {}
    for part, files in parts.items():
        for path in files.paths:
            try:
                found.setdefault(part, []).append(read_header(path))
            except ImmaError as error:
                reasons += [f"{path}: {reason}" for reason in error.reasons]
    if reasons:
        raise ImmaError("cannot read the folder's weights", reasons)
    return found
