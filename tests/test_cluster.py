"""Cells on a Dask cluster: the same numbers as a serial run, also if a worker is killed in the middle."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sapcore import results, runner
from sapcore.errors import SapcoreError
from sapcore.experiments import cells, settings
from sapcore.results import Cell

pytest.importorskip("distributed", reason="Dask is an extra: pip install -e '.[cluster]'")

FIGURES = ("fig1b", "fig1c", "fig2a")
Cluster = tuple[str, list[subprocess.Popen[bytes]], subprocess.Popen[bytes]]
"""A scheduler's address, its workers, and itself."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def wanted(examples: int = 6) -> list[Cell]:
    s = settings("digits", [0, 3], examples=examples, passes=2)
    return list(dict.fromkeys(cell for figure in FIGURES for cell in cells(figure, s)))


def start(command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *command], stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | ONE_THREAD | environment, cwd=Path(__file__).parent.parent, start_new_session=True,
        )  # fmt: skip


def wait_for(pattern: str, log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 60
    while True:
        found = re.search(pattern, log.read_text())
        if found:
            return found.group(0)
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler and two workers as separate processes on loopback."""
    log = tmp_path / "scheduler.log"
    scheduler = start(["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"], log)
    processes = [scheduler]
    try:
        address = wait_for(r"tcp://127\.0\.0\.1:\d+", log, scheduler)
        for number in range(2):
            worker = ["distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
            processes.append(start([*worker, "--local-directory", str(tmp_path)], tmp_path / f"worker{number}.log"))
        for number in range(2):
            wait_for("Starting established connection", tmp_path / f"worker{number}.log", processes[1 + number])
        yield address, processes[1:], scheduler
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def in_a_process_of_one_thread(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`sapcore run` of what `wanted` lists."""
    command = ["sapcore.cli", "run", *FIGURES, "--dataset", "digits", "--eps", "0", "3"]
    command += ["--examples", "6", "--passes", "2", *arguments]
    folder.mkdir()
    return start(command, folder / "log", SAPCORE_RESULTS=str(folder / "results"))


def numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setenv("SAPCORE_RESULTS", str(folder / "results"))
    found = [results.read(cell) for cell in wanted()]
    assert None not in found
    return [content["result"] for content in found if content is not None]


def test_a_cluster_computes_what_a_serial_run_does_bit_for_bit_although_a_worker_is_killed(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL as soon as the first cells are on disk; each process has one thread."""
    address, workers, _ = cluster
    serial = in_a_process_of_one_thread(tmp_path / "serial")
    assert serial.wait(timeout=300) == 0, (tmp_path / "serial" / "log").read_text()

    shared = in_a_process_of_one_thread(tmp_path / "shared", "--scheduler", address)
    store = tmp_path / "shared" / "results"
    deadline = time.monotonic() + 120
    while not list(store.rglob("*.json")):
        assert shared.poll() is None, (tmp_path / "shared" / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers[0].send_signal(signal.SIGKILL)
    assert workers[0].wait() == -signal.SIGKILL
    on_disk = len(list(store.rglob("*.json")))
    assert on_disk < len(wanted()), "the kill came too late to show anything"
    assert shared.wait(timeout=300) == 0, (tmp_path / "shared" / "log").read_text()
    assert numbers(tmp_path / "shared", monkeypatch) == numbers(tmp_path / "serial", monkeypatch)
    names = {path.name for path in store.rglob("*") if path.is_file()}
    assert names == {cell.path.name for cell in wanted()}


@pytest.mark.filterwarnings("ignore")  # of the cluster's own processes and sockets
def test_local_workers_compute_every_cell(store: Path) -> None:
    few = cells("fig1b", settings("digits", 3, examples=3, passes=1))[:4]
    threads = {name: value for name, value in os.environ.items() if "THREADS" in name}
    assert runner.run(few, device="cpu", progress=False, workers=2) == []
    assert {name: value for name, value in os.environ.items() if "THREADS" in name} == threads
    assert {results.state(cell)[0] for cell in few} == {"present"}
    provenance = [results.read(cell)["provenance"] for cell in few]  # type: ignore[index]
    assert all(origin["device"] and origin["seconds"] >= 0 for origin in provenance)
    nobody = "tcp://127.0.0.1:1"  # is not asked: nothing is left to do
    assert runner.run(few, device="cpu", progress=False, scheduler=nobody) == []


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_dies_is_one_sentence_and_what_is_finished_is_kept(
    cluster: Cluster, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _, scheduler = cluster
    write = results.write

    def kill(*arguments: Any) -> None:
        write(*arguments)
        scheduler.kill()

    monkeypatch.setattr(results, "write", kill)
    with pytest.raises(SapcoreError, match=r"^the Dask scheduler was lost; start again: what is finished is stored$"):
        runner.run(wanted(), device="cpu", progress=False, scheduler=address)
    assert 1 <= len(list(store.rglob("*.json"))) < len(wanted())


def test_a_scheduler_that_does_not_answer_is_one_sentence(store: Path) -> None:
    for address in ("tcp://127.0.0.1:1", "nonsense://here", "tls://127.0.0.1:1"):
        with pytest.raises(SapcoreError, match=f"^no Dask scheduler answers at {address}"):
            runner.run(wanted(), device="cpu", progress=False, scheduler=address)
    assert not list(store.rglob("*.json"))


def test_without_dask_the_extra_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SapcoreError, match=r"need Dask: install it with `pip install -e '\.\[cluster\]'`"):
        runner.run(wanted(), device="cpu", progress=False, workers=2)
