"""Accuracy of a network, noisy or not: the mean softmax over fresh passes, with a Wilson interval (Sec. 4)."""

import contextlib
import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from weakref import WeakKeyDictionary

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from sapcore.bfloat16 import autocast
from sapcore.errors import SapcoreError, check_count, check_module, check_tensor
from sapcore.randomness import Begun, NoisyModel, per_example
from sapcore.splitting import has_hooks

BATCH_SIZE = 256
"""Rows per forward pass at most: more cost a CPU its cache, fewer its time between the layers."""
BATCH_SIZE_ON_GPU = 2000
MEMORY = 2**30
"""Bytes that the rows of a forward pass may keep for their gradient on a CPU, unless a batch size is given."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How many of the images a network gets right, with a 95 % Wilson interval."""

    correct: int
    images: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.correct / self.images


def accuracy(probabilities: Tensor, labels: Tensor) -> Accuracy:
    """Accuracy of argmax predictions. probabilities: (N, classes), or logits; labels: int64 (N,).

    Raises `SapcoreError` for no image, for nan or inf, and for labels that are not one class per image.
    """
    shape = check_outputs(probabilities)
    if not len(probabilities):
        raise SapcoreError("there is no image to measure accuracy on")
    labels = check_labels(labels, *shape)
    correct = int((probabilities.argmax(1).cpu() == labels.cpu()).sum())
    interval = binomtest(correct, len(labels)).proportion_ci(0.95, method="wilson")
    return Accuracy(correct, len(labels), float(interval.low), float(interval.high))


