"""Stable Diffusion 1.x: CLIP text encoder, UNet on latents of an autoencoder of factor 8, PNDM/DDPM noise schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from imma_cli.families.family import DRAWING_STEPS, Family
from imma_cli.families.model import Model

if TYPE_CHECKING:
    from PIL.Image import Image


class StableDiffusion1(Family):
    """ε-prediction (v-prediction where the scheduler's configuration says so) under the DDPM schedule."""

    name = "sd1"
    title = "Stable Diffusion 1.x"

    def assemble(
        self, *, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, scheduler: Mapping[str, Any]
    ) -> Model:
        from diffusers import DDPMScheduler

        return Model(
            family=self,
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            # samplers such as PNDM state no training target: the DDPM schedule over the same betas does
            scheduler=DDPMScheduler.from_config(scheduler),
        ).freeze()

    def use_xformers(self, model: Model) -> None:
        # not set_attention_backend: on a UNet that does nothing but change the default of the whole process
        model.unet.enable_xformers_memory_efficient_attention()

    def resolution(self, model: Model) -> int:
        levels = len(model.vae.config.block_out_channels)
        return int(model.unet.config.sample_size) << (levels - 1)

    def encode_images(self, model: Model, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = model.vae.encode(pixels.to(model.vae.dtype)).latent_dist
        scale = model.vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale

    def encode_prompts(self, model: Model, prompts: Sequence[str]) -> Tensor:
        tokens = model.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=model.tokenizer.model_max_length,
            return_tensors="pt",
        )
        return cast(Tensor, model.text_encoder(tokens.input_ids.to(model.device))[0])

    def training_timesteps(self, model: Model) -> int:
        return int(model.scheduler.config.num_train_timesteps)

    def predict(self, model: Model, latents: Tensor, conditioning: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy = model.scheduler.add_noise(latents, noise, timesteps)
        return cast(Tensor, model.unet(noisy, timesteps, encoder_hidden_states=conditioning, return_dict=False)[0])

    def loss(self, model: Model, latents: Tensor, conditioning: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        schedule = model.scheduler
        if schedule.config.prediction_type == "epsilon":
            target = noise
        else:
            target = schedule.get_velocity(latents, noise, timesteps)
        predicted = self.predict(model, latents, conditioning, noise, timesteps)
        return F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2, 3))

    @torch.no_grad()
    def draw(
        self,
        model: Model,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = DRAWING_STEPS,
        guidance_scale: float = 5.0,
    ) -> list[Image]:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=model.vae,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            unet=model.unet,
            scheduler=DDIMScheduler.from_config(model.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        side = self.resolution(model)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipeline(
            list(prompts),
            height=side,
            width=side,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generators,
        ).images
        return cast("list[Image]", images)
