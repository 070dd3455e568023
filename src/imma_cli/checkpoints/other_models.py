"""What a refused file is instead: named by the keys that only files of its kind hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from imma_cli.checkpoints.topology import PREFIXES, Shape

CONV_IN = PREFIXES["unet"] + "input_blocks.0.0.weight"
BY_INPUT_CHANNELS = {
    9: "an inpainting model",
    8: "an image-editing model (InstructPix2Pix)",
    5: "a depth-conditioned model",
}
LATER = "imma reads Stable Diffusion 1.x so far."
WHOLE = "Give the whole checkpoint: UNet, VAE and text encoder in one .safetensors file, or a diffusers folder."


@dataclass(frozen=True)
class OtherModel:
    what: str
    hint: str


def other_model(shapes: Mapping[str, Shape]) -> OtherModel | None:
    """What kind of file holds keys of these *shapes*, if it is a known one and no SD 1.x checkpoint."""

    def holds(*parts: str) -> bool:
        return any(part in key for key in shapes for part in parts)

    def begins(*starts: str) -> bool:
        return any(key.startswith(starts) for key in shapes)

    if holds("lora_up.", "lora_down.", ".lora_A.", ".lora_B.", ".hada_w1", ".lokr_w1", ".oft_") or begins(
        "lora_unet_", "lora_te"
    ):
        return OtherModel(
            "it is a LoRA file: small additions to a checkpoint, not a checkpoint", "Harden the checkpoint itself."
        )
    if _is_embedding(shapes):
        return OtherModel("it is a textual-inversion embedding, not a checkpoint", "Harden the checkpoint itself.")
    if holds("joint_blocks."):
        return OtherModel("it is a Stable Diffusion 3 model", LATER)
    if holds("double_blocks.", "single_transformer_blocks."):
        return OtherModel("it is a FLUX model", LATER)
    if begins("conditioner.embedders."):
        return OtherModel("it is a Stable Diffusion XL model", LATER)
    if begins("cond_stage_model.model."):
        return OtherModel("it is a Stable Diffusion 2.x model", LATER)
    if begins("control_model.") or holds("input_hint_block.", "controlnet_cond_embedding."):
        return OtherModel("it is a ControlNet, not a checkpoint", "Harden the checkpoint that it steers.")
    if (channels := shapes.get(CONV_IN, (0, 4))[1:2]) and channels[0] in BY_INPUT_CHANNELS:
        count = channels[0]
        return OtherModel(
            f"it is {BY_INPUT_CHANNELS[count]}: its UNet takes {count} input channels instead of 4", LATER
        )
    if begins("cond_stage_model.transformer.embeddings.", "cond_stage_model.transformer.encoder."):
        return OtherModel(
            "its text encoder's keys are in an old form without 'text_model.', which diffusers does not read",
            "Rename 'cond_stage_model.transformer.X' to 'cond_stage_model.transformer.text_model.X' and save it again.",
        )
    return _bare_part(shapes)


def _is_embedding(shapes: Mapping[str, Shape]) -> bool:
    if "emb_params" in shapes or any(key.startswith("string_to_param") for key in shapes):
        return True
    widths = {768, 1024, 1280}
    return len(shapes) <= 4 and all(1 <= len(shape) <= 2 and shape[-1] in widths for shape in shapes.values())


def _bare_part(shapes: Mapping[str, Shape]) -> OtherModel | None:
    """A single part of a checkpoint, in the original's or in diffusers' names."""
    present = [part for part, prefix in PREFIXES.items() if any(key.startswith(prefix) for key in shapes)]
    bare = {
        "unet": ("input_blocks.0.0.weight", "time_embedding.linear_1.weight"),
        "vae": ("encoder.conv_in.weight", "quant_conv.weight"),
        "text_encoder": ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
    }
    titles = {"unet": "a bare UNet", "vae": "a bare VAE", "text_encoder": "a bare text encoder"}
    if not present:
        present = [part for part, names in bare.items() if any(name in shapes for name in names)]
    return OtherModel(f"it is {titles[present[0]]}, not a whole checkpoint", WHOLE) if len(present) == 1 else None
