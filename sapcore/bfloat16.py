"""bfloat16 at about the speed of float32, or better, whatever the processor.

torch hands convolutions and products in bfloat16 to oneDNN, which on x86 wants AVX-512; without it they run ten times
slower than in float32, or worse. `Rounded` computes them there as oneDNN does where it can: of numbers rounded to
bfloat16, with products and sums in float32, and rounds what comes out.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sapcore.errors import SapcoreError

PRECISIONS = ("float32", "bfloat16")
CONVOLUTIONS_AND_PRODUCTS = (
    torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm,
)  # fmt: skip
"""Of those that autocast takes in bfloat16; the others are right, and slow."""


@functools.cache
def is_fast(device_type: str) -> bool:
    """Whether torch's own convolutions and products in bfloat16 are fast there."""
    if device_type != "cpu":
        return True
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Rounded(TorchFunctionMode):
    """Within it convolutions and products on the CPU that autocast or their operands want in bfloat16 are of rounded
    numbers in float32, rounded at the end; so are their gradients."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
        if func not in CONVOLUTIONS_AND_PRODUCTS or not _wanted(operands):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            found = func(*map(_rounded, args), **{name: _rounded(value) for name, value in (kwargs or {}).items()})
            return found.bfloat16()


def _wanted(operands: list[Tensor]) -> bool:
    if any(t.device.type != "cpu" or t.dtype not in (torch.float32, torch.bfloat16) for t in operands):
        return False
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return bool(operands) and (cast or all(t.dtype == torch.bfloat16 for t in operands))


def _rounded(value: Any) -> Any:
    return value.bfloat16().float() if isinstance(value, Tensor) else value


def arithmetic(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Where networks whose weights are bfloat16 run."""
    return contextlib.nullcontext() if is_fast(device.type) else Rounded()


@contextlib.contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """The arithmetic of convolutions and products: float32 as it is, or bfloat16 by autocast.

    Raises `SapcoreError` for another precision.
    """
    if precision not in PRECISIONS:
        raise SapcoreError(f"precision is {precision!r}, but must be one of {', '.join(PRECISIONS)}")
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        if precision == "float32":
            yield
        else:
            with arithmetic(device):
                yield
