"""Which code, on which machine: the lines stored beside every number."""

import datetime
import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sapcore.errors import SapcoreError
from sapcore.paths import ROOT


def device(name: str | None = None) -> torch.device:
    """The device to compute on: `name`, else $SAPCORE_DEVICE, else CUDA where there is one, else the CPU."""
    chosen = name or os.environ.get("SAPCORE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found: torch.device | None = torch.device(chosen)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda") or (found.type == "cpu" and found.index):
        raise SapcoreError(f"device is {chosen!r}, but must be cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and not count:
        raise SapcoreError(f"device is {chosen!r}, but torch finds no CUDA device here; use cpu")
    if found.type == "cuda" and (found.index or 0) >= count:
        raise SapcoreError(f"device is {chosen!r}, but the last CUDA device here is cuda:{count - 1}")
    return found


def collect(on: torch.device, packages: tuple[str, ...] = ()) -> dict[str, object]:
    """Device, versions, commit and date of a computation that runs now; packages: more whose versions count.

    A CPU's `instructions` are those that torch chose, such as AVX512 or AVX2: processors of one name may differ in
    them, and they decide the order of sums.
    """
    return {
        "device": device_name(on),
        "threads": torch.get_num_threads(),
        **({"instructions": torch.backends.cpu.get_cpu_capability()} if on.type == "cpu" else {}),
        "versions": {
            "python": platform.python_version(),
            **{p: _version(p) for p in ("sapcore", "torch", "numba", *packages)},
        },
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def machine(origin: dict[str, Any]) -> str:
    """The device that `collect` found and, where it says so, its instructions."""
    return ", ".join(str(origin[name]) for name in ("device", "instructions") if name in origin)


def device_name(on: torch.device) -> str:
    """The GPU's marketing name, or the CPU's model and its number of cores."""
    if on.type == "cuda":
        return torch.cuda.get_device_name(on)
    return f"{_cpu_model()}, {os.cpu_count()} cores"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@functools.cache
def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """The short hash of the checked-out commit, with `-dirty` if `sapcore/` differs from it.

    Asked once per process: what runs is what was imported, whatever is checked out later.
    """
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        diff = subprocess.run([*git, "status", "--porcelain", "sapcore"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if diff.stdout.strip() else "")
