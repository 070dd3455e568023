"""A checkpoint on disk, validated: what it is, the model in it, and how it is written back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from imma_cli.checkpoints import folder as folders
from imma_cli.checkpoints.atomic import refuse_output
from imma_cli.checkpoints.safetensors_file import Entry, Header, read_header
from imma_cli.checkpoints.single_file import EMA, Match, match_single_file
from imma_cli.checkpoints.topology import PREFIXES, Shape
from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    from torch import Tensor

    from imma_cli.families.family import Family
    from imma_cli.families.model import Model

PROVENANCE = "imma"
"""The key of the safetensors metadata under which imma's own record stands, as JSON."""


@dataclass(frozen=True, eq=False)
class WeightFile:
    """One safetensors file of a checkpoint, and the moment at which its header was read."""

    path: Path
    header: Header
    stamp: tuple[int, int]
    """Size in bytes and time of the last change."""

    @classmethod
    def open(cls, path: Path, header: Header | None = None) -> WeightFile:
        header = header or read_header(path)
        return cls(path, header, _stamp(path))


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint: its number of parameters and the dtypes that they are stored in."""

    parameters: int
    dtype: str


@dataclass(frozen=True)
class WriteReport:
    """What a written checkpoint differs in from its input."""

    path: Path
    tensors: int
    """Tensors of the file in which at least one value differs."""
    parameters: int
    """Single values that differ, after rounding to the file's dtype."""
    dropped: tuple[str, ...]
    """Keys (of a folder: files) left out, because they would hand out the unchanged weights."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose header was validated and whose weights were not loaded yet. Made by :func:`open_checkpoint`."""

    path: Path
    layout: Literal["single-file", "folder"]
    architecture: str
    """"sd1", "demo", or "custom" for what a configuration folder describes."""
    config: Path
    """Folder with the configuration and the tokenizer, in diffusers' layout."""
    files: tuple[WeightFile, ...]
    shapes: Mapping[str, Mapping[str, Shape]]
    """Per part, the shape of each of its keys."""
    variants: Mapping[str, str | None] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    """What a user should know about the file, each one sentence."""

    @cached_property
    def family(self) -> Family:
        from imma_cli.families import family_named

        return family_named("sd1")

    @cached_property
    def entries(self) -> dict[str, dict[str, tuple[WeightFile, Entry]]]:
        """Per part, where each of its keys stands."""
        everywhere = dict.fromkeys(self.shapes, self.files)
        if self.layout == "folder":
            everywhere = {part: tuple(f for f in self.files if f.path.parent.name == part) for part in self.shapes}
        return {
            part: {
                key: (file, file.header.entries[key])
                for file in files
                for key in file.header.entries
                if key in self.shapes[part]
            }
            for part, files in everywhere.items()
        }

    @property
    def size(self) -> int:
        """Bytes of all weight files together."""
        return sum(file.stamp[0] for file in self.files)

    @property
    def parts(self) -> dict[str, Part]:
        found = {}
        for part, placed in self.entries.items():
            dtypes = sorted({entry.dtype for _, entry in placed.values()})
            found[part] = Part(sum(entry.parameters for _, entry in placed.values()), "+".join(dtypes))
        return found

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Dtypes of the networks' weights, in safetensors' words."""
        return tuple(sorted({entry.dtype for placed in self.entries.values() for _, entry in placed.values()}))

    @property
    def metadata(self) -> dict[str, str]:
        """The safetensors metadata; of a folder, that of all its files together."""
        return {key: value for file in self.files for key, value in file.header.metadata.items()}

    @property
    def provenance(self) -> dict[str, Any] | None:
        """What imma wrote when it made this file, or None for a file that it did not make."""
        try:
            record = json.loads(self.metadata.get(PROVENANCE, "null"))
        except ValueError:
            return None
        return record if _is_record(record) else None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file; of a folder, that of the lines "digest  path" of its weight files, sorted by path."""
        if self.layout == "single-file":
            return _sha256(self.path)
        lines = [f"{_sha256(file.path)}  {file.path.relative_to(self.path).as_posix()}\n" for file in self.files]
        return hashlib.sha256("".join(sorted(lines, key=lambda line: line[66:])).encode()).hexdigest()

    @property
    def ema_keys(self) -> tuple[str, ...]:
        """Keys of a second, averaged copy of the UNet. Writing drops them: they hold the unchanged weights."""
        return tuple(key for file in self.files for key in file.header.entries if key.startswith(EMA))

    def load(self, *, halved: bool = False) -> Model:
        """The model in float32 on the CPU, frozen; *halved*: what `Runtime.halved` means, in 16 bits. Uses no network.

        Raises ImmaError for NaN or Inf in the weights, for a tokenizer that does not work, or where the file changed since it was opened.
        """
        from imma_cli.checkpoints.loading import load

        self.require_unchanged()
        return load(self, halved=halved)

    def check_output(self, output: Path, *, force: bool = False) -> None:
        """Raises ImmaError, with every reason, where :meth:`write` could not write *output*. Call it before long work."""
        single = self.layout == "single-file"
        if single and output.suffix != ".safetensors":
            raise ImmaError(
                f"cannot write {output}", ["its name does not end in .safetensors, which is what is written"]
            )
        if not single and output.suffix == ".safetensors":
            raise ImmaError(
                f"cannot write {output}",
                ["a diffusers folder is written as a folder: give a name without .safetensors"],
            )
        refuse_output(output, self.path, force=force, folder=not single, needed=self.size, replaceable=_is_model_folder)

    def write(
        self, output: Path, changed: Mapping[str, Tensor], provenance: Mapping[str, Any], *, force: bool = False
    ) -> WriteReport:
        """Writes this checkpoint with *changed* weights to *output*, in the same layout, whole or not at all.

        *changed* is keyed by part and diffusers' name ("unet.conv_in.weight"); each value has its weight's shape and is
        cast to the file's dtype. *provenance* must be JSON; it stands under the metadata key "imma". The same arguments
        give the same bytes.

        Raises ImmaError for names or shapes that the model does not have, for NaN or Inf (also from the cast), for an
        *output* that exists without *force*, and where writing fails; nothing is left behind then.
        """
        from imma_cli.checkpoints.writing import write

        self.check_output(output, force=force)
        self.require_unchanged()
        return write(self, output, changed, provenance, force=force)

    def require_unchanged(self) -> None:
        """Raises ImmaError where a weight file is not the one that was opened."""
        moved = [file.path for file in self.files if not file.path.is_file() or _stamp(file.path) != file.stamp]
        if moved:
            raise ImmaError(f"cannot use {self.path}", [f"{path} changed while it was in use" for path in moved])


