"""Less memory, the same result: what --low-memory and the frozen parts' release change, and what they do not."""

from __future__ import annotations

import copy
import gc
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import save_file
from test_imma import attack_named, some_concept
from torch import Tensor, nn

from imma_cli.checkpoints import open_checkpoint
from imma_cli.cli.hardening import Task, carry_out
from imma_cli.concepts.batches import Batch
from imma_cli.errors import ImmaError
from imma_cli.families.halving import halve
from imma_cli.families.model import Model
from imma_cli.families.recomputing import Recompute, recompute
from imma_cli.families.runtime import Runtime, choose_runtime
from imma_cli.immunizers import originals
from imma_cli.immunizers.episodes import EpisodesSettings
from imma_cli.immunizers.estimate import Living
from imma_cli.immunizers.imma import ImmunizerSettings, immunize
from imma_cli.immunizers.keeper import Keeper
from imma_cli.immunizers.scope import protected_weights

CPU = Runtime("cpu", "sdpa", "fp32")


def tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


@pytest.mark.parametrize("options", [("--method", "imma"), ("--steps", 18)])
def test_low_memory_gives_the_same_weights_for_a_float16_file(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path, options
) -> None:
    def hardened(name: str, *more: str) -> dict[str, Tensor]:
        code, _, err = imma(
            "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue", "--images", pictures, "--steps", 6,
            "--attack", "lora:targets=attention", "--device", "cpu", "--output", tmp_path / name, *options, *more,
        )  # fmt: skip
        assert code == 0, err
        return tensors(tmp_path / name)

    plain, saving = hardened("plain.safetensors"), hardened("saving.safetensors", "--low-memory")
    before = tensors(tiny_checkpoint)
    assert any(not torch.equal(plain[name], before[name]) for name in before)
    assert all(torch.equal(plain[name], saving[name]) for name in plain)


def test_halving_takes_half_of_what_is_frozen_and_leaves_attention(tiny_model: Model) -> None:
    kept = copy.deepcopy(dict(tiny_model.unet.named_parameters()))
    halve(tiny_model.unet)
    halved = {n for n, p in tiny_model.unet.named_parameters() if p.dtype != torch.float32}
    assert not any(".attn" in name for name in halved)
    frozen = {n: p for n, p in kept.items() if ".attn" not in n}
    assert sum(kept[n].numel() for n in halved) > 0.9 * sum(p.numel() for p in frozen.values())


def test_a_file_in_32_bits_is_read_as_halving_would_make_it(
    tiny_checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """Also where a value is too large for float16."""
    wide = {name: tensor.float() for name, tensor in tensors(tiny_checkpoint).items()}
    wide["model.diffusion_model.input_blocks.0.0.weight"][0, 0, 0, 0] = 1e6
    save_file(wide, tmp_path / "wide.safetensors", {"format": "pt"})
    opened = open_checkpoint(tmp_path / "wide.safetensors", tiny_config)
    halved, read = opened.load(halved=True), opened.load()
    assert halved.unet.conv_in.weight.dtype == torch.bfloat16
    halve(read.unet)
    ours, theirs = halved.unet.state_dict(), read.unet.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)


@pytest.mark.parametrize("attack", ["lora:targets=everything", "loha", "textual-inversion", "dreambooth-lora"])
def test_attackers_learn_in_32_bits_beside_weights_in_16(tiny_model: Model, attack: str) -> None:
    halve(tiny_model.unet)
    with attack_named(attack).attach(tiny_model, some_concept(), 0) as parameters:
        assert {p.dtype for p in parameters.values()} == {torch.float32}
    result = immunize(tiny_model, [attack_named(attack)], [some_concept()], ImmunizerSettings(steps=4), CPU)
    assert all(step.inner_loss is not None for step in result.steps)


def held_at_most(model: Model, what: Recompute) -> tuple[int, dict[str, Tensor]]:
    """Bytes that are held at most on the way there and back, besides the weights, and the gradients."""
    recompute(model.unet, what)
    weights = protected_weights(model.unet, "attention")
    for weight in weights.values():
        weight.requires_grad_(True)
    words = model.family.encode_prompts(model, ["a cat"]).detach()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with Living(model.unet.parameters()) as living:
        out = model.unet(latents, torch.tensor([5]), encoder_hidden_states=words, return_dict=False)[0]
        gradients = torch.autograd.grad(out.square().mean(), list(weights.values()))
    return int(living.peak), dict(zip(weights, gradients, strict=True))


