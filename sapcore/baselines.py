"""Other ways to make a pretrained network stochastic or sparse: dropout (Sec. 4.1) and six more (Sec. 4.3, App. B).

Each is a copy of the network, as `with_sap` makes one. Noise on activations comes after every ReLU and has
numbers of its own for every image and pass. Noise on weights is on every tensor of weights of a convolution or
a linear layer, not on biases and BatchNorm; it is drawn anew for every pass, and all images of a pass share it.
"""

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from sapcore import noise_cpu
from sapcore.errors import SapcoreError, is_number
from sapcore.randomness import Begun, Noise, NoisyModel, copy_of, normal, per_example, split_seed, words
from sapcore.sap.layer import ModuleTypes, put_after, sap
from sapcore.sap.reference import draws, from_units, to_units

BACKENDS = ("auto", "reference", "cpu")


def with_dropout(
    model: nn.Module, rate: float = 0.1, backend: str = "auto", after: ModuleTypes = (nn.ReLU,)
) -> NoisyModel:
    """Dropout after every ReLU, on at test time too: a unit is 0 with probability `rate`, else h / (1 - rate) (Fig. 2).

    `after`: other types of modules that it follows, as in `with_sap`.
    Raises `SapcoreError` unless 0 <= rate < 1.
    """
    if not is_number(rate) or not 0 <= rate < 1:
        raise SapcoreError(f"rate is {rate!r}, but must be a number from 0 to below 1")
    return _noisy_activations(model, "dropout", float(rate), backend, after)


def with_rna(model: nn.Module, std: float, backend: str = "auto", after: ModuleTypes = (nn.ReLU,)) -> NoisyModel:
    """Random noisy activations: h + N(0, std^2) for each unit after every ReLU, or `after` others (App. B.5)."""
    return _noisy_activations(model, "rna", _check_std(std), backend, after)


def with_rsa(model: nn.Module, std: float, backend: str = "auto", after: ModuleTypes = (nn.ReLU,)) -> NoisyModel:
    """Randomly scaled activations: h N(1, std^2) for each unit after every ReLU, or `after` others (App. B.6)."""
    return _noisy_activations(model, "rsa", _check_std(std), backend, after)


def with_rnw(model: nn.Module, std: float) -> NoisyModel:
    """Random noisy weights: w + N(0, std^2) for each weight, anew for every pass (App. B.1)."""
    std = _check_std(std)

    def noisy(w: Tensor, seed: int, number: int, layer: int) -> Tensor:
        return w + std * _normal_like(w, seed, number, layer)

    return _NoisyWeights(model, noisy, {"kind": "rnw", "std": std})


def with_rsw(model: nn.Module, std: float) -> NoisyModel:
    """Randomly scaled weights: w N(1, std^2) for each weight, anew for every pass (App. B.2)."""
    std = _check_std(std)

    def scaled(w: Tensor, seed: int, number: int, layer: int) -> Tensor:
        return w * (1 + std * _normal_like(w, seed, number, layer))

    return _NoisyWeights(model, scaled, {"kind": "rsw", "std": std})


def with_swp(model: nn.Module, percent: float = 100) -> NoisyModel:
    """Stochastic weight pruning: SAP's rule on each tensor of weights, anew for every pass (App. B.4).

    Of n weights, int(percent/100 n) are drawn with replacement with probability |w| / sum |w|; those drawn at
    least once are divided by the probability of that, the others are 0.
    """
    draws(percent, 1)

    def pruned(w: Tensor, seed: int, number: int, layer: int) -> Tensor:
        first = torch.zeros(1, dtype=torch.int64)
        return sap(w.reshape(1, -1), percent, seed, ids=first, passes=number, layer=layer).reshape(w.shape)

    return _NoisyWeights(model, pruned, {"kind": "swp", "percent": percent})


