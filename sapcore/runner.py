"""Computes cells and stores each the moment it is done, so that a run can be stopped at any time and started again.

Cells are computed here, one after the other, or by the workers of a Dask cluster; the store is written here alone.
"""

import contextlib
import dataclasses
import functools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sapcore import attacks, checkpoints, data, evaluation, provenance, results
from sapcore.attacks import library
from sapcore.baselines import BASELINES
from sapcore.calibration import calibration
from sapcore.checkpoints import CheckpointError
from sapcore.errors import SapcoreError, check_count
from sapcore.randomness import stream, with_noisy_statistics
from sapcore.released import images_of, with_batch_statistics
from sapcore.results import Cell, Defence
from sapcore.rl import environments, playing
from sapcore.sap import with_sap
from sapcore.sap.bernoulli import with_bernoulli_sap

Outcome = tuple[dict[str, Any], dict[str, Any]] | Exception | None
"""What became of a cell: (result, provenance), an error, or nothing, because another run has stored it."""
Outcomes = Generator[tuple[Cell, Outcome]]


def run(
    cells: Iterable[Cell], device: str | None = None, progress: bool = True, workers: int = 0, scheduler: str = "",
    also: tuple[str, ...] = (),
) -> list[tuple[Cell, Exception]]:  # fmt: skip
    """Compute the cells that are not in the store; returns those that failed, with their errors.

    also: what their results must hold besides, such as "calibration"; without it they are computed anew.
    device: cpu, cuda or cuda:N. With `workers` local processes share the work, with `scheduler` those of the Dask
    cluster at that address; each then takes its own default device if none is given.
    A cell that fails does not stop the others, but a missing data set or checkpoint, a cluster that does not answer
    and a store that cannot be written stop the run at once, with a `SapcoreError`.
    """
    provenance.commit()  # of the code as it starts
    here = provenance.device(device) if not (workers or scheduler) else None
    todo = [cell for cell in cells if results.read(cell, also) is None]
    for plays, dataset, checkpoint in {(cell.plays, cell.dataset, cell.checkpoint) for cell in todo}:
        if plays:
            environments.make(dataset, 1).close()
        else:
            data.load(dataset, "test")
        if checkpoint:
            checkpoints.load(checkpoint)
    results.check_writable(todo)
    if not todo:
        return []
    failed: list[tuple[Cell, Exception]] = []
    with tqdm(total=sum(map(_work, todo)), unit="pass", unit_scale=True, disable=not progress) as bar:
        if here is None:
            outcomes = _on_dask(todo, device, workers, scheduler, bar.set_description)
        else:
            outcomes = _here(todo, here, bar, also)
        with contextlib.closing(outcomes):
            for cell, outcome in outcomes:
                if isinstance(outcome, Exception):
                    failed.append((cell, outcome))
                    bar.write(f"{cell.label}: {type(outcome).__name__}: {outcome}")
                elif outcome is not None:
                    results.write(cell, *outcome)
                if here is None:
                    bar.update(_work(cell))
    return failed


def _work(cell: Cell) -> int:
    """Passes of all images, or of all observations of all episodes, through the network: for the bar."""
    passes = cell.passes + cell.attack.gradients
    if not cell.plays:
        return cell.examples * passes
    source = cell.attack.source
    labels = 0 if source is None else cell.passes if source.noisy else 1  # to know what the source would do
    return round(_steps_per_episode(cell.path.parent) * cell.examples * (passes + labels))


