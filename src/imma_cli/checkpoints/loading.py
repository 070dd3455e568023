"""From a validated checkpoint to a model in memory, through diffusers' own loaders, offline and silent."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from imma_cli.errors import ImmaError
from imma_cli.families.model import Model

if TYPE_CHECKING:
    from imma_cli.checkpoints.checkpoint import Checkpoint

NAMED = 8
PROBE = "a photo of a cat on the red table"


def load(checkpoint: Checkpoint) -> Model:
    """The checkpoint's model, float32, on the CPU; see ``Checkpoint.load``."""
    import torch

    with quiet():
        if checkpoint.layout == "folder":
            pipeline = _folder_pipeline(checkpoint)
        else:
            from diffusers import StableDiffusionPipeline

            pipeline = StableDiffusionPipeline.from_single_file(
                str(checkpoint.path),
                config=str(checkpoint.config),
                local_files_only=True,
                torch_dtype=torch.float32,
                safety_checker=None,
                feature_extractor=None,
                image_encoder=None,
            )
        # a pipeline takes a sample_size under 64 in an old configuration for a mistake and sets 64
        described = json.loads((checkpoint.config / "unet" / "config.json").read_text(encoding="utf-8"))
        if "sample_size" in described:
            pipeline.unet.register_to_config(sample_size=described["sample_size"])
    model = checkpoint.family.assemble(pipeline)
    faults = [*_values_faults(model), *_tokenizer_faults(model)]
    if faults:
        raise ImmaError(f"cannot use {checkpoint.path}", faults)
    return model


def _folder_pipeline(checkpoint: Checkpoint) -> Any:
    import diffusers
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    scheduler = diffusers.DDPMScheduler.load_config(str(checkpoint.path), subfolder="scheduler", local_files_only=True)

    def part(loader: Any, name: str, dtype: str) -> Any:
        return loader.from_pretrained(
            str(checkpoint.path),
            subfolder=name,
            variant=checkpoint.variants.get(name),
            use_safetensors=True,
            local_files_only=True,
            **{dtype: torch.float32},
        )

    return diffusers.StableDiffusionPipeline(
        vae=part(diffusers.AutoencoderKL, "vae", "torch_dtype"),
        text_encoder=part(CLIPTextModel, "text_encoder", "dtype"),
        tokenizer=CLIPTokenizer.from_pretrained(str(checkpoint.path), subfolder="tokenizer", local_files_only=True),
        unet=part(diffusers.UNet2DConditionModel, "unet", "torch_dtype"),
        scheduler=diffusers.DDPMScheduler.from_config(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _values_faults(model: Model) -> Iterator[str]:
    names = [
        f"{part}.{name}"
        for part, network in model.networks.items()
        for name, weight in network.state_dict().items()
        if not bool(weight.isfinite().all())
    ]
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
