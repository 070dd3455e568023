"""Files that are no Stable Diffusion 1.x checkpoint are called by their name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from imma_cli.checkpoints import open_checkpoint
from imma_cli.errors import ImmaError

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"

KINDS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "LoRA of kohya": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (4, 1)}, "LoRA"),
    "LoRA of diffusers": ({"unet.up_blocks.0.attentions.0.to_q.lora_A.weight": (4, 8)}, "LoRA"),
    "LoHa": ({"lora_unet_x.hada_w1_a": (4, 8)}, "LoRA"),
    "embedding of diffusers": ({"<my-cat>": (1, 768)}, "textual-inversion"),
    "embedding of SDXL": ({"clip_g": (1, 1280), "clip_l": (1, 768)}, "textual-inversion"),
    "Stable Diffusion 3": ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (3, 3)}, "Diffusion 3"),
    "FLUX": ({"double_blocks.0.img_attn.qkv.weight": (3, 3)}, "FLUX"),
    "FLUX in ComfyUI": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (3, 3)}, "FLUX"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": (3, 3, 3, 3)}, "ControlNet"),
    "UNet, original names": ({"input_blocks.0.0.weight": (320, 4, 3, 3)}, "a bare UNet"),
    "UNet, original names with prefix": ({CONV_IN: (320, 4, 3, 3)}, "a bare UNet"),
    "UNet, diffusers' names": ({"time_embedding.linear_1.weight": (1280, 320)}, "a bare UNet"),
    "VAE": ({"encoder.conv_in.weight": (128, 3, 3, 3), "quant_conv.weight": (8, 8, 1, 1)}, "a bare VAE"),
    "text encoder": ({"text_model.embeddings.token_embedding.weight": (49408, 8)}, "a bare text encoder"),
    "old text encoder": (
        {CONV_IN: (320, 4, 3, 3), "cond_stage_model.transformer.embeddings.token_embedding.weight": (49408, 8)},
        "an old form without 'text_model.'",
    ),
    "depth model": ({CONV_IN: (320, 5, 3, 3), "first_stage_model.quant_conv.weight": (8, 8, 1, 1)}, "depth"),
    "InstructPix2Pix": (
        {CONV_IN: (320, 8, 3, 3), "first_stage_model.quant_conv.weight": (8, 8, 1, 1)},
        "InstructPix2Pix",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_files_are_named_and_not_listed_key_by_key(kind: str, tmp_path: Path) -> None:
    shapes, said = KINDS[kind]
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ImmaError) as caught:
        open_checkpoint(tmp_path / "x.safetensors")
    assert said in caught.value.reasons[0]
    assert len(caught.value.reasons) == 1
    assert caught.value.hint


def test_many_missing_tensors_are_counted_and_the_first_named(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    tensors = {key: tensor for key, tensor in load_file(tiny_checkpoint).items() if ".output_blocks.1" not in key}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ImmaError) as caught:
        open_checkpoint(tmp_path / "x.safetensors", tiny_config)
    (reason,) = caught.value.reasons
    gone = len(load_file(tiny_checkpoint)) - len(tensors)
    assert reason.startswith(f"{gone} tensors missing: model.diffusion_model.output_blocks.1.")
    assert reason.endswith(f"and {gone - 8} more")


def test_unknown_widths_are_one_reason_and_not_a_list_of_tensors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """With the demo's three text layers every name is known, and hardly any shape."""
    tensors = load_file(tiny_checkpoint)
    for key in [key for key in tensors if ".encoder.layers.1." in key]:
        tensors[key.replace("layers.1.", "layers.2.")] = tensors[key].clone()
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ImmaError) as caught:
        open_checkpoint(tmp_path / "x.safetensors")
    (reason,) = caught.value.reasons
    assert "its widths are of no architecture that the package knows" in reason
    assert "--config DIR" in str(caught.value.hint)


def test_quantised_weights_are_refused(tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_checkpoint)
    tensors[CONV_IN] = tensors[CONV_IN].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ImmaError, match="F8_E4M3"):
        open_checkpoint(tmp_path / "x.safetensors", tiny_config)


def test_a_demo_with_a_damaged_tensor_is_compared_with_the_demo(tmp_path: Path) -> None:
    """One wrong shape is a fault of the file, not another architecture."""
    from imma_cli.families import CONFIGS

    tensors = load_file(CONFIGS.parents[1] / "demo" / "model.safetensors")
    tensors[CONV_IN] = torch.zeros(3, 4, 3, 3)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ImmaError, match="the demo architecture") as caught:
        open_checkpoint(tmp_path / "x.safetensors")
    assert caught.value.reasons == (f"1 tensor misshapen: {CONV_IN} is [3, 4, 3, 3] instead of [64, 4, 3, 3]",)
