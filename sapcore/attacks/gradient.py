"""Estimators of the input gradient of the loss: what an adversary knows of a network, noisy or not.

An estimator is a function `(model, x, y, ids, seed, passes, batch_size, precision, loss) -> gradient` with
x float (n, ...), y int64 (n,), passes a range, gradient shaped as x. The loss is one of `LOSSES`.
"""

import copy
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapcore.bfloat16 import autocast
from sapcore.errors import SapcoreError
from sapcore.evaluation import begin, check_labels, check_network, count_passes, device_of, noisy_passes, predict
from sapcore.randomness import Begun


class Estimator(Protocol):
    """What every estimator takes and returns."""

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int, passes: range, batch_size: int,
        precision: str, loss: str = "cross_entropy",
    ) -> Tensor: ...  # fmt: skip


def cross_entropy(scores: Tensor, y: Tensor) -> Tensor:
    """-log softmax of the true class: (..., classes), (...) -> (...)."""
    return F.cross_entropy(scores.flatten(0, -2), y.flatten(), reduction="none").reshape(y.shape)


def margin(scores: Tensor, y: Tensor) -> Tensor:
    """By how much the best wrong class leads the true one (Carlini and Wagner 2017): (..., classes), (...) -> (...)."""
    right = scores.gather(-1, y[..., None])[..., 0]
    wrong = scores.scatter(-1, y[..., None], -torch.inf).amax(-1)
    return wrong - right


def furthest_wrong(
    model: nn.Module, tries: list[Tensor], y: Tensor, ids: Tensor, passes: int, seed: int, batch_size: int,
    precision: str,
) -> Tensor:  # fmt: skip
    """Of several tries at the same images, for each image that with the largest margin of its mean softmax."""
    if len(tries) == 1:
        return tries[0]
    chosen = [predict(model, t, passes, seed, ids, batch_size, precision).clamp(min=1e-30).log() for t in tries]
    best = torch.stack([margin(scores, y.cpu()) for scores in chosen]).argmax(0).to(y.device)
    return torch.stack(tries)[best, torch.arange(len(y), device=y.device)]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": cross_entropy, "margin": margin}


@torch.enable_grad()
def mean_of_gradients(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int, passes: range, batch_size: int, precision: str,
    loss: str = "cross_entropy",
) -> Tensor:  # fmt: skip
    """The mean over passes of each pass's gradient of the loss: the paper's estimator (Sec. 3.2).

    Exact on a deterministic network, whose loss has one gradient.
    """

    loss_of = _loss(loss, y)

    def of_passes(logits: Tensor) -> Tensor:
        # in float64: where the network is nearly certain, softmax - 1 has no digits left in float32
        return loss_of(logits.double()).sum()

    total = _sum_of_gradients(model, x, ids, seed, passes, batch_size, precision, of_passes)
    return total / count_passes(model, len(passes))


@torch.enable_grad()
def gradient_of_mean(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int, passes: range, batch_size: int, precision: str,
    loss: str = "cross_entropy",
) -> Tensor:  # fmt: skip
    """The gradient of the loss of the mean softmax, which is the network's output (Sec. 4).

    The passes are run twice, so that memory does not grow with their number: first for the mean softmax P, then for
    the gradient: that of the loss by log P, times 1/P, times the mean gradient of each pass's probabilities.
    """
    count = count_passes(model, passes=len(passes))
    with torch.no_grad():
        total = torch.zeros((), device=x.device, dtype=torch.float64)
        for _, logits in noisy_passes(model, begin(model, x, precision), ids, seed, passes, batch_size, precision):
            total = total + logits.double().softmax(-1).sum(0)
        mean = (total / count).clamp(min=1e-30)
    leaf = mean.log().requires_grad_()
    (by_log,) = torch.autograd.grad(_loss(loss, y)(leaf).sum(), leaf)

    def of_passes(logits: Tensor) -> Tensor:
        return (logits.double().softmax(-1) * (by_log / mean)).sum()

    return _sum_of_gradients(model, x, ids, seed, passes, batch_size, precision, of_passes) / count


@torch.enable_grad()
def dense_backward(
    model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int, passes: range, batch_size: int, precision: str,
    loss: str = "cross_entropy",
) -> Tensor:  # fmt: skip
    """The mean over passes of the loss's gradient by the noisy logits, taken back through the network without noise.

    BPDA (Athalye et al. 2018) with the dense network's backward pass in the place of SAP's.
    That network is the one that was given to `with_sap` or `with_bernoulli_sap`, as it is now.
    Raises `SapcoreError` for a network that neither has made.
    """
    plain = getattr(model, "plain", ())
    if not plain:
        raise SapcoreError(
            "dense_backward needs a network that with_sap or with_bernoulli_sap made: it goes back through the one "
            "without noise"
        )
    network = plain[0] if device_of(plain[0]) == x.device else copy.deepcopy(plain[0]).to(x.device)
    check_network(network)
    by_logits, loss_of = torch.zeros((), device=x.device, dtype=torch.float64), _loss(loss, y)
    begun = begin(model, x.detach(), precision)
    for _, logits in noisy_passes(model, begun, ids, seed, passes, batch_size, precision):
        leaf = logits.detach().double().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(leaf).sum(), leaf)
        by_logits = by_logits + gradient.sum(0)
    leaf = x.detach().requires_grad_()
    with autocast(precision, x.device):
        dense = network(leaf).float()
    by_logits = (by_logits / count_passes(model, len(passes))).float()
    return _checked(torch.autograd.grad(dense, leaf, by_logits)[0])


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
        check_gradient(logits)
        found = torch.autograd.grad(loss(logits), heads.parts, allow_unused=True)
        for total, gradient in zip(totals, found, strict=True):
            total += 0 if gradient is None else gradient
    gradients = [total.to(part.dtype) for total, part in zip(totals, begun.parts, strict=True)]
    return _checked(torch.autograd.grad(begun.parts, leaf, gradients)[0])


def check_gradient(logits: Tensor) -> None:
    """Raises `SapcoreError` if these have no gradient."""
    if not logits.requires_grad:
        why = "in torch.inference_mode()" if torch.is_inference_mode_enabled() else "by its own forward"
        raise SapcoreError(f"the network's output has no gradient, {why}, and this attack needs one")


def _checked(gradient: Tensor) -> Tensor:
    """Raises `SapcoreError` for nan, whose sign torch takes for 0."""
    if gradient.isnan().any():
        raise SapcoreError("the network's gradient is nan, so that it shows no direction")
    return gradient


ESTIMATORS: dict[str, Estimator] = {
    "mean_of_gradients": mean_of_gradients,
    "gradient_of_mean": gradient_of_mean,
    "dense_backward": dense_backward,
}


def estimator(name: str) -> Estimator:
    """The estimator of this name."""
    if name not in ESTIMATORS:
        raise SapcoreError(f"estimator is {name!r}, but must be one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def _loss(name: str, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of scores (..., n, classes) whose true classes are y (n,): (..., n)."""
    if name not in LOSSES:
        raise SapcoreError(f"loss is {name!r}, but must be one of {', '.join(LOSSES)}")
    last = int(y.max())

    def loss(scores: Tensor) -> Tensor:
        if last >= scores.shape[-1]:
            check_labels(y, len(y), scores.shape[-1])
        return LOSSES[name](scores, y.expand(scores.shape[:-1]))

    return loss
