"""What every attack shares: checks of its arguments, batches, and the projection onto what is allowed."""

import math
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sapcore.errors import SapcoreError, check_tensor, is_number
from sapcore.evaluation import as_pixels, batches, check_labels, check_network, device_of, rows_at_once


def check_eps(eps: float) -> float:
    """eps in pixel units: a finite number of 0 or more."""
    if not is_number(eps) or not 0 <= eps < math.inf:
        raise SapcoreError(f"eps is {eps!r}, but must be a number of 0 or more, in pixel units (0-255), such as 4")
    return float(eps)


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
    while frame.f_back and frame.f_globals["__name__"].startswith("sapcore."):
        frame, level = frame.f_back, level + 1
    return level


def project(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """Back into the l-infinity ball of radius eps round x and into [0, 255]."""
    return torch.clamp(torch.clamp(x_adv, x - eps, x + eps), 0, 255)


def in_batches(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ids: Tensor | None,
    batch_size: int | None,
    precision: str,
    attack: Callable[[Tensor, Tensor, Tensor, int], Tensor],
) -> Tensor:
    """Run `attack(x, y, ids, rows per pass)` on batches of pixels in 0-255; returns float32 on the device of x."""
    check_network(model)
    check_pixels(x)
    y = check_labels(y, len(x))
    device = device_of(model)
    at_once = rows_at_once(model, x, batch_size, precision)
    done = [
        attack(as_pixels(x[rows], device), y[rows].to(device), names, at_once).to(x.device)
        for rows, names in batches(len(x), ids, at_once)
    ]
    return torch.cat(done) if done else x.float()
