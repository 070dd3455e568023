"""Jobs and search trials that several processes share, get killed at, and take over from each other."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any, ClassVar

import psutil
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from imma_cli.attacks import Attack, AttackSettings, Choice, Preset
from imma_cli.attacks.attack import Range
from imma_cli.errors import ImmaError
from imma_cli.verification.outcomes import Result
from imma_cli.verification.search import STEPS, propose, setting, space, typed
from imma_cli.verification.storage import Claim, Storage
from imma_cli.verification.workers import DEAD_AFTER

STUDY = "5eed"
SPEC = "plain:rank=2"
JOBS = [f"job {i}" for i in range(6)]
COUNT = 9
SPACE = {
    "rate": FloatDistribution(1e-5, 1e-1, log=True),
    "rank": IntDistribution(1, 16),
    "warmup": CategoricalDistribution((None, "cosine", 0.1, True)),
}
FIRST = {"rate": 1e-3, "rank": 4, "warmup": None}


def value(settings: Any) -> float:
    return -abs(settings["rate"] - 3e-3) - 0.01 * abs(settings["rank"] - 9) + (settings["warmup"] == "cosine")


def work(url: str, pause: float) -> None:
    """What a worker process does: everything, until nothing is left. It writes what it has begun."""
    storage, until = Storage.open(url, STUDY), time.monotonic() + 120
    while sum(map(storage.is_done, JOBS)) < len(JOBS) or storage.searched(SPEC) < COUNT:
        claims = (storage.claim(job) for job in JOBS)
        claim = next((c for c in claims if c), None) or storage.claim_search(SPEC, COUNT, SPACE, FIRST)
        if claim is None:
            assert time.monotonic() < until, "waits for somebody who does not come back"
            time.sleep(0.05)
            continue
        with claim:
            os.write(1, f"{claim.job}\n".encode())
            time.sleep(pause)
            if claim.index == 3:
                claim.fail([{"job": claim.job, "status": "failed"}])
            else:
                claim.finish([{"job": claim.job}], value(claim.settings) if claim.settings else None)


def start(url: str, pause: float, count: int = 1) -> list[subprocess.Popen[str]]:
    """Worker processes that begin together: on a busy machine one may need seconds longer for its imports than another."""
    command = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", __file__, url, str(pause)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(count)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


def output(process: subprocess.Popen[str]) -> list[str]:
    printed, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    return printed.splitlines()


EVERYTHING = sorted(JOBS + [f"{SPEC} #{i}" for i in range(COUNT)])


@pytest.fixture(params=["sqlite", "journal"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/study.db" if request.param == "sqlite" else f"journal:{tmp_path}/study.log"


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL server of its own on a free port: its address, with a user and without a database."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not places:
        pytest.skip("PostgreSQL is not installed")
    user: dict[str, Any] = {}
    # not below pytest's folder, which another user may not enter
    folder = Path(tempfile.mkdtemp(prefix="imma-postgres-"))
    if os.geteuid() == 0:  # postgres refuses to run as root
        try:
            shutil.chown(folder, "postgres", "postgres")
        except LookupError:
            shutil.rmtree(folder)
            pytest.skip("there is no user postgres")
        user = {"user": "postgres", "group": "postgres", "extra_groups": [], "cwd": folder}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
    control = [places[-1] / "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log"]
    try:
        quiet = {"check": True, "stdout": subprocess.DEVNULL, **user}
        subprocess.run([places[-1] / "initdb", "-D", folder / "data", "-U", "imma", "-A", "trust", "-N"], **quiet)
        subprocess.run([*control, "-o", options, "start"], **quiet)
        yield f"postgresql://imma:se%40cret@127.0.0.1:{port}"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, stdout=subprocess.DEVNULL, **user)
        shutil.rmtree(folder)


def check_two_processes(url: str) -> None:
    begun = [output(process) for process in start(url, 0.1, count=2)]
    assert sorted(begun[0] + begun[1]) == EVERYTHING
    assert all(begun)  # both took part
    results = Storage.open(url, STUDY).finished()
    assert [r.job for r in results] == JOBS + [f"{SPEC} #{i}" for i in range(COUNT)]
    assert [r.job for r in results if r.status == "failed"] == [f"{SPEC} #3"]
    assert all(r.lines[0]["job"] == r.job for r in results)


def test_two_processes_do_everything_exactly_once(url: str) -> None:
    check_two_processes(url)


def test_two_processes_do_everything_exactly_once_on_postgresql(postgres: str) -> None:
    check_two_processes(f"{postgres}/postgres")


def test_of_two_that_claim_at_the_same_moment_one_gets_the_job(url: str) -> None:
    storages = [Storage.open(url, STUDY) for _ in range(3)]
    together = Barrier(len(storages))

    def claims(storage: Storage) -> list[Claim | None]:
        found = []
        for job in range(12):
            together.wait(timeout=120)
            found.append(storage.claim(str(job)))
            together.wait(timeout=120)
            found.append(storage.claim_search(SPEC, job + 1, SPACE, FIRST))
        return found

    with ThreadPoolExecutor(len(storages)) as threads:
        for same in zip(*threads.map(claims, storages), strict=True):
            assert sum(claim is not None for claim in same) == 1


@pytest.mark.parametrize("victim", ["job 2", f"{SPEC} #2", f"{SPEC} #7"])
def test_a_killed_run_goes_on_at_once_and_ends_like_an_uninterrupted_one(victim: str, url: str, tmp_path: Path) -> None:
    whole = url.replace("study", "whole")
    work(whole, 0)
    (killed,) = start(url, 0.3 if victim == "job 2" else 0.1)
    assert killed.stdout is not None
    assert any(line.strip() == victim for line in killed.stdout)
    killed.kill()
    while psutil.Process(killed.pid).status() != psutil.STATUS_ZOMBIE:  # as long as nobody asks for its exit code
        time.sleep(0.01)
    if url.startswith("journal"):
        killed.wait()
    before = Storage.open(url, STUDY).finished()
    assert 0 < len(before) < len(EVERYTHING)
    started = time.monotonic()
    work(url, 0)
    assert time.monotonic() - started < DEAD_AFTER / 2
    results = Storage.open(url, STUDY).finished()
    assert results == Storage.open(whole, STUDY).finished()
    assert [r for r in results if r in before] == before
    assert {r.attempt for r in results} == {1}
    killed.communicate()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_gives_the_job_back(url: str, error: type[BaseException]) -> None:
    storage, other = Storage.open(url, STUDY), Storage.open(url, STUDY)
    for claim_of in (
        lambda s: s.claim("a"),
        lambda s: s.claim_search(SPEC, 1, SPACE, FIRST),
    ):
        claim = claim_of(storage)
        assert claim
        with suppress(error), claim:
            assert claim_of(other) is None
            assert claim_of(storage) is None
            assert other.busy()
            assert not storage.busy()
            raise error
        assert not other.busy()
        again = claim_of(other)
        assert again
        assert again.attempt == 1
        with again:
            again.finish([], 1.0)
        assert claim_of(storage) is None
    assert storage.is_done("a")
    assert [r.value for r in storage.finished()] == [1.0, 1.0]


def test_a_result_counts_from_the_moment_its_trial_ended(url: str) -> None:
    storage = Storage.open(url, STUDY)
    for job in ("b", "a"):
        claim, done = storage.claim(job), storage.claim(f"{job}, done")
        assert claim
        assert done
        with claim:  # as if killed in the middle of finish()
            storage._backend.set_trial_user_attr(claim._trial_id, "result", '{"lines": [], "value": null}')
        with done:
            done.finish([])
        assert not storage.is_done(job)
    assert [r.job for r in storage.finished()] == ["a, done", "b, done"]
    again = Storage.open(url, STUDY, retry_failed=True).claim("a")
    assert again
    assert again.attempt == 1


def test_what_failed_counts_and_is_tried_again_only_when_asked(url: str) -> None:
    storage = Storage.open(url, STUDY)

    def attempts(storage: Storage) -> list[tuple[str, int]]:
        done = []
        for claim in (storage.claim("a"), storage.claim_search(SPEC, 1, SPACE, None)):
            if claim:
                with claim:
                    claim.fail([{"attempt": claim.attempt}])
                done.append((claim.job, claim.attempt))
        return done

    assert attempts(storage) == [("a", 1), (f"{SPEC} #0", 1)]
    assert storage.is_done("a")
    assert storage.searched(SPEC) == 1
    assert attempts(storage) == attempts(Storage.open(url, STUDY)) == []
    again, beside = (Storage.open(url, STUDY, retry_failed=True) for _ in range(2))
    assert not again.is_done("a")
    assert again.searched(SPEC) == 0
    assert attempts(again) == [("a", 2), (f"{SPEC} #0", 2)]
    assert attempts(again) == attempts(beside) == []  # once for all runs that began before
    assert [(r.job, r.lines) for r in storage.finished()] == [
        ("a", ({"attempt": 1},)),
        ("a", ({"attempt": 2},)),
        (f"{SPEC} #0", ({"attempt": 1},)),
        (f"{SPEC} #0", ({"attempt": 2},)),
    ]
    assert storage.search_results(SPEC) == storage.finished()[2:]
    assert storage.search_results("another") == []


def test_a_worker_of_another_machine_is_waited_for_and_then_taken_over(url: str) -> None:
    away = Storage.open(url, STUDY, heartbeat=0.05)
    away._worker = {**away._worker, "host": "elsewhere", "started": 0.0}
    here = Storage.open(url, STUDY, dead_after=2.0)
    lost = away.claim("a")
    assert lost
    with lost:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert here.claim("a") is None
            assert here.busy()
            time.sleep(0.1)
        lost._stop.set()  # its machine went away
        stopped = time.monotonic()
        while (claim := here.claim("a")) is None:
            assert time.monotonic() < stopped + 60
            time.sleep(0.05)
        assert time.monotonic() - stopped > 1
        assert not here.busy()
        with claim:
            assert lost.finish([{"by": "away"}]) is False  # it comes back too late
            assert claim.finish([{"by": "here"}]) is True
    assert [r.lines for r in here.finished()] == [({"by": "here"},)]


def test_what_is_kept_comes_back_as_it_was(url: str) -> None:
    lines = [{"webp": ["x" * 500_000], "none": None, "text": "ä\ud800\0\n", "number": 0.1, "deep": [[1], {}]}] * 2
    claim = Storage.open(url, STUDY).claim("a")
    assert claim
    with claim:
        claim.finish(lines, 0.25)
    assert Storage.open(url, STUDY).finished() == [Result("a", "ok", tuple(lines), 0.25)]
    assert Storage.open(url, "other study").finished() == []


def test_a_search_trial_needs_a_value_and_a_job_one_result() -> None:
    storage = Storage.open(None, STUDY)
    claim = storage.claim_search(SPEC, 1, SPACE, FIRST)
    assert claim
    with claim:
        for bad in (None, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="finite"):
                claim.finish([], bad)
        claim.finish([], 1.0)
        with pytest.raises(RuntimeError, match="has its result"):
            claim.fail([])


def test_names_of_files_are_taken_as_they_are(tmp_path: Path) -> None:
    for form in ("sqlite:///{}", "journal:{}"):
        path = tmp_path / f"{form[:6]} {{a}} 100%d ü.db"
        Storage.open(form.format(path), STUDY)
        assert path.stat().st_size > 0


def searched(storage: Storage, count: int, spec: str = SPEC, sign: int = 1) -> list[dict[str, Any]]:
    while claim := storage.claim_search(spec, count, SPACE, FIRST):
        with claim:
            claim.finish([], sign * value(claim.settings))
    return [r.settings for r in storage.search_results(spec)]


def test_proposals_follow_from_study_attack_and_results() -> None:
    ten = searched(Storage.open(None, STUDY), 10)
    assert ten[0] == FIRST
    assert searched(Storage.open(None, STUDY), 10) == ten
    longer = Storage.open(None, STUDY)
    assert searched(longer, 4) + searched(longer, 20)[4:10] == ten  # asking for more later changes nothing
    assert searched(Storage.open(None, "other"), 10) != ten
    assert searched(Storage.open(None, STUDY), 10, "other") != ten
    opposite = searched(Storage.open(None, STUDY), 10, sign=-1)
    assert opposite[:5] == ten[:5]  # random
    assert opposite[6:] != ten[6:]  # learned
    assert propose(SPACE, [], 1) != propose(SPACE, [], 2)


def test_what_was_once_proposed_is_done_whatever_became_known_since(url: str) -> None:
    storage = Storage.open(url, STUDY)
    searched(storage, 7)
    earlier, later = (storage.claim_search(SPEC, 9, SPACE, FIRST) for _ in range(2))
    assert earlier
    assert later
    assert (earlier.index, later.index) == (7, 8)
    with later:
        pass
    with earlier:
        earlier.finish([], 100.0)
    again = storage.claim_search(SPEC, 9, SPACE, FIRST)
    assert again
    with again:
        assert again.settings == later.settings
        again.fail([])
    once_more = Storage.open(url, STUDY, retry_failed=True).claim_search(SPEC, 9, SPACE, FIRST)
    assert once_more
    assert (once_more.attempt, once_more.settings) == (2, later.settings)
    proposed = [(r.settings, r.value) for r in storage.search_results(SPEC) if r.value is not None]
    assert propose(SPACE, proposed, 1) != propose(SPACE, proposed[:-1], 1)


def test_a_search_learns() -> None:
    best = []
    for study in "abcdefgh":
        values = [value(settings) for settings in searched(Storage.open(None, study), 30)]
        best.append(sum(values[20:]) / 10 - sum(values[1:5]) / 4)
    assert sum(best) / len(best) > 0.3


@pytest.mark.parametrize("form", ["sqlite:///{}/nowhere/study.db", "journal:{}/nowhere/study.log"])
def test_a_missing_folder_is_named(form: str, tmp_path: Path) -> None:
    with pytest.raises(ImmaError, match=r"no folder .*nowhere"):
        Storage.open(form.format(tmp_path), STUDY)


@pytest.mark.parametrize(
    "content",
    [
        b"no journal",
        b"no journal\n",
        b"[]\n",
        b"{}\n",
        b'"op_code"\n',
        b"\xff\0\n" * 99,
        b'{"op_code": 99, "worker_id": ""}\n',
    ],
)
@pytest.mark.parametrize("form", ["sqlite:///{}", "journal:{}"])
def test_a_file_of_something_else_is_refused_and_stays(form: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ImmaError, match="cannot be opened"):
        Storage.open(form.format(path), STUDY)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_database_of_something_else_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "file.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE customers (name TEXT)")
    content = path.read_bytes()
    with pytest.raises(ImmaError, match="customers"):
        Storage.open(f"sqlite:///{path}", STUDY)
    assert path.read_bytes() == content


def test_a_database_of_another_optuna_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    Storage.open(url, STUDY)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99'")
    with pytest.raises(ImmaError, match="optuna"):
        Storage.open(url, STUDY)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("study.db", "sqlite:///FILE"),
        ("", "sqlite:///FILE"),
        ("redis://localhost", "redis is unknown"),
        ("journal:", "no file is named"),
        ("journal:/", "is no file"),
        ("journal:" + "x" * 300, "File name too long"),
        ("sqlite:///" + "x" * 300, "File name too long"),
        ("journal:a\0b", "cannot be opened"),
        ("sqlite:///a\0b", "cannot be opened"),
        ("sqlite:////", "is no file"),
        ("mysql://u:hunter2@localhost/x", "driver is missing"),
        ("postgresql://u:hunter2@127.0.0.1:1/x", "refused"),
        ("postgres://u:hunter2@127.0.0.1:1/x", "refused"),
        ("postgresql+psycopg://u:hunt{er}2@127.0.0.1:1/x", "refused"),
        ("postgresql://u:hunter2@127.0.0.1:1/x?password=hunter2", "refused"),
        ("postgresql://u:hunter2@host:port/x", "sqlite:///FILE"),
        ("postgresql://u:p%40hunter2@127.0.0.1:1/x?nonsense=1", "nonsense"),
        ("postgresql+nonsense://u:hunter2@127.0.0.1:1/x", "nonsense is unknown"),
    ],
)
def test_what_cannot_be_opened_is_told_without_a_password(
    url: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImmaError, match=reason) as caught:
        Storage.open(url, STUDY)
    assert "hunt" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert list(tmp_path.iterdir()) == []


def test_a_missing_driver_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ImmaError, match=r'pip install "imma-cli\[postgres\]"'):
        Storage.open("postgresql://u@localhost/x", STUDY)


def test_a_missing_database_is_told(postgres: str) -> None:
    with pytest.raises(ImmaError, match='database "nowhere" does not exist') as caught:
        Storage.open(f"{postgres}/nowhere", STUDY)
    assert "cret" not in str(caught.value)


def test_a_storage_that_goes_away_is_an_error_of_the_user(tmp_path: Path) -> None:
    storage = Storage.open(f"sqlite:///{tmp_path}/study.db", STUDY)
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("DROP TABLE trials")
    with pytest.raises(ImmaError, match=r"does not answer[\s\S]*no such table: trials"):
        storage.finished()


def test_a_line_that_was_cut_off_does_not_break_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    for job in "abc":
        claim = Storage.open(f"journal:{path}", STUDY).claim(job)
        assert claim
        with claim:
            claim.finish([])
        with path.open("ab") as file:
            file.write(b'{"op_code": 8, "user_attr": {"res')
    assert [r.job for r in Storage.open(f"journal:{path}", STUDY).finished()] == ["a", "b", "c"]


@dataclass(frozen=True)
class PlainSettings(AttackSettings):
    rank: int = 4
    size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank > self.size:
            raise ValueError("rank must not exceed size")


class Plain(Attack):
    name = "plain"
    summary = paper = "a test's"
    Settings = PlainSettings
    presets: ClassVar = {}
    search: ClassVar = {
        **Attack.search,
        "rank": Range(1, 16, log=True),
        "size": Choice((4, 8)),
    }

    def attach(self, model: Any, concept: Any, seed: int) -> Any:
        raise NotImplementedError


RATES = Preset(learning_rate=1e-3, outer_learning_rate=1e-4, steps=600)


def test_the_space_is_what_the_attack_declares_without_what_was_typed() -> None:
    attack = Plain(PlainSettings())
    found = space(attack, RATES)
    assert list(found) == [*Plain.search, STEPS]
    assert found["learning_rate"] == FloatDistribution(0.1 * 1e-3, 10 * 1e-3, log=True)
    assert found["rank"] == IntDistribution(1, 16, log=True)
    assert found["size"] == CategoricalDistribution((4, 8))
    assert found[STEPS] == CategoricalDistribution((0.5, 1.0))
    first = typed(attack, RATES)
    assert first == {
        "learning_rate": 1e-3,
        "optimizer": "adamw",
        "schedule": "constant",
        "warmup": 0.0,
        "pictures": 0,
        "rank": 4,
        "size": 8,
        STEPS: 1.0,
    }
    assert setting(attack, {**first, "rank": 2}).settings == PlainSettings(learning_rate=1e-3, rank=2)
    fixed = Plain(PlainSettings(learning_rate=5.0, optimizer="radam", rank=3))
    assert list(space(fixed, RATES)) == ["schedule", "warmup", "pictures", "size", STEPS]
    assert setting(fixed, {"size": 4, STEPS: 0.5}).settings == PlainSettings(
        learning_rate=5.0, optimizer="radam", rank=3, size=4
    )


def test_what_was_typed_may_lie_outside_and_combinations_may_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = Plain(PlainSettings())
    monkeypatch.setattr(Plain, "search", {"size": Choice((16, 32))})
    assert typed(attack, RATES) is None
    with pytest.raises(ImmaError, match=r"refuses rank=9[\s\S]*rank must not exceed size"):
        setting(attack, {"rank": 9, STEPS: 1.0})
    with pytest.raises(ImmaError, match="refuses nonsense=9"):
        setting(attack, {"nonsense": 9})
    bad = {"nonsense": Choice((1,)), "rank": Range(4, 2), "size": Range(1, 2, of_preset=True), STEPS: Choice((1,))}
    monkeypatch.setattr(Plain, "search", bad)
    with pytest.raises(ImmaError) as caught:
        space(attack, RATES)
    assert len(caught.value.reasons) == 5


if __name__ == "__main__":
    os.write(1, b"ready\n")
    sys.stdin.readline()
    work(sys.argv[1], float(sys.argv[2]))