def with_dwp(model: nn.Module, percent: float) -> nn.Module:
    """Deterministic weight pruning: the largest `percent` % of each tensor of weights stay, the rest are 0 (App. B.3).

    By magnitude, round(percent/100 n) of n, and of equal ones the first.
    Raises `SapcoreError` unless 0 <= percent <= 100.
    """
    if not is_number(percent) or not 0 <= percent <= 100:
        raise SapcoreError(f"percent is {percent!r}, but must be a number from 0 to 100")
    percent = float(percent)
    pruned = copy_of(model)
    for _, weight in _weights(pruned):
        flat = weight.detach().reshape(-1)
        order = flat.abs().argsort(descending=True, stable=True)
        smallest = order[round(percent / 100 * len(order)) :]
        kept = flat.clone()
        kept[smallest] = 0
        with torch.no_grad():
            weight.copy_(kept.reshape(weight.shape))
    return pruned


BASELINES: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    "dropout": with_dropout,
    "rnw": with_rnw,
    "rsw": with_rsw,
    "dwp": with_dwp,
    "swp": with_swp,
    "rna": with_rna,
    "rsa": with_rsa,
}
"""Each takes a network and its level: dropout's rate, a standard deviation, or a percentage."""


def _check_std(std: float) -> float:
    if not is_number(std) or not 0 <= std < math.inf:
        raise SapcoreError(f"std is {std!r}, but must be a number of 0 or more")
    return float(std)


def _noisy_activations(model: nn.Module, kind: str, level: float, backend: str, after: ModuleTypes) -> NoisyModel:
    noise = Noise()
    noisy = put_after(model, after, lambda rectify: ActivationNoise(kind, level, noise, backend, rectify))
    return NoisyModel(noisy, noise, {"kind": kind, "level": level})


class ActivationNoise(nn.Module):
    """A layer that does to each unit what `kind` says: dropout, rna or rsa; with `rectify`, to its relu."""

    def __init__(self, kind: str, level: float, noise: Noise, backend: str = "auto", rectify: bool = False) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise SapcoreError(f"backend is {backend!r}, but must be one of {', '.join(BACKENDS)}")
        self.kind, self.level, self.noise, self.backend, self.rectify = kind, level, noise, backend, rectify

    def forward(self, h: Tensor) -> Tensor:
        noise = self.noise
        if noise.ids is None or noise.passes is None or len(noise.ids) != len(h):
            given = 0 if noise.ids is None else len(noise.ids)
            raise SapcoreError(f"the map holds {len(h)} examples, but the network was given {given}; each has its own")
        names = noise.seed, noise.ids, noise.passes, noise.next_layer()
        fast = self.backend != "reference" and h.device.type == "cpu" and h.dtype in noise_cpu.DTYPES
        if self.backend == "cpu" and not fast:
            raise SapcoreError(f"backend cpu takes float32 and bfloat16 on the CPU, but h is {h.dtype} on {h.device}")
        out: Tensor = _Noise.apply(h, self.kind, self.level, self.rectify, *names, fast)
        return out

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.level}" + ", rectify=True" * self.rectify


