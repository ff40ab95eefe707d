"""Centered RMSProp as MXNet, and so the authors' code, has it: the constant is under the root (Graves 2013, eq. 38-45).

torch.optim.RMSprop adds it after the root, which is another step: where gradients are small, ten times longer.
"""

import math
from collections.abc import Iterable

import torch
from numba import njit, prange
from torch import Tensor, nn


class RMSProp:
    """For each parameter with gradient g:

    n <- gamma1 n + (1 - gamma1) g^2,  m <- gamma1 m + (1 - gamma1) g,
    d <- gamma2 d - rate g / sqrt(n - m^2 + epsilon),  parameter <- parameter + d.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], rate: float, gamma1: float, gamma2: float, epsilon: float
    ) -> None:
        self.parameters = list(parameters)
        self.constants = (rate, gamma1, gamma2, epsilon)
        self.kept = [[torch.zeros_like(p) for _ in "nmd"] for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient."""
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            if parameter.grad is None:
                continue
            if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
                arrays = (_flat(t, parameter).numpy() for t in (parameter.detach(), parameter.grad, *kept))
                _fused(*arrays, *self.constants)
            else:
                n, m, d = kept
                reference(parameter, parameter.grad, n, m, d, *self.constants)

    def state(self) -> dict[str, Tensor]:
        """What is remembered between steps, by name."""
        return {f"{name}{i}": t for i, kept in enumerate(self.kept) for name, t in zip("nmd", kept, strict=True)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, t in self.state().items():
            t.copy_(state[name])


def reference(
    parameter: Tensor, g: Tensor, n: Tensor, m: Tensor, d: Tensor,
    rate: float, gamma1: float, gamma2: float, epsilon: float,
) -> None:  # fmt: skip
    """The rule in plain torch, in place."""
    n.mul_(gamma1).addcmul_(g, g, value=1 - gamma1)
    m.mul_(gamma1).add_(g, alpha=1 - gamma1)
    d.mul_(gamma2).sub_(rate * g / (n - m * m + epsilon).sqrt())
    parameter.add_(d)


def _flat(t: Tensor, like: Tensor) -> Tensor:
    """A view of all numbers in the order in which `like` has them in memory."""
    if t.stride() != like.stride():
        t = torch.empty_like(like).copy_(t)
    return t.as_strided((t.numel(),), (1,))


@njit(parallel=True, nogil=True, cache=True, fastmath={"contract"})
def _fused(parameter, g, n, m, d, rate, gamma1, gamma2, epsilon):
    """The rule in one pass over memory."""
    for i in prange(len(g)):
        n[i] = gamma1 * n[i] + (1 - gamma1) * g[i] * g[i]
        m[i] = gamma1 * m[i] + (1 - gamma1) * g[i]
        d[i] = gamma2 * d[i] - rate * g[i] / math.sqrt(n[i] - m[i] * m[i] + epsilon)
        parameter[i] += d[i]
