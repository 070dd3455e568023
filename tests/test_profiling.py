"""What `imma harden --profile` writes, and when it does not."""

from __future__ import annotations

import json


def harden(imma, tiny_checkpoint, tiny_config, pictures, tmp_path, steps: int, trace) -> tuple[int, str]:
    code, _, err = imma(
        "harden", tiny_checkpoint, "--config", tiny_config, "--concept", "blue", "--images", pictures, "--steps", steps,
        "--method", "imma", "--attack", "lora", "--output", tmp_path / "hard.safetensors", "--profile", trace,
    )  # fmt: skip
    return code, " ".join(err.split())


def test_a_trace_shows_the_operations_of_some_cycles(imma, tiny_checkpoint, tiny_config, pictures, tmp_path) -> None:
    trace = tmp_path / "trace.json"
    code, said = harden(imma, tiny_checkpoint, tiny_config, pictures, tmp_path, 12, trace)
    assert code == 0
    assert "Trace of up to 3 cycles" in said
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::convolution", "ProfilerStep#2", "ProfilerStep#4"} <= names
    assert "ProfilerStep#5" not in names


def test_too_few_cycles_give_no_trace_and_say_so(imma, tiny_checkpoint, tiny_config, pictures, tmp_path) -> None:
    trace = tmp_path / "trace.json"
    code, said = harden(imma, tiny_checkpoint, tiny_config, pictures, tmp_path, 2, trace)
    assert code == 0
    assert "No trace" in said
    assert not trace.exists()


def test_a_trace_that_cannot_be_written_is_refused_at_once(
    imma, tiny_checkpoint, tiny_config, pictures, tmp_path
) -> None:
    code, said = harden(imma, tiny_checkpoint, tiny_config, pictures, tmp_path, 2, tmp_path / "gone" / "trace.json")
    assert code == 2
    assert "not a file in a folder that exists" in said
    assert not (tmp_path / "hard.safetensors").exists()
