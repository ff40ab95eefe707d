"""SAP as a function, as a module, and as a copy of a pretrained network with SAP after every ReLU."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from sapcore.errors import SapcoreError, check_tensor
from sapcore.randomness import Noise, NoisyModel, check_plain, copy_of, per_example
from sapcore.sap import cpu, reference

BACKENDS = ("auto", "reference", "cpu", "gpu")
BACKWARDS = ("constant", "scale", "identity")
ModuleTypes = type[nn.Module] | tuple[type[nn.Module], ...]


@overload
def sap(h: Tensor, percent: float = ..., seed: int = ..., ids: Tensor | None = ..., passes: Tensor | int = ...,
        layer: int = ..., return_mask: Literal[False] = ..., backend: str = ...) -> Tensor: ...  # fmt: skip
@overload
def sap(h: Tensor, percent: float = ..., seed: int = ..., ids: Tensor | None = ..., passes: Tensor | int = ...,
        layer: int = ..., *, return_mask: Literal[True], backend: str = ...) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def sap(
    h: Tensor,
    percent: float = 100,
    seed: int = 0,
    ids: Tensor | None = None,
    passes: Tensor | int = 0,
    layer: int = 0,
    return_mask: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Stochastic Activation Pruning of a batch of activation maps (Sec. 3, Algorithm 1).

    Of each example's map of a units, int(percent/100 * a) are drawn with replacement with probability
    p_j = |h_j| / sum |h|. A unit drawn at least once becomes h_j / (1 - (1 - p_j)^r), any other 0, so
    that the mean of the output is h. A map of zeros stays zero, as does one from which r = 0 units are drawn.

    h: float (N, ...) -> the same shape (channels_last if 4-D). The mask is a function of
    (seed, ids, passes, layer, unit): ids, int64 (N,), modulo 2**32, names the examples, default 0..N-1; passes, int or
    int64 (N,), numbers the Monte Carlo sample; layer numbers the map within a network. With
    `return_mask` the result is (output, mask), mask bool and shaped as h.
    The gradient takes mask and scale as constants, as the authors' code does.
    `backend`: "reference" (plain torch), "cpu" or "gpu" (fused kernels), or "auto", which takes the kernel if
    there is one for h. All keep the same units, but for ties in rounding.
    Raises `SapcoreError` for nan or inf (the gpu kernel returns nan instead, so as not to wait for the device),
    for percent <= 0, for a layer that is no whole number from 0 to 65,535, and for maps of more than 2**22 units.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < 2**16:
        raise SapcoreError(f"layer is {layer!r}, but must be a whole number from 0 to 65535")
    check_tensor("h", h)
    ids, passes = (t.to(h.device) for t in per_example(len(h) if h.dim() else 0, ids, passes))
    out, mask = _sap(h, percent, seed, ids, passes, layer, False, return_mask, backend)
    return (out, mask) if return_mask else out


def _sap(
    h: Tensor,
    percent: float,
    seed: int,
    ids: Tensor,
    passes: Tensor,
    layer: int,
    rectify: bool,
    want_mask: bool,
    backend: str,
) -> tuple[Tensor, Any]:
    """`sap` of h, or of relu(h) in the same step; the mask is None if it is not wanted."""
    check_backend(backend)
    if h.dim() < 2 or not h.is_floating_point():
        raise SapcoreError(f"h is {h.dtype} with shape {tuple(h.shape)}, but must be float with shape (N, ...)")
    r = count_draws(h, percent, ids)
    if backend == "auto":
        backend = "cpu" if _cpu_takes(h) else "gpu" if h.device.type == "cuda" and _gpu_takes(h) else "reference"
    elif backend == "cpu" and not _cpu_takes(h):
        raise SapcoreError(f"backend cpu takes float32 and bfloat16 maps on the CPU, but h is {h.dtype} on {h.device}")
    elif backend == "gpu" and not _gpu_takes(h):
        raise SapcoreError(
            "backend gpu takes float32, bfloat16 and float16 maps on a GPU that Triton knows, "
            f"but h is {h.dtype} on {h.device}"
        )
    if backend == "cpu" and not (h.requires_grad and torch.is_grad_enabled()):  # autograd costs as much as a small map
        out, _, mask = cpu.forward(h, r, seed, ids, passes, layer, rectify, False, want_mask)
        return out, mask
    function = _SapOnGpu if backend == "gpu" else _Sap
    return function.apply(h, r, seed, ids, passes, layer, rectify, want_mask, backend)


def count_draws(h: Tensor, percent: float, ids: Tensor | None) -> int:
    """How many units of each map are drawn, once it is sure that every map has a name."""
    if ids is None or len(ids) != len(h):
        given = 0 if ids is None else len(ids)
        raise SapcoreError(f"the map holds {len(h)} examples, but the network was given {given}; SAP prunes each alone")
    return reference.draws(percent, h.numel() // len(h) if len(h) else 0)


def _cpu_takes(h: Tensor) -> bool:
    return h.device.type == "cpu" and h.dtype in cpu.DTYPES


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _gpu_takes(h: Tensor) -> bool:
    if not _has_triton():
        return False
    from sapcore.sap import gpu

    return (h.device.type == "cuda" or gpu.INTERPRETED) and h.dtype in gpu.DTYPES


class _Sap(torch.autograd.Function):
    """SAP whose backward pass multiplies by the factors that the forward pass kept."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        r: int,
        seed: int,
        ids: Tensor,
        passes: Tensor,
        layer: int,
        rectify: bool,
        want_mask: bool,
        backend: str,
        affine: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        want_factor = ctx.needs_input_grad[0]
        if backend == "cpu":
            out, factor, mask = cpu.forward(h, r, seed, ids, passes, layer, rectify, want_factor, want_mask, affine)
        else:
            out, factor, mask = reference.forward(h, r, seed, ids, passes, layer, rectify)
        if want_factor:
            ctx.save_for_backward(factor)
        if not want_mask:
            return out, None
        ctx.mark_non_differentiable(mask)
        return out, mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        return grad * factor, *[None] * 9


