"""Where the computation runs is chosen once, for a reason that the user is told."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_imma import some_concept

from imma_cli.cli.hardening import Task, draw_all
from imma_cli.environment import SETTINGS
from imma_cli.errors import ImmaError
from imma_cli.families import allocator
from imma_cli.families.model import Model
from imma_cli.families.runtime import Runtime, choose_runtime


def test_auto_says_why_it_took_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runtime = choose_runtime()
    assert (runtime.device, runtime.attention, runtime.precision) == ("cpu", "sdpa", "fp32")
    assert "works on CUDA devices only" in str(runtime)


def test_xformers_is_refused_where_it_cannot_work() -> None:
    with pytest.raises(ImmaError) as refused:
        choose_runtime("cpu", "xformers")
    assert "works on CUDA devices only; use sdpa" in "".join(refused.value.reasons)


def test_what_harden_computes_on_is_said_and_recorded(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path, capsys
) -> None:
    code, out, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue", "--images", pictures, "--steps", 2,
        "--method", "imma", "--attack", "lora", "--device", "cpu", "--output", tmp_path / "hard.safetensors",
    )  # fmt: skip
    assert code == 0, err
    assert "On cpu, fp32, sdpa attention (no xformers: it works on CUDA devices only" in err
    _, out, _ = imma("inspect", tmp_path / "hard.safetensors", "--config", tiny_config, "--json")
    assert "works on CUDA devices only" in out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 5e-2), ("fp16", 1e-2)])
def test_xformers_agrees_with_sdpa_forward_and_backward(tiny_model: Model, precision: str, tolerance: float) -> None:
    """Relative to the largest value; fp32 through xformers' kernels for tensors of that dtype."""
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(2, 4, 8, 8, device="cuda")
    timesteps = torch.tensor([100, 700], device="cuda")
    found = []
    for attention in ("sdpa", "xformers"):
        runtime = Runtime("cuda", choose_runtime("cuda", attention).attention, precision)  # type: ignore[arg-type]
        model = runtime.apply(copy.deepcopy(tiny_model))
        weight = model.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.requires_grad_(True)
        conditioning = model.family.encode_prompts(model, ["a cat", "a dog"]).detach()

        def loss(model: Model = model, conditioning: torch.Tensor = conditioning) -> torch.Tensor:
            return model.family.loss(model, latents, conditioning, noise, timesteps).mean()

        value = runtime.forward(loss)
        found.append((value.detach(), torch.autograd.grad(value, weight)[0]))
    for one, other in zip(*found, strict=True):
        assert float((one - other).abs().max()) <= tolerance * float(one.abs().max())


def test_large_tensors_ask_for_huge_pages_where_nobody_said_otherwise() -> None:
    """In a process of its own: torch looks when it first makes a tensor."""
    if not all(map(Path.exists, (Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage")))):
        pytest.skip("this system has no huge pages, or does not tell of its mappings")
    looks = """
import contextlib, sys
from imma_cli.cli import main
sys.argv = ["imma", "--version"]
with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
    main()
import torch
made = torch.ones(64 * 2**20)
print(sum(line.startswith("VmFlags") and " hg" in line for line in open("/proc/self/smaps")))
"""

    def mappings(**said: str) -> int:
        env = {name: value for name, value in os.environ.items() if name not in SETTINGS} | said
        out = subprocess.run([sys.executable, "-c", looks], env=env, check=True, capture_output=True, text=True).stdout
        return int(out)

    assert mappings() > 0
    assert mappings(THP_MEM_ALLOC_ENABLE="0") == 0


def test_the_heap_gives_gaps_back_before_the_turn_and_only_on_the_way_to_a_gradient(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, given = tiny_model.unet, []
    monkeypatch.setattr(allocator, "_glibc", lambda name, *numbers: given.append(name))
    for _ in range(2):  # a second runtime must not have it done twice
        allocator.give_back_gaps(unet)
    side = unet.config.sample_size
    inputs = torch.zeros(1, 4, side, side), torch.tensor([5]), torch.zeros(1, 4, unet.config.cross_attention_dim)
    with torch.no_grad():
        unet(*inputs)
    assert given == []
    unet(*inputs)
    assert given == ["malloc_trim"] * 2


def test_concepts_are_drawn_in_the_precision_of_the_run(tiny_model: Model) -> None:
    computed: list[torch.dtype] = []
    tiny_model.unet.conv_in.register_forward_hook(lambda layer, inputs, output: computed.append(output.dtype))
    task = Task(tiny_model, [], [some_concept()], None, Runtime("cpu", "sdpa", "bf16"))
    concepts, _ = draw_all(task, 1, 0, quiet=True)
    assert len(concepts[0].images) == 1
    assert set(computed) == {torch.bfloat16}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system tells no other figure")
def test_a_measured_peak_is_the_processs_own() -> None:
    """And not that of the larger one that started it."""
    held = torch.ones(200_000_000)
    tells = """
from imma_cli.families.runtime import Runtime
from imma_cli.immunizers.memory import peak_memory
print(peak_memory(Runtime("cpu", "sdpa", "fp32")))
"""
    done = subprocess.run([sys.executable, "-c", tells], check=True, capture_output=True, text=True)
    assert 0 < int(done.stdout) < held.nbytes
