"""Train the demo model from scratch: artwork, autoencoder, text encoder and UNet together, and the decoder once more.

One command, resumable (start it again after any interruption), 140 minutes on two cores:

    python benchmarks/demo_model/train.py WORK

The learning rate falls with the share of the time budget that is used up, not with steps: the same command
fits a slow machine and a fast one. Each stage runs one single-threaded process per core and averages gradients,
which is faster here than one process with two threads.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from artwork import STYLES, Artwork, caption
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from imma_cli.checkpoints import open_checkpoint

CONFIG = Path(__file__).parents[2] / "src" / "imma_cli" / "families" / "configs" / "demo"
LATENT_STD = 1 / 0.18215  # SD 1.x's scaling factor is folded into the autoencoder, so its configuration fits


def from_config(cls: type, part: str) -> nn.Module:
    return cls.from_config(json.loads((CONFIG / part / "config.json").read_text()))


def log(work: Path, **values: object) -> None:
    line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
    print(line, flush=True)
    with (work / "log.jsonl").open("a") as f:
        f.write(line + "\n")


# ---------------------------------------------------------------- artwork


def draw_all(work: Path) -> dict[str, np.ndarray]:
    """uint8 pictures [N, 64, 64, 3] of the seen concepts and of the extra icons, per style."""
    path = work / "artwork.npz"
    if not path.exists():
        art = Artwork(work / "npm")
        arrays = {}
        for package in STYLES:
            for part, names in (("seen", art.seen), ("extra", art.extra)):
                arrays[f"{part}/{package}"] = np.stack([np.asarray(art.draw(n, package)) for n in names])
        part_file = path.with_name("artwork.part.npz")
        np.savez_compressed(part_file, **arrays)
        part_file.rename(path)
    return dict(np.load(path))


def as_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------- one training stage


def run_stage(
    name: str,
    work: Path,
    minutes: float,
    modules: nn.ModuleDict,
    loss_of: Callable[[nn.ModuleDict], Tensor],
    learning_rate: float,
    ema_decay: float,
) -> nn.ModuleDict:
    """AdamW with warm-up and cosine until *minutes* of training have been spent; returns the averaged weights."""
    rank, world = dist.get_rank(), dist.get_world_size()
    state_path = work / f"{name}.state.pt"
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    averaged = copy.deepcopy(modules).requires_grad_(False)
    step, spent = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        modules.load_state_dict(state["modules"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    torch.manual_seed(1000 * step + rank)
    random.seed(1000 * step + rank)
    last_save = last_log = time.monotonic()
    running = torch.zeros(())
    while spent < 60 * minutes:
        began = time.monotonic()
        progress = spent / (60 * minutes)
        rate = learning_rate * min(1.0, (step + 1) / 300) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = max(rate, learning_rate * 0.005)
        loss = loss_of(modules)
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in parameters])
        if world > 1:
            dist.all_reduce(flat)
            flat /= world
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(g.view_as(p))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(modules.parameters()), 1 - decay)
        running = running.lerp(loss.detach(), max(0.02, 1 / (step + 1)))
        step += 1
        clock = torch.tensor(time.monotonic() - began)
        if world > 1:  # everybody must agree when to stop
            dist.all_reduce(clock)
            clock /= world
        spent += clock.item()
        if rank == 0 and time.monotonic() - last_log > 30:
            last_log = time.monotonic()
            log(work, stage=name, step=step, minutes=spent / 60, loss=running.item(), seconds=clock.item())
        if rank == 0 and time.monotonic() - last_save > 120:
            last_save = time.monotonic()
            save_state(state_path, modules, averaged, optimizer, step, spent)
    if rank == 0:
        save_state(state_path, modules, averaged, optimizer, step, spent)
        log(work, stage=name, step=step, minutes=spent / 60, loss=running.item(), done=True)
    return averaged


def save_state(path: Path, modules, averaged, optimizer, step: int, spent: float) -> None:
    part = path.with_suffix(".part")
    torch.save(
        {
            "modules": modules.state_dict(),
            "averaged": averaged.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "spent": spent,
        },
        part,
    )
    part.rename(path)


# ---------------------------------------------------------------- autoencoder


def augmented(pictures: Tensor) -> Tensor:
    """Flips, shifts, scales, colour mixing and grey: the autoencoder must code pictures it never saw."""
    n = len(pictures)
    angle = (torch.rand(n) - 0.5) * 0.8 * (torch.rand(n) < 0.3)
    zoom = 0.9 + 0.5 * torch.rand(n)
    flip = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = flip * zoom * angle.cos(), -zoom * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = flip * zoom * angle.sin(), zoom * angle.cos()
    theta[:, :, 2] = (torch.rand(n, 2) - 0.5) * 0.4
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    background = torch.where(torch.rand(n, 1, 1, 1) < 0.7, torch.ones(n, 3, 1, 1), torch.rand(n, 3, 1, 1) * 2 - 1)
    ink = F.grid_sample(1 - pictures, grid, align_corners=False)  # 0 outside is white
    warped = 1 - ink
    plain = torch.rand(n, 1, 1, 1)
    warped = torch.where(plain < 0.4, pictures, warped)
    whiteness = ((warped.amin(1, keepdim=True) - 0.9) * 10).clamp(0, 1)
    warped = torch.where(plain > 0.7, warped * (1 - whiteness) + background * whiteness, warped)
    grey = warped.mean(1, keepdim=True)
    contrast = 1 + 4 * torch.rand(n, 1, 1, 1)
    grey = ((grey - grey.mean((2, 3), keepdim=True)) * contrast).clamp(-1, 1).expand_as(warped)
    warped = torch.where(torch.rand(n, 1, 1, 1) < 0.15, grey, warped)
    return torch.where(torch.rand(n, 1, 1, 1) < 0.05, -warped, warped).clamp(-1, 1)


def edge_difference(y: Tensor, x: Tensor) -> Tensor:
    """How far neighbouring pixels differ otherwise than they should."""
    return sum((y.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (-1, -2))


def autoencoder_loss(pictures: Tensor, batch: int) -> Callable[[nn.ModuleDict], Tensor]:
    def loss_of(modules: nn.ModuleDict) -> Tensor:
        x = augmented(pictures[torch.randint(len(pictures), (batch,))])
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = modules["vae"].encode(x).latent_dist
        y = modules["vae"].decode(posterior.sample()).sample
        pixel = (y - x).abs().mean() + 0.5 * (y - x).square().mean()
        kl = posterior.kl().mean() / x[0].numel()  # nats per sub-pixel
        return pixel + edge_difference(y, x) + 3e-3 * kl

    return loss_of


@torch.no_grad()
def fold_scale(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Rescale the latents to SD 1.x's standard deviation, exactly, through the two 1 × 1 convolutions at the latents."""
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in pictures.split(64)])
    factor = LATENT_STD / latents.std()
    channels = latents.shape[1]
    vae.quant_conv.weight[:channels] *= factor
    vae.quant_conv.bias[:channels] *= factor
    vae.quant_conv.bias[channels:] += 2 * factor.log()
    vae.post_quant_conv.weight /= factor


