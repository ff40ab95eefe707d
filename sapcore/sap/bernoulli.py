"""The SAP that "Obfuscated Gradients" attacked (Athalye et al. 2018, their released code): not the paper's.

It differs from Algorithm 1 in three ways: each unit is kept by a coin of its own, with probability 1 - exp(-r p), as if
the number of draws were Poisson's; r is 2 a for a map of a units; and it comes after every convolution, where units are
negative too, and not after the ReLU. Dhillon and Carlini (2020) say what follows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sapcore import noise_cpu
from sapcore.errors import SapcoreError
from sapcore.randomness import Noise, NoisyModel, words
from sapcore.sap import cpu
from sapcore.sap.layer import check_backward, count_draws, put_after
from sapcore.sap.reference import draws, from_units, to_units


def with_bernoulli_sap(model: nn.Module, percent: float = 200, backward: str = "constant") -> NoisyModel:
    """A copy of a pretrained network with Bernoulli SAP after every convolution; the original is untouched.

    `backward` as in `SAP`; their own attack goes through the scale. Raises `SapcoreError` if there is no convolution.
    """
    noise = Noise()
    guarded = put_after(model, nn.Conv2d, lambda _: BernoulliSAP(percent, noise, backward), hint="")
    noisy = NoisyModel(guarded, noise, {"kind": "bernoulli-sap", "percent": percent})
    noisy.plain = (model,)
    return noisy


class BernoulliSAP(nn.Module):
    """h / q where a coin of probability q = 1 - exp(-r |h| / sum |h|) says so, else 0; h (N, ...) -> the same shape."""

    def __init__(self, percent: float, noise: Noise, backward: str = "constant") -> None:
        super().__init__()
        self.percent, self.noise, self.backward_kind = percent, noise, check_backward(backward)
        draws(percent, 1)

    def forward(self, h: Tensor) -> Tensor:
        noise = self.noise
        if noise.ids is None or noise.passes is None:
            raise SapcoreError("Bernoulli SAP needs its network's random numbers: call what with_bernoulli_sap made")
        r = count_draws(h, self.percent, noise.ids)
        names = noise.seed, noise.ids, noise.passes, noise.next_layer()
        fast = h.device.type == "cpu" and h.dtype in noise_cpu.DTYPES
        if self.backward_kind == "identity":
            out = _Coins.apply(h.detach(), r, *names, False) if fast else h.detach() * _factor(h.detach(), r, *names)
            return out + (h - h.detach())
        scaled = self.backward_kind == "scale"
        if fast:
            return _Coins.apply(h, r, *names, scaled)
        return h * _factor(h if scaled else h.detach(), r, *names)

    def extra_repr(self) -> str:
        return f"percent={self.percent}, backward={self.backward_kind!r}"


def _factor(h: Tensor, r: int, seed: int, ids: Tensor, passes: Tensor, layer: int) -> Tensor:
    """0 or 1 / q for each unit, as h; differentiable in h, given the coins."""
    size = to_units(h if h.dtype == torch.float64 else h.float()).abs()
    u = (words(seed, ids.to(h.device), passes.to(h.device), layer, size.shape[1], noise_cpu.COINS) + 0.5) * 2.0**-32
    q = -torch.expm1(-r * size / size.sum(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny))
    keep = (u <= q) & (q > 0)
    return from_units(torch.where(keep, 1 / torch.where(keep, q, 1.0), 0.0).to(h.dtype), h)


class _Coins(torch.autograd.Function):
    """The same by the CPU's kernel."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, r: int, seed: int, ids: Tensor, passes: Tensor, layer: int, through_scale: bool
    ) -> Tensor:
        want = ctx.needs_input_grad[0]
        out, factor = noise_cpu.forward(h, "bernoulli-sap", r, False, seed, ids, passes, layer, want)
        if factor is not None:
            ctx.save_for_backward(h, factor)
        ctx.rest = r, through_scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, factor = ctx.saved_tensors
        r, through_scale = ctx.rest
        found = cpu.through_scale(h, factor, grad, r, coins=True) if through_scale else grad * factor
        return found, *[None] * 6
