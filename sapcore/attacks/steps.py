"""What every attack shares: checks of its arguments, batches, and the projection onto what is allowed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sapcore.errors import SapcoreError, is_number
from sapcore.evaluation import as_pixels, batches, check_labels, check_network, check_pixels, device_of, rows_at_once


def check_eps(eps: float) -> float:
    """eps in pixel units: a finite number of 0 or more."""
    if not is_number(eps) or not 0 <= eps < math.inf:
        raise SapcoreError(f"eps is {eps!r}, but must be a number of 0 or more, in pixel units (0-255), such as 4")
    return float(eps)


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