class _ThroughScale(torch.autograd.Function):
    """SAP by the CPU's kernel, whose backward pass goes through p and the scale too."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, r: int, seed: int, ids: Tensor, passes: Tensor, layer: int, rectify: bool
    ) -> Tensor:
        out, factor, _ = cpu.forward(h, r, seed, ids, passes, layer, rectify, True, False)
        assert factor is not None
        ctx.save_for_backward(h, factor)
        ctx.rest = r, rectify
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, factor = ctx.saved_tensors
        r, rectify = ctx.rest
        return cpu.through_scale(h, factor, grad, r, rectify), *[None] * 6


class _SapOnGpu(torch.autograd.Function):
    """SAP whose backward pass makes the factors anew from the map and the names of its random numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        r: int,
        seed: int,
        ids: Tensor,
        passes: Tensor,
        layer: int,
        rectify: bool,
        want_mask: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        from sapcore.sap import gpu

        ctx.save_for_backward(h, ids, passes)
        ctx.rest = r, seed, layer, rectify
        out, mask = gpu.scaled(h, h, r, seed, ids, passes, layer, rectify, want_mask)
        if mask is not None:
            ctx.mark_non_differentiable(mask)
        return out, mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        from sapcore.sap import gpu

        h, ids, passes = ctx.saved_tensors
        r, seed, layer, rectify = ctx.rest
        return gpu.scaled(h, grad, r, seed, ids, passes, layer, rectify, False)[0], *[None] * 8


