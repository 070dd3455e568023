"""Output that appears whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from imma_cli.checkpoints.atomic import atomic_file, atomic_folder, refuse_output
from imma_cli.errors import ImmaError


def test_nothing_is_seen_until_the_block_ends(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with atomic_file(output) as temporary:
        temporary.write_text("new")
        assert not output.exists()
        assert temporary.parent == output.parent
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert output.read_text() == "new"


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_file(tmp_path / "out") as temporary:
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o644


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ImmaError, match="exists already"), atomic_file(tmp_path / "out") as temporary:
        temporary.write_text("new")
        (tmp_path / "out").write_text("somebody else's")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out", "somebody else's")]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(KeyboardInterrupt), atomic_folder(output, force=True) as temporary:
        (temporary / "new").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/old"]


def test_links_to_the_input_and_links_to_nowhere_are_not_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    source.write_text("weights")
    for name, make in (("soft", Path.symlink_to), ("hard", Path.hardlink_to)):
        make(tmp_path / name, source)
        with pytest.raises(ImmaError, match="it is the input"):
            refuse_output(tmp_path / name, source, force=True, folder=False)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ImmaError, match="exists already"):
        refuse_output(tmp_path / "dangling", source, force=False, folder=False)


def test_a_full_disk_and_a_protected_folder_are_seen_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ImmaError, match="20 MB are needed, 1 MB are free"):
        refuse_output(tmp_path / "out", tmp_path / "in", force=False, folder=False, needed=20_000_000)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ImmaError, match="no permission"):
        refuse_output(tmp_path / "out", tmp_path / "in", force=False, folder=False)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and locks")
@pytest.mark.parametrize("writer", ["atomic_file", "atomic_folder"])
def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path: Path, writer: str) -> None:
    half_written = f"""
import sys, time
from pathlib import Path
from imma_cli.checkpoints.atomic import {writer}
with {writer}(Path(sys.argv[1])) as temporary:
    (temporary / "a" if temporary.is_dir() else temporary).write_text("half")
    print(temporary.name, flush=True)
    time.sleep(60)
"""
    others = [
        subprocess.Popen([sys.executable, "-c", half_written, str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
        for name in ("killed", "alive")
    ]
    left = [process.stdout.readline().strip() for process in others if process.stdout]
    others[0].kill()
    others[0].wait()
    with atomic_file(tmp_path / "out") as temporary:
        temporary.write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"out", left[1]}
    others[1].kill()
    others[1].wait()
