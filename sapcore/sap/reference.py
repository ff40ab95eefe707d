"""SAP in plain torch, to be read beside the paper (Sec. 3, Algorithm 1).

`algorithm1` is the paper's listing, line by line. `sample` draws from the same law with random numbers
that depend only on (seed, image, pass, layer, unit); the fast kernels do the same arithmetic. How:

Let the r draws arrive as a Poisson process. Unit j's first arrival comes after an exponential time
of rate p_j, independently of the others; it is in by time m if e_j < m p_j. A unit that is in goes on
arriving at rate p_j, so the number of all repeats is one Poisson number of mean
sum_j max(m p_j - e_j, 0). First arrivals and repeats add up to a total T, and given T the draws are
multinomial(T, p). With m a little below r, T <= r most of the time: the r - T missing draws are made
one by one. Where T > r, everything is drawn anew, which leaves the law of the kept set
exact, because for every T <= r it is that of r multinomial draws.
"""

import math

import torch
from torch import Tensor

from sapcore.errors import SapcoreError, is_number
from sapcore.randomness import LOW, philox, split_seed, words

MARGIN = 1.0
"""m = r - MARGIN sqrt(r): a wider margin means fewer redraws (16 % here) and more missing draws."""
WEIGHT_BITS = 40
"""Normalized |h| becomes a whole number below 2**40, so that its sums do not depend on their order."""
LARGEST_MAP = 2**22
MOST_DRAWS = 2**30
FIRST_ARRIVALS, REPEATS, MISSING = 0, 1, 2


def draws(percent: float, size: int) -> int:
    """r = int(percent / 100 * a), the number of draws from a map of a units (Sec. 4.1)."""
    if not is_number(percent) or not 0 < percent < math.inf:
        raise SapcoreError(f"percent is {percent!r}, but must be a positive number, as in SAP-100")
    r = float(percent) * size / 100
    if r >= MOST_DRAWS + 1:
        raise SapcoreError(f"percent is {percent!r}, which asks for {r:.0f} draws, but {MOST_DRAWS} is the most")
    return int(r)


def scale(p: Tensor, r: int) -> Tensor:
    """1 / (1 - (1 - p)^r), the inverse of a unit's probability of being kept; 1 where p is 0."""
    kept_probability = -torch.expm1(r * torch.log1p(-p))
    return torch.where(p > 0, 1 / kept_probability, 1.0)


def algorithm1(h: Tensor, r: int, generator: torch.Generator | None = None) -> Tensor:
    """Algorithm 1 as printed: draw r units of each example with replacement, prune the rest, scale up.

    h: (N, ...), float; returns the same shape. A map of zeros stays zero. The gradient takes mask and scale as
    constants.
    """
    flat = h.flatten(1)
    p = flat.detach().abs()
    p = p / p.sum(1, keepdim=True)
    p = torch.where(p.isnan(), 0.0, p)
    keep = torch.zeros_like(p, dtype=torch.bool)
    for example in range(len(flat)):
        if r > 0 and p[example].sum() > 0:
            drawn = torch.multinomial(p[example], r, replacement=True, generator=generator)
            keep[example, drawn] = True
    return torch.where(keep, flat * scale(p, r), 0.0).reshape(h.shape)


def to_units(h: Tensor) -> Tensor:
    """Each example's map as a row, (N, a); units of a (C, H, W) map count channels fastest, as in channels_last."""
    return h.movedim(1, -1).flatten(1) if h.dim() > 2 else h.flatten(1)