def difference(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    """a - b of two accuracies, each given with its Wilson interval, and the 95 % interval of the difference.

    By Newcombe's hybrid of the two (1998), as if they were of different images: too wide for the same ones.
    """
    (x, x_low, x_high), (y, y_low, y_high) = a, b
    return x - y, x - y - math.hypot(x - x_low, y_high - y), x - y + math.hypot(x_high - x, y - y_low)


def predict(
    model: nn.Module,
    x: Tensor,
    passes: int = 100,
    seed: int = 1,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    precision: str = "float32",
) -> Tensor:
    """Mean softmax over `passes` fresh noisy passes, float64 (N, classes).

    x: (N, 3, 32, 32), uint8 or float in 0-255; ids: int64 (N,), names of the examples, modulo 2**32, default 0..N-1.
    A deterministic network is run once. At most `batch_size` rows are in memory at a time, by default as many as
    `rows_at_once` finds; the result does not depend on it but for float rounding. Raises `SapcoreError` for a network
    in training mode, for pixels beyond 0-255, and where its output is nan or inf; warns if white seems to be 1.
    """
    return _predict(model, x, None, passes, seed, ids, batch_size, precision)[0]


def predict_and_count(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    passes: int = 100,
    seed: int = 1,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """What `predict` returns, and how many of its passes alone get each image right, int64 (N,). y: int64 (N,)."""
    return _predict(model, x, y, passes, seed, ids, batch_size, precision)


@torch.no_grad()
def _predict(
    model: nn.Module, x: Tensor, y: Tensor | None, passes: int, seed: int, ids: Tensor | None,
    batch_size: int | None, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_network(model)
    check_pixels(x)
    y = None if y is None else check_labels(y, len(x))
    device, count = device_of(model), count_passes(model, passes)
    if not len(x):
        raise SapcoreError("x holds no images, but at least one is needed")
    batch_size = rows_at_once(model, x, batch_size, precision)
    outputs, counts = [], []
    for rows, names in batches(len(x), ids, batch_size):
        begun = begin(model, as_pixels(x[rows], device), precision)
        labels = None if y is None else y[rows].to(device)
        total = torch.zeros((), device=device, dtype=torch.float64)
        right = torch.zeros((), device=device, dtype=torch.int64)
        for _, logits in noisy_passes(model, begun, names, seed, range(passes), batch_size, precision):
            total = total + logits.double().softmax(-1).sum(0)
            if labels is not None:
                right = right + (logits.argmax(-1) == labels).sum(0)
        mean = (total / count).cpu()
        if wrong := int(mean.isnan().any(-1).sum()):
            raise SapcoreError(f"the network's output is nan or inf for {wrong} of the first {rows.stop} images")
        if y is not None and not rows.start:
            check_labels(y, len(x), mean.shape[1])
        outputs.append(mean)
        counts.append(right.cpu())
    return torch.cat(outputs), torch.cat(counts) if y is not None else torch.zeros(0, dtype=torch.int64)


def most_rows(device: torch.device) -> int:
    """So many rows serve a device best, if it has the memory."""
    return BATCH_SIZE if device.type == "cpu" else BATCH_SIZE_ON_GPU


def rows_at_once(model: nn.Module, x: Tensor, batch_size: int | None, precision: str) -> int:
    """Rows per forward pass: `batch_size`, or, if that is None, as many as serve the device and fit into its memory.

    That is `MEMORY` on a CPU, half of what is free on a GPU. What a row takes is measured once per network and shape,
    on four copies of the first image; not if hooks wait for a call.
    """
    if batch_size is not None:
        check_count("batch_size", batch_size)
        return batch_size
    device = device_of(model)
    if not len(x) or any(map(has_hooks, model.modules())):
        return most_rows(device)
    budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else MEMORY
    return min(most_rows(device), max(1, budget // max(1, row_bytes(model, x, precision))))


_ROW_BYTES: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], int]] = WeakKeyDictionary()


def row_bytes(model: nn.Module, x: Tensor, precision: str) -> int:
    """Bytes of activations that the network keeps of one image, shaped as x[0], for its gradient; 0 if it has none."""
    known, kind = _ROW_BYTES.setdefault(model, {}), (x.shape[1:], precision, device_of(model))
    if kind not in known:
        try:
            known[kind] = (_kept(model, x, 4, precision) - _kept(model, x, 2, precision)) // 2
        except Exception:  # without a gradient it may work all the same; if not, the pass that is to come says why
            known[kind] = 0
    return known[kind]


def _kept(model: nn.Module, x: Tensor, rows: int, precision: str) -> int:
    """Bytes that so many copies of the first image keep for their gradient."""
    device, noisy = device_of(model), isinstance(model, NoisyModel)
    sizes: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    leaf = as_pixels(x[:1].repeat(rows, *[1] * (x.dim() - 1)), device).requires_grad_()
    devices = [device] if device.type == "cuda" else []
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved)
    with torch.random.fork_rng(devices), torch.enable_grad(), autocast(precision, device), hooks:
        x = leaf.clone()  # which the network may change in place
        # the output holds on to what is saved, so that no address comes twice
        output = model(x, ids=torch.arange(rows), passes=torch.zeros(rows).long()) if noisy else model(x)
    del output
    return sum(sizes.values())


def begin(model: nn.Module, x: Tensor, precision: str) -> Begun:
    """What all passes over x have in common."""
    if not isinstance(model, NoisyModel):
        return Begun(model, (x,))
    with autocast(precision, x.device):
        return model.begin(x)


_TOLD: ContextVar[Callable[[int], object] | None] = ContextVar("told", default=None)


@contextlib.contextmanager
def progress(told: Callable[[int], object]) -> Iterator[None]:
    """Within it `told` hears of all passes as they are done: of how many images times passes."""
    token = _TOLD.set(told)
    try:
        yield
    finally:
        _TOLD.reset(token)


def noisy_passes(
    model: nn.Module, begun: Begun, ids: Tensor, seed: int, passes: range, batch_size: int, precision: str
) -> Iterator[tuple[int, Tensor]]:
    """Go on from `begun` (n rows) once per pass; yields (first pass, logits (g, n, classes)) for g passes at once."""
    n, device, told = len(begun), begun.parts[0].device, _TOLD.get()
    if not isinstance(model, NoisyModel):
        with autocast(precision, device):
            yield passes.start, check_logits(begun.model(*begun.cloned().parts), n)[None].float()
        if told:
            told(n)
        return
    mixing = any(getattr(module, "one_pass_at_a_time", False) for module in model.modules())
    group = 1 if mixing else max(1, batch_size // n)
    for start in range(passes.start, passes.stop, group):
        numbers = torch.arange(start, min(start + group, passes.stop))
        rows = begun.repeated(len(numbers))
        rows = rows.cloned() if begun.model is model.model and rows is begun else rows
        with autocast(precision, device):
            logits = model(rows, seed=seed, ids=ids.repeat(len(numbers)), passes=numbers.repeat_interleave(n))
        yield start, check_logits(logits, len(rows)).float().reshape(len(numbers), n, -1)
        if told:
            told(len(rows))


def check_logits(found: object, rows: int) -> Tensor:
    """What a network gave; raises `SapcoreError` unless it is logits of two classes or more."""
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != rows or found.shape[1] < 2:
        given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
        raise SapcoreError(
            f"the network's output has {given}, but must be logits ({rows}, classes) of two classes or more"
        )
    return found


def batches(n: int, ids: Tensor | None, batch_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of at most `batch_size` of n examples, each with the names of its examples."""
    ids, _ = per_example(n, ids, 0)
    for start in range(0, n, batch_size):
        rows = slice(start, min(start + batch_size, n))
        yield rows, ids[rows]


def count_passes(model: nn.Module, passes: int) -> int:
    """The passes that are run: `passes` on a noisy network, one on a deterministic one."""
    check_count("passes", passes)
    return passes if isinstance(model, NoisyModel) else 1


def check_labels(labels: Tensor, images: int, classes: int | None = None) -> Tensor:
    """The labels as int64; raises `SapcoreError` unless there is one for each image, a class from 0 on."""
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.dtype == torch.bool)
    if not whole or labels.dim() != 1:
        given = (
            f"{str(labels.dtype)[6:]} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        )
        raise SapcoreError(f"labels are {given}, but must be whole numbers in a tensor ({images},), one per image")
    if len(labels) != images:
        raise SapcoreError(f"there are {images} images but {len(labels)} labels")
    if images and not (int(labels.min()) >= 0 and (classes is None or int(labels.max()) < classes)):
        allowed = "0 or more" if classes is None else f"from 0 to {classes - 1}"
        raise SapcoreError(f"labels go from {int(labels.min())} to {int(labels.max())}, but must be {allowed}")
    return labels.long()


def check_outputs(outputs: Tensor) -> tuple[int, int]:
    """Images and classes of a network's outputs; raises `SapcoreError` unless they are finite numbers (N, classes)."""
    check_tensor("probabilities", outputs)
    if outputs.dim() != 2:
        raise SapcoreError(f"probabilities are of shape {tuple(outputs.shape)}, but must be (N, classes)")
    if not bool(outputs.isfinite().all()):
        raise SapcoreError("probabilities hold nan or inf, but must be finite numbers")
    return outputs.shape[0], outputs.shape[1]


def check_network(model: nn.Module) -> None:
    """Stop if numbers of this network would mean something else.

    That is so if BatchNorm or Dropout behave as in training, if it is not of float32, or if a noisy network is inside
    another module, which would call it for the same pass again and again.
    """
    check_module(model)
    if any(module.training for module in model.modules()):
        raise SapcoreError("the network is in training mode; call model.eval() first (SAP's noise stays on)")
    if any(isinstance(module, NoisyModel) for module in model.modules() if module is not model):
        raise SapcoreError(
            f"a noisy network is inside a {type(model).__name__}, where all its passes are one; put the noise in last, "
            "as in with_sap(nn.Sequential(normalize, network))"
        )
    other = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if other is not None:
        raise SapcoreError(
            f"the network's weights are {str(other)[6:]}, but must be float32; precision='bfloat16' makes passes faster"
        )


def check_pixels(x: Tensor) -> None:
    """Stop if a pixel is not in [0, 255]; warn if all look as if white were 1."""
    check_tensor("x", x)
    if not x.numel():
        return
    low, high = float(x.min()), float(x.max())
    if not (low >= 0 and high <= 255):
        raise SapcoreError(f"pixels lie in [{low:g}, {high:g}], but must lie in [0, 255]")
    if high <= 1 and bool((x != x.round()).any()):
        message = f"pixels lie in [{low:g}, {high:g}], where 255 is white; give 255 * x if 1 is"
        warnings.warn(message, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """The `stacklevel` of whoever called sapcore, for the function that asks."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("sapcore.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level


def as_pixels(x: Tensor, device: torch.device) -> Tensor:
    """Images as float32 on the device, channels_last if 4-D."""
    x = x.to(device, torch.float32)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def device_of(model: nn.Module) -> torch.device:
    """Where the network's parameters lie."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
