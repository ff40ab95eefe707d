"""bfloat16 where the processor's own convolutions do not know it: the same numbers, whatever the processor."""

import operator
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sapcore import bfloat16
from sapcore.bfloat16 import Rounded, arithmetic, autocast
from sapcore.models import Float32Linear

CPU = torch.device("cpu")
STEP = 2**-8
"""Half the distance between two neighbours in bfloat16, relative to them: what rounding changes."""
OPERATIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "conv1d": (F.conv1d, ((3, 4, 9), (5, 4, 3))),
    "conv2d": (F.conv2d, ((3, 4, 9, 9), (5, 4, 3, 3), (5,))),
    "conv2d, strided": (partial(F.conv2d, stride=2, padding=1, groups=2), ((3, 4, 9, 9), (6, 2, 3, 3), (6,))),
    "conv3d": (F.conv3d, ((2, 3, 5, 5, 5), (4, 3, 3, 3, 3), (4,))),
    "conv_transpose2d": (F.conv_transpose2d, ((3, 5, 4, 4), (5, 4, 3, 3), (4,))),
    "linear": (F.linear, ((6, 70), (5, 70), (5,))),
    "matmul": (torch.matmul, ((2, 6, 70), (70, 5))),
    "@": (operator.matmul, ((6, 70), (70, 5))),
    "bmm": (torch.bmm, ((2, 6, 70), (2, 70, 5))),
}


def count_rounded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list of what is rounded, from now on."""
    taken: list[Tensor] = []
    rounded = bfloat16._rounded

    def noted(value: Tensor) -> Tensor:
        if isinstance(value, Tensor):  # and no stride
            taken.append(value)
        return rounded(value)

    monkeypatch.setattr(bfloat16, "_rounded", noted)
    return taken


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_results_and_gradients_are_those_of_rounded_operands_rounded_once(
    name: str, weights: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation, shapes = OPERATIONS[name]
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(shape, generator=generator).to(weights) for shape in shapes]
    exact = [t.bfloat16().double().requires_grad_() for t in operands]
    rounded = [t.clone().requires_grad_() for t in operands]
    expected = operation(*exact)
    direction = torch.randn(expected.shape, generator=generator).bfloat16()
    taken = count_rounded(monkeypatch)
    with Rounded(), torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        found = operation(*rounded)
    assert len(taken) == len(operands)
    assert found.dtype == torch.bfloat16
    gradients = torch.autograd.grad(found, rounded, direction)
    pairs = zip((found, *gradients), (expected, *torch.autograd.grad(expected, exact, direction.double())), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=STEP, atol=1e-5)
    assert [g.dtype for g in gradients] == [weights] * len(operands)


def test_a_bias_by_name_is_rounded_too() -> None:
    x, w, b = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([1 + 2**-9])
    with Rounded(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F.linear(x, w, bias=b), b.bfloat16()[None])


def test_what_nobody_wants_in_bfloat16_stays_as_it_is() -> None:
    x, w = torch.rand(2, 3, 5, 5), torch.rand(4, 3, 3, 3)
    with Rounded():
        assert torch.equal(F.conv2d(x, w), F.conv2d(x, w))
        assert F.conv2d(x, w).dtype == torch.float32
    with Rounded(), torch.autocast("cpu", torch.bfloat16):
        assert F.conv2d(x.double(), w.double()).dtype == torch.float64
        assert Float32Linear(5, 2)(x).dtype == torch.float32


@pytest.mark.parametrize("fast", [True, False])
def test_convolutions_are_rounded_where_and_only_where_torchs_own_are_slow(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_rounded(monkeypatch)
    monkeypatch.setattr(bfloat16, "is_fast", lambda _: fast)
    x, w = torch.rand(2, 3, 5, 5), torch.rand(4, 3, 3, 3)
    with autocast("bfloat16", CPU):
        F.conv2d(x, w)
    assert len(calls) == (0 if fast else 2)
    calls.clear()
    with arithmetic(CPU):
        F.conv2d(x.bfloat16(), w.bfloat16())
    assert len(calls) == (0 if fast else 2)
    calls.clear()
    with autocast("float32", CPU):
        assert F.conv2d(x, w).dtype == torch.float32
    assert not calls


def test_a_gpu_needs_no_help_and_a_torch_without_onednn_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert bfloat16.is_fast.__wrapped__("cuda")
    assert not bfloat16.is_fast.__wrapped__("cpu")
