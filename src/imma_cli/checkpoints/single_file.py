"""Which model a single file holds: by its keys and by their shapes, without loading a weight."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imma_cli.checkpoints.configuration import configuration_faults
from imma_cli.checkpoints.other_models import other_model
from imma_cli.checkpoints.safetensors_file import Header
from imma_cli.checkpoints.topology import Shape, architectures, part_of, same_shape
from imma_cli.errors import ImmaError
from imma_cli.families import CONFIGS

EMA = "model_ema."
HARMLESS = re.compile(
    r"""
    (sqrt_)?(one_minus_)?alphas_cumprod(_prev)? | betas | log_one_minus_alphas_cumprod | sqrt_recip(m1)?_alphas_cumprod
    | (v_)?posterior_(variance|log_variance_clipped|mean_coef[12]) | logvar | lvlb_weights | scale_factor
    | cond_stage_model\.(transformer\.)?(logit_scale | text_projection(\.weight)?)
    | cond_stage_model\.transformer\.text_model\.embeddings\.position_ids
    | cond_stage_model\.transformer\.text_model\.text_projection(\.weight)?
    """,
    re.VERBOSE,
)
"""Keys beside the three networks' weights: the noise schedule's tables, and parts of CLIP that SD 1.x does not use."""

WRITABLE = {"F16", "BF16", "F32", "F64"}
NAMED = 8
CONFIG_HINT = "If the model's widths or layers differ from SD 1.x, pass its configuration folder with --config DIR."


@dataclass(frozen=True)
class Match:
    """The architecture that a file's keys and shapes fit."""

    architecture: str
    config: Path
    shapes: Mapping[str, Mapping[str, Shape]]
    """Per part, the file's own shape of each of its keys."""


@dataclass(frozen=True)
class Misfit:
    """How a file differs from an architecture."""

    missing: Sequence[str]
    misshapen: Sequence[str]
    """Each already described: key, found and expected shape."""

    @property
    def total(self) -> int:
        return len(self.missing) + len(self.misshapen)


def match_single_file(path: Path, header: Header, config: Path | None) -> Match:
    """The known architecture, or the one that the folder *config* describes, that the file fits exactly.

    Raises ImmaError, with all reasons, where it fits none.
    """
    candidates = architectures() if config is None else {"custom": _configured(config)}
    found = {key: entry.shape for key, entry in header.entries.items()}
    misfits = {name: _misfit(found, expected) for name, expected in candidates.items()}
    closest = min(misfits, key=lambda name: misfits[name].total)
    expected, misfit = candidates[closest], misfits[closest]
    extra = [key for key in found if key not in expected and not key.startswith(EMA) and not HARMLESS.fullmatch(key)]

    refusal = f"cannot use {path}"
    if (misfit.total or extra) and (other := other_model(found)):
        raise ImmaError(refusal, [other.what], hint=other.hint)
    if config is None and not misfit.missing and not extra and len(misfit.misshapen) > len(expected) // 4:
        reason = (
            "its keys are those of Stable Diffusion 1.x, but its widths are of no architecture that the package knows"
        )
        raise ImmaError(
            refusal, [reason], hint="Pass the folder with the model's configuration and tokenizer: --config DIR"
        )
    reasons = [
        *named("missing", misfit.missing),
        *named("not part of the model", extra),
        *named("misshapen", misfit.misshapen),
        *dtype_faults({key: header.entries[key].dtype for key in found if key in expected}),
    ]
    if reasons:
        against = (
            f" (compared with {config})" if config else f" (compared with the {closest} architecture, the closest)"
        )
        raise ImmaError(refusal + against, reasons, hint=CONFIG_HINT if config is None else None)

    shapes: dict[str, dict[str, Shape]] = {}
    for key in found:
        if key in expected and (part := part_of(key)):
            shapes.setdefault(part, {})[key] = found[key]
    return Match(closest if config is None else known_as(expected), config or CONFIGS / closest, shapes)


def known_as(expected: Mapping[str, Shape]) -> str:
    """The name of the known architecture with exactly these keys and shapes, or "custom"."""
    return next((name for name, shapes in architectures().items() if dict(shapes) == dict(expected)), "custom")


def _configured(config: Path) -> Mapping[str, Shape]:
    if faults := list(configuration_faults(config)):
        raise ImmaError(f"cannot use the configuration folder {config}", faults)
    from imma_cli.checkpoints.configured_shapes import configured_shapes

    return configured_shapes(config)


def _misfit(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> Misfit:
    missing = [key for key in expected if key not in found]
    misshapen = [
        f"{key} is {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in found and not same_shape(key, found[key], shape)
    ]
    return Misfit(missing, misshapen)


def named(fault: str, keys: Sequence[str]) -> list[str]:
    """One reason that names the first of the *keys* and counts the others; none where there are no keys."""
    if not keys:
        return []
    more = f", and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return [f"{len(keys)} tensor{'s' if len(keys) > 1 else ''} {fault}: {', '.join(keys[:NAMED])}{more}"]


def dtype_faults(dtypes: Mapping[str, str]) -> list[str]:
    odd = [f"{key} ({dtype})" for key, dtype in dtypes.items() if dtype not in WRITABLE]
    return named("quantised or not of floating point", odd)
