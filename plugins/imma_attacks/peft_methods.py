"""The family of parameter-efficient methods that PEFT puts beside or into layers, one attack for each that people use.

``peft`` stands for all others that the installed PEFT can inject.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from imma_attacks._captions import CAPTION_SEARCH, CaptionedAttack, CaptionSettings
from imma_attacks._exports import save_lora, save_peft
from imma_attacks._peft import ADAPTER, TARGETS, Targets, adapter, check_rank, lora
from imma_cli.attacks import Attack, Choice, Preset, Space, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.errors import ImmaError
from imma_cli.families.model import Model

OWN = ("lora", "dora", "rslora", "loha", "lokr", "oft", "boft", "ia3", "hra")
"""Methods that have an attack of their own."""
NOT_FOR_LAYERS = ("xlora", "poly", "trainable_tokens")
"""Methods that mix adapters, or tasks, or train rows of an embedding."""


@cache
def further_methods() -> Mapping[str, type[Any]]:
    """The configuration classes of all others that go into layers, by PEFT's name."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = sorted((str(kind.value).lower(), cls) for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items())
    return {
        name: cls
        for name, cls in known
        if "target_modules" in {field.name for field in fields(cls)} and name not in (*OWN, *NOT_FOR_LAYERS)
    }


def rates(paper: float, small: float, outer: float = 1e-4) -> Mapping[str, Preset]:
    """The attacker's rates on full-size and on small models; the defender's are LoRA's where nothing else was measured."""
    return {
        "paper": Preset(learning_rate=paper, outer_learning_rate=1e-5, steps=1000),
        "small": Preset(learning_rate=small, outer_learning_rate=outer, steps=600),
    }


@dataclass(frozen=True)
class LayerSettings(CaptionSettings):
    """Settings of every method of this family."""

    targets: Targets = "attention"
    """Which layers are adapted."""


@dataclass(frozen=True)
class RankSettings(LayerSettings):
    """Settings of methods whose size is a rank."""

    rank: int = 4
    """Rank of what is added to each layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.rank)


@dataclass(frozen=True)
class BlockSettings(LayerSettings):
    """Settings of methods that rotate features in blocks."""

    block_size: int = 8
    """Side of the blocks; the features of every targeted layer must be a multiple of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, not {self.block_size}")


LAYER_SEARCH: Mapping[str, Space] = {**CAPTION_SEARCH, "targets": Choice(tuple(TARGETS))}
RANK_SEARCH: Mapping[str, Space] = {**LAYER_SEARCH, "rank": Choice((1, 4, 16))}
# not every method has a form for convolutions
LINEAR_SEARCH: Mapping[str, Space] = {
    **CAPTION_SEARCH,
    "targets": Choice(("attention", "cross-attention", "transformer")),
}
BLOCK_SEARCH: Mapping[str, Space] = {**LINEAR_SEARCH, "block_size": Choice((4, 8))}


class PeftAttack(CaptionedAttack):
    """Trains what one of PEFT's methods adds to layers of the UNet, on captioned pictures."""

    settings: LayerSettings

    def config(self, seed: int) -> Any:
        """PEFT's configuration of the method."""
        raise NotImplementedError

    @property
    def layers(self) -> list[str] | str:
        return TARGETS[self.settings.targets]

    def attach(self, model: Model, concept: Concept, seed: int) -> AbstractContextManager[dict[str, nn.Parameter]]:
        return adapter(model.unet, self.config(seed), seed)

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        save_peft(folder, model.unet)


class RankAttack(PeftAttack):
    """A method whose size is a rank."""

    Settings = RankSettings
    settings: RankSettings
    search: ClassVar = RANK_SEARCH


class Dora(RankAttack):
    """LoRA for the direction of every weight, and a magnitude of its own."""

    name = "dora"
    summary = "weight-decomposed LoRA: a direction and a magnitude for each layer"
    trains = "LoRA matrices and magnitudes beside layers of the UNet"
    paper = "arXiv 2402.09353"
    presets: ClassVar = rates(paper=1e-4, small=1e-3)

    def config(self, seed: int) -> Any:
        return lora(self.settings.rank, self.layers, use_dora=True)

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        save_lora(folder, model.unet)