class PatchDiscriminator(nn.Module):
    """Tells real from decoded patches of 26 × 26 pixels; returns every layer's output, the logits last."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(3, 32, 4, 2), (32, 64, 4, 2), (64, 64, 3, 1), (64, 1, 3, 1)]  # in, out, kernel, stride
        self.layers = nn.ModuleList(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(i, o, k, s, padding=1)) for i, o, k, s in shapes
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
            x = F.leaky_relu(x, 0.2)
        return outputs


def decoder_loss(
    vae: AutoencoderKL, denoised: Callable[[list[int]], Tensor], seen: Tensor, pictures: Tensor, batch: int
) -> Callable[[nn.ModuleDict], Tensor]:
    """For the decoder alone, while the latents stay what the UNet has learned.

    Most of its inputs are what the UNet makes of noised latents: what the UNet draws is never exactly what the encoder
    would have given. The rest are any pictures, for the held-out style and objects. A discriminator, trained along in
    the same step, keeps the decoder from averaging flat colour, gradient and edge into the same soft blob.
    """
    order = iter_shuffled(len(seen))

    def loss_of(modules: nn.ModuleDict) -> Tensor:
        other = batch // 3
        rows = [next(order) for _ in range(batch - other)]
        extra = augmented(pictures[torch.randint(len(pictures), (other,))])
        with torch.no_grad():
            coded = vae.encode(extra).latent_dist.sample()
            coded = coded + 0.1 * LATENT_STD * torch.rand(other, 1, 1, 1) * torch.randn_like(coded)
            latents = torch.cat([denoised(rows), coded])
        x = torch.cat([seen[rows], extra])
        y = modules["decoder"](modules["post_quant_conv"](latents))
        pixel = (y - x).abs().mean()

        judge = modules["discriminator"]
        real, fake = judge(x), judge(y.detach())
        judged = F.relu(1 - real[-1]).mean() + F.relu(1 + fake[-1]).mean()
        judge.requires_grad_(False)  # the decoder's share must not train the discriminator
        fake = judge(y)
        judge.requires_grad_(True)
        matching = torch.stack([(f - r.detach()).abs().mean() for f, r in zip(fake[:-1], real[:-1], strict=True)])
        return pixel + edge_difference(y, x) + matching.mean() - 0.02 * fake[-1].mean() + judged

    return loss_of


def seen_pictures(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[f"seen/{p}"] for p in STYLES])


@torch.no_grad()
def save_vae(work: Path, vae: AutoencoderKL, arrays: dict[str, np.ndarray]) -> None:
    """The autoencoder, and the latents the UNet learns from. The autoencoder last: its file says the stage is done."""
    posteriors = [vae.encode(x).latent_dist for x in as_tensor(seen_pictures(arrays)).split(64)]
    mean, std = (torch.cat([getattr(p, name) for p in posteriors]).contiguous() for name in ("mean", "std"))
    save_file({"mean": mean, "std": std}, work / "latents.safetensors")
    save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, work / "vae.safetensors")


def unpack(checkpoint: Path, work: Path, arrays: dict[str, np.ndarray]) -> None:
    """Make *checkpoint* the state to go on from: its autoencoder is kept, its UNet and text encoder are trained further."""
    model = open_checkpoint(checkpoint).load()
    for part in ("unet", "text_encoder"):
        weights = {k: v.contiguous() for k, v in model.networks[part].state_dict().items()}
        save_file(weights, work / f"{part}.start.safetensors")
    save_vae(work, model.vae, arrays)


# ---------------------------------------------------------------- text encoder and UNet


def token_ids() -> Callable[[str], Tensor]:
    tokenizer = CLIPTokenizer.from_pretrained(CONFIG / "tokenizer")
    return cache(lambda text: tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids[0])


def diffusion_loss(
    mean: Tensor, std: Tensor, index: list[tuple[str, str]], batch: int
) -> Callable[[nn.ModuleDict], Tensor]:
    scheduler = DDPMScheduler.from_pretrained(CONFIG / "scheduler")
    ids = token_ids()
    order = iter_shuffled(len(index))

    def loss_of(modules: nn.ModuleDict) -> Tensor:
        rows = [next(order) for _ in range(batch)]
        tokens = torch.stack([ids(caption(*index[r], random)) for r in rows])
        unique, inverse = tokens.unique(dim=0, return_inverse=True)
        hidden = modules["text_encoder"](unique)[0][inverse]  # [B, 77, D]
        latents = (mean[rows] + std[rows] * torch.randn_like(mean[rows])) * 0.18215
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (batch,))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = modules["unet"](noisy, timesteps, hidden).sample
        snr = compute_snr(scheduler, timesteps)
        weight = snr.clamp(max=5) / snr  # min-SNR, arXiv 2303.09556
        return ((predicted - noise).square().mean((1, 2, 3)) * weight).mean()

    return loss_of


def denoised_latents(
    networks: nn.ModuleDict, mean: Tensor, std: Tensor, index: list[tuple[str, str]]
) -> Callable[[list[int]], Tensor]:
    """The pictures' latents, noised (signal-to-noise ratio above 1.3) and denoised by the UNet in one step."""
    scheduler = DDPMScheduler.from_pretrained(CONFIG / "scheduler")
    ids = token_ids()

    @torch.no_grad()
    def denoised(rows: list[int]) -> Tensor:
        latents = (mean[rows] + std[rows] * torch.randn_like(mean[rows])) * 0.18215
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 300, (len(rows),))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        hidden = networks["text_encoder"](torch.stack([ids(caption(*index[r], random)) for r in rows]))[0]
        predicted = networks["unet"](noisy, timesteps, hidden).sample
        alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return (noisy - (1 - alpha).sqrt() * predicted) / alpha.sqrt() / 0.18215

    return denoised