class _Noise(torch.autograd.Function):
    """relu(h) * factor + shift, or h * factor + shift; the derivative by h is what the forward pass kept."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, kind: str, level: float, rectify: bool,
        seed: int, ids: Tensor, passes: Tensor, layer: int, fast: bool,
    ) -> Tensor:  # fmt: skip
        run = noise_cpu.forward if fast else reference
        want = ctx.needs_input_grad[0]
        out, derivative = run(h, kind, level, rectify, seed, ids, passes, layer, want)
        if derivative is not None:
            ctx.save_for_backward(derivative)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        return grad * derivative, *[None] * 8


def reference(
    h: Tensor, kind: str, level: float, rectify: bool,
    seed: int, ids: Tensor, passes: Tensor, layer: int, want_derivative: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The noise in plain torch: the noisy map and its derivative by h, both as h. Arithmetic is in float32 at least."""
    flat = to_units(h.detach())
    flat = flat if flat.dtype == torch.float64 else flat.float()
    factor, shift = torch.ones_like(flat), torch.zeros_like(flat)
    if kind == "dropout":
        dropped = words(seed, ids, passes, layer, flat.shape[1], noise_cpu.DROPOUT) < round(level * 2**32)
        factor = torch.where(dropped, 0.0, 1 / (1 - level)).to(flat.dtype)
    else:
        z = normal(seed, ids, passes, layer, flat.shape[1], noise_cpu.GAUSSIAN).to(flat.dtype)
        factor, shift = (factor, level * z) if kind == "rna" else (1 + level * z, shift)
    if rectify:
        derivative = torch.where(flat > 0, factor, 0.0)
        flat = flat.relu()
    else:
        derivative = factor
    out = flat * factor + shift
    return from_units(out.to(h.dtype), h), from_units(derivative.to(h.dtype), h) if want_derivative else None


def _normal_like(w: Tensor, seed: int, number: int, layer: int) -> Tensor:
    """Standard normal numbers shaped as a tensor of weights."""
    ids, passes = (torch.tensor([i], device=w.device) for i in (0, number))
    run = noise_cpu.forward if w.device.type == "cpu" else reference
    zeros = torch.zeros(1, w.numel(), device=w.device)
    z, _ = run(zeros, "rna", 1.0, False, seed, ids, passes, layer, want_derivative=False)
    return z.to(w.dtype).reshape(w.shape)


def _weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The weights of convolutions and linear layers by name, in the order of the network; a shared one once."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    once: dict[int, tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            if parametrize.is_parametrized(module):
                raise SapcoreError(
                    f"the weights of {name or 'the network'} are computed anew at each call (parametrized); call "
                    "torch.nn.utils.parametrize.remove_parametrizations first"
                )
            once.setdefault(id(module.weight), (f"{name}.weight" if name else "weight", module.weight))
    if not once:
        raise SapcoreError("the network has no convolution and no linear layer whose weights could be changed")
    return list(once.values())


_ONE_PASS_AT_A_TIME = threading.RLock()
"""Other threads would see a pass's weights in the place of the network's own."""


class _NoisyWeights(NoisyModel):
    """A network whose weights are replaced for the length of a pass; its own stay as they are, whatever happens."""

    def __init__(
        self, model: nn.Module, noisy: Callable[[Tensor, int, int, int], Tensor], description: dict[str, object]
    ) -> None:
        super().__init__(copy_of(model), Noise(), description)
        self.noisy = noisy
        _weights(self.model)

    def weights(self, seed: int, number: int) -> dict[str, Tensor]:
        """The weights of one pass, by name, each laid out in memory as the network's own."""
        return {
            name: torch.empty_like(weight).copy_(self.noisy(weight, seed, number, layer))
            for layer, (name, weight) in enumerate(_weights(self.model))
        }

    def forward(self, x: Tensor | Begun, seed: int = 0, ids: Tensor | None = None, passes: Tensor | int = 0) -> Tensor:
        """One noisy pass per row, as `NoisyModel.forward`; the images of a pass share its noise, whatever their ids."""
        split_seed(seed)
        rows = x.parts[0] if isinstance(x, Begun) else x
        _, numbers = per_example(len(rows), ids, passes)
        if not len(rows):
            return self.model(rows)
        outputs, places = [], []
        for number in numbers.unique().tolist():
            place = (numbers == number).nonzero()[:, 0]
            chosen = rows if len(place) == len(rows) else rows[place.to(rows.device)]
            with _ONE_PASS_AT_A_TIME:
                outputs.append(functional_call(self.model, self.weights(seed, number), (chosen,)))
            places.append(place)
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs)[torch.cat(places).argsort().to(rows.device)]

    def begin(self, x: Tensor) -> Begun:
        """Passes have nothing in common: the noise begins with the first weights."""
        return Begun(self.model, (x,))
