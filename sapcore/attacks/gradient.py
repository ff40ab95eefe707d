"""Estimators of the input gradient of the loss: what an adversary knows of a network, noisy or not.

An estimator is a function `(model, x, y, ids, seed, passes, batch_size, precision) -> gradient` with
x float (n, ...), y int64 (n,), passes a range, gradient shaped as x.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapcore.errors import SapcoreError
from sapcore.evaluation import count_passes, noisy_passes

Estimator = Callable[[nn.Module, Tensor, Tensor, Tensor, int, range, int, str], Tensor]


@torch.enable_grad()
def mean_of_gradients(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int, passes: range, batch_size: int, precision: str
) -> Tensor:
    """The mean over passes of each pass's gradient of the cross-entropy: the paper's estimator (Sec. 3.2).

    Exact on a deterministic network, whose loss has one gradient.
    """
    gradient = torch.zeros_like(x)
    leaf = x.detach().requires_grad_()
    for _, logits in noisy_passes(model, leaf, ids, seed, passes, batch_size, precision):
        # in float64: where the network is nearly certain, softmax - 1 has no digits left in float32
        loss = F.cross_entropy(logits.double().flatten(0, 1), y.repeat(len(logits)), reduction="sum")
        gradient += torch.autograd.grad(loss, leaf)[0]
    return gradient / count_passes(model, len(passes))


@torch.enable_grad()
def gradient_of_mean(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int, passes: range, batch_size: int, precision: str
) -> Tensor:
    """The gradient of the cross-entropy of the mean softmax, which is the network's output (Sec. 4).

    The passes are run twice, so that memory does not grow with their number: first for the mean
    probability P of the true class, then for the gradient of -log P, which is -(1/P) times the mean
    gradient of each pass's probability.
    """
    with torch.no_grad():
        mean = torch.zeros_like(y, dtype=torch.float64)
        for _, logits in noisy_passes(model, x, ids, seed, passes, batch_size, precision):
            mean += _true_class(logits, y).sum(0)
        mean /= count_passes(model, len(passes))
    gradient = torch.zeros_like(x)
    leaf = x.detach().requires_grad_()
    for _, logits in noisy_passes(model, leaf, ids, seed, passes, batch_size, precision):
        loss = -(_true_class(logits, y) / mean.clamp(min=1e-30)).sum()
        gradient += torch.autograd.grad(loss, leaf)[0]
    return gradient / count_passes(model, len(passes))


ESTIMATORS: dict[str, Estimator] = {"mean_of_gradients": mean_of_gradients, "gradient_of_mean": gradient_of_mean}


def estimator(name: str) -> Estimator:
    """The estimator of this name."""
    if name not in ESTIMATORS:
        raise SapcoreError(f"estimator is {name!r}, but must be one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def _true_class(logits: Tensor, y: Tensor) -> Tensor:
    """The probability of the true class, float64: (g, n, classes) -> (g, n)."""
    return logits.double().softmax(-1).gather(-1, y.expand(len(logits), -1)[..., None])[..., 0]
