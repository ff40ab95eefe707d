"""What the benchmarks share: candidates timed in turn, one printed table, one appended row.

Candidates are run one after the other in each round, so that whatever else the machine does slows them all. A
benchmark's claim is a ratio within one run, given with the rounds' 20th, 50th and 80th percentile.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from sapcore import checkpoints, data, provenance
from sapcore.errors import SapcoreError
from sapcore.paths import ROOT

PERCENTILES = (20, 50, 80)


def arguments(description: str | None, game: str = "", **defaults: int) -> argparse.Namespace:
    """The options of a benchmark: --device, --dataset if it plays no game, and whole numbers named by `defaults`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default=None, help="cpu or cuda; CUDA where there is one")
    if not game:
        parser.add_argument("--dataset", default="cifar10", choices=data.DATASETS)
    parser.add_argument("--rows", type=Path, default=ROOT / "data" / "benchmarks", help="where the row is appended")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    found = parser.parse_args()
    try:
        found.device = provenance.device(found.device)
        if game:
            found.dataset = game
            return found
        data.load(found.dataset, "test")
        checkpoints.load(f"resnet20-{found.dataset}")
    except SapcoreError as error:
        parser.exit(1, f"{error}\n")
    return found


def network(dataset: str, device: torch.device) -> nn.Module:
    """The dense network of this data set."""
    return checkpoints.load(f"resnet20-{dataset}").to(device)


def test_images(dataset: str, count: int) -> tuple[Tensor, Tensor]:
    """The first test images, float32 in 0-255, and their labels, int64."""
    images, labels = data.load(dataset, "test")
    return images[:count].float(), labels[:count]


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The wall time of one call, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(candidates: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> pd.DataFrame:
    """Seconds, a row per round, a column per candidate, after one round that warms up."""
    for run in candidates.values():
        run()
    return pd.DataFrame([{name: seconds_of(run, device) for name, run in candidates.items()} for _ in range(rounds)])


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """p20, p50 and p80, to four digits."""
    found = np.percentile(np.array(list(values)), PERCENTILES)
    return {f"p{p}": float(f"{value:.4g}") for p, value in zip(PERCENTILES, found, strict=True)}


def report(name: str, options: argparse.Namespace, table: list[dict[str, object]], **facts: object) -> None:
    """Print the table and the facts, and append all of it as one row to NAME.jsonl."""
    print(pd.DataFrame(table).to_markdown(index=False))
    for fact, value in facts.items():
        print(f"{fact}: {value}")
    found = {"dataset": options.dataset, **facts, "table": table, "provenance": provenance.collect(options.device)}
    options.rows.mkdir(parents=True, exist_ok=True)
    path = options.rows / f"{name}.jsonl"
    half = path.exists() and not path.read_text().endswith("\n")  # another run was cut off while it wrote
    with path.open("a") as file:
        file.write("\n" * half + json.dumps({"benchmark": name} | found) + "\n")
