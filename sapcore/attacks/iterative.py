"""The iterative attack (Kurakin et al. 2016; Sec. 4.5): small signed steps, each projected into the ball."""

import math

from torch import Tensor, nn

from sapcore.attacks.gradient import estimator as estimator_named
from sapcore.attacks.steps import check_eps, in_batches, project
from sapcore.errors import SapcoreError
from sapcore.evaluation import BATCH_SIZE, count_passes
from sapcore.randomness import stream


def iterative(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    step: float = 1,
    steps: int = 10,
    passes: int = 10,
    seed: int = 0,
    ids: Tensor | None = None,
    estimator: str = "mean_of_gradients",
    batch_size: int = BATCH_SIZE,
    precision: str = "float32",
) -> Tensor:
    """`steps` times: x_adv <- project(x_adv + step * sign(gradient at x_adv)), from x_adv = x.

    x: (N, ...) in 0-255; y: int64 (N,), true labels; eps and step: pixel units. On a noisy network each
    step draws `passes` fresh passes. Returns float32, shaped as x.
    Raises `SapcoreError` for senseless arguments and for a network in training mode.
    """
    eps = check_eps(eps)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise SapcoreError(f"steps is {steps!r}, but must be a whole number of 1 or more")
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < math.inf:
        raise SapcoreError(f"step is {step!r}, but must be a positive number, in pixel units")
    estimate, count = estimator_named(estimator), count_passes(model, passes)

    def attack(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        x_adv = x
        for i in range(steps):
            fresh = range(i * count, (i + 1) * count)
            gradient = estimate(model, x_adv, y, ids, stream(seed, "attack"), fresh, batch_size, precision)
            x_adv = project(x_adv + step * gradient.sign(), x, eps)
        return x_adv

    return in_batches(model, x, y, ids, batch_size, attack)