@pytest.mark.parametrize(("halved", "at_most"), [(False, 0.9), (True, 0.7)])
def test_making_activations_again_takes_less_memory_for_the_same_gradients(
    tiny_model: Model, halved: bool, at_most: float
) -> None:
    if halved:
        halve(tiny_model.unet)
    plain, gradients = held_at_most(tiny_model, "nothing")
    less, again = held_at_most(tiny_model.sharing(), "activations")  # what a copy takes along
    assert less < at_most * plain
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)
    assert held_at_most(tiny_model, "nothing")[0] == plain


def test_what_was_computed_without_a_way_back_is_not_held_on_to(tiny_model: Model) -> None:
    recompute(tiny_model.unet, "activations")
    for weight in protected_weights(tiny_model.unet, "attention").values():
        weight.requires_grad_(True)
    words = tiny_model.family.encode_prompts(tiny_model, ["a cat"]).detach()
    with Living([*tiny_model.unet.parameters(), words]) as living:
        out = tiny_model.unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), encoder_hidden_states=words).sample
        assert living.now > 100_000
        del out
        gc.collect()
        assert living.now < 1_000


class Cast(nn.Module):
    """What a UNet has of it, in mixed precision."""

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.dtype = norm.requires_grad_(False), dtype
        norm.weight.data.fill_(1.7)
        norm.bias.data.fill_(0.3)

    def enable_gradient_checkpointing(self, function: object) -> None: ...

    def disable_gradient_checkpointing(self) -> None: ...

    def forward(self, inputs: Tensor) -> Tensor:
        normed = self.norm(inputs)
        if isinstance(self.norm, nn.GroupNorm):
            return F.silu(normed).to(self.dtype).square()
        return normed.to(self.dtype).flatten(0, 1).square()  # in rows, as layers take them


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm(64)], ids=["group", "layer"])
def test_what_mixed_precision_casts_is_made_again_too(norm: nn.GroupNorm | nn.LayerNorm, dtype: torch.dtype) -> None:
    def held_and_slope(what: Recompute) -> tuple[int, Tensor]:
        recompute(network, what)
        with Living([inputs]) as living:
            out = network(inputs).sum()
            held = int(living.now)
            return held, torch.autograd.grad(out, inputs)[0]

    network, inputs = Cast(norm, dtype), torch.randn(2, 4, 64, requires_grad=True)
    (plain, slope), (less, again) = held_and_slope("nothing"), held_and_slope("activations")
    assert less <= plain - inputs.numel() * dtype.itemsize
    assert torch.equal(slope, again)


class Like(nn.GroupNorm):
    def forward(self, inputs: Tensor) -> Tensor:
        return F.group_norm(inputs, self.num_groups, self.weight, None, self.eps).square()


class Changed(nn.SiLU):
    def forward(self, inputs: Tensor) -> Tensor:
        out = super().forward(inputs)
        with torch.no_grad():
            return out.mul_(3)


class LaidOut(nn.SiLU):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).to(torch.float64, memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.GroupNorm(2, 4, affine=False), nn.GroupNorm(4, 4, affine=False)],
        [nn.LayerNorm(8, elementwise_affine=False, eps=1.0), nn.LayerNorm(8, elementwise_affine=False)],
        [nn.LayerNorm(8, bias=False), nn.LayerNorm(8)],
        [nn.GroupNorm(2, 4), Like(4, 4)],
        [Changed()],
        [LaidOut()],
    ],
    ids=["group norms without weights", "layer norms without", "no bias", "subclass", "changed in place", "laid out"],
)
def test_what_cannot_be_told_how_it_was_made_is_kept(layers: list[nn.Module]) -> None:
    class Squared(Cast):
        def forward(self, inputs: Tensor) -> Tensor:
            for layer in self.layers:
                inputs = layer(inputs).square()
            return inputs

    network = Squared(nn.GroupNorm(1, 1), torch.float32)
    network.layers = nn.ModuleList(layers).requires_grad_(False)
    for name, parameter in network.named_parameters():
        parameter.data.fill_(0.3 if name.endswith("bias") else 1.7)
    inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)

    def slope(what: Recompute) -> Tensor:
        recompute(network, what)
        return torch.autograd.grad(network(inputs).sum(), inputs)[0]

    assert torch.equal(slope("nothing"), slope("activations"))


