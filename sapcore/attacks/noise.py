"""Random noise of the size of an attack: what a perturbation does that knows nothing of the network (Fig. 1a)."""

import math

import torch
from torch import Tensor

from sapcore.attacks.steps import check_eps
from sapcore.evaluation import as_pixels, check_pixels
from sapcore.randomness import per_example, stream, words


def noise(x: Tensor, eps: float, seed: int = 0, ids: Tensor | None = None) -> Tensor:
    """clip(x + eps s) with each s = +1 or -1 at random (Sec. 4.1, Fig. 1a).

    x: (N, ...) in 0-255; eps: pixel units; ids: int64 (N,), default 0..N-1. Returns float32, shaped as x.
    The signs depend on (seed, id, pixel) alone.
    """
    eps = check_eps(eps)
    check_pixels(x)
    ids, passes = per_example(len(x), ids, 0)
    word = words(stream(seed, "noise"), ids, passes, 0, math.prod(x.shape[1:]))
    sign = ((word & 1) * 2 - 1).reshape(x.shape).to(x.device)
    return torch.clamp(as_pixels(x, x.device) + eps * sign, 0, 255)
