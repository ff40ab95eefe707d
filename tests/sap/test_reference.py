"""The reference: Algorithm 1 as printed, the number of draws, the scale, and the parts of the sampler."""

from collections.abc import Callable
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sapcore.errors import SapcoreError
from sapcore.sap import cpu, reference


@pytest.mark.parametrize(
    ("percent", "size", "r"),
    [(100, 16384, 16384), (5, 16384, 819), (1, 99, 0), (1, 100, 1), (200, 7, 14), (1000, 3, 30), (0.5, 4096, 20)],
)
def test_draws_are_the_whole_part_of_the_percentage(percent: float, size: int, r: int) -> None:
    assert reference.draws(percent, size) == r


@pytest.mark.parametrize("size", [3, 100, 4096, 8192, 16384])
def test_draws_of_a_whole_percentage_are_exact(size: int) -> None:
    for percent in range(1, 1001):
        assert reference.draws(float(percent), size) == reference.draws(percent, size) == percent * size // 100


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.uint16, np.int64, np.float16, np.float32, np.float64])
def test_numbers_may_be_numpys(kind: Callable[[int], float]) -> None:
    assert reference.draws(kind(33), 16384) == reference.draws(33, 16384)


@pytest.mark.parametrize("percent", [0, -1, float("nan"), float("inf"), "100", None, True, np.True_])
def test_a_senseless_percentage_is_refused(percent: object) -> None:
    with pytest.raises(SapcoreError, match=r"percent is .*, but must be a positive number, as in SAP-100"):
        reference.draws(percent, 10)  # type: ignore[arg-type]


def exact_scale(p: float, r: int) -> float:
    """1 / (1 - (1 - p)^r) of this very p, with 60 digits."""
    getcontext().prec = 60
    return float(1 / (1 - (1 - Decimal(p)) ** r))


@given(exponent=st.floats(-8, 0), r=st.integers(1, 200_000), double=st.booleans())
def test_the_scale_is_exact_to_the_last_bits_down_to_p_of_1e_minus_8(exponent: float, r: int, double: bool) -> None:
    p = torch.tensor(10.0**exponent, dtype=torch.float64 if double else torch.float32)
    bound = 1e-13 if double else 1e-6
    assert float(reference.scale(p, r)) == pytest.approx(exact_scale(p.item(), r), rel=bound)


def test_the_scale_is_right_where_the_naive_formula_divides_by_zero() -> None:
    p = torch.tensor(1e-8)
    assert 1 - (1 - p) ** 1000 == 0
    assert float(reference.scale(p, 1000)) == pytest.approx(exact_scale(p.item(), 1000), rel=1e-6)


def test_the_scale_is_one_where_p_is_zero_or_one() -> None:
    assert reference.scale(torch.tensor([0.0, 1.0]), 3).tolist() == [1, 1]


def test_algorithm1_follows_the_paper_on_a_map_that_leaves_no_choice() -> None:
    h = torch.tensor([[0.0, -3.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(reference.algorithm1(h, 5), h)


def test_algorithm1_scales_what_it_keeps_by_one_over_its_inclusion_probability() -> None:
    h = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    out = reference.algorithm1(h, 3, torch.Generator().manual_seed(0))
    expected = h / (1 - (1 - h / 10) ** 3)
    assert ((out == 0) | torch.isclose(out, expected, rtol=1e-14)).all()


def test_the_gradient_of_algorithm1_takes_mask_and_scale_as_constants() -> None:
    h = torch.tensor([[0.0, 1.0, 3.0, 0.5], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    out = reference.algorithm1(h, 3, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(out.sum(), h)
    assert torch.equal(gradient * h, out)
    assert gradient.isfinite().all()


def test_algorithm1_keeps_the_shape_and_draws_nothing_where_r_is_zero() -> None:
    assert torch.equal(reference.algorithm1(torch.ones(2, 3, 4, 5), 0), torch.zeros(2, 3, 4, 5))


@pytest.mark.parametrize("shape", [(2, 7), (2, 3, 5), (2, 3, 5, 7), (2, 3, 5, 7, 2)])
def test_units_come_back_to_where_they_were(shape: tuple[int, ...]) -> None:
    h = torch.arange(float(np.prod(shape))).reshape(shape)
    assert torch.equal(reference.from_units(reference.to_units(h), h), h)


def test_units_of_a_map_in_channels_last_are_its_memory() -> None:
    h = torch.rand(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    assert reference.to_units(h).data_ptr() == h.data_ptr()
    assert reference.to_units(h).is_contiguous()


POISSON_MEANS = [0.0, 0.2, 3.0, 9.99, 10.01, 40.0, 1000.0, 20_000.0]


def bins(mean: float) -> np.ndarray:
    """Edges that part a Poisson number into at most 20 bins of about equal probability."""
    return np.unique(stats.poisson.ppf(np.linspace(0.05, 0.95, 19), mean))


@pytest.mark.parametrize("mean", POISSON_MEANS)
def test_poisson_numbers_pass_a_chi_square_test(mean: float) -> None:
    """False alarm: 1e-6 each."""
    n = 20_000
    zeros = torch.zeros(n, dtype=torch.int64)
    found = reference._poisson(torch.full((n,), mean, dtype=torch.float64), 3, torch.arange(n), zeros, 0, 0).numpy()
    if mean == 0:
        assert not found.any()
        return
    edges = np.concatenate([[-1], bins(mean), [np.inf]])
    observed = np.histogram(found, edges + 0.5)[0]
    expected = n * np.diff(stats.poisson.cdf(edges, mean))
    assert stats.chisquare(observed, expected).pvalue > 1e-6


@pytest.mark.parametrize("mean", POISSON_MEANS)
def test_the_kernels_poisson_numbers_are_the_references(mean: float) -> None:
    n = 300
    zeros = torch.zeros(n, dtype=torch.int64)
    expected = reference._poisson(torch.full((n,), mean, dtype=torch.float64), 3, torch.arange(n), zeros, 2, 0)
    c3 = 2 | reference.REPEATS << 16
    found = [cpu._poisson(mean, *(cpu.u64(word) for word in (i, 0, c3, 3, 0))) for i in range(n)]
    assert found == expected.tolist()


def test_exponential_numbers_pass_kolmogorov_and_smirnov() -> None:
    """False alarm: 1e-6."""
    words = torch.arange(2**20) * 2**12 + 2**11
    assert stats.kstest(reference._exponential(words).double().numpy(), stats.expon.cdf).pvalue > 1e-6


def test_exponential_numbers_are_finite_and_positive_at_the_ends() -> None:
    ends = reference._exponential(torch.tensor([0, 2**32 - 1]))
    assert 0 < float(ends[0]) < 1e-9
    assert 22 < float(ends[1]) < 24
