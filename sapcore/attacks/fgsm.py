"""The fast gradient sign method (Goodfellow et al. 2014; Sec. 2), by Monte Carlo on noisy networks (Sec. 3.2)."""

import torch
from torch import Tensor, nn

from sapcore.attacks.gradient import estimator as estimator_named
from sapcore.attacks.steps import check_eps, in_batches
from sapcore.evaluation import as_pixels, count_passes
from sapcore.randomness import stream


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    passes: int = 100,
    seed: int = 0,
    ids: Tensor | None = None,
    estimator: str = "mean_of_gradients",
    batch_size: int | None = None,
    precision: str = "float32",
    loss: str = "cross_entropy",
) -> Tensor:
    """clip(x + eps sign(gradient)), clipped to [0, 255].

    x: (N, ...) in 0-255; y: int64 (N,), true labels; eps: pixel units. On a noisy network the gradient is
    estimated from `passes` passes, which a deterministic network does not need. Returns float32, shaped as x.
    Raises `SapcoreError` for senseless arguments and for a network in training mode.
    """
    eps = check_eps(eps)
    direction = fgsm_direction(model, x, y, passes, seed, ids, estimator, batch_size, precision, loss)
    return torch.clamp(as_pixels(x, x.device) + eps * direction, 0, 255)


def fgsm_direction(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    passes: int = 100,
    seed: int = 0,
    ids: Tensor | None = None,
    estimator: str = "mean_of_gradients",
    batch_size: int | None = None,
    precision: str = "float32",
    loss: str = "cross_entropy",
) -> Tensor:
    """The sign of the gradient at x, which does not depend on eps: float32 in {-1, 0, 1}, shaped as x."""
    estimate, count = estimator_named(estimator), count_passes(model, passes)

    def attack(x: Tensor, y: Tensor, ids: Tensor, rows: int) -> Tensor:
        return estimate(model, x, y, ids, stream(seed, "attack"), range(count), rows, precision, loss).sign()

    return in_batches(model, x, y, ids, batch_size, precision, attack)
