"""What r draws with replacement do, exactly, and samples of it from each implementation."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapcore import sap
from sapcore.sap import reference

Sampler = Callable[[Tensor, int, int], Tensor]


def kept_probability(p: NDArray, r: int) -> NDArray:
    """P(unit j is drawn at least once) = 1 - (1 - p_j)^r."""
    return -np.expm1(r * np.log1p(-p))


def kept_covariance(p: NDArray, r: int) -> NDArray:
    """Cov(j kept, k kept) = (1 - p_j - p_k)^r - (1 - p_j)^r (1 - p_k)^r; the variance on the diagonal."""
    missed = (1 - p) ** r
    both_missed = np.maximum(1 - p[:, None] - p[None, :], 0) ** r
    covariance = both_missed - missed[:, None] * missed[None, :]
    np.fill_diagonal(covariance, missed * (1 - missed))
    return covariance


def kept_set_law(p: NDArray, r: int) -> dict[tuple[bool, ...], float]:
    """P(exactly this set is kept), by inclusion and exclusion over its subsets."""
    law = {}
    for kept in itertools.product((False, True), repeat=len(p)):
        inside = np.flatnonzero(kept)
        subsets = itertools.chain.from_iterable(itertools.combinations(inside, n) for n in range(len(inside) + 1))
        law[kept] = sum((-1) ** (len(inside) - len(s)) * float(p[list(s)].sum()) ** r for s in subsets)
    return law


def percent_for(r: int, size: int) -> float:
    """A percentage from which int(percent / 100 * size) is r."""
    percent = 100 * (r + 0.5) / size
    assert reference.draws(percent, size) == r
    return percent


def by_algorithm1(h: Tensor, r: int, n: int) -> Tensor:
    """n outputs of the literal Algorithm 1 for one map (a,)."""
    return reference.algorithm1(h.expand(n, -1), r, torch.Generator().manual_seed(1))


def by_backend(backend: str) -> Sampler:
    """n outputs of `sap` for one map (a,): one example under n names."""
    return lambda h, r, n: sap(h.expand(n, -1), percent_for(r, len(h)), seed=1, backend=backend)


SAMPLERS: dict[str, Sampler] = {
    "algorithm1": by_algorithm1,
    "reference": by_backend("reference"),
    "cpu": by_backend("cpu"),
}
