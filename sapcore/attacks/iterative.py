"""The iterative attack (Kurakin et al. 2016; Sec. 4.5): small signed steps, each projected into the ball."""

import math

import torch
from torch import Tensor, nn

from sapcore.attacks.gradient import estimator as estimator_named
from sapcore.attacks.gradient import furthest_wrong
from sapcore.attacks.steps import check_eps, in_batches, project
from sapcore.errors import SapcoreError, check_count, is_number
from sapcore.evaluation import as_pixels, count_passes, predict
from sapcore.randomness import NoisyModel, per_example, stream, words


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
    batch_size: int | None = None,
    precision: str = "float32",
    stop_at_success: bool = False,
    loss: str = "cross_entropy",
    random_start: bool = False,
    restarts: int = 1,
) -> Tensor:
    """`steps` times: x_adv <- project(x_adv + step * sign(gradient at x_adv)), from x_adv = x.

    x: (N, ...) in 0-255; y: int64 (N,), true labels; eps and step: pixel units. On a noisy network each
    step draws `passes` fresh passes. Returns float32, shaped as x.
    With `stop_at_success` an image on which the network errs, in the same precision, after 1, 2, 4, ... steps is left
    as it is: sooner done on a deterministic network, and no weaker; a noisy one has no single answer to look at.
    With `random_start` x_adv begins anywhere in the ball (PGD, Madry et al. 2017). Of several `restarts`, each with
    passes of its own, that one is kept for an image whose mean softmax over `passes` more is furthest wrong.
    Raises `SapcoreError` for senseless arguments and for a network in training mode.
    """
    eps = check_eps(eps)
    check_count("restarts", restarts)
    if restarts > 1 and not (random_start or isinstance(model, NoisyModel)):
        raise SapcoreError("restarts of a deterministic network are all the same without random_start")
    check_count("steps", steps)
    if not is_number(step) or not 0 < step < math.inf:
        raise SapcoreError(f"step is {step!r}, but must be a positive number, in pixel units")
    step = float(step)
    if stop_at_success and isinstance(model, NoisyModel):
        raise SapcoreError("stop_at_success is for deterministic networks: one pass of a noisy one proves nothing")
    estimate, count = estimator_named(estimator), count_passes(model, passes)

    def attack(x: Tensor, y: Tensor, ids: Tensor, rows: int) -> Tensor:
        tried = [once(x, y, ids, rows, stream(seed, "attack" if i == 0 else f"attack {i}")) for i in range(restarts)]
        return furthest_wrong(model, tried, y, ids, passes, stream(seed, "choice"), rows, precision)

    def once(x: Tensor, y: Tensor, ids: Tensor, rows: int, seed: int) -> Tensor:
        x_adv = _anywhere(x, eps, seed, ids) if random_start else x.clone()
        left = torch.arange(len(x), device=x.device)
        for i in range(steps):
            if stop_at_success and i.bit_count() == 1:
                found = predict(model, x_adv[left], batch_size=rows, precision=precision).argmax(1)
                left = left[found.to(y.device) == y[left]]
            if not len(left):
                break
            start, before = (x, x_adv) if len(left) == len(x) else (x[left], as_pixels(x_adv[left], x.device))
            fresh = range(i * count, (i + 1) * count)
            names = ids[left.to(ids.device)]
            gradient = estimate(model, before, y[left], names, seed, fresh, rows, precision, loss)
            x_adv[left] = project(before + step * gradient.sign(), start, eps)
        return x_adv

    return in_batches(model, x, y, ids, batch_size, precision, attack)


def _anywhere(x: Tensor, eps: float, seed: int, ids: Tensor) -> Tensor:
    """A point of the ball round each image, each pixel's change uniform in [-eps, eps], clipped to [0, 255]."""
    names, passes = per_example(len(x), ids, 0)
    word = words(stream(seed, "start"), names.cpu(), passes, 0, math.prod(x.shape[1:]))
    change = (((word.double() + 0.5) * 2.0**-31 - 1) * eps).reshape(x.shape)
    return torch.clamp(x + change.to(x), 0, 255)
