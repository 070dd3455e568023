"""From a validated checkpoint to a model in memory: one weight at a time, by diffusers' own names, offline and silent."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from imma_cli.checkpoints.row_map import described_network
from imma_cli.checkpoints.tensors import Float32Weights, all_finite
from imma_cli.checkpoints.topology import PREFIXES
from imma_cli.errors import ImmaError
from imma_cli.families.allocator import give_back_large_blocks
from imma_cli.families.halving import halved_layers
from imma_cli.families.model import SMALL_MODEL, Model

if TYPE_CHECKING:
    from imma_cli.checkpoints.checkpoint import Checkpoint

NAMED = 8
PROBE = "a photo of a cat on the red table"


def load(checkpoint: Checkpoint, *, halved: bool = False) -> Model:
    """The checkpoint's model, float32, on the CPU; see ``Checkpoint.load``."""
    broken: list[str] = []
    if checkpoint.parts["unet"].parameters >= SMALL_MODEL:
        give_back_large_blocks()
    with quiet():
        # the pipeline is for drawing; its import tells of optional packages, which nobody here has asked for
        from diffusers import DDPMScheduler, StableDiffusionPipeline  # noqa: F401
        from transformers import CLIPTokenizer

        model = checkpoint.family.assemble(
            **{part: _network(checkpoint, part, broken, halved=halved and part == "unet") for part in PREFIXES},
            tokenizer=CLIPTokenizer.from_pretrained(checkpoint.config / "tokenizer", local_files_only=True),
            scheduler=DDPMScheduler.load_config(checkpoint.config / "scheduler", local_files_only=True),
        )
    faults = [*_values_faults(broken), *_tokenizer_faults(model)]
    if faults:
        raise ImmaError(f"cannot use {checkpoint.path}", faults)
    return model


def _network(checkpoint: Checkpoint, part: str, broken: list[str], *, halved: bool) -> Any:
    """One network with its weights; the names of those with NaN or Inf are added to *broken*."""
    from accelerate import init_empty_weights

    # buffers are computed, not read
    with init_empty_weights(include_buffers=False):
        network = described_network(part, checkpoint.config)
    weights = Float32Weights(checkpoint, part)
    filled = {}
    narrow = {f"{name}.weight" for name, _ in halved_layers(network)} if halved else set()
    for name, empty in network.state_dict().items():
        get = weights.narrow if name in narrow else weights.get
        filled[name] = get(name, tuple(empty.shape))
        if not all_finite(filled[name]):
            broken.append(f"{part}.{name}")
    network.load_state_dict(filled, assign=True)
    return network


def _values_faults(names: Sequence[str]) -> Iterator[str]:
    if names:
        more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield f"NaN or Inf in {len(names)} tensor{'s' if len(names) > 1 else ''}: {', '.join(names[:NAMED])}{more}"


def _tokenizer_faults(model: Model) -> Iterator[str]:
    """A tokenizer without its vocabulary loads without a word and reads every prompt alike."""
    tokenizer, encoder = model.tokenizer, model.text_encoder.config
    ids = tokenizer(PROBE).input_ids
    if ids[0] != tokenizer.bos_token_id or ids[-1] != tokenizer.eos_token_id or len(set(ids)) < 5:
        yield f"its tokenizer does not work: it reads {PROBE!r} as {ids}"
    elif max(ids) >= encoder.vocab_size:
        yield f"its tokenizer gives ids up to {max(ids)}, its text encoder knows {encoder.vocab_size} only"
    if tokenizer.model_max_length > encoder.max_position_embeddings:
        yield (
            f"its tokenizer gives prompts of {tokenizer.model_max_length} tokens, "
            f"its text encoder reads {encoder.max_position_embeddings}"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers without log lines, warnings and progress bars; their settings come back afterwards."""
    logging.getLogger("xformers").setLevel(logging.ERROR)  # warns of a missing GPU when diffusers is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        levels = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
        bars = [library for library, _ in levels if library.is_progress_bar_enabled()]
        for library, _ in levels:
            library.set_verbosity_error()
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library, level in levels:
                library.set_verbosity(level)
            for library in bars:
                library.enable_progress_bar()
