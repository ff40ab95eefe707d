"""The fused rule is the plain one, and the plain one is the formula."""

import math

import pytest
import torch
from torch import nn

from sapcore.rl.rmsprop import RMSProp, reference

RATE, GAMMA1, GAMMA2, EPSILON = 2.5e-4, 0.95, 0.9, 0.01


def test_the_rule_by_hand() -> None:
    p, g, m, n = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 0.3, 0.1, 0.2))
    reference(p, g, m, n, RATE, GAMMA1, GAMMA2, EPSILON)
    new_m, new_n = 0.95 * 0.1 + 0.05 * 0.3, 0.9 * 0.2 + 0.1 * 0.09
    assert (float(m), float(n)) == pytest.approx((new_m, new_n), rel=1e-14)
    assert float(p) == pytest.approx(1 - RATE * 0.3 / math.sqrt(new_n - new_m**2 + EPSILON), rel=1e-14)


def test_the_fused_rule_is_the_plain_one_whatever_the_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4, 3, 3), (7,), (3, 6))]
    layers = [nn.Parameter(p.float()) for p in plain]
    layers[0].data = layers[0].data.contiguous(memory_format=torch.channels_last)
    optimizer = RMSProp(layers, RATE, GAMMA1, GAMMA2, EPSILON)
    kept = [(torch.zeros_like(p), torch.zeros_like(p)) for p in plain]
    for _ in range(20):
        for p, layer, (m, n) in zip(plain, layers, kept, strict=True):
            g = torch.randn(p.shape, generator=generator)
            layer.grad = g
            reference(p, g.double(), m, n, RATE, GAMMA1, GAMMA2, EPSILON)
        optimizer.step()
    for p, layer in zip(plain, layers, strict=True):
        torch.testing.assert_close(layer.detach().double(), p, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_copies_have_the_gradients_and_follow(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """The fused rule for parameters in float32 and copies in their layout, the plain one for the others."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 8, 3, 3, generator=generator, dtype=dtype))
    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    alone = nn.Parameter(parameter.detach().clone())
    copy = nn.Parameter(parameter.detach().to(torch.bfloat16, memory_format=layout))
    optimizer = RMSProp([parameter], RATE, GAMMA1, GAMMA2, EPSILON, copies=[copy])
    expected = RMSProp([alone], RATE, GAMMA1, GAMMA2, EPSILON)
    for _ in range(20):
        copy.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
        alone.grad = copy.grad.to(dtype)
        optimizer.step()
        expected.step()
        torch.testing.assert_close(parameter, alone, atol=1e-6, rtol=1e-6)
        assert torch.equal(copy, parameter.bfloat16())
    assert parameter.grad is None


def test_its_state_can_be_taken_over() -> None:
    first, second = (nn.Parameter(torch.ones(4)) for _ in range(2))
    a, b = (RMSProp([p], RATE, GAMMA1, GAMMA2, EPSILON) for p in (first, second))
    for gradient in (torch.arange(4.0), torch.ones(4)):
        first.grad = gradient
        a.step()
    b.load(a.state())
    second.data.copy_(first.data)
    for p, optimizer in ((first, a), (second, b)):
        p.grad = torch.full((4,), 2.0)
        optimizer.step()
    assert torch.equal(first, second)
    assert first.grad is not None


def test_a_parameter_without_a_gradient_stays() -> None:
    parameter = nn.Parameter(torch.ones(4))
    RMSProp([parameter], RATE, GAMMA1, GAMMA2, EPSILON).step()
    assert torch.equal(parameter, torch.ones(4))
