"""The parameter-efficient methods that people use and PEFT puts beside or into layers, one attack for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from imma_attacks._captions import CAPTION_SEARCH, CaptionedAttack, CaptionSettings
from imma_attacks._exports import save_peft
from imma_attacks._peft import ADAPTER, TARGETS, Targets, adapter
from imma_attacks.lora import Lora, LoraSettings
from imma_cli.attacks import Attack, Choice, Preset, Space, hookimpl
from imma_cli.concepts.concept import Concept
from imma_cli.families.model import Model


def rates(paper: float, small: float) -> Mapping[str, Preset]:
    """The attacker's rates on full-size and on small models; the defender's are LoRA's."""
    return {
        "paper": Preset(learning_rate=paper, outer_learning_rate=1e-5, steps=1000),
        "small": Preset(learning_rate=small, outer_learning_rate=1e-4, steps=600),
    }


@dataclass(frozen=True)
class LayerSettings(CaptionSettings):
    """Settings of methods without a rank."""

    targets: Targets = "attention"
    """Which layers are adapted."""


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
# not every method has a form for convolutions
LINEAR_SEARCH: Mapping[str, Space] = {
    **CAPTION_SEARCH,
    "targets": Choice(("attention", "cross-attention", "transformer")),
}
BLOCK_SEARCH: Mapping[str, Space] = {**LINEAR_SEARCH, "block_size": Choice((4, 8))}


class PeftAttack(CaptionedAttack):
    """Trains what one of PEFT's methods adds to layers of the UNet, on captioned pictures."""

    settings: LayerSettings | LoraSettings

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

    Settings = LoraSettings
    settings: LoraSettings
    search: ClassVar = Lora.search


class Dora(Lora):
    """LoRA for the direction of every weight, and a magnitude of its own."""

    name = "dora"
    summary = "weight-decomposed LoRA: a direction and a magnitude for each layer"
    trains = "LoRA matrices and magnitudes beside layers of the UNet"
    paper = "arXiv 2402.09353"
    variant: ClassVar = {"use_dora": True}


class RsLora(Lora):
    """LoRA with alpha / √rank for its scale, so that high ranks learn as fast as low ones."""

    name = "rslora"
    summary = "rank-stabilised LoRA: scaled by the root of the rank"
    paper = "arXiv 2312.03732"
    variant: ClassVar = {"use_rslora": True}


class LoHa(RankAttack):
    """The Hadamard product of two low-rank matrices."""

    name = "loha"
    summary = "LoHa: a Hadamard product of two low-rank matrices (FedPara)"
    trains = "LoHa matrices beside layers of the UNet"
    paper = "arXiv 2108.06098"
    simulated = True
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
class HraSettings(LoraSettings):
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
    search: ClassVar = {**Lora.search, "rank": Choice((2, 4, 16))}
    presets: ClassVar = rates(paper=5e-3, small=3e-3)

    def config(self, seed: int) -> Any:
        from peft import HRAConfig

        return HRAConfig(r=self.settings.rank, target_modules=self.layers)

    @contextmanager
    def attach(self, model: Model, concept: Concept, seed: int) -> Iterator[dict[str, nn.Parameter]]:
        from peft.tuners.hra import HRALinear

        with super().attach(model, concept, seed) as parameters:
            for layer in model.unet.modules():
                if isinstance(layer, HRALinear):
                    # PEFT's own computes with detached weights: no hardening would reach them
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


@hookimpl
def imma_attacks() -> list[type[Attack]]:
    return [Dora, RsLora, LoHa, LoKr, Oft, Boft, Ia3, Hra]