def test_a_bias_that_learns_between_two_ways_back_does_not_change_the_second(tiny_model: Model) -> None:
    norm = nn.GroupNorm(2, 4)
    norm.weight.requires_grad_(False)
    network, inputs = Cast(nn.GroupNorm(1, 1), torch.float64), torch.randn(2, 4, 8, requires_grad=True)
    network.norm = norm
    recompute(network, "activations")
    out = network(inputs).sum()
    (first,) = torch.autograd.grad(out, inputs, retain_graph=True)
    with torch.no_grad():
        norm.bias.add_(1)
    assert torch.equal(torch.autograd.grad(out, inputs)[0], first)


def test_a_network_that_keeps_less_is_saved_and_copied_as_any_other(tiny_model: Model, tmp_path: Path) -> None:
    recompute(tiny_model.unet, "activations")
    torch.save(tiny_model.unet, tmp_path / "unet.pt")
    for other in (torch.load(tmp_path / "unet.pt", weights_only=False), copy.deepcopy(tiny_model.unet)):
        with torch.no_grad():
            tiny_model.unet.conv_out.bias.fill_(torch.nan)
        words = tiny_model.family.encode_prompts(tiny_model, ["a cat"]).detach()
        out = other(torch.randn(1, 4, 8, 8), torch.tensor([5]), encoder_hidden_states=words, return_dict=False)[0]
        assert torch.isfinite(out).all()


def test_a_forward_that_another_put_there_stays(tiny_model: Model) -> None:
    def theirs(*inputs: object, **options: object) -> str:
        return "theirs"

    tiny_model.unet.forward = theirs
    for what in ("activations", "blocks", "nothing"):
        recompute(tiny_model.unet, what)
        assert tiny_model.unet(None) == "theirs"


def test_a_norm_that_is_trained_keeps_what_it_gave(tiny_model: Model) -> None:
    """Its weight changes before the next step, and autograd hands out another object for it."""
    unet = tiny_model.unet
    norms = [m for m in unet.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
    words = tiny_model.family.encode_prompts(tiny_model, ["a cat"]).detach()
    latents = torch.randn(1, 4, 8, 8)

    def gradients(what: Recompute) -> list[Tensor]:
        recompute(unet, what)
        out = unet(latents, torch.tensor([5]), encoder_hidden_states=words, return_dict=False)[0]
        return list(torch.autograd.grad(out.square().mean(), [norm.weight for norm in norms]))

    unet.requires_grad_(True)
    assert all(map(torch.equal, gradients("nothing"), gradients("activations")))


def test_a_change_in_place_before_the_way_back_is_an_error(tiny_model: Model) -> None:
    recompute(tiny_model.unet, "activations")
    weights = list(protected_weights(tiny_model.unet, "attention").values())
    for weight in weights:
        weight.requires_grad_(True)
    words = tiny_model.family.encode_prompts(tiny_model, ["a cat"]).detach()
    out = tiny_model.unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), encoder_hidden_states=words).sample
    with torch.no_grad():
        for weight in weights:
            weight.add_(1)
    with pytest.raises(RuntimeError, match="in place"):
        torch.autograd.grad(out.sum(), weights)


def test_so_is_a_change_of_a_weight_in_16_bits(tiny_model: Model) -> None:
    halve(tiny_model.unet)
    recompute(tiny_model.unet, "activations")
    latents = torch.randn(1, 4, 8, 8).requires_grad_(True)
    words = tiny_model.family.encode_prompts(tiny_model, ["a cat"]).detach()
    out = tiny_model.unet(latents, torch.tensor([5]), encoder_hidden_states=words).sample
    with torch.no_grad():
        tiny_model.unet.conv_out.weight.mul_(2)
    with pytest.raises(RuntimeError, match="16 bits was changed"):
        torch.autograd.grad(out.sum(), latents)


