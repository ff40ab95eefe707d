"""Everything that wants a GPU, in one command that can be cut off and started again.

    python benchmarks/accelerator.py --out FOLDER [--minutes 9]

In order: the tests of the Triton kernels on the hardware, the benchmarks, the trainings that have no checkpoint, and
the cells that are missing from the store. Each step that is done leaves a mark in FOLDER and is not repeated; its log
is there too. After each step what is new under data/ is packed into FOLDER/results.tar, to be unpacked in the
repository that the numbers are for. No step is begun after `--minutes`; training and cells stop there and go on later.
"""

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from sapcore.paths import ROOT, STATE
from sapcore.rl import double_dqn
from sapcore.training import RECIPES

BENCHMARKS = ("sampling", "network", "attacks", "eot", "training", "double_dqn", "scaling")
NEW = ("data/benchmarks", "data/results", "data/checkpoints")


def steps() -> dict[str, list[str]]:
    """The commands, each under the name of its mark."""
    python = [sys.executable]
    commands = {"tests": [*python, "-m", "pytest", "-q", "tests/sap/test_gpu.py"]}
    commands |= {name: [*python, f"benchmarks/{name}.py"] for name in BENCHMARKS}
    for name in (*RECIPES, *double_dqn.RECIPES):
        if not (ROOT / "data" / "checkpoints" / f"{name}.safetensors").exists():
            commands[f"train-{name}"] = [*python, "-m", "sapcore.cli", "train", name]
    return commands | {"cells": [*python, "-m", "sapcore.cli", "run"]}


def run(command: list[str], log: Path, seconds: float) -> int | None:
    """The command's exit status, or None if it was still at work after this time and was stopped."""
    print(" ".join(command[1:]), flush=True)
    with log.open("a") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=_environment())
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            return None


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def pack(out: Path) -> None:
    """What the repository gains, and the half-finished trainings without their replays, in one file."""
    temporary = out / ".results.tar"
    with tarfile.open(temporary, "w") as tar:
        for name in (*NEW, STATE.name):
            if (ROOT / name).exists():
                tar.add(
                    ROOT / name, arcname=name, filter=lambda member: None if member.name.endswith(".npy") else member
                )
    temporary.replace(out / "results.tar")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for marks, logs and results.tar")
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing, and end what runs, after this time")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    marks = options.out / "done.txt"
    done = set(marks.read_text().split()) if marks.exists() else set()
    failed = []
    for name, command in steps().items():
        if name in done:
            continue
        if time.monotonic() > deadline:
            print("out of time; start again to go on", flush=True)
            break
        status = run(command, options.out / "log.txt", deadline - time.monotonic())
        if status == 0:
            done.add(name)
            marks.write_text("\n".join(sorted(done)) + "\n")
        elif status is not None:
            failed.append(name)
        pack(options.out)
        print(f"{name}: {'not finished' if status is None else 'done' if status == 0 else 'FAILED'}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
