"""Whatever else the installed PEFT can inject into layers, as one attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar

from imma_attacks.lora import LoraSettings
from imma_attacks.peft_methods import LINEAR_SEARCH, RankAttack, rates
from imma_cli.attacks import Attack, Choice, hookimpl
from imma_cli.errors import ImmaError

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


@dataclass(frozen=True)
class AnyMethodSettings(LoraSettings):
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
    return [AnyMethod]
