"""The safetensors format: headers that cannot be trusted are refused with every reason; what is written keeps its layout."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from imma_cli.checkpoints.safetensors_file import BITS, read_header, rewrite
from imma_cli.errors import ImmaError


def entry(start: int, end: int, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def make(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ImmaError) as caught:
        read_header(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("header", "size", "said"),
    [
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "4 unused bytes between 'a' and 'b'"),
        ({"a": entry(4, 8)}, 8, "4 unused bytes before 'a'"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'a' and 'b' overlap"),
        ({"a": entry(0, 8)}, 4, "4 bytes of its tensors are missing"),
        ({"a": entry(0, 4)}, 8, "4 bytes follow after the last tensor"),
        ({"a": entry(0, 4, shape=[2])}, 4, "does not fit F32 of shape [2]"),
        ({"a": entry(0, 4, shape=[-1])}, 4, "impossible shape"),
        ({"a": entry(0, 4, shape=[True])}, 4, "impossible shape"),
        ({"a": entry(4, 0, shape=[1])}, 4, "does not fit"),
        ({"a\x00b": entry(0, 4)}, 4, "control characters"),
        ({"a\u202eb": entry(0, 4)}, 4, "control characters"),
        ({"/etc/passwd": entry(0, 4)}, 4, "looks like a path"),
        ({"C:\\x": entry(0, 4)}, 4, "looks like a path"),
        ({"": entry(0, 4)}, 4, "no name"),
        ({"a": {**entry(0, 4), "more": 1}}, 4, "not described by"),
        ({"a": 3}, 0, "not described by"),
        ({"a": entry(0, 4), "__metadata__": {"n": 1}}, 4, "not an object of texts"),
        (b'{"__metadata__":{"k":"1","k":"2"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "metadata key 'k'"),
        (b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', 4, "not described by"),
        ({}, 0, "holds no tensors"),
        (b"[1]", 0, "does not start with '{'"),
        (b"{not json}", 0, "not JSON"),
        (b'{"\xff": 1}', 0, "not JSON"),
        (b'{"a":' + b"[" * 100_000, 0, "not JSON"),
    ],
)  # fmt: skip
def test_headers_that_cannot_be_trusted_are_refused(header: Any, size: int, said: str, tmp_path: Path) -> None:
    assert said in refusal(make(tmp_path / "x.safetensors", header, bytes(size)))


def test_every_reason_is_named_at_once_and_many_are_counted(tmp_path: Path) -> None:
    header = {"../a": entry(0, 4), "b": entry(4, 8, dtype="F99"), "c": entry(8, 8, shape=[0, 2])}
    said = refusal(make(tmp_path / "x.safetensors", header, bytes(16)))
    for reason in ("'../a' looks like a path", "unknown dtype 'F99'", "'c' has size zero", "8 bytes follow"):
        assert reason in said
    many = {f"../{index}": entry(4 * index, 4 * index + 4) for index in range(50)}
    assert "and 30 more" in refusal(make(tmp_path / "y.safetensors", many, bytes(200)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GGUF" + bytes(40), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"abc", "too short"),
        ((10**6).to_bytes(8, "little") + b'{"a":', "truncated"),
    ],
)
def test_other_files_are_named(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    assert said in refusal(tmp_path / "x.safetensors")


def test_a_header_whose_length_begins_like_a_pickle_is_still_read(tmp_path: Path) -> None:
    """0x0280 is the length of a real header, and the first two bytes of a pickle."""
    text = json.dumps({"a": entry(0, 4)}).encode()
    text += b" " * (0x0280 - len(text))
    assert list(read_header(make(tmp_path / "x.safetensors", text, bytes(4))).entries) == ["a"]


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.safetensors")
    assert "directory" in refusal(tmp_path)


def test_every_dtype_that_torch_saves_is_known(tmp_path: Path) -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.uint16, torch.complex64]
    save_file({str(dtype): torch.zeros(3, dtype=dtype) for dtype in dtypes}, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert len(header.entries) == len(dtypes)
    assert {found.dtype for found in header.entries.values()} <= BITS.keys()


def test_rewriting_keeps_the_headers_order_and_the_datas_order(tmp_path: Path) -> None:
    """A header may name its tensors in another order than that of their bytes."""
    header = {"z": entry(8, 12), "m": entry(12, 16), "a": entry(4, 8), "x": entry(0, 4)}
    source = make(tmp_path / "in.safetensors", header, bytes(range(16)))
    target = tmp_path / "out.safetensors"
    rewrite(source, read_header(source), target, {"m": torch.tensor([1.5])}.get, {"x"}, {"é": "ü"})
    again = read_header(target)
    assert list(again.entries) == ["z", "m", "a"]
    assert again.metadata == {"é": "ü"}
    assert again.data_start % 8 == 0
    assert target.read_bytes()[again.data_start :][:8] == bytes(range(4, 12))  # a, then z
    assert load_file(target)["m"].item() == 1.5


def few_bytes(source: int, target: int, count: int, offset: int) -> int:
    return os.pwrite(target, os.pread(source, min(count, 5), offset), os.lseek(target, 0, os.SEEK_END))


def another_file_system(*_: object) -> int:
    raise OSError(errno.EXDEV, "another file system")


def half_way(source: int, target: int, count: int, offset: int) -> int:
    """As on file systems that refuse after some calls."""
    return few_bytes(source, target, count, offset) if offset % 2 else another_file_system()


@pytest.mark.parametrize("copies", [None, few_bytes, another_file_system, half_way])
def test_a_file_rewritten_without_changes_is_what_the_library_wrote(
    copies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if copies and not hasattr(os, "copy_file_range"):
        pytest.skip("only Linux copies files inside the kernel")
    if copies:
        monkeypatch.setattr(os, "copy_file_range", copies)
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"b": torch.randn(3, 5), "a": torch.arange(7), "s": torch.tensor(2.0)}, source, {"format": "pt"})
    header = read_header(source)
    rewrite(source, header, target, {}.get, set(), header.metadata)
    assert target.read_bytes() == source.read_bytes()
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_error_while_a_replacement_is_made_arrives_after_those_before_it_are_written(tmp_path: Path) -> None:
    source = make(
        tmp_path / "in.safetensors", {name: entry(4 * i, 4 * i + 4) for i, name in enumerate("abcd")}, bytes(16)
    )
    asked: list[str] = []

    def fails_at_c(name: str) -> bytes:
        asked.append(name)
        if name == "c":
            raise ValueError("c cannot be made")
        return name.encode() * 4

    with pytest.raises(ValueError, match="c cannot be made"):
        rewrite(source, read_header(source), tmp_path / "out", fails_at_c, set(), {})
    assert asked[:3] == ["a", "b", "c"]
    assert (tmp_path / "out").read_bytes().endswith(b"aaaabbbb")


def test_a_replacement_of_another_size_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    source = make(tmp_path / "in.safetensors", {"a": entry(0, 8)}, bytes(8))
    with pytest.raises(ValueError, match="a: 4 bytes given for 8"):
        rewrite(source, read_header(source), tmp_path / "out", {"a": bytes(4)}.get, set(), {})