def _nearby(path: Path) -> str:
    """What stands where the checkpoint was looked for."""
    folder = path.parent
    if not folder.is_dir():
        return f"There is no folder {folder} either."
    names = sorted(p.name for p in folder.glob("*") if p.suffix == ".safetensors" or (p / "model_index.json").is_file())
    return f"In {folder} there are: {', '.join(names[:5])}." if names else f"{folder.absolute()} holds no checkpoint."


def open_checkpoint(path: Path, config: Path | None = None) -> Checkpoint:
    """Validates the checkpoint at *path*, a ``.safetensors`` file or a diffusers folder, without loading its weights.

    *config* is a configuration folder for a single file whose architecture the package does not know. Raises ImmaError,
    with every reason found, for whatever is not a whole Stable Diffusion 1.x checkpoint.
    """
    if not path.exists():
        raise ImmaError(f"cannot use {path}", ["there is no such file or folder"], _nearby(path))
    if path.is_dir():
        return _open_folder(path, config)
    file = WeightFile.open(path)
    match = match_single_file(path, file.header, config)
    return Checkpoint(
        path, "single-file", match.architecture, match.config, (file,), match.shapes, notices=_notices([file])
    )


def _open_folder(path: Path, config: Path | None) -> Checkpoint:
    if config is not None:
        raise ImmaError(
            f"cannot use {config} for {path}",
            ["a diffusers folder carries its own configuration"],
            hint="Leave out --config.",
        )
    if not (path / "model_index.json").is_file():
        lone = sorted(path.glob("*.safetensors"))
        hint = f"Did you mean {lone[0]}?" if len(lone) == 1 else None
        raise ImmaError(f"cannot use {path}", ["it is not a diffusers folder: it has no model_index.json"], hint=hint)
    parts = folders.find_parts(path)
    headers = folders.read_headers(parts)
    match: Match = folders.match_folder(path, headers)
    files = tuple(
        WeightFile.open(file, header)
        for part in PREFIXES
        for file, header in zip(parts[part].paths, headers[part], strict=True)
    )
    variants = {part: found.variant for part, found in parts.items()}
    return Checkpoint(path, "folder", match.architecture, path, files, match.shapes, variants, notices=_notices(files))


def _notices(files: Iterable[WeightFile]) -> tuple[str, ...]:
    found = []
    ema = sum(key.startswith(EMA) for file in files for key in file.header.entries)
    if ema:
        found.append(
            f"The file holds a second, averaged copy of the UNet ({ema} tensors model_ema.*). It is left out of what is "
            "written: whoever loads it would get the unhardened weights."
        )
    for file in files:
        if record := file.header.metadata.get(PROVENANCE):
            try:
                json.loads(record)
            except ValueError:
                found.append(
                    f"The metadata key 'imma' of {file.path.name} is not JSON, so it is not imma's record; writing replaces it."
                )
    return tuple(found)


def _is_record(record: Any) -> bool:
    """Whether *record* has the form of imma's own; anybody can write anything under its key."""
    if not isinstance(record, dict) or not isinstance(record.get("settings", {}), dict):
        return False
    attacks, concepts = (record.get(key, []) for key in ("attacks", "concepts"))
    if not all(
        isinstance(many, list) and all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in many)
        for many in (attacks, concepts)
    ):
        return False
    hashes = [one.get(key, []) for one in concepts for key in ("sha256", "captions_sha256")]
    texts = [one.get("spec", "") for one in attacks]
    tables = [one.get(key) or {} for one in attacks for key in ("settings", "rates")]
    return (
        all(isinstance(many, list) and all(isinstance(one, str) for one in many) for many in hashes)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(table, dict) for table in tables)
    )


def _is_model_folder(path: Path) -> bool:
    return (path / "model_index.json").is_file() or not any(path.iterdir())


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