class SAP(nn.Module):
    """A layer that applies `sap` with the random numbers that its network's `Noise` names.

    With `rectify` it stands for a ReLU and the SAP after it, in one step: the same numbers, sooner.
    `backward` is what a gradient sees: "constant" takes mask and scale as constants, as the authors' code does;
    "scale" goes through the scale too; "identity" sees the map as if SAP were not there (BPDA, Athalye et al. 2018).
    """

    def __init__(
        self, percent: float, noise: Noise, backend: str = "auto", rectify: bool = False, backward: str = "constant"
    ) -> None:
        super().__init__()
        reference.draws(percent, 1)
        self.percent, self.noise, self.backend, self.rectify = percent, noise, check_backend(backend), rectify
        self.backward_kind = check_backward(backward)

    def forward(self, h: Tensor) -> Tensor:
        noise = self.noise
        if noise.ids is None or noise.passes is None:
            raise SapcoreError("a SAP layer needs its network's random numbers: call the NoisyModel that with_sap made")
        names = noise.seed, noise.ids, noise.passes, noise.next_layer()
        if self.backward_kind == "constant" or not (h.requires_grad and torch.is_grad_enabled()):
            return _sap(h, self.percent, *names, self.rectify, False, self.backend)[0]
        scaled = self.backward_kind == "scale"
        if scaled and _cpu_takes(h) and self.backend in ("auto", "cpu"):
            ids, passes = (t.to(h.device) for t in (noise.ids, noise.passes))
            r = count_draws(h, self.percent, ids)
            return _ThroughScale.apply(h, r, noise.seed, ids, passes, names[-1], self.rectify)
        h = h.relu() if self.rectify else h
        out, mask = _sap(h.detach(), self.percent, *names, False, scaled, self.backend)
        soft = scaled_by_mask(h, mask, self.percent) if scaled else h
        return out + (soft - soft.detach())

    def extra_repr(self) -> str:
        more = "" if self.backward_kind == "constant" else f", backward={self.backward_kind!r}"
        return f"percent={self.percent}" + ", rectify=True" * self.rectify + more

    def absorb(self, before: nn.Module) -> nn.Module | None:
        """A layer that is `before`, then this one, in one step; None if there is none."""
        if type(before) is nn.ReLU and not self.rectify:
            return SAP(self.percent, self.noise, self.backend, True, self.backward_kind)
        if type(before) is nn.BatchNorm2d and self.rectify and self.backward_kind == "constant":
            return NormalizedSAP(before, self)
        return None


def check_backend(backend: str) -> str:
    """One of `BACKENDS`."""
    if backend not in BACKENDS:
        raise SapcoreError(f"backend is {backend!r}, but must be one of {', '.join(BACKENDS)}")
    return backend


def check_backward(backward: str) -> str:
    """One of `BACKWARDS`."""
    if backward not in BACKWARDS:
        raise SapcoreError(f"backward is {backward!r}, but must be one of {', '.join(BACKWARDS)}")
    return backward


