"""Everything that wants a GPU, in one command that can be cut off and started again.

    python benchmarks/accelerator.py --out FOLDER [--minutes 9] [--dataset cifar10]

In order: the tests of the Triton kernels on the hardware, the benchmarks, the cells that are missing of figures whose
networks are all there, the trainings that have no checkpoint, all of them side by side, and the other cells. Each step
that is done leaves a mark in FOLDER and is not repeated; what all of them print is in its log.txt. After each step what
is new or changed under data/ since the first start, and half-finished networks, are packed into FOLDER/results.tar, to
be unpacked in a checkout of the same commit: files there are replaced. No step is begun after `--minutes`; trainings
and cells stop there and go on later: cells and networks anywhere, agents where their `.state/` still is.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from sapcore import data, experiments
from sapcore.paths import ROOT, STATE, write_atomically
from sapcore.rl import double_dqn
from sapcore.training import RECIPES

BENCHMARKS = ("sampling", "network", "bfloat16", "attacks", "eot", "training", "double_dqn", "scaling")
NEW = ("data/benchmarks", "data/results", "data/checkpoints")


def steps(dataset: str = "cifar10") -> list[dict[str, list[str]]]:
    """The commands, each under the name of its mark; those of one group run side by side."""
    python, of = [sys.executable], ["--dataset", dataset]
    plain = ["-o", "addopts=", "-W", "default"]  # with whatever pytest, torch and Triton are there
    groups = [{"tests": [*python, "-m", "pytest", "-q", *plain, "tests/sap/test_gpu.py"]}]
    groups += [{name: [*python, f"benchmarks/{name}.py", *([] if name == "double_dqn" else of)]} for name in BENCHMARKS]
    s = experiments.settings(dataset)
    trained = [name for name in experiments.FIGURES if all(cell.computable for cell in experiments.cells(name, s))]
    cells = [*python, "-m", "sapcore.cli", "run", *of]
    if trained:
        groups.append({"cells-of-trained": [*cells, *trained]})
    untrained = [
        name for name in (*RECIPES, *double_dqn.RECIPES)
        if not (ROOT / "data" / "checkpoints" / f"{name}.safetensors").exists()
    ]  # fmt: skip
    groups.append({f"train-{name}": [*python, "-m", "sapcore.cli", "train", name] for name in untrained})
    return [*groups, {"cells": cells}]


def run(commands: dict[str, list[str]], out: Path, deadline: float) -> dict[str, int | None]:
    """Each command's exit status, or None if it was still at work at the deadline and was stopped."""
    processes = {}
    for name, command in commands.items():
        print(" ".join(command[1:]), flush=True)
        with (out / "log.txt").open("a") as file:
            file.write(f"\n{name}: {' '.join(command[1:])}\n")
            file.flush()
            processes[name] = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=_environment(len(commands))
            )
    found: dict[str, int | None] = {}
    for name, process in processes.items():
        try:
            found[name] = process.wait(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            found[name] = None
    return found


def _environment(processes: int) -> dict[str, str]:
    """Ours, with the CPU's cores shared out among the processes."""
    found = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if processes > 1:
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        found |= {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
    return found


def digests() -> dict[str, str]:
    """The sha256 of all files that `pack` may pack; an agent's replay would be too large."""
    found = {}
    for folder in (*NEW, STATE.name):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            whole = path.is_file() and path.suffix not in (".tmp", ".lock")
            if whole and not name.startswith(f"{STATE.name}/double-dqn-"):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def pack(out: Path) -> None:
    """What has changed since the first start, in one file."""
    before, temporary = json.loads((out / "before.json").read_text()), out / ".results.tar"
    with tarfile.open(temporary, "w") as tar:
        for name, digest in digests().items():
            if before.get(name) != digest:
                tar.add(ROOT / name, arcname=name)
    temporary.replace(out / "results.tar")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for marks, log.txt and results.tar")
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing, and end what runs, after this time")
    parser.add_argument("--dataset", default="cifar10", choices=data.DATASETS, help="of the benchmarks and cells")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    if not (options.out / "before.json").exists():
        write_atomically(options.out / "before.json", json.dumps(digests()).encode())
    marks = options.out / "done.txt"
    done = set(marks.read_text().split()) if marks.exists() else set()
    failed = []
    for group in steps(options.dataset):
        todo = {name: command for name, command in group.items() if f"{options.dataset}/{name}" not in done}
        if not todo:
            continue
        if time.monotonic() > deadline:
            print("out of time; start again to go on", flush=True)
            break
        for name, status in run(todo, options.out, deadline).items():
            if status == 0:
                done.add(f"{options.dataset}/{name}")
                marks.write_text("\n".join(sorted(done)) + "\n")
            elif status is not None:
                failed.append(name)
            print(f"{name}: {'not finished' if status is None else 'done' if status == 0 else 'FAILED'}", flush=True)
        pack(options.out)
        if "tests" in failed:
            print("nothing is measured by kernels that fail their tests; see log.txt", flush=True)
            break
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
