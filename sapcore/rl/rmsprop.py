"""Centered RMSProp as Mnih et al. (2015) have it: two averages, and the constant under the root.

torch.optim.RMSprop adds the constant after the root and knows one decay: where gradients are small, its steps are ten
times longer.

Numba caches what it compiles by the time stamp of this file alone: touch it after a change of sap/cpu.py.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor, nn

from sapcore.sap.cpu import _load, _rounded


class RMSProp:
    """For each parameter with gradient g:

    m <- gamma1 m + (1 - gamma1) g,  n <- gamma2 n + (1 - gamma2) g^2,
    parameter <- parameter - rate g / sqrt(n - m^2 + epsilon).

    With `copies` of the parameters, in bfloat16 for instance, the gradients are those of the copies, and each step
    ends with the parameters rounded to them.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], rate: float, gamma1: float, gamma2: float, epsilon: float,
        copies: Iterable[nn.Parameter] | None = None,
    ) -> None:  # fmt: skip
        self.parameters = list(parameters)
        self.copies = self.parameters if copies is None else list(copies)
        self.constants = (rate, gamma1, gamma2, epsilon)
        self.kept = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient."""
        for parameter, copy, (m, n) in zip(self.parameters, self.copies, self.kept, strict=True):
            if copy.grad is None:
                continue
            alike = parameter.stride() == copy.stride() and copy.dtype in (torch.float32, torch.bfloat16)
            if alike and parameter.device.type == "cpu" and parameter.dtype == torch.float32:
                arrays = (_flat(t, parameter) for t in (parameter.detach(), copy.detach(), copy.grad, m, n))
                _fused(*arrays, *(np.float32(x) for x in self.constants))
            else:
                reference(parameter, copy.grad.to(parameter.dtype), m, n, *self.constants)
                copy.copy_(parameter)

    def state(self) -> dict[str, Tensor]:
        """What is remembered between steps, by name."""
        return {f"{name}{i}": t for i, kept in enumerate(self.kept) for name, t in zip("mn", kept, strict=True)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, t in self.state().items():
            t.copy_(state[name])


def reference(
    parameter: Tensor, g: Tensor, m: Tensor, n: Tensor, rate: float, gamma1: float, gamma2: float, epsilon: float
) -> None:
    """The rule in plain torch, in place."""
    m.mul_(gamma1).add_(g, alpha=1 - gamma1)
    n.mul_(gamma2).addcmul_(g, g, value=1 - gamma2)
    parameter.sub_(rate * g / (n - m * m + epsilon).sqrt())


def _flat(t: Tensor, like: Tensor) -> NDArray[Any]:
    """A view of all numbers in the order in which `like` has them in memory, bfloat16 as uint16."""
    if t.stride() != like.stride():
        t = torch.empty_like(like, dtype=t.dtype).copy_(t)
    flat = t.as_strided((t.numel(),), (1,))
    return (flat.view(torch.uint16) if t.dtype == torch.bfloat16 else flat).numpy()


@njit(parallel=True, nogil=True, cache=True, fastmath={"contract"})
def _fused(parameter, copy, gradient, m, n, rate, gamma1, gamma2, epsilon):
    """The rule in one pass over memory."""
    one = np.float32(1)
    for i in prange(len(m)):
        g = _load(gradient[i])
        mean = gamma1 * m[i] + (one - gamma1) * g
        square = gamma2 * n[i] + (one - gamma2) * g * g
        new = parameter[i] - rate * g / math.sqrt(square - mean * mean + epsilon)
        m[i], n[i], parameter[i], copy[i] = mean, square, new, _rounded(new, copy)
