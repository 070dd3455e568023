"""Pack the trained parts into the single file that ships with imma: SD 1.x's key names, fp16.

python benchmarks/demo_model/export.py WORK                                # src/imma_cli/demo/model.safetensors
python benchmarks/demo_model/export.py WORK --from-state --output look.safetensors   # during training
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from artwork import STYLES, VERSIONS
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from train import CONFIG, from_config
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from imma_cli.checkpoints import compose_single_file
from imma_cli.families.model import Model
from imma_cli.families.stable_diffusion_1 import StableDiffusion1

OUTPUT = Path(__file__).parents[2] / "src" / "imma_cli" / "demo" / "model.safetensors"
LIMIT = 25_000_000


def trained_weights(work: Path, from_state: bool) -> dict[str, dict[str, Tensor]]:
    """The averaged weights of every part; *from_state* takes those of the last save instead of the finished ones."""
    finished = work / "vae-final.safetensors"  # there once the decoder was trained further
    weights = {"vae": load_file(finished if finished.exists() else work / "vae.safetensors")}
    if from_state:
        averaged = torch.load(work / "unet.state.pt", weights_only=True)["averaged"]
        for part in ("text_encoder", "unet"):
            weights[part] = {k.removeprefix(f"{part}."): v for k, v in averaged.items() if k.startswith(f"{part}.")}
    else:
        for part in ("text_encoder", "unet"):
            weights[part] = load_file(work / f"{part}.safetensors")
    return weights


def trained_model(work: Path, *, from_state: bool = False) -> Model:
    weights = trained_weights(work, from_state)
    text_config = CLIPTextConfig(**json.loads((CONFIG / "text_encoder" / "config.json").read_text()))
    model = Model(
        family=StableDiffusion1(),
        unet=from_config(UNet2DConditionModel, "unet"),
        vae=from_config(AutoencoderKL, "vae"),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=CLIPTokenizer.from_pretrained(CONFIG / "tokenizer"),
        scheduler=DDPMScheduler.from_pretrained(CONFIG / "scheduler"),
    )
    for part, network in model.networks.items():
        network.load_state_dict(weights[part])
    return model.freeze()


def metadata() -> dict[str, str]:
    """What the file says about itself, in the words of https://github.com/Stability-AI/ModelSpec."""
    data = ", ".join(f"@iconify-json/{package}@{VERSIONS[package]}" for package in STYLES)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "imma demo model",
        "modelspec.author": "The imma authors",
        "modelspec.description": "Small text-to-image model with the topology of Stable Diffusion 1.x, for trying imma "
        "offline. Trained from scratch on emoji artwork: benchmarks/demo_model in imma's repository.",
        "modelspec.license": "Apache-2.0",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
        "training_data": f"{data} (npm; Apache-2.0 and MIT)",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--from-state", action="store_true", help="the last save of a training that still runs")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    model = trained_model(args.work, from_state=args.from_state)
    tensors = compose_single_file(model, CONFIG)
    half = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    for name, tensor in half.items():
        if not tensor.isfinite().all():
            raise SystemExit(f"{name} does not fit into fp16")
    part = args.output.with_name(args.output.name + ".part")
    save_file({name: t.contiguous() for name, t in half.items()}, part, metadata())
    if part.stat().st_size > LIMIT:
        raise SystemExit(f"{part} has {part.stat().st_size} bytes; at most {LIMIT} may ship")
    part.rename(args.output)
    print(f"{args.output}: {len(half)} tensors, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
