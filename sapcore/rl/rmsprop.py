"""Centered RMSProp as Mnih et al. (2015) have it: two averages, and the constant under the root.

torch.optim.RMSprop adds the constant after the root and knows one decay: where gradients are small, its steps are ten
times longer.
"""

import math
from collections.abc import Iterable

import torch
from numba import njit, prange
from torch import Tensor, nn


class RMSProp:
    """For each parameter with gradient g:

    m <- gamma1 m + (1 - gamma1) g,  n <- gamma2 n + (1 - gamma2) g^2,
    parameter <- parameter - rate g / sqrt(n - m^2 + epsilon).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], rate: float, gamma1: float, gamma2: float, epsilon: float
    ) -> None:
        self.parameters = list(parameters)
        self.constants = (rate, gamma1, gamma2, epsilon)
        self.kept = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient."""
        for parameter, (m, n) in zip(self.parameters, self.kept, strict=True):
            if parameter.grad is None:
                continue
            if parameter.device.type == "cpu" and parameter.dtype == torch.float32:
                arrays = (_flat(t, parameter).numpy() for t in (parameter.detach(), parameter.grad, m, n))
                _fused(*arrays, *self.constants)
            else:
                reference(parameter, parameter.grad, m, n, *self.constants)

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


def _flat(t: Tensor, like: Tensor) -> Tensor:
    """A view of all numbers in the order in which `like` has them in memory."""
    if t.stride() != like.stride():
        t = torch.empty_like(like).copy_(t)
    return t.as_strided((t.numel(),), (1,))


@njit(parallel=True, nogil=True, cache=True, fastmath={"contract"})
def _fused(parameter, g, m, n, rate, gamma1, gamma2, epsilon):
    """The rule in one pass over memory."""
    for i in prange(len(g)):
        m[i] = gamma1 * m[i] + (1 - gamma1) * g[i]
        n[i] = gamma2 * n[i] + (1 - gamma2) * g[i] * g[i]
        parameter[i] -= rate * g[i] / math.sqrt(n[i] - m[i] * m[i] + epsilon)