class RsLora(RankAttack):
    """LoRA scaled by 1/√rank, so that high ranks learn as fast as low ones."""

    name = "rslora"
    summary = "rank-stabilised LoRA: scaled by the root of the rank"
    trains = "LoRA matrices beside layers of the UNet"
    paper = "arXiv 2312.03732"
    presets: ClassVar = rates(paper=1e-4, small=1e-3)

    def config(self, seed: int) -> Any:
        return lora(self.settings.rank, self.layers, use_rslora=True)

    def save(self, model: Model, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
        save_lora(folder, model.unet)


class LoHa(RankAttack):
    """The Hadamard product of two low-rank matrices."""

    name = "loha"
    summary = "LoHa: a Hadamard product of two low-rank matrices (FedPara)"
    trains = "LoHa matrices beside layers of the UNet"
    paper = "arXiv 2108.06098"
    presets: ClassVar = rates(paper=1e-4, small=3e-3)

    def config(self, seed: int) -> Any:
        from peft import LoHaConfig

        return LoHaConfig(r=self.settings.rank, alpha=self.settings.rank, target_modules=self.layers)


class LoKr(RankAttack):
    """A Kronecker product, of which one factor may be of low rank."""

    name = "lokr"
    summary = "LoKr: a Kronecker product of small matrices"
    trains = "LoKr matrices beside layers of the UNet"
    paper = "arXiv 2309.14859"
    presets: ClassVar = rates(paper=1e-4, small=3e-3)

    def config(self, seed: int) -> Any:
        from peft import LoKrConfig

        return LoKrConfig(r=self.settings.rank, alpha=self.settings.rank, target_modules=self.layers)


@dataclass(frozen=True)
class HraSettings(RankSettings):
    """Settings of Householder reflections."""

    rank: int = 4
    """How many reflections: an even number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % 2:
            raise ValueError(f"rank must be even, as reflections undo each other in pairs at first, not {self.rank}")


class Hra(RankAttack):
    """A chain of Householder reflections: orthogonal, and of low rank."""

    name = "hra"
    summary = "a chain of Householder reflections of each layer's input"
    trains = "Householder vectors before layers of the UNet"
    paper = "arXiv 2405.17484"
    Settings = HraSettings
    search: ClassVar = {**RANK_SEARCH, "rank": Choice((2, 4, 16))}
    presets: ClassVar = rates(paper=5e-3, small=3e-3)

    def config(self, seed: int) -> Any:
        from peft import HRAConfig

        return HRAConfig(r=self.settings.rank, target_modules=self.layers)

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        from peft.tuners.hra import HRALinear

        with super().attach(model, concept, seed) as parameters:
            for layer in model.unet.modules():
                if isinstance(
                    layer, HRALinear
                ):  # PEFT's own computes with detached weights: no hardening would reach them
                    layer.forward = partial(_reflected, layer)
            yield parameters


def _reflected(layer: Any, inputs: Tensor) -> Tensor:
    """W (R x) + b for *inputs* x [..., in]: what the layer computes as (W R) x + b."""
    reflections = layer.get_delta_weight(ADAPTER)  # [in, in]
    return cast(Tensor, layer.get_base_layer()(inputs @ reflections.T.to(inputs.dtype)))


class BlockAttack(PeftAttack):
    """A method that rotates features in blocks."""

    Settings = BlockSettings
    settings: BlockSettings
    search: ClassVar = BLOCK_SEARCH


class Oft(BlockAttack):
    """Orthogonal fine-tuning: every layer's input is rotated in blocks."""

    name = "oft"
    summary = "orthogonal fine-tuning: block-wise rotations of each layer's input"
    trains = "block-wise rotations before layers of the UNet"
    paper = "arXiv 2306.07280"
    presets: ClassVar = rates(paper=3e-5, small=3e-3)

    def config(self, seed: int) -> Any:
        from peft import OFTConfig

        return OFTConfig(r=0, oft_block_size=self.settings.block_size, target_modules=self.layers)


class Boft(BlockAttack):
    """Orthogonal butterfly fine-tuning, with one factor as in PEFT's default: blocks of rotations, and a scale."""

    name = "boft"
    summary = "block-wise rotations and a scale of each layer's weights (BOFT, one butterfly factor)"
    trains = "block-wise rotations and scales of layers of the UNet"
    paper = "arXiv 2311.06243"
    presets: ClassVar = rates(paper=3e-5, small=3e-3)

    def config(self, seed: int) -> Any:
        from peft import BOFTConfig

        return BOFTConfig(boft_block_size=self.settings.block_size, target_modules=self.layers)


class Ia3(PeftAttack):
    """One factor for every output feature."""

    name = "ia3"
    summary = "(IA)³: a factor for every output of each layer"
    trains = "scales of layers' outputs in the UNet"
    paper = "arXiv 2205.05638"
    Settings = LayerSettings
    presets: ClassVar = rates(paper=1e-3, small=1e-2)
    search: ClassVar = LAYER_SEARCH

    def config(self, seed: int) -> Any:
        from peft import IA3Config

        return IA3Config(target_modules=self.layers, feedforward_modules=[])


@dataclass(frozen=True)
class AnyMethodSettings(RankSettings):
    """Settings of any further method of PEFT."""

    method: str = "miss"
    """PEFT's name of the method, such as miss, delora, hira, randlora or shira."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method in OWN:
            raise ValueError(f"method {self.method} is an attack of its own: --attack {self.method}")
        if self.method not in further_methods():
            raise ValueError(f"PEFT has no method {self.method!r} for layers; it has {', '.join(further_methods())}")


class AnyMethod(RankAttack):
    """Whatever else the installed PEFT can inject, with PEFT's own defaults."""

    name = "peft"
    summary = "any further method that the installed PEFT can put into layers"
    trains = "what the method adds to layers of the UNet"
    paper = "https://github.com/huggingface/peft"
    search: ClassVar = {**LINEAR_SEARCH, "rank": Choice((1, 4, 16))}
    Settings = AnyMethodSettings
    settings: AnyMethodSettings
    presets: ClassVar = rates(paper=1e-4, small=1e-3)

    def config(self, seed: int) -> Any:
        cls = further_methods()[self.settings.method]
        known = {field.name for field in fields(cls)}
        wanted = {"r": self.settings.rank, "target_modules": self.layers, "random_seed": seed}
        try:
            return cls(**{name: value for name, value in wanted.items() if name in known})
        except Exception as error:
            raise ImmaError(
                f"PEFT cannot set {self.settings.method} up.", [str(error)], "Choose another method."
            ) from error


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [Dora, RsLora, LoHa, LoKr, Oft, Boft, Ia3, Hra, AnyMethod]
