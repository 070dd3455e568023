"""Train the autoencoder's decoder further on its own, while the latents stay what the UNet has learned.

    python benchmarks/demo_model/sharpen.py WORK --minutes 20

Encoder and quantisation are frozen, so this runs beside or after the UNet's training. The latents get a little noise:
what the UNet draws is never exactly what the encoder would have given. Resumable like train.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train import LATENT_STD, as_tensor, augmented, from_config, run_stage


def decoder_loss(vae: AutoencoderKL, pictures: Tensor, batch: int):
    def loss_of(modules: nn.ModuleDict) -> Tensor:
        chosen = pictures[torch.randint(len(pictures), (batch,))]
        half = batch // 2
        x = torch.cat([chosen[:half], augmented(chosen[half:])])
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.sample()
            latents = latents + 0.1 * LATENT_STD * torch.rand(batch, 1, 1, 1) * torch.randn_like(latents)
        y = modules["decoder"](modules["post_quant_conv"](latents))
        pixel = (y - x).abs().mean()
        edges = (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean() + (y.diff(dim=-2) - x.diff(dim=-2)).abs().mean()
        return pixel + 2 * edges

    return loss_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    args = parser.parse_args()
    work = args.work
    torch.set_num_threads(1)
    (work / "rendezvous-sharpen").unlink(missing_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{work.resolve()}/rendezvous-sharpen", rank=0, world_size=1)
    vae = from_config(AutoencoderKL, "vae")
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    vae.requires_grad_(False).to(memory_format=torch.channels_last)
    pictures = as_tensor(np.concatenate(list(dict(np.load(work / "artwork.npz")).values())))
    stage = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)
    averaged = run_stage("decoder", work, args.minutes, stage, decoder_loss(vae, pictures, 16), 1e-3, 0.999)
    weights = load_file(work / "vae.safetensors")
    for part in ("decoder", "post_quant_conv"):
        weights.update({f"{part}.{k}": v.contiguous() for k, v in averaged[part].state_dict().items()})
    save_file(weights, work / "vae-sharp.safetensors")
    print(json.dumps({"written": "vae-sharp.safetensors"}))


if __name__ == "__main__":
    main()