def scaled_by_mask(h: Tensor, mask: Tensor, percent: float) -> Tensor:
    """h / (1 - (1 - p)^r) where the mask keeps it, else 0: differentiable in h through p too, given the mask."""
    flat = reference.to_units(h)
    wide = flat if flat.dtype == torch.float64 else flat.float()
    p = wide.abs() / wide.abs().sum(1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    keep = reference.to_units(mask) & (p > 0)
    inside = torch.where(keep, p, 0.5).clamp(max=1 - torch.finfo(wide.dtype).eps)  # where the derivative is finite
    r = max(1, reference.draws(percent, flat.shape[1]))  # of no draws nothing is kept
    out = torch.where(keep, wide * reference.scale(inside, r), 0.0)
    return reference.from_units(out.to(h.dtype), h)


class NormalizedSAP(nn.Module):
    """BatchNorm in eval mode, ReLU and SAP in one pass of the CPU kernel; elsewhere one after the other."""

    def __init__(self, norm: nn.BatchNorm2d, sap: SAP) -> None:
        super().__init__()
        self.norm, self.sap = norm, sap
        self._affine: tuple[list[Tensor], Any] = [], None

    def forward(self, h: Tensor) -> Tensor:
        affine = self._current_affine() if _cpu_takes(h) and self.sap.backend in ("auto", "cpu") else None
        if affine is None or self.norm.training:
            return self.sap(self.norm(h))
        noise = self.sap.noise
        r = count_draws(h, self.sap.percent, noise.ids)
        names = noise.seed, noise.ids, noise.passes, noise.next_layer()
        return _Sap.apply(h, r, *names, True, False, "cpu", affine)[0]

    def _current_affine(self) -> Any:
        """Scale and shift of the running statistics, made anew when one of them has changed."""
        norm = self.norm
        if norm.running_mean is None or norm.running_var is None:
            return None
        given = [t.detach() for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias) if t is not None]
        seen, affine = self._affine
        if len(seen) != len(given) or not all(map(torch.equal, seen, given)):  # sooner than to make them, and sure
            scale = (norm.running_var.float() + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight.float()
            shift = -norm.running_mean.double() * scale.double()  # rounded once, as torch does
            shift = shift if norm.bias is None else shift + norm.bias.double()
            affine = cpu.affine_of(scale, shift.float())
            self._affine = [t.clone() for t in given], affine
        return affine


def with_sap(
    model: nn.Module,
    percent: float = 100,
    after: ModuleTypes = (nn.ReLU,),
    backend: str = "auto",
    backward: str = "constant",
) -> NoisyModel:
    """A copy of a pretrained network with SAP after every ReLU (Sec. 3); the original is untouched.

    The copy is called as `noisy(x, seed=0, ids=None, passes=0)`; see `NoisyModel`. A plain ReLU and its SAP become
    one `SAP(rectify=True)`; a ReLU with hooks, or in place, stays before a SAP of its own. Only modules count:
    a network that calls `torch.relu` in its forward must make it an `nn.ReLU` first. `after` names other types of
    modules that SAP is to follow, as `torch.nn.GELU`, or a tuple of such. `backward` is for adversaries,
    see `SAP`: the outputs are the same, their gradients are not. `noisy.plain` holds the original itself, through which
    the estimator `dense_backward` goes.
    Raises `SapcoreError` if the network has no module of the types `after`, or is noisy already.
    """
    noise = Noise()
    guarded = put_after(model, after, lambda rectify: SAP(percent, noise, backend, rectify, backward))
    noisy = NoisyModel(guarded, noise, {"kind": "sap", "percent": percent})
    noisy.plain = (model,)
    return noisy


HINT = " to put noise after; make its activations modules of that type, or name another, as in after=torch.nn.GELU"


def put_after(model: nn.Module, after: ModuleTypes, layer: Callable[[bool], nn.Module], hint: str = HINT) -> nn.Module:
    """A copy of `model` with `layer(False)` after each module of these types; `layer(True)` replaces a plain ReLU.

    A ReLU in place stays, because others may see what it changes.
    """
    kinds = after if isinstance(after, tuple) else (after,)
    if not kinds or not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in kinds):
        raise SapcoreError(f"after is {after!r}, but must be a type of module or a tuple of such, as torch.nn.ReLU")

    def followed(module: nn.Module) -> nn.Module:
        if type(module) is nn.ReLU and not (module.inplace or module._forward_hooks or module._forward_pre_hooks):
            return layer(True)
        return nn.Sequential(module, layer(False))

    check_plain(model)
    return replace_modules(model, kinds, followed, hint)


def replace_modules(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], replace: Callable[[nn.Module], nn.Module], hint: str = ""
) -> nn.Module:
    """A copy of `model` with `replace(module)` in the place of each module of these types.

    Raises `SapcoreError` if there is none, with the hint.
    """
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise SapcoreError("the network is a compiled one; give the network that was compiled, its `_orig_mod`")
    copied = copy_of(model)
    found = 0
    for parent in list(copied.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out repeated modules
            if isinstance(child, kinds):
                setattr(parent, name, replace(child).train(child.training))
                found += 1
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0  # its fast path would go round the activation
    if not found:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise SapcoreError(f"the network has no {wanted} module{hint}")
    return copied