def iter_shuffled(n: int) -> Iterator[int]:
    while True:
        yield from random.sample(range(n), n)


# ---------------------------------------------------------------- all of it


def worker(rank: int, world: int, args: argparse.Namespace) -> None:
    work: Path = args.work
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work.resolve()}/rendezvous", rank=rank, world_size=world)
    arrays = dict(np.load(work / "artwork.npz"))
    torch.manual_seed(0)
    vae = from_config(AutoencoderKL, "vae").to(memory_format=torch.channels_last)
    vae_file = work / "vae.safetensors"
    if not vae_file.exists():
        pictures = as_tensor(np.concatenate(list(arrays.values())))
        stage = nn.ModuleDict({"vae": vae})
        averaged = run_stage(
            "vae", work, args.vae_minutes, stage, autoencoder_loss(pictures, 32 // world), 1.5e-3, 0.998
        )
        if rank == 0:
            vae = averaged["vae"].eval()
            fold_scale(vae, as_tensor(seen_pictures(arrays)))
            save_vae(work, vae, arrays)
        dist.barrier()
    latents = load_file(work / "latents.safetensors")
    art = Artwork(work / "npm")
    index = [(name, package) for package in STYLES for name in art.seen]
    torch.manual_seed(1)
    text_config = CLIPTextConfig(**json.loads((CONFIG / "text_encoder" / "config.json").read_text()))
    stage = nn.ModuleDict(
        {"text_encoder": CLIPTextModel(text_config), "unet": from_config(UNet2DConditionModel, "unet")}
    )
    for part in stage:
        if (start := work / f"{part}.start.safetensors").exists():
            stage[part].load_state_dict(load_file(start))
    loss_of = diffusion_loss(latents["mean"], latents["std"], index, args.batch // world)
    averaged = run_stage("unet", work, args.unet_minutes, stage, loss_of, args.learning_rate, 0.9995)
    if rank == 0:
        for part in averaged:
            save_file({k: v.contiguous() for k, v in averaged[part].state_dict().items()}, work / f"{part}.safetensors")
    dist.barrier()
    for part in stage:
        stage[part].load_state_dict(load_file(work / f"{part}.safetensors"))
    denoised = denoised_latents(stage.eval().requires_grad_(False), latents["mean"], latents["std"], index)
    vae.load_state_dict(load_file(vae_file))
    vae.requires_grad_(False)
    stage = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)
    torch.manual_seed(2)
    stage["discriminator"] = PatchDiscriminator().to(memory_format=torch.channels_last)
    seen, pictures = as_tensor(seen_pictures(arrays)), as_tensor(np.concatenate(list(arrays.values())))
    loss_of = decoder_loss(vae, denoised, seen, pictures, 16 // world)
    averaged = run_stage("decoder", work, args.decoder_minutes, stage, loss_of, 1e-3, 0.999)
    if rank == 0:
        weights = load_file(vae_file)
        for part in ("decoder", "post_quant_conv"):
            weights.update({f"{part}.{k}": v.contiguous() for k, v in averaged[part].state_dict().items()})
        save_file(weights, work / "vae-final.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--continue-from", type=Path, help="a demo model: keep its autoencoder, train the rest further")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--vae-minutes", type=float, default=17)
    parser.add_argument("--unet-minutes", type=float, default=97)
    parser.add_argument("--decoder-minutes", type=float, default=21)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    arrays = draw_all(args.work)
    if args.continue_from and not (args.work / "vae.safetensors").exists():
        unpack(args.continue_from, args.work, arrays)
    (args.work / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(worker, (args.processes, args), nprocs=args.processes)


if __name__ == "__main__":
    main()
