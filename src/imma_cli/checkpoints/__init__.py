"""Bytes on disk and a loaded model: detect, read, write back in the same layout, with provenance.

Opening a checkpoint reads headers only, no weights, so that refusals are quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from imma_cli.checkpoints.checkpoint import Checkpoint, Part, WriteReport, open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from imma_cli.families.model import Model

__all__ = ["Checkpoint", "Part", "WriteReport", "compose_single_file", "open_checkpoint"]


def compose_single_file(model: Model, config: Path) -> dict[str, Tensor]:
    """The weights of *model* as the tensors of an SD 1.x single file, in the file's key order.

    *config* is the model's configuration folder. The tensors keep their dtype and share memory with the model's weights.
    Raises ValueError where the model's networks are not those of SD 1.x.
    """
    from imma_cli.checkpoints.writing import composed

    return composed(model, config)
