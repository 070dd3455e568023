"""What an attack is: parameters that go into a model, and the loss they are trained with."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from imma_cli.attacks.plugin import Plugin, PluginSettings
from imma_cli.errors import ImmaError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from imma_cli.concepts.batches import Batch
    from imma_cli.concepts.concept import Concept
    from imma_cli.families.family import Family
    from imma_cli.families.model import Model


@dataclass(frozen=True)
class Preset:
    """The rates of one attack that belong together, and the number of inner + outer steps they were chosen for."""

    learning_rate: float
    outer_learning_rate: float
    steps: int
    max_grad_norm: float | None = 1.0


@dataclass(frozen=True)
class Range:
    """Numbers from *low* to *high* that a search may try; integers where both are."""

    low: float
    high: float
    log: bool = False
    """Whether a search should try orders of magnitude alike."""
    of_preset: bool = False
    """Whether *low* and *high* are multiples of the preset's value."""


@dataclass(frozen=True)
class Choice:
    """Values that a search may try."""

    options: tuple[Any, ...]
    held_out: tuple[Any, ...] = ()
    """More that a search tries, and no hardening simulates: a real attacker is not bound to what a defender thought of."""


Space = Range | Choice


@dataclass(frozen=True)
class AttackSettings(PluginSettings):
    """Settings of every attack; each attack adds its own."""

    preset: str = "auto"
    """paper: the published rates for full-size models; small: for models like the demo; auto: by size."""
    learning_rate: float | None = None
    """The attacker's rate; overrides the preset's."""
    optimizer: Literal["adamw", "radam", "adafactor"] = "adamw"
    """The attacker's optimizer."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls: not at all, or to zero at the end."""
    warmup: float = 0.0
    """Share of the steps over which the rate first rises from zero."""
    pictures: int = 0
    """How many of the pictures the attacker has, picked by the seed; 0: all of them."""

    def __post_init__(self) -> None:
        rate = self.learning_rate
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"learning_rate must be a positive number, not {rate:g}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, from 0 to below 1, not {self.warmup:g}")
        if self.pictures < 0:
            raise ValueError(f"pictures must not be negative, but is {self.pictures}")


COMMON_SEARCH: Mapping[str, Space] = {
    "learning_rate": Range(0.1, 10, log=True, of_preset=True),
    "optimizer": Choice(("adamw", "radam", "adafactor")),
    "schedule": Choice(("constant", "linear", "cosine")),
    "warmup": Choice((0.0, 0.1, 0.3)),
    "pictures": Choice((0, 4, 10)),
}
"""What a search may vary in every attack."""


class Attack(Plugin):
    """A fine-tuning method. Subclasses say how parameters go into a model, and where it differs, what the loss is.

    An object of an attack is attached to one model at a time.
    """

    paper: ClassVar[str]
    trains: ClassVar[str] = ""
    """What kind of thing is trained, in a few words, such as "LoRA matrices in the UNet's attention"."""
    families: ClassVar[tuple[str, ...] | None] = None
    """Names of the model families it can be attached to; None: every family, also those to come."""
    Settings: ClassVar[type[AttackSettings]] = AttackSettings
    presets: ClassVar[Mapping[str, Preset]]
    search: ClassVar[Mapping[str, Space]] = COMMON_SEARCH
    """Which settings an attacker would tune, and over what: by the settings' names."""
    trains_text: ClassVar[bool] = False
    """Whether what the prompts are encoded to changes while the attack trains, so that it cannot be computed once."""
    simulated: ClassVar[bool] = False
    """Whether hardening simulates it where the user names no attack. Not inherited: each class states it of itself."""
    in_place: ClassVar[bool] = False
    """Whether the parameters are the model's own weights instead of additional ones."""
    computes_with: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    """The networks besides the UNet that `attach` and `loss` touch: pictures are encoded for the attack, and so are captions
    where it does not train the text encoder. Hardening frees the memory of the others."""
    settings: AttackSettings

    @abstractmethod
    def attach(self, model: Model, concept: Concept, seed: int) -> AbstractContextManager[dict[str, nn.Parameter]]:
        """Put the attack's trainable parameters φ, initialised from *seed*, into *model* and give them by name.

        Leaving the context gives the model back bit-identical, also after an exception.
        """

    @classmethod
    def is_simulated(cls) -> bool:
        """Whether this class, not one it derives from, says that hardening simulates it."""
        return bool(vars(cls).get("simulated"))

    def require_family(self, family: Family) -> None:
        """Raises ImmaError where the attack cannot be attached to models of *family*."""
        if self.families is not None and family.name not in self.families:
            raise ImmaError(
                f"The attack {self.name} does not work on {family.title}.",
                hint=f"It works on: {', '.join(self.families)}.",
            )

    def caption(self, concept: Concept, caption: str) -> str:
        """What this attacker writes below a picture of *concept* that came with *caption*."""
        return caption

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The scalar that the attacker minimises over φ."""
        conditioning = batch.conditioning
        if conditioning is None:
            conditioning = model.family.encode_prompts(model, batch.captions)
        return model.family.loss(model, batch.latents, conditioning, batch.noise, batch.timesteps).mean()

    def concept_loss(self, model: Model, batch: Batch) -> Tensor:
        """The scalar that immunization maximises over θ: the attacker's loss without what holds on to other things."""
        return self.loss(model, batch)

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        """Write what was learned into the empty *folder*, in the formats that its users' programs load.

        Called while the attack is attached to *model*. By default the parameters are written by name.
        """
        from safetensors.torch import save_file

        learned = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
        save_file(learned, folder / "adaptation.safetensors")

    def rate_of(self, parameter: str) -> float:
        """How fast the *parameter* of that name learns, as a multiple of the attack's rate."""
        return 1.0

    def rates(self, model: Model) -> Preset:
        """The preset that applies to *model*, with the settings' own rate where one is given."""
        preset = self.settings.preset
        if preset == "auto":
            preset = "small" if model.is_small else "paper"
        if preset not in self.presets:
            raise ImmaError(
                f"The attack {self.name} has no preset {preset!r}.",
                hint=f"Choose from auto, {', '.join(self.presets)}.",
            )
        chosen = self.presets[preset]
        rate = self.settings.learning_rate
        return chosen if rate is None else replace(chosen, learning_rate=rate)