def _steps_per_episode(game: Path) -> float:
    """The mean over a game's stored cells; 1,000 where there is none."""
    steps = episodes = 0
    for path in game.glob("*.json"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged cell is for others to report
            result = json.loads(path.read_text())["result"]
            steps, episodes = steps + result["steps"], episodes + len(result["returns"])
    return steps / episodes if episodes else 1000.0


def _here(todo: list[Cell], device: torch.device, bar: Any, also: tuple[str, ...]) -> Outcomes:
    for cell in todo:
        bar.set_description(cell.label)
        end = bar.n + _work(cell)

        def told(passes: int, end: int = end) -> None:
            bar.update(min(passes, end - bar.n))

        outcome: Outcome = None
        if results.read(cell, also) is None:
            try:
                with evaluation.progress(told):
                    outcome = _timed(cell, device)
            except Exception as error:
                outcome = error
        bar.update(end - bar.n)
        yield cell, outcome


def _timed(cell: Cell, device: torch.device, direction: Tensor | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    started = time.perf_counter()
    result = compute(cell, device) if direction is None else compute(cell, device, direction)
    return result, provenance.collect(device, _packages(cell)) | {"seconds": round(time.perf_counter() - started, 1)}


def _on_dask(
    todo: list[Cell], device: str | None, workers: int, scheduler: str, note: Callable[[str], None]
) -> Outcomes:
    """Each cell as soon as a worker has it; what a dead worker took with it is computed again by another."""
    try:
        from distributed import Client, LocalCluster, as_completed
    except ImportError:
        raise SapcoreError(
            "several workers need Dask: install it with `pip install -e '.[cluster]'` in the checkout"
        ) from None
    with contextlib.ExitStack() as stack:
        address: Any = scheduler
        if not scheduler:
            stack.callback(_restore_environment, dict(os.environ))  # Dask writes OMP_NUM_THREADS=1 and more into ours
            local = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
            address = stack.enter_context(local)
        try:
            client = stack.enter_context(Client(address, timeout="10s"))
        except (OSError, ValueError, TypeError) as error:  # nobody there; no such protocol; TLS without a certificate
            raise SapcoreError(f"no Dask scheduler answers at {scheduler} ({type(error).__name__})") from None
        directions: dict[tuple[Any, ...], Any] = {}
        futures: dict[Any, Cell] = {}
        for cell in todo:
            direction, names = None, _direction_of(cell)
            if names is not None:
                if names not in directions:
                    directions[names] = client.submit(_remote_direction, names, device, pure=False)
                direction = directions[names]
            futures[client.submit(_remote, cell, device, direction, pure=False)] = cell
        del direction
        directions.clear()  # Dask keeps a direction for as long as a cell needs it
        note(f"{len(todo)} cells on {scheduler or f'{workers} workers'}")
        for future in as_completed(list(futures)):
            cell = futures.pop(future)
            if future.cancelled():
                raise SapcoreError("the Dask scheduler was lost; start again: what is finished is stored")
            yield cell, future.exception() or future.result()


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


_ONE_AT_A_TIME = threading.Lock()
"""A worker may have several threads, but while torch.fx traces a network (`splitting`) no other may be called."""


def _remote(cell: Cell, device: str | None, direction: Tensor | None) -> tuple[dict[str, Any], dict[str, Any]]:
    with _ONE_AT_A_TIME:
        return _timed(cell, _worker_device(device), direction)


def _remote_direction(names: tuple[Any, ...], device: str | None) -> Tensor:
    with _ONE_AT_A_TIME:
        return _direction(*names, _worker_device(device)).cpu()


def _worker_device(device: str | None) -> torch.device:
    """The worker's device, with as many threads for our kernels as torch has for its own."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    return provenance.device(device)


BY_TORCHATTACKS = ("autoattack", "autoattack_standard", "square")


def _packages(cell: Cell) -> tuple[str, ...]:
    """What a result depends on besides our own packages."""
    if cell.plays:
        return ("ale-py",)
    return ("torchattacks",) if cell.attack.kind in BY_TORCHATTACKS else ()


@dataclasses.dataclass(frozen=True)
class Check:
    """What came of computing a stored cell again."""

    cell: Cell
    same: bool
    reason: str
    """The two numbers, and how they were compared."""


def verify(
    cells: Sequence[Cell], sample: int | None = None, seed: int = 0, device: str | None = None
) -> Iterator[Check]:
    """Compute stored cells again, all or `sample` of them drawn by `seed`, and compare with the store.

    On the device of the stored cell, with its versions, threads and instructions, the whole result must be the same.
    Elsewhere the accuracy must lie in the stored interval; games part ways with the first action that differs, so that
    their interval must overlap the stored one. The oldest cells do not say which instructions they had: they may be
    the same or agree. Raises `SapcoreError` for a sample that is no whole number of 1 or more.
    """
    if sample is not None:
        check_count("sample", sample)
        cells = random.Random(seed).sample(list(cells), min(sample, len(cells)))
    on = provenance.device(device)
    for cell in cells:
        stored = results.read(cell)
        assert stored is not None
        there, before = stored["provenance"], stored["result"]
        with _threads(there.get("threads")):
            found, here = compute(cell, on), provenance.collect(on, _packages(cell))
        others = [name for name, value in before.items() if json.loads(json.dumps(found.get(name))) != value]
        alike = all(here[name] == there.get(name) for name in ("device", "threads", "versions"))
        promised = here.get("instructions") == there.get("instructions")
        if alike and (promised or not others):
            same = not others
            how = "the same device and versions" + (f"; not the same: {', '.join(others)}" if others else "")
        else:
            same = _agree(cell, found, before)
            how = f"95 % interval [{before['low']}, {before['high']}], computed on {there['device']}"
        if cell.plays:
            numbers = f"mean return {found['mean']:g}, stored {before['mean']:g}"
        else:
            numbers = f"{found['correct']} of {found['images']} right, stored {before['correct']}"
        yield Check(cell, same, f"{numbers} ({how})")


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads, if there are cores for them, for torch and for our kernels."""
    before = torch.get_num_threads(), numba.get_num_threads()
    most = numba.config.NUMBA_NUM_THREADS
    if count is not None and count <= most:
        torch.set_num_threads(count)
        numba.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def _agree(cell: Cell, found: dict[str, Any], before: dict[str, Any]) -> bool:
    if not cell.plays:
        return bool(before["low"] <= found["accuracy"] <= before["high"])
    if found["low"] is None or before["low"] is None:
        return bool(found["mean"] == before["mean"])
    return bool(found["low"] <= before["high"] and before["low"] <= found["high"])


def compute(cell: Cell, device: torch.device, direction: Tensor | None = None) -> dict[str, Any]:
    """Attack the first `cell.examples` test images and measure accuracy and calibration on fresh passes, or play.

    `direction` is FGSM's, if it is there already. Raises `SapcoreError` if this code or its checkpoint is not
    what the cell is about.
    """
    if cell.version != results.VERSION:
        raise SapcoreError(f"the cell is of version {cell.version}, but this code computes version {results.VERSION}")
    if cell.plays:
        return _played(cell, device)
    images, labels = seen(cell.dataset, cell.checkpoint, cell.examples)
    model = defended(cell.checkpoint, cell.checkpoint_sha256, cell.defence, device)
    p, right = evaluation.predict_and_count(
        model, attacked(cell, images, labels, device, direction), labels, cell.passes,
        stream(cell.seed, "evaluation"), batch_size=_batch_size(device, cell.defence.batch_statistics),
        precision=cell.precision,
    )  # fmt: skip
    a = evaluation.accuracy(p, labels)
    found = {"accuracy": a.value, "low": a.low, "high": a.high, "correct": a.correct, "images": a.images}
    if cell.defence.noisy:
        # what counting single passes would claim: their mean, and the share of images that every pass gets right
        found["single_pass"] = float(right.double().mean()) / cell.passes
        found["every_pass"] = float((right == cell.passes).double().mean())
    return {**found, "calibration": vars(calibration(p, labels))}


def seen(dataset: str, checkpoint: str, examples: int) -> tuple[Tensor, Tensor]:
    """The first so many test images as this network sees them, and their labels."""
    images, labels = (t[:examples] for t in data.load(dataset, "test"))
    return images_of(checkpoints.card(checkpoint).get("recipe", {})).of_test(images), labels


def _played(cell: Cell, device: torch.device) -> dict[str, Any]:
    """The returns of `cell.examples` episodes, their mean and its interval."""

    def with_defence(defence: Defence | None) -> nn.Module | None:
        if defence is None or defence.kind == "random":
            return None
        return defended(cell.checkpoint, cell.checkpoint_sha256, defence, device)

    attack = cell.attack
    found = playing.play(
        with_defence(cell.defence), cell.dataset, cell.examples, attack.eps, cell.passes,
        with_defence(attack.source), max(1, attack.passes), cell.seed, cell.rules,
        estimator=attack.estimator or "mean_of_gradients", precision=cell.precision,
    )  # fmt: skip
    low, high = playing.interval_of_mean(found.returns)
    return {"mean": found.mean, "low": low, "high": high, "returns": found.returns, "steps": found.steps}


def _batch_size(device: torch.device, batch_statistics: int = 0) -> int:
    """Images to a batch: on every device so many as share their statistics, if they do."""
    return batch_statistics or evaluation.most_rows(device)


def attacked(
    cell: Cell, images: Tensor, labels: Tensor, device: torch.device, direction: Tensor | None = None
) -> Tensor:
    """The images after the cell's attack, in 0-255."""
    attack = cell.attack
    if attack.kind == "none":
        return images
    if attack.kind == "noise":
        return attacks.noise(images, attack.eps, cell.seed)
    assert attack.source is not None
    if attack.kind == "fgsm":
        names = _direction_of(cell)
        assert names is not None
        direction = _direction(*names, device) if direction is None else direction
        return torch.clamp(images + attack.eps * direction.float(), 0, 255)
    if attack.kind == "iterative":
        model = defended(cell.checkpoint, cell.checkpoint_sha256, attack.source, device, attack.batch_statistics > 0)
        return attacks.iterative(
            model, images, labels, attack.eps, attack.step, attack.steps, attack.passes, cell.seed,
            estimator=attack.estimator, batch_size=_batch_size(device, attack.batch_statistics),
            precision=cell.precision, loss=attack.loss, random_start=attack.random_start, restarts=attack.restarts,
        )  # fmt: skip
    if attack.kind in BY_TORCHATTACKS:
        model = defended(cell.checkpoint, cell.checkpoint_sha256, attack.source, device)
        how: dict[str, Any] = {"seed": cell.seed, "precision": cell.precision}
        how["batch_size"] = evaluation.BATCH_SIZE  # on every device: they draw anew for each batch
        if attack.kind == "autoattack_standard":
            return library.autoattack_standard(model, images, labels, attack.eps, attack.steps, **how)
        run = library.autoattack if attack.kind == "autoattack" else library.square
        return run(model, images, labels, attack.eps, attack.steps, attack.passes, **how)
    raise ValueError(f"unknown attack {attack.kind!r}")


def _direction_of(cell: Cell) -> tuple[Any, ...] | None:
    """What FGSM's direction depends on; None for another attack, and where each observation has its own."""
    attack = cell.attack
    if attack.kind != "fgsm" or cell.plays:
        return None
    return (
        cell.dataset, cell.examples, cell.checkpoint, cell.checkpoint_sha256, attack.source,
        attack.passes, attack.estimator, cell.seed, cell.precision, attack.loss, attack.batch_statistics,
    )  # fmt: skip


@functools.lru_cache(maxsize=2)
def _direction(
    dataset: str, examples: int, checkpoint: str, sha256: str, source: Defence,
    passes: int, estimator: str, seed: int, precision: str, loss: str, batch_statistics: int, device: torch.device,
) -> Tensor:  # fmt: skip
    """FGSM's direction as int8: it does not depend on eps, so the cells of one curve share it."""
    images, labels = seen(dataset, checkpoint, examples)
    model = defended(checkpoint, sha256, source, device, batch_statistics > 0)
    direction = attacks.fgsm_direction(
        model,
        images,
        labels,
        passes,
        seed,
        estimator=estimator,
        batch_size=_batch_size(device, batch_statistics),
        precision=precision,
        loss=loss,
    )
    return direction.to(torch.int8)


@functools.lru_cache(maxsize=8)
def defended(
    checkpoint: str, sha256: str, defence: Defence, device: torch.device, batch_statistics: bool = False
) -> nn.Module:
    """The network of this name and sha256 with its defence; raises `CheckpointError` if another one has its name."""
    network = checkpoints.load(checkpoint)
    if checkpoints.sha256(checkpoint) != sha256:
        raise CheckpointError(f"the checkpoint {checkpoint} is another one than the cell's; list the cells again")
    network = with_batch_statistics(network) if batch_statistics or defence.batch_statistics else network
    network = _with_noise(network.to(device), defence)
    if not defence.noisy_statistics:
        return network
    recipe = checkpoints.card(checkpoint)["recipe"]
    images, _ = data.load(recipe["dataset"], "train")
    return with_noisy_statistics(network, images_of(recipe).of_test(images[: defence.noisy_statistics]))


def _with_noise(network: nn.Module, defence: Defence) -> nn.Module:
    if defence.kind == "dense":
        return network
    assert defence.level is not None
    if defence.kind == "sap":
        return with_sap(network, defence.level, backward=defence.backward)
    if defence.kind == "bernoulli-sap":
        return with_bernoulli_sap(network, defence.level, defence.backward)
    return BASELINES[defence.kind](network, defence.level)
