"""Write ``families/configs/sd1/keys.json``: every key of an SD 1.x single file, with its shape at full size and in the demo.

The names are built here from the topology of the original latent-diffusion code; diffusers is asked only to confirm
them. Its converters must map exactly these keys onto exactly the names in its own models' state dicts, and its models
give the shapes.

    python benchmarks/sd1_keys.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from imma_cli.checkpoints.row_map import row_map, state_dict_shapes
from imma_cli.checkpoints.topology import PREFIXES
from imma_cli.families import CONFIGS

TARGET = CONFIGS / "sd1" / "keys.json"
ARCHITECTURES = ("sd1", "demo")
CONV, LINEAR, VECTOR = 4, 2, 1  # numbers of dimensions

Key = tuple[str, int]


def layer(name: str, dimensions: int, bias: bool = True) -> Iterator[Key]:
    yield f"{name}.weight", dimensions
    if bias:
        yield f"{name}.bias", VECTOR


def unet_resnet(name: str, skip: bool) -> Iterator[Key]:
    yield from layer(f"{name}.in_layers.0", VECTOR)
    yield from layer(f"{name}.in_layers.2", CONV)
    yield from layer(f"{name}.emb_layers.1", LINEAR)
    yield from layer(f"{name}.out_layers.0", VECTOR)
    yield from layer(f"{name}.out_layers.3", CONV)
    if skip:
        yield from layer(f"{name}.skip_connection", CONV)


def unet_transformer(name: str) -> Iterator[Key]:
    yield from layer(f"{name}.norm", VECTOR)
    yield from layer(f"{name}.proj_in", CONV)
    yield from layer(f"{name}.proj_out", CONV)
    block = f"{name}.transformer_blocks.0"
    for attention in ("attn1", "attn2"):
        for projection in ("to_q", "to_k", "to_v"):
            yield from layer(f"{block}.{attention}.{projection}", LINEAR, bias=False)
        yield from layer(f"{block}.{attention}.to_out.0", LINEAR)
    for norm in ("norm1", "norm2", "norm3"):
        yield from layer(f"{block}.{norm}", VECTOR)
    yield from layer(f"{block}.ff.net.0.proj", LINEAR)
    yield from layer(f"{block}.ff.net.2", LINEAR)


def unet() -> Iterator[Key]:
    """Four levels of two layers; attention in the first three; channels grow where levels 1 and 2 begin."""
    yield from layer("time_embed.0", LINEAR)
    yield from layer("time_embed.2", LINEAR)
    yield from layer("input_blocks.0.0", CONV)
    block = 1
    for level in range(4):
        for index in range(2):
            yield from unet_resnet(f"input_blocks.{block}.0", skip=index == 0 and level in (1, 2))
            if level < 3:
                yield from unet_transformer(f"input_blocks.{block}.1")
            block += 1
        if level < 3:
            yield from layer(f"input_blocks.{block}.0.op", CONV)
            block += 1
    yield from unet_resnet("middle_block.0", skip=False)
    yield from unet_transformer("middle_block.1")
    yield from unet_resnet("middle_block.2", skip=False)
    block = 0
    for level in (3, 2, 1, 0):
        for index in range(3):  # each takes in what the matching input block gave, so each has a skip connection
            yield from unet_resnet(f"output_blocks.{block}.0", skip=True)
            if level < 3:
                yield from unet_transformer(f"output_blocks.{block}.1")
            if level > 0 and index == 2:
                yield from layer(f"output_blocks.{block}.{2 if level < 3 else 1}.conv", CONV)
            block += 1
    yield from layer("out.0", VECTOR)
    yield from layer("out.2", CONV)


def vae_resnet(name: str, skip: bool) -> Iterator[Key]:
    for part, dimensions in (("norm1", VECTOR), ("conv1", CONV), ("norm2", VECTOR), ("conv2", CONV)):
        yield from layer(f"{name}.{part}", dimensions)
    if skip:
        yield from layer(f"{name}.nin_shortcut", CONV)


def vae_half(name: str) -> Iterator[Key]:
    encodes = name == "encoder"
    yield from layer(f"{name}.conv_in", CONV)
    for level in range(4):
        for index in range(2 if encodes else 3):
            skip = index == 0 and level in ((1, 2) if encodes else (0, 1))
            yield from vae_resnet(f"{name}.{'down' if encodes else 'up'}.{level}.block.{index}", skip)
        if encodes and level < 3:
            yield from layer(f"{name}.down.{level}.downsample.conv", CONV)
        if not encodes and level > 0:
            yield from layer(f"{name}.up.{level}.upsample.conv", CONV)
    yield from vae_resnet(f"{name}.mid.block_1", skip=False)
    yield from layer(f"{name}.mid.attn_1.norm", VECTOR)
    for projection in ("q", "k", "v", "proj_out"):
        yield from layer(f"{name}.mid.attn_1.{projection}", CONV)
    yield from vae_resnet(f"{name}.mid.block_2", skip=False)
    yield from layer(f"{name}.norm_out", VECTOR)
    yield from layer(f"{name}.conv_out", CONV)


def vae() -> Iterator[Key]:
    yield from vae_half("encoder")
    yield from vae_half("decoder")
    yield from layer("quant_conv", CONV)
    yield from layer("post_quant_conv", CONV)


def text_encoder(layers: int) -> Iterator[Key]:
    yield "text_model.embeddings.token_embedding.weight", LINEAR
    yield "text_model.embeddings.position_embedding.weight", LINEAR
    for index in range(layers):
        name = f"text_model.encoder.layers.{index}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from layer(f"{name}.self_attn.{projection}", LINEAR)
        for part, dimensions in (
            ("layer_norm1", VECTOR),
            ("layer_norm2", VECTOR),
            ("mlp.fc1", LINEAR),
            ("mlp.fc2", LINEAR),
        ):
            yield from layer(f"{name}.{part}", dimensions)
    yield from layer("text_model.final_layer_norm", VECTOR)


def shapes(architecture: str) -> dict[str, list[int]]:
    """Shape of every key, confirmed by diffusers: its converters take all of them and give all that its models need."""
    config = CONFIGS / architecture
    layers = json.loads((config / "text_encoder" / "config.json").read_text())["num_hidden_layers"]
    found: dict[str, list[int]] = {}
    for part, keys in (("unet", unet()), ("vae", vae()), ("text_encoder", text_encoder(layers))):
        dimensions = {PREFIXES[part] + name: count for name, count in keys}
        expected = state_dict_shapes(part, config)
        origin = row_map(
            part, "single-file", {key: (1,) * count for key, count in dimensions.items()}, config
        ).renames()
        if set(origin) != set(expected) or set(origin.values()) != set(dimensions):
            raise SystemExit(f"{architecture} {part}: diffusers disagrees: {set(origin) ^ set(expected)}")
        for name, key in origin.items():
            shape = expected[name]
            found[key] = [*shape, *[1] * (dimensions[key] - len(shape))]  # the VAE's attention: 1 × 1 convolutions
    return found


def main() -> None:
    tables = {architecture: shapes(architecture) for architecture in ARCHITECTURES}
    lines = []
    for key in sorted(tables["sd1"]):
        row = {architecture: table[key] for architecture, table in tables.items() if key in table}
        lines.append(f"{json.dumps(key)}: {json.dumps(row)}")
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if "--check" in sys.argv and TARGET.read_text() != text:
        raise SystemExit(f"{TARGET} is not what the topology gives")
    if "--check" not in sys.argv:
        Path(TARGET).write_text(text)
    for part, prefix in PREFIXES.items():
        print(part, {name: sum(key.startswith(prefix) for key in table) for name, table in tables.items()})


if __name__ == "__main__":
    main()
