"""What differs between families of models, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from imma_cli.families.model import Model


DRAWING_STEPS = 25
"""Of the sampler, unless somebody wants another number."""


class Family(ABC):
    """How a kind of model reads prompts, codes pictures, adds noise, states its target and draws."""

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def assemble(
        self, *, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, scheduler: Mapping[str, Any]
    ) -> Model:
        """The frozen model in its parts. *scheduler* is the configuration of the pipeline's, whatever its class."""

    @abstractmethod
    def use_xformers(self, model: Model) -> None:
        """Switch the network that is trained to xformers' memory-efficient attention."""

    @abstractmethod
    def resolution(self, model: Model) -> int:
        """Side of the pictures the model is made for, in pixels."""

    @abstractmethod
    def encode_images(self, model: Model, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, scaled as the UNet expects: [B, C, h, w] each.

        *pixels* is [B, 3, H, W] in [-1, 1].
        """

    @abstractmethod
    def encode_prompts(self, model: Model, prompts: Sequence[str]) -> Tensor:
        """What the UNet is conditioned on: [B, tokens, D]. Differentiable in the text encoder's weights."""

    @abstractmethod
    def training_timesteps(self, model: Model) -> int:
        """The number T of noise levels; timesteps run from 0 to T - 1."""

    @abstractmethod
    def predict(self, model: Model, latents: Tensor, conditioning: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network says about *latents* noised to *timesteps*, whatever its target is: [B, C, h, w].

        Arguments as in `loss`.
        """

    @abstractmethod
    def loss(self, model: Model, latents: Tensor, conditioning: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The denoising loss, one number per picture: [B].

        *latents* and *noise* are [B, C, h, w], *conditioning* is [B, tokens, D], *timesteps* is int64 [B]. Randomness
        comes in as arguments, so this is a pure function of them and of the weights.
        """

    @abstractmethod
    def draw(
        self,
        model: Model,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = DRAWING_STEPS,
        guidance_scale: float = 5.0,
    ) -> list[Image]:
        """One picture per prompt, each from its own seed, so that a picture does not depend on its batch."""
