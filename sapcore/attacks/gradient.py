"""Estimators of the input gradient of the loss: what an adversary knows of a network, noisy or not.

An estimator is a function `(model, x, y, ids, seed, passes, batch_size, precision) -> gradient` with
x float (n, ...), y int64 (n,), passes a range, gradient shaped as x.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapcore.errors import SapcoreError
from sapcore.evaluation import begin, count_passes, noisy_passes
from sapcore.randomness import Begun

Estimator = Callable[[nn.Module, Tensor, Tensor, Tensor, int, range, int, str], Tensor]


@torch.enable_grad()
def mean_of_gradients(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int, passes: range, batch_size: int, precision: str
) -> Tensor:
    """The mean over passes of each pass's gradient of the cross-entropy: the paper's estimator (Sec. 3.2).

    Exact on a deterministic network, whose loss has one gradient.
    """

    def loss(logits: Tensor) -> Tensor:
        # in float64: where the network is nearly certain, softmax - 1 has no digits left in float32
        return F.cross_entropy(logits.double().flatten(0, 1), y.repeat(len(logits)), reduction="sum")

    total = _sum_of_gradients(model, x, ids, seed, passes, batch_size, precision, loss)
    return total / count_passes(model, len(passes))


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
        for _, logits in noisy_passes(model, begin(model, x, precision), ids, seed, passes, batch_size, precision):
            mean += _true_class(logits, y).sum(0)
        mean /= count_passes(model, len(passes))

    def loss(logits: Tensor) -> Tensor:
        return -(_true_class(logits, y) / mean.clamp(min=1e-30)).sum()

    total = _sum_of_gradients(model, x, ids, seed, passes, batch_size, precision, loss)
    return total / count_passes(model, len(passes))


def _sum_of_gradients(
    model: nn.Module, x: Tensor, ids: Tensor, seed: int, passes: range, batch_size: int, precision: str,
    loss: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """The sum over passes of the gradient of loss(logits); what comes before the noise is gone through once."""
    leaf = x.detach().requires_grad_()
    begun = begin(model, leaf, precision)
    heads = Begun(begun.model, tuple(part.detach().requires_grad_() for part in begun.parts))
    totals = [torch.zeros_like(part, dtype=torch.float32) for part in heads.parts]
    for _, logits in noisy_passes(model, heads, ids, seed, passes, batch_size, precision):
        for total, gradient in zip(totals, torch.autograd.grad(loss(logits), heads.parts), strict=True):
            total += gradient
    gradients = [total.to(part.dtype) for total, part in zip(totals, begun.parts, strict=True)]
    return torch.autograd.grad(begun.parts, leaf, gradients)[0]


ESTIMATORS: dict[str, Estimator] = {"mean_of_gradients": mean_of_gradients, "gradient_of_mean": gradient_of_mean}


def estimator(name: str) -> Estimator:
    """The estimator of this name."""
    if name not in ESTIMATORS:
        raise SapcoreError(f"estimator is {name!r}, but must be one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def _true_class(logits: Tensor, y: Tensor) -> Tensor:
    """The probability of the true class, float64: (g, n, classes) -> (g, n)."""
    return logits.double().softmax(-1).gather(-1, y.expand(len(logits), -1)[..., None])[..., 0]