def test_a_gradient_of_a_gradient_goes_through_what_is_made_again(tiny_model: Model) -> None:
    def steepness(what: Recompute) -> Tensor:
        recompute(tiny_model.unet, what)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        out = tiny_model.unet(latents, torch.tensor([5]), encoder_hidden_states=words, return_dict=False)[0]
        (slope,) = torch.autograd.grad(out.square().mean(), latents, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), latents)[0]

    words = tiny_model.family.encode_prompts(tiny_model, ["a cat"]).detach()
    for layer in tiny_model.unet.modules():
        if hasattr(layer, "set_processor"):
            layer.set_processor(AttnProcessor())  # the fused one has no second derivative
    assert torch.allclose(steepness("nothing"), steepness("activations"), rtol=1e-4, atol=1e-7)


def test_nothing_stays_behind_where_a_network_fails(tiny_model: Model) -> None:
    recompute(tiny_model.unet, "activations")
    with pytest.raises(RuntimeError):
        tiny_model.unet(torch.zeros(1, 3, 8, 8), torch.tensor([5]), encoder_hidden_states=torch.zeros(1, 1, 1))
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_low_memory_names_everything_that_it_cannot_do(imma, tiny_checkpoint, tiny_config, pictures) -> None:
    code, _, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue", "--images", pictures, "--low-memory",
        "--attack", "full-finetune", "--attack", "dreambooth", "--protect", "unet", "--output", "never.safetensors",
    )  # fmt: skip
    assert code == 2
    assert "full-finetune, dreambooth train all weights" in " ".join(err.split())
    assert "--protect unet" in err


def test_low_memory_is_said(imma, tiny_checkpoint, tiny_config, pictures, tmp_path) -> None:
    code, _, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue", "--images", pictures, "--low-memory",
        "--steps", 12, "--output", tmp_path / "hard.safetensors",
    )  # fmt: skip
    assert code == 0, err
    assert "fp32 (what is frozen in 16 bits)" in " ".join(err.split())
    assert "Left out, as it takes a second copy of all weights: full-finetune" in " ".join(err.split())


@pytest.mark.usefixtures("short_checks")
@pytest.mark.parametrize("settings", [ImmunizerSettings(steps=2), EpisodesSettings(steps=30, checks=1)])
def test_networks_that_no_attack_computes_with_take_no_memory(tiny_model: Model, settings) -> None:
    done = carry_out(Task(tiny_model, [attack_named("lora")], [some_concept()], settings, CPU), Keeper(), quiet=True)
    assert len(done.checks) == isinstance(settings, EpisodesSettings)
    assert sum(p.untyped_storage().nbytes() for p in tiny_model.vae.parameters()) == 0
    assert all(p.untyped_storage().nbytes() for p in tiny_model.unet.parameters())


def test_an_attack_that_says_nothing_keeps_every_network(tiny_model: Model) -> None:
    cls = type(attack_named("lora"))

    class Decoding(cls):  # type: ignore[misc, valid-type]
        computes_with: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")

        def loss(self, model: Model, batch: Batch) -> Tensor:
            drawn = model.vae.decode(batch.latents).sample
            words = model.family.encode_prompts(model, batch.captions)
            return super().loss(model, batch) + 0 * drawn.mean() + 0 * words.mean()

    attack = Decoding(attack_named("lora").settings)
    task = Task(tiny_model, [attack], [some_concept()], ImmunizerSettings(steps=4), CPU)
    result = carry_out(task, Keeper(), quiet=True)
    assert len(result.steps) == 2


@pytest.mark.parametrize("in_memory", [0, 2**30])
def test_the_model_is_given_back_wherever_its_weights_waited(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    monkeypatch.setattr(originals, "IN_MEMORY", in_memory)
    before = copy.deepcopy(tiny_model.unet.state_dict())
    result = immunize(tiny_model, [attack_named("lora")], [some_concept()], ImmunizerSettings(steps=4), CPU)
    assert any(not torch.equal(weight, before[name]) for name, weight in result.weights.items())
    with suppress(RuntimeError), originals.put_back(list(tiny_model.unet.parameters())):
        next(tiny_model.unet.parameters()).data.zero_()
        raise RuntimeError
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.unet.state_dict().items())


def test_no_room_for_the_weights_is_said(tiny_model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(originals, "IN_MEMORY", 0)
    monkeypatch.setattr(originals.tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(ImmaError, match="set TMPDIR") as refused:
        immunize(tiny_model, [attack_named("lora")], [some_concept()], ImmunizerSettings(steps=2), CPU)
    assert "cannot be kept in" in refused.value.what


def test_what_is_halved_is_part_of_the_runtime() -> None:
    assert choose_runtime("cpu", halved=True).halved
