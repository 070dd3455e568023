"""What attacks learned, saved and loaded by the programs that their users have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from imma_cli.attacks import Attack
from imma_cli.attacks.manager import discover
from imma_cli.attacks.settings import parse_attacks
from imma_cli.attacks.testing import example_concept, tiny_model
from imma_cli.attacks.training import Attacker
from imma_cli.concepts.batches import TrainingSet, encode

REGISTRY = discover()
CONCEPT = example_concept()
LORA_LIKE = [
    "lora", "lora:rank=3,targets=everything", "dreambooth-lora", "dora", "rslora", "text-encoder-lora", "pivotal-tuning:tokens=2", "dora:targets=everything",
]  # fmt: skip
OTHER_ADAPTERS = [
    "loha",
    "lokr",
    "oft",
    "boft",
    "ia3",
    "hra",
    "peft:method=miss",
    "peft:method=lily",
    "peft:method=randlora",
]
WORDS = ["textual-inversion:tokens=3", "custom-diffusion:prior_weight=0"]
IN_PLACE = ["dreambooth", "full-finetune"]


def drawn(pipeline: StableDiffusionPipeline, prompt: str) -> Tensor:
    """What *pipeline* draws: latents after some steps, so that nothing is lost to rounding."""
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline(prompt, height=64, width=64, latents=latents, num_inference_steps=3, output_type="latent").images


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], tuple[Path, str, Tensor, Tensor]]:
    """An attack trained for a moment and saved: its folder, a prompt, and what that drew after and before."""

    def train(spec: str) -> tuple[Path, str, Tensor, Tensor]:
        (attack,) = parse_attacks([spec], REGISTRY)
        model = tiny_model("sd1")
        prompt = attack.caption(CONCEPT, CONCEPT.captions[0])
        before = drawn(assembled(model), prompt)
        with attack.attach(model, CONCEPT, 0) as parameters:
            rates = attack.rates(model)
            attacker = Attacker(parameters, rates, attack.settings, 3, lambda name: 30 * attack.rate_of(name))
            batches = iter(TrainingSet(model, attack, CONCEPT, encode(model, CONCEPT.images), seed=0))
            for _ in range(3):
                attacker.step(lambda: attack.loss(model, next(batches)))
            attack.save(model, parameters, tmp_path)
            return tmp_path, prompt, drawn(assembled(model), prompt), before

    return train


def assembled(model: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer, unet=model.unet,
        scheduler=DDIMScheduler.from_config(model.scheduler.config), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def same(got: Tensor, wanted: Tensor, before: Tensor) -> None:
    moved = (wanted - before).abs().max()
    assert moved > 1e-3, "the attack changed nothing that could be compared"
    assert (got - wanted).abs().max() < 0.01 * moved


def words_into(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    for file in sorted(folder.glob("imma-*.safetensors")):
        pipeline.load_textual_inversion(folder, weight_name=file.name)


@pytest.mark.parametrize("format_", ["pytorch_lora_weights.safetensors", "kohya.safetensors"])
@pytest.mark.parametrize("spec", LORA_LIKE)
def test_loras_are_read_by_diffusers_in_both_formats(saved: Any, spec: str, format_: str) -> None:
    if spec.startswith("dora") and format_ == "kohya.safetensors":
        pytest.skip("diffusers 0.42 leaves out the magnitudes in kohya's layout; the next test reads them")
    folder, prompt, after, before = saved(spec)
    pipeline = assembled(tiny_model("sd1"))
    pipeline.load_lora_weights(folder, weight_name=format_)
    words_into(pipeline, folder)
    same(drawn(pipeline, prompt), after, before)


@pytest.mark.parametrize("spec", ["lora:rank=3,targets=everything", "rslora", "dora", "text-encoder-lora"])
def test_kohyas_file_says_what_its_readers_compute(saved: Any, spec: str) -> None:
    """W + alpha / rank · up · down under the names that the file for one text encoder has; with DoRA each row scaled."""
    folder, prompt, after, before = saved(spec)
    state = load_file(folder / "kohya.safetensors")
    pipeline = assembled(tiny_model("sd1"))
    known = {
        prefix + name.replace(".", "_"): module
        for prefix, network in (("lora_unet_", pipeline.unet), ("lora_te_", pipeline.text_encoder))
        for name, module in network.named_modules()
    }
    layers = {name.partition(".")[0] for name in state}
    assert layers <= set(known)
    for layer in layers:
        down, up, alpha = (state[f"{layer}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        change = (up.flatten(1) @ down.flatten(1)) * alpha / len(down)
        weight = known[layer].weight
        weight.data += change.reshape(weight.shape)
        if (scale := state.get(f"{layer}.dora_scale")) is not None:
            weight.data *= scale / weight.data.norm(dim=1, keepdim=True)
    same(drawn(pipeline, prompt), after, before)


@pytest.mark.parametrize("spec", OTHER_ADAPTERS)
def test_other_adapters_are_read_by_peft(saved: Any, spec: str) -> None:
    folder, prompt, after, before = saved(spec)
    pipeline = assembled(tiny_model("sd1"))
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, folder).base_model.model
    same(drawn(pipeline, prompt), after, before)


@pytest.mark.parametrize("spec", WORDS)
def test_new_words_are_read_by_diffusers(saved: Any, spec: str) -> None:
    folder, prompt, after, before = saved(spec)
    pipeline = assembled(tiny_model("sd1"))
    if spec.startswith("custom"):
        # without _pipeline, diffusers 0.42 reads the file and then drops it
        file = "pytorch_custom_diffusion_weights.safetensors"
        pipeline.unet.load_attn_procs(folder, weight_name=file, _pipeline=pipeline)
    words_into(pipeline, folder)
    same(drawn(pipeline, prompt), after, before)


@pytest.mark.parametrize("spec", IN_PLACE)
def test_a_whole_unet_is_read_by_diffusers(saved: Any, spec: str) -> None:
    folder, prompt, after, before = saved(spec)
    pipeline = assembled(tiny_model("sd1"))
    pipeline.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    same(drawn(pipeline, prompt), after, before)


def test_every_attack_that_ships_is_among_them() -> None:
    tried = {spec.partition(":")[0] for spec in (*LORA_LIKE, *OTHER_ADAPTERS, *WORDS, *IN_PLACE)}
    assert tried == {name for name, found in REGISTRY.found.items() if found.distribution == "imma-cli"}


def test_an_attack_without_a_format_of_its_own_keeps_its_parameters_by_name(tmp_path: Path) -> None:
    (attack,) = parse_attacks(["lora"], REGISTRY)
    parameters = {"new": torch.nn.Parameter(torch.arange(3.0))}
    Attack.save(attack, tiny_model("sd1"), parameters, tmp_path)
    with safe_open(tmp_path / "adaptation.safetensors", "pt") as file:
        assert file.get_tensor("new").tolist() == [0, 1, 2]