def from_units(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_units`: rows (N, a) as a map shaped as `like`; 4-D maps come out channels_last, uncopied."""
    if like.dim() <= 2:
        return flat.reshape(like.shape)
    n, channels, *space = like.shape
    return flat.reshape(n, *space, channels).movedim(-1, 1)


def sample(h: Tensor, r: int, seed: int, ids: Tensor, passes: Tensor, layer: int) -> Tensor:
    """Which units at least one of r draws with replacement from p = |h| / sum |h| hits.

    h: (N, a) rows of units; ids, passes: int64 (N,). Returns bool (N, a). The law is that of h rounded
    to float32.
    """
    magnitude = normalized(h).float()
    weight = (magnitude.double() * 2.0**WEIGHT_BITS).long()
    total = weight.sum(1)
    ids, passes = ids & LOW, passes & LOW
    if r == 0 or h.numel() == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    m = max(0.0, r - MARGIN * math.sqrt(r))
    l1 = total.double() * 2.0**-WEIGHT_BITS
    rate = magnitude * torch.where(total > 0, m / l1, 0.0).float()[:, None]

    keep = torch.zeros_like(weight, dtype=torch.bool)
    missing = torch.zeros_like(total)
    todo = (total > 0).nonzero()[:, 0]
    attempt = 0
    while len(todo):
        at = ids[todo], passes[todo], layer
        time = _exponential(words(seed, *at, h.shape[1], FIRST_ARRIVALS, attempt))
        first = time < rate[todo]
        excess = torch.where(first, (rate[todo] - time) * 2.0**32, 0.0).long()
        repeats = _poisson(excess.sum(1).double() * 2.0**-32, seed, *at, attempt)
        arrived = first.sum(1) + repeats
        fits = arrived <= r
        keep[todo[fits]] = first[fits]
        missing[todo[fits]] = r - arrived[fits]
        todo = todo[~fits]
        attempt += 1

    bound = weight.cumsum(1)
    most = int(missing.max())
    u = _uniform53(seed, ids, passes, layer, most)
    target = torch.minimum((u * total[:, None]).long(), (total - 1).clamp(min=0)[:, None])
    hit = torch.searchsorted(bound, target, right=True).clamp(max=h.shape[1] - 1)
    wanted = torch.arange(most, device=h.device) < missing[:, None]
    row = torch.arange(len(h), device=h.device)[:, None].expand_as(hit)
    keep[row[wanted], hit[wanted]] = True
    return keep


def normalized(h: Tensor) -> Tensor:
    """|h| times a power of two that brings each row's largest into [1/2, 1), float64 (N, a); p stays the same."""
    if h.shape[1] > LARGEST_MAP:
        raise SapcoreError(f"the map has {h.shape[1]} units, but SAP takes {LARGEST_MAP} at most")
    magnitude = h.abs().double()
    if h.numel() == 0:
        return magnitude
    if not torch.isfinite(magnitude).all():
        raise SapcoreError("the activation map holds nan or inf, but SAP needs finite activations")
    exponent = torch.frexp(magnitude.amax(1, keepdim=True))[1]
    half = exponent // 2  # in two steps, because 2**1074 is no float64
    return torch.ldexp(torch.ldexp(magnitude, -half), half - exponent)


def _exponential(word: Tensor) -> Tensor:
    """A standard exponential number per word, float32: -log(1 - u) with full precision near 0."""
    return -torch.log1p(-(word.double() + 0.5) * 2.0**-32).float()


def _uniform53(seed: int, ids: Tensor, passes: Tensor, layer: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) of 53 bits, float64 (N, count); number t takes words 2t and 2t + 1 in counter order."""
    block = torch.arange(-(-count // 2), device=ids.device)[None, :]
    counter = (block, ids[:, None], passes[:, None], layer | MISSING << 16)
    w = torch.stack(philox(counter, split_seed(seed)), dim=-1).reshape(len(ids), -1, 2)[:, :count]
    return ((w[..., 0] >> 5).double() * 2.0**26 + (w[..., 1] >> 6).double()) * 2.0**-53


def _poisson(mean: Tensor, seed: int, ids: Tensor, passes: Tensor, layer: int, attempt: int) -> Tensor:
    """One Poisson number per row, int64 (N,): Hörmann's transformed rejection (1993, PTRS); inversion below 10."""
    result = torch.full(mean.shape, -1, dtype=torch.int64, device=mean.device)
    root = mean.sqrt()
    b = 0.931 + 2.53 * root
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    v_r = 0.9277 - 3.6224 / (b - 2)
    trial = 0
    while (result < 0).any():
        counter = (torch.full_like(ids, trial), ids, passes, layer | REPEATS << 16 | attempt << 24)
        w = philox(counter, split_seed(seed))
        u, v = ((x.double() + 0.5) * 2.0**-32 for x in w[:2])
        centred = u - 0.5
        us = 0.5 - centred.abs()
        k = ((2 * a / us + b) * centred + mean + 0.43).floor()
        quick = (us >= 0.07) & (v <= v_r)
        bound = k * mean.log() - mean - torch.lgamma(k + 1)
        slow = (
            (k >= 0) & ~((us < 0.013) & (v > us)) & (v.log() + inverse_alpha.log() - (a / (us * us) + b).log() <= bound)
        )
        k = torch.where(mean < 10, _poisson_by_inversion(mean, u), k)
        accepted = quick | slow | (mean < 10)
        result = torch.where((result < 0) & accepted, k.long(), result)
        trial += 1
    return result


def _poisson_by_inversion(mean: Tensor, u: Tensor) -> Tensor:
    """The smallest k whose distribution function exceeds u, for means below 10."""
    term = torch.exp(-mean)
    cumulated = term.clone()
    k = torch.zeros_like(mean)
    for n in range(1, 64):
        above = u >= cumulated
        k = torch.where(above, float(n), k)
        term = term * mean / n
        cumulated = cumulated + term
    return k


def forward(
    h: Tensor, r: int, seed: int, ids: Tensor, passes: Tensor, layer: int, rectify: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """SAP of a map, or of its relu: the output h * factor, the factor (0 or 1 / (1 - (1 - p)^r)) and the mask.

    h: (N, ...), float64, float32, bfloat16 or float16; arithmetic is in float32 at least.
    """
    flat = to_units(h.relu() if rectify else h)
    keep = sample(flat, r, seed, ids, passes, layer)
    wide = flat if flat.dtype == torch.float64 else flat.float()
    magnitude = normalized(flat).to(wide.dtype)
    l1 = magnitude.sum(1, keepdim=True)
    p = torch.where(l1 > 0, magnitude / l1, 0.0)
    factor = torch.where(keep, scale(p, r), 0.0)
    out = (wide * factor).to(h.dtype)
    return from_units(out, h), from_units(factor.to(h.dtype), h), from_units(keep, h)
