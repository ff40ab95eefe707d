"""Every implementation follows the law of r draws with replacement: alone, in pairs, and jointly.

False alarms: each comparison is against a bound of 5 standard errors (6e-7 each) or a p-value of 1e-6;
all of this file together, about 3,000 comparisons, fails by chance with a probability below 0.2 %. The seeds are fixed.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from sapcore import sap
from tests.sap.laws import SAMPLERS, Sampler, kept_covariance, kept_probability, kept_set_law, percent_for

STANDARD_ERRORS = 5
MAPS = {  # name: (h, r)
    "flat": (torch.ones(64), 64),
    "ramp": (torch.arange(1.0, 51.0), 50),
    "peak": (torch.tensor([60.0] + [1.0] * 40), 20),
    "signed": (torch.tensor([3.0, -2.0, 1.0, -0.5, 0.25, -8.0]), 5),
    "many draws": (torch.arange(1.0, 33.0) ** 4, 320),
}


@pytest.fixture(params=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return SAMPLERS[request.param]


def probabilities(h: torch.Tensor) -> np.ndarray:
    return (h.double().abs() / h.double().abs().sum()).numpy()


@pytest.mark.parametrize("name", MAPS)
def test_each_unit_is_kept_with_probability_one_minus_one_minus_p_to_the_r(sampler: Sampler, name: str) -> None:
    (h, r), n = MAPS[name], 10_000
    q = kept_probability(probabilities(h), r)
    share = (sampler(h, r, n) != 0).double().mean(0).numpy()
    assert np.all(np.abs(share - q) <= STANDARD_ERRORS * np.sqrt(q * (1 - q) / n) + 3 / n)  # 3: events hardly ever seen


@pytest.mark.parametrize("name", MAPS)
def test_the_mean_of_the_output_is_the_input(sampler: Sampler, name: str) -> None:
    (h, r), n = MAPS[name], 10_000
    q = kept_probability(probabilities(h), r)
    error = np.abs(sampler(h, r, n).double().mean(0).numpy() - h.numpy())
    standard_error = np.abs(h.numpy()) * np.sqrt((1 - q) / q / n)
    assert np.all(error <= STANDARD_ERRORS * standard_error + 1e-6 * np.abs(h.numpy()))


@pytest.mark.parametrize("name", ["flat", "ramp", "peak"])
def test_the_number_of_kept_units_varies_as_for_multinomial_draws_not_as_for_coins(sampler: Sampler, name: str) -> None:
    (h, r), n = MAPS[name], 20_000
    p = probabilities(h)
    q = kept_probability(p, r)
    multinomial, coins = kept_covariance(p, r).sum(), (q * (1 - q)).sum()
    assert coins > 1.5 * multinomial
    count = (sampler(h, r, n) != 0).sum(1).double().numpy()
    variance = count.var(ddof=1)
    standard_error = np.sqrt((stats.moment(count, 4) - variance**2) / n)
    assert abs(variance - multinomial) < STANDARD_ERRORS * standard_error
    assert coins - variance > 10 * STANDARD_ERRORS * standard_error


@pytest.mark.parametrize("name", ["signed", "peak"])
def test_each_pair_of_units_is_kept_together_as_often_as_by_draws(sampler: Sampler, name: str) -> None:
    (h, r), n = MAPS[name], 20_000
    p = probabilities(h)
    kept = (sampler(h, r, n) != 0).double().numpy() - kept_probability(p, r)
    products = kept[:, :, None] * kept[:, None, :]
    error = np.abs(products.mean(0) - kept_covariance(p, r))
    assert np.all(error <= STANDARD_ERRORS * products.std(0) / np.sqrt(n) + 3 / n)


TINY_MAPS = [  # few units, so that every set of kept units can be counted; (h, r)
    ([5.0, 3.0, 2.0], 1),
    ([5.0, 3.0, 2.0], 2),
    ([5.0, 3.0, 2.0], 3),
    ([1.0, 1.0, 1.0, 1.0], 4),
    ([90.0, 6.0, 3.0, 1.0], 12),
    ([97.0, 1.0, 1.0, 0.5, 0.5], 100),
]


@pytest.mark.parametrize(("h", "r"), TINY_MAPS)
def test_the_law_of_the_whole_kept_set_passes_a_chi_square_test(sampler: Sampler, h: list[float], r: int) -> None:
    n = 20_000
    law = kept_set_law(probabilities(torch.tensor(h)), r)
    kept = (sampler(torch.tensor(h), r, n) != 0).numpy()
    found = dict.fromkeys(law, 0)
    for row, count in zip(*np.unique(kept, axis=0, return_counts=True), strict=True):
        found[tuple(map(bool, row))] = int(count)
    assert all(found[key] == 0 for key in law if law[key] < 1e-12)
    observed, expected = [0], [0.0]
    for key in sorted(law, key=lambda key: law[key]):  # chi square wants five expected in each bin
        if expected[-1] >= 5:
            observed.append(0)
            expected.append(0.0)
        observed[-1] += found[key]
        expected[-1] += n * law[key]
    assert stats.chisquare(observed, expected).pvalue > 1e-6


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_one_draw_keeps_exactly_one_unit_at_its_full_weight(sampler: Sampler, size: int) -> None:
    h = torch.arange(1.0, size + 1)
    out = sampler(h, 1, 200)
    assert ((out != 0).sum(1) == 1).all()
    assert torch.allclose(out.sum(1), h.sum(), rtol=1e-5)  # h_j / p_j = sum |h|


@pytest.mark.parametrize("r", [2, 7, 50])
def test_r_draws_keep_between_one_and_r_units(sampler: Sampler, r: int) -> None:
    kept = (sampler(torch.ones(100), r, 2000) != 0).sum(1)
    assert 1 <= int(kept.min()) <= int(kept.max()) <= r


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_map_of_the_networks_size_keeps_as_many_units_as_draws_do(backend: str) -> None:
    """Mean and variance of the number of kept units, of 4,096 with a rectified normal map; false alarm 1e-6 each."""
    a, n, r = 4096, 1000, 4096
    h = torch.randn(a, generator=torch.Generator().manual_seed(3)).relu()
    p = probabilities(h)
    count = (SAMPLERS[backend](h, r, n) != 0).sum(1).double().numpy()
    mean, variance = kept_probability(p, r).sum(), kept_covariance(p, r).sum()
    assert abs(count.mean() - mean) < STANDARD_ERRORS * np.sqrt(variance / n)
    assert 5e-7 < stats.chi2.cdf((n - 1) * count.var(ddof=1) / variance, n - 1) < 1 - 5e-7


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("axis", ["ids", "passes", "layer", "seed"])
def test_masks_are_independent_along_each_argument(backend: str, axis: str) -> None:
    """Neighbours along ids, passes, layers and seeds share as many kept units as chance has it; false alarm 6e-7."""
    a, n = 500, 400
    h = torch.ones(1, a)
    percent = percent_for(a, a)
    zeros = torch.zeros(n, dtype=torch.int64)
    if axis == "ids":
        kept = sap(h.expand(n, -1), percent, ids=torch.arange(n), backend=backend) != 0
    elif axis == "passes":
        kept = sap(h.expand(n, -1), percent, ids=zeros, passes=torch.arange(n), backend=backend) != 0
    elif axis == "layer":
        kept = torch.cat([sap(h, percent, layer=i, backend=backend) != 0 for i in range(n)])
    else:
        kept = torch.cat([sap(h, percent, seed=i, backend=backend) != 0 for i in range(n)])
    q = float(kept_probability(np.array([1 / a]), a)[0])
    agreement = ((kept[1:].double() - q) * (kept[:-1].double() - q)).sum(1)
    assert abs(float(agreement.mean())) < STANDARD_ERRORS * float(agreement.std()) / np.sqrt(n - 1)


@pytest.mark.parametrize(
    ("backend", "h", "r", "n"),
    [("reference", 5e-6, 1000, 20_000), ("cpu", 5e-6, 1000, 20_000), ("cpu", 1e-7, 20_000, 50_000)],
)
def test_a_unit_of_tiny_probability_is_kept_as_often_as_the_law_says(backend: str, h: float, r: int, n: int) -> None:
    """It is kept about 100 times in n maps. False alarm: 1e-6."""
    pair = torch.tensor([1.0, h])
    kept = (SAMPLERS[backend](pair, r, n) != 0).sum(0)
    assert int(kept[0]) == n
    q = float(kept_probability(probabilities(pair), r)[1])
    assert stats.binomtest(int(kept[1]), n, q).pvalue > 1e-6
