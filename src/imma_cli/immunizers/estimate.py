"""How much memory hardening is going to take, before anything is loaded: the real network on tensors without values.

A pass forward and backward is run on torch's fake tensors, which have shapes and no memory, while every storage that
comes and goes is counted. What lives throughout is added up: weights, optimizers, copies.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from imma_cli.checkpoints.row_map import empty_network
from imma_cli.families.halving import halve, halved_layers
from imma_cli.families.model import SMALL_MODEL
from imma_cli.families.recomputing import Recompute, recompute, usual
from imma_cli.immunizers.imma import ImmunizerSettings
from imma_cli.immunizers.originals import IN_MEMORY
from imma_cli.immunizers.scope import Protect, protected_weights
from imma_cli.immunizers.settings import EpisodesSettings

if TYPE_CHECKING:
    from imma_cli.attacks.attack import Attack

FLOAT = 4
MOMENTS = 2
"""Numbers that AdamW keeps for each one that it trains."""
EIGHT_BIT = 0.254
"""How much of them is left in 8 bits, with one scale for every 256."""
TOKENS = 77


@dataclass(frozen=True)
class Estimate:
    """Bytes that hardening needs, besides what the process has already, or the driver takes for itself."""

    loading: int
    """All networks, while pictures and captions are encoded."""
    lasting: int
    """The UNet, what is kept at hand beside it, optimizers and copies."""
    passing: int
    """Activations and gradients, at most at once."""

    @property
    def peak(self) -> int:
        return max(self.loading, self.lasting + self.passing)


def estimate(
    config: Path,
    attacks: Sequence[Attack],
    settings: ImmunizerSettings | EpisodesSettings,
    *,
    halved: bool,
    recomputed: Recompute | None,
    on_cpu: bool,
    mixed: bool = False,
    concepts: int = 1,
) -> Estimate:
    """The estimate for the model that the folder *config* describes, with that many *concepts*. *recomputed* as
    `Runtime.apply` takes it; *mixed*: losses in 16 bits, as a GPU's autocast computes them."""
    networks = {part: empty_network(part, config) for part in ("unet", "vae", "text_encoder")}
    sizes = {part: _bytes(network.parameters()) for part, network in networks.items()}
    unet, everything = networks["unet"], sizes["unet"]
    small = everything < SMALL_MODEL * FLOAT
    if recomputed is None:
        recomputed = usual(on_cpu=on_cpu, small=small, halved=halved)
    if halved:
        sizes["unet"] -= sum(_bytes([layer.weight]) // 2 for _, layer in halved_layers(unet))
    protected = _bytes(protected_weights(unet, settings.protect).values())
    episodes = settings if isinstance(settings, EpisodesSettings) else None
    in_place = sum(attack.in_place for attack in attacks) * concepts
    if episodes and not episodes.side_by_side:
        in_place = min(in_place, 1)
    at_hand = {part for attack in attacks for part in attack.computes_with} | ({"text_encoder"} if episodes else set())
    moments = MOMENTS * (EIGHT_BIT if settings.eight_bit else 1)
    lasting = sizes["unet"] + sum(sizes[part] for part in at_hand) + int(moments * protected)
    lasting += protected if protected <= IN_MEMORY else 0
    # each that is there at the same time has weights of its own, what they were like, and the moments
    # episodes draw optimizers, too, and only AdamW has moments in 8 bits
    lasting += int(in_place * (2 + (MOMENTS if episodes else moments)) * everything)
    shadow = _shadow_of(config, settings.protect, halved, recomputed, mixed)
    passing = shadow.passing(settings.batch_size, everything=in_place > 0)
    if episodes:
        lasting += protected if episodes.objective != "absolute" else 0
        passing = max(passing, shadow.passing(episodes.outer_batch))
        if episodes.keep_batch:  # while the gradient of the harmful loss waits, and what has come together so far
            together = 2 * (episodes.keep_batch if small else 1)
            passing = max(passing, (1 if small else 2) * protected + shadow.passing(together))
    if settings.accumulate > 1:  # the gradients so far wait while the next ones come
        passing += everything if in_place else protected
    side = unet.config.sample_size << (len(networks["vae"].config.block_out_channels) - 1)
    loading = sum(sizes.values()) + _encoding(config, side)
    return Estimate(loading=loading, lasting=lasting, passing=passing)


@cache
def _encoding(config: Path, side: int) -> int:
    """Bytes that encoding one picture has at most at once."""
    with FakeTensorMode(), torch.no_grad():
        shadow = _shadow(empty_network("vae", config))
        with Living(shadow.parameters()) as living:
            shadow.encode(torch.randn(1, 3, side, side)).latent_dist.mean.add(0)
    return int(living.peak)


def _shadow(network: Any) -> Any:
    """*network* with fake weights; inside a FakeTensorMode."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty(p.shape, device="cpu"), requires_grad=False) for p in network.parameters()
    }
    memo |= {id(b): torch.empty(b.shape, dtype=b.dtype, device="cpu") for b in network.buffers()}
    return copy.deepcopy(network, memo).eval()


@cache
def _shadow_of(config: Path, protect: Protect, halved: bool, recomputed: Recompute, mixed: bool) -> Shadow:
    return Shadow(empty_network("unet", config), protect, halved=halved, recomputed=recomputed, mixed=mixed)


class Shadow:
    """A UNet of fake tensors, and what passes through it take."""

    def __init__(self, unet: Any, protect: Protect, *, halved: bool, recomputed: Recompute, mixed: bool) -> None:
        self.fake, self.protect, self.mixed = FakeTensorMode(), protect, mixed
        self.measured: dict[tuple[int, bool], int] = {}
        with self.fake:
            self.unet = _shadow(unet)
            if halved:
                halve(self.unet)
            recompute(self.unet, recomputed)
        if mixed:
            # autocast leaves norms in 32 bits on GPUs, and on processors, where this runs, in 16
            for module in self.unet.modules():
                if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                    module.register_forward_pre_hook(lambda norm, given: (given[0].float(),))

    def passing(self, batch: int, *, everything: bool = False) -> int:
        """Bytes that a pass forward and backward over *batch* pictures has at most at once.

        Gradients are of the protected weights, or of *everything*.
        """
        if batch > 2:  # activations grow with the pictures, gradients do not
            one, two = (self.passing(count, everything=everything) for count in (1, 2))
            return one + (batch - 1) * (two - one)
        key = batch, everything
        if key not in self.measured:
            with self.fake:
                self.measured[key] = self._measure(batch, everything)
        return self.measured[key]

    def _measure(self, batch: int, everything: bool) -> int:
        unet = self.unet
        wanted = list(unet.parameters() if everything else protected_weights(unet, self.protect).values())
        side = unet.config.sample_size
        latents = torch.randn(batch, unet.config.in_channels, side, side)
        words = torch.randn(batch, TOKENS, unet.config.cross_attention_dim)
        timesteps = torch.zeros(batch, dtype=torch.int64)
        for parameter in wanted:
            parameter.requires_grad_(True)
        try:
            with Living(unet.parameters()) as living:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
                    predicted = unet(latents, timesteps, encoder_hidden_states=words, return_dict=False)[0].float()
                gradients = torch.autograd.grad(predicted.square().mean(), wanted, allow_unused=True)
                del gradients
        finally:
            for parameter in wanted:
                parameter.requires_grad_(False)
        return int(living.peak)


class Living(TorchDispatchMode):
    """Counts the bytes of storages that come to be inside, and how many there are at most at once. *known* ones are not counted."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.known: Any = WeakIdKeyDictionary()
        for tensor in known:
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, out)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known[storage] = True
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def _bytes(weights: Iterable[Any]) -> int:
    return sum(int(weight.numel()) * FLOAT for weight in weights)
