"""Computes cells and stores each the moment it is done, so that a run can be stopped at any time and started again."""

import functools
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sapcore import attacks, checkpoints, data, evaluation, provenance, results
from sapcore.randomness import stream
from sapcore.results import Cell, Defence
from sapcore.sap import with_sap


def run(cells: Iterable[Cell], device: str | None = None, progress: bool = True) -> list[tuple[Cell, Exception]]:
    """Compute the cells that are not in the store; returns those that failed, with their errors.

    A cell that fails does not stop the others, but a missing data set or checkpoint stops the run at once.
    """
    on = provenance.device(device)
    provenance.commit()  # of the code as it starts
    todo = [cell for cell in cells if results.read(cell) is None]
    for dataset, checkpoint in {(cell.dataset, cell.checkpoint) for cell in todo}:
        data.load(dataset, "test")
        checkpoints.load(checkpoint)
    failed: list[tuple[Cell, Exception]] = []
    with tqdm(total=sum(map(_work, todo)), unit="pass", unit_scale=True, disable=not (progress and todo)) as bar:
        for cell in todo:
            bar.set_description(cell.label)
            started = time.perf_counter()
            try:
                result = compute(cell, on)
            except Exception as error:
                failed.append((cell, error))
                bar.write(f"{cell.label}: {type(error).__name__}: {error}")
            else:
                origin = provenance.collect(on) | {"seconds": round(time.perf_counter() - started, 1)}
                results.write(cell, result, origin)
            bar.update(_work(cell))
    return failed


def _work(cell: Cell) -> int:
    """Passes of one image through the network, for the progress bar."""
    return cell.examples * cell.passes


def compute(cell: Cell, device: torch.device) -> dict[str, float | int]:
    """Attack the first `cell.examples` test images and measure the accuracy on fresh passes."""
    images, labels = (t[: cell.examples] for t in data.load(cell.dataset, "test"))
    model = defended(cell.checkpoint, cell.checkpoint_sha256, cell.defence, device)
    p = evaluation.predict(
        model, attacked(cell, images, labels, device), cell.passes, stream(cell.seed, "evaluation"),
        batch_size=_batch_size(device), precision=cell.precision,
    )  # fmt: skip
    a = evaluation.accuracy(p, labels)
    return {"accuracy": a.value, "low": a.low, "high": a.high, "correct": a.correct, "images": a.images}


def _batch_size(device: torch.device) -> int:
    return evaluation.BATCH_SIZE if device.type == "cpu" else 2000


def attacked(cell: Cell, images: Tensor, labels: Tensor, device: torch.device) -> Tensor:
    """The images after the cell's attack, in 0-255."""
    attack = cell.attack
    if attack.kind == "none":
        return images
    if attack.kind == "noise":
        return attacks.noise(images, attack.eps, cell.seed)
    assert attack.source is not None
    if attack.kind == "fgsm":
        direction = _direction(
            cell.dataset, cell.examples, cell.checkpoint, cell.checkpoint_sha256, attack.source,
            attack.passes, attack.estimator, cell.seed, cell.precision, device,
        )  # fmt: skip
        return torch.clamp(images + attack.eps * direction.float(), 0, 255)
    if attack.kind == "iterative":
        model = defended(cell.checkpoint, cell.checkpoint_sha256, attack.source, device)
        return attacks.iterative(
            model, images, labels, attack.eps, attack.step, attack.steps, attack.passes, cell.seed,
            estimator=attack.estimator, batch_size=_batch_size(device), precision=cell.precision,
        )  # fmt: skip
    raise ValueError(f"unknown attack {attack.kind!r}")


@functools.lru_cache(maxsize=2)
def _direction(
    dataset: str, examples: int, checkpoint: str, sha256: str, source: Defence,
    passes: int, estimator: str, seed: int, precision: str, device: torch.device,
) -> Tensor:  # fmt: skip
    """FGSM's direction as int8: it does not depend on eps, so the cells of one curve share it."""
    images, labels = (t[:examples] for t in data.load(dataset, "test"))
    model = defended(checkpoint, sha256, source, device)
    direction = attacks.fgsm_direction(
        model,
        images,
        labels,
        passes,
        seed,
        estimator=estimator,
        batch_size=_batch_size(device),
        precision=precision,
    )
    return direction.to(torch.int8)


@functools.lru_cache(maxsize=8)
def defended(checkpoint: str, sha256: str, defence: Defence, device: torch.device) -> nn.Module:
    """The pretrained network with its defence; `sha256` only makes the cache notice a new checkpoint."""
    dense = checkpoints.load(checkpoint).to(device)
    if defence.kind == "dense":
        return dense
    assert defence.percent is not None
    return with_sap(dense, defence.percent)
