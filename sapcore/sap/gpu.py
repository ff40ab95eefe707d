"""SAP's Triton kernels: `reference.sample` and its scaling, one program per example's map.

A map of up to 32,768 units is held by its program: it is read once and written once. A larger one is swept
tile by tile. Either way a scratch row holds the cumulated weights of its blocks, and the missing draws,
which can hit any unit, are written last, over what is there. Nothing is stored for the backward pass: the same kernel
scales the gradient by the factors that the same random numbers give again.

The first arrivals' words come four per counter, so a map is held as four runs of units, one per word.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapcore.errors import SapcoreError
from sapcore.randomness import split_seed
from sapcore.sap import reference
from sapcore.sap.reference import LARGEST_MAP, from_units, to_units

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""With TRITON_INTERPRET=1 in the environment the kernels run on the CPU, slowly, as tests do."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LONGEST_RUN = 8192  # units of each of the four runs of a map that a program holds
TILE = 2048  # units per run that a larger map's program treats at a time
BLOCK = 16  # units per partial sum, for finding a missing draw's unit
DRAWS_PER_WARP = 16  # missing draws made at once

MARGIN = tl.constexpr(reference.MARGIN)
TWO_40 = tl.constexpr(2.0**reference.WEIGHT_BITS)
TWO_M40 = tl.constexpr(2.0**-reference.WEIGHT_BITS)
TWO_32 = tl.constexpr(2.0**32)
TWO_M32 = tl.constexpr(2.0**-32)
FIRST_ARRIVALS = tl.constexpr(reference.FIRST_ARRIVALS)
REPEATS = tl.constexpr(reference.REPEATS)
MISSING = tl.constexpr(reference.MISSING)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _log_of_complement(v, w):
    """log(w) where w = 1 - v, both float32 in [0, 1] and each as precise as it can be; about 1 ulp."""
    bits = w.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.where(exponent == 0, -v, mantissa - 1.0)
    y = f * 7.0376836292e-2 - 1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f - 1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f - 1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f - 2.4999993993e-1
    y = y * f + 3.3333331174e-1
    square = f * f
    return exponent.to(tl.float32) * LN2 + (f - 0.5 * square + y * square * f)


@triton.jit
def _one_minus_exp(t):
    """1 - exp(t) for t <= 0, without cancellation near 0."""
    t = tl.maximum(t, -80.0)
    n = (t * LOG2E - 0.5).to(tl.int32)
    f = t - n.to(tl.float32) * LN2
    y = f * 1.9875691500e-4 + 1.3981999507e-3
    y = y * f + 8.3334519073e-3
    y = y * f + 4.1665795894e-2
    y = y * f + 1.6666665459e-1
    y = y * f + 5.0000001201e-1
    power = ((n + 127) << 23).to(tl.float32, bitcast=True)
    return (1.0 - power) - power * (y * f * f + f)


@triton.jit
def _scale(magnitude, inverse_l1, r):
    """1 / (1 - (1 - p)^r); p <= inverse_l1, because no magnitude exceeds 1."""
    p = tl.minimum(magnitude * inverse_l1, 1.0)
    if inverse_l1 < 2.0**-7:
        log = -p * (1.0 + p * (1 / 2 + p * (1 / 3 + p * (1 / 4))))
    else:
        log = _log_of_complement(p, 1.0 - p)
    return 1.0 / _one_minus_exp(r.to(tl.float32) * log)


@triton.jit
def _load(h, valid, RECTIFY: tl.constexpr):
    """|h| or relu(h) as float32, and how many units are nan or inf."""
    x = tl.load(h, mask=valid, other=0.0).to(tl.float32)
    magnitude = tl.maximum(x, 0.0) if RECTIFY else tl.abs(x)
    bad = (x != x) | (magnitude == INFINITY)
    return magnitude, tl.sum(bad.to(tl.int32))


@triton.jit
def _powers(largest):
    """Two powers of two whose product brings the largest magnitude into [1/2, 1)."""
    first = tl.where(largest < 2.0**-62, 2.0**64, tl.where(largest > 2.0**62, 2.0**-64, 1.0)).to(tl.float32)
    exponent = ((largest * first).to(tl.int32, bitcast=True) >> 23) - 126
    second = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return first, tl.where(largest > 0, second, 0.0)


@triton.jit
def _weight(magnitude):
    return (magnitude * TWO_40).to(tl.int64)


@triton.jit
def _rate(total, r):
    """Arrivals per unit of magnitude: m / sum of magnitudes."""
    draws = r.to(tl.float64)
    m = tl.maximum(draws - MARGIN * tl.sqrt(draws), 0.0)
    return tl.where((total > 0) & (r > 0), m / (tl.maximum(total, 1).to(tl.float64) * TWO_M40), 0.0).to(tl.float32)


@triton.jit
def _time_since_arrival(word, magnitude, rate):
    """How long before m each unit first arrived, times its rate; 0 if it did not."""
    v = (word.to(tl.float32) + 0.5) * TWO_M32
    w = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * TWO_M32
    return tl.maximum(magnitude * rate + _log_of_complement(v, w), 0.0)


@triton.jit
def _log_factorial(k):
    """log k! in float64 for k >= 0: Stirling's series at k + 8."""
    product = k + 1
    for i in tl.static_range(2, 9):
        product = product * (k + i)
    x = k + 9
    series = (1 / 12 - (1 / 360 - (1 / 1260 - 1 / 1680 / (x * x)) / (x * x)) / (x * x)) / x
    return (x - 0.5) * tl.log(x) - x + HALF_LOG_2PI + series - tl.log(product)


@triton.jit
def _poisson(mean, seed, name, number, tag):
    """`reference._poisson` for one row."""
    zero = tl.zeros_like(tag)
    result = tl.full((), -1, tl.int64)
    if mean < 10.0:
        word, _, _, _ = tl.philox(seed, zero, name, number, tag)
        u = (word.to(tl.float64) + 0.5) * TWO_M32
        term = tl.exp(-mean)
        cumulated = term
        count = tl.full((), 0, tl.int64)
        while (u >= cumulated) & (count < 63):
            count += 1
            term = term * mean / count.to(tl.float64)
            cumulated += term
        result = count
    else:
        b = 0.931 + 2.53 * tl.sqrt(mean)
        a = -0.059 + 0.02483 * b
        inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
        v_r = 0.9277 - 3.6224 / (b - 2)
        trial = zero
        while result < 0:
            word0, word1, _, _ = tl.philox(seed, trial, name, number, tag)
            trial += 1
            centred = (word0.to(tl.float64) + 0.5) * TWO_M32 - 0.5
            v = (word1.to(tl.float64) + 0.5) * TWO_M32
            us = 0.5 - tl.abs(centred)
            k = tl.floor((2 * a / us + b) * centred + mean + 0.43)
            if (us >= 0.07) & (v <= v_r):
                result = k.to(tl.int64)
            elif (k >= 0) & ((us >= 0.013) | (v <= us)):  # rarely: the logarithms are slow
                bound = k * tl.log(mean) - mean - _log_factorial(k)
                if tl.log(v) + tl.log(inverse_alpha) - tl.log(a / (us * us) + b) <= bound:
                    result = k.to(tl.int64)
    return result


@triton.jit
def _targets(t, total, seed, name, number, tag):
    """The whole numbers below total that the draws t fall on, each from 53 bits of two words."""
    word0, word1, word2, word3 = tl.philox(seed, (t >> 1).to(tl.uint32), name, number, tag)
    even = (t & 1) == 0
    high = tl.where(even, word0, word2) >> 5
    low = tl.where(even, word1, word3) >> 6
    u = (high.to(tl.float64) * 67108864.0 + low.to(tl.float64)) * (2.0**-53)
    return tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def _draw(h, value, out, mask, t, missing, first, length, reached, target, power1, power2, inverse_l1, r,
          RECTIFY: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Find each draw's unit in the block that starts at unit `first`, and write it."""
    inside = tl.arange(0, BLOCK)[None, :]
    valid = (inside < length[:, None]) & (t < missing)[:, None]
    magnitude, _ = _load(h + first[:, None] + inside, valid, RECTIFY)
    cumulated = tl.cumsum(_weight(magnitude * power1 * power2), 1) + reached[:, None]
    unit = first + tl.sum((cumulated <= target[:, None]).to(tl.int32), 1)
    hit = t < missing
    magnitude, _ = _load(h + unit, hit, RECTIFY)
    scale = _scale(magnitude * power1 * power2, inverse_l1, r)
    x = tl.load(value + unit, mask=hit, other=0.0).to(tl.float32)
    tl.store(out + unit, x * scale, mask=hit)
    if MASK:
        tl.store(mask + unit, hit, mask=hit)


@triton.jit
def _write(value, out, mask, unit, valid, keep, magnitude, inverse_l1, r, MASK: tl.constexpr):
    """Scale what is kept, prune the rest; all is nan if inverse_l1 is."""
    x = tl.load(value + unit, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + unit, tl.where(keep, x * _scale(magnitude, inverse_l1, r), 0.0) + 0.0 * inverse_l1, mask=valid)
    if MASK:
        tl.store(mask + unit, keep, mask=valid)


@triton.jit
def _block_sums(magnitude, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    return tl.sum(tl.reshape(_weight(magnitude), (BLOCKS, BLOCK)), 1)


@triton.jit(do_not_specialize=["r", "seed", "layer"])
def _small_map(h, value, out, mask, bound, ids, passes, a, quarter, r: tl.int64, seed: tl.uint64, layer: tl.int32,
               RECTIFY: tl.constexpr, MASK: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, FINE: tl.constexpr,
               DRAWS: tl.constexpr):  # fmt: skip
    """A map held whole. RUN: a power of two of at least quarter = ceil(a/4) units.

    The cumulated weights of blocks go to `bound`, (N, 4 RUN/BLOCK); those of FINE blocks together stay in the program.
    """
    row = tl.program_id(0).to(tl.int64)
    BLOCKS: tl.constexpr = RUN // BLOCK
    h, value, out, mask, bound = h + row * a, value + row * a, out + row * a, mask + row * a, bound + row * 4 * BLOCKS
    name, number = tl.load(ids + row).to(tl.uint32), tl.load(passes + row).to(tl.uint32)
    j = tl.arange(0, RUN)
    unit0, unit1, unit2, unit3 = j, j + quarter, j + 2 * quarter, j + 3 * quarter
    valid = j < quarter
    valid0, valid1, valid2, valid3 = valid & (unit0 < a), valid & (unit1 < a), valid & (unit2 < a), valid & (unit3 < a)
    m0, bad0 = _load(h + unit0, valid0, RECTIFY)
    m1, bad1 = _load(h + unit1, valid1, RECTIFY)
    m2, bad2 = _load(h + unit2, valid2, RECTIFY)
    m3, bad3 = _load(h + unit3, valid3, RECTIFY)
    largest = tl.max(tl.maximum(tl.maximum(m0, m1), tl.maximum(m2, m3)), 0)
    power1, power2 = _powers(largest)
    m0, m1, m2, m3 = m0 * power1 * power2, m1 * power1 * power2, m2 * power1 * power2, m3 * power1 * power2

    coarse0 = _bounds(m0, bound, tl.zeros_like(r), BLOCKS, BLOCK, FINE)
    coarse1 = _bounds(m1, bound + BLOCKS, tl.max(coarse0, 0), BLOCKS, BLOCK, FINE)
    coarse2 = _bounds(m2, bound + 2 * BLOCKS, tl.max(coarse1, 0), BLOCKS, BLOCK, FINE)
    coarse3 = _bounds(m3, bound + 3 * BLOCKS, tl.max(coarse2, 0), BLOCKS, BLOCK, FINE)
    total = tl.max(coarse3, 0)
    bad = bad0 + bad1 + bad2 + bad3
    rate, inverse_l1 = _rate(total, r), _inverse_l1(total, bad)

    missing = tl.zeros_like(r)
    attempt = tl.zeros_like(layer)
    todo = quarter > 0
    while todo:
        tag = layer | (attempt << 24)
        word0, word1, word2, word3 = tl.philox(seed, j.to(tl.uint32), name, number, tag | (FIRST_ARRIVALS << 16))
        since0, since1 = _time_since_arrival(word0, m0, rate), _time_since_arrival(word1, m1, rate)
        since2, since3 = _time_since_arrival(word2, m2, rate), _time_since_arrival(word3, m3, rate)
        _write(value, out, mask, unit0, valid0, since0 > 0, m0, inverse_l1, r, MASK)
        _write(value, out, mask, unit1, valid1, since1 > 0, m1, inverse_l1, r, MASK)
        _write(value, out, mask, unit2, valid2, since2 > 0, m2, inverse_l1, r, MASK)
        _write(value, out, mask, unit3, valid3, since3 > 0, m3, inverse_l1, r, MASK)
        count = tl.sum((since0 > 0).to(tl.int32) + (since1 > 0) + (since2 > 0) + (since3 > 0), 0)
        excess = tl.sum((since0 * TWO_32).to(tl.int64) + (since1 * TWO_32).to(tl.int64), 0)
        excess += tl.sum((since2 * TWO_32).to(tl.int64) + (since3 * TWO_32).to(tl.int64), 0)
        missing = _missing(count, excess, total, bad, r, seed, name, number, tag)
        todo = missing < 0
        attempt += 1
        tl.debug_barrier()  # what comes next may be written over what other threads wrote

    start = tl.zeros_like(missing)
    while start < missing:
        t = start + tl.arange(0, DRAWS)
        target = _targets(t, total, seed, name, number, layer | (MISSING << 16))
        over0, over1 = coarse0[None, :] <= target[:, None], coarse1[None, :] <= target[:, None]
        over2, over3 = coarse2[None, :] <= target[:, None], coarse3[None, :] <= target[:, None]
        group = tl.sum(over0.to(tl.int32), 1) + tl.sum(over1.to(tl.int32), 1)
        group += tl.sum(over2.to(tl.int32), 1) + tl.sum(over3.to(tl.int32), 1)
        group = tl.minimum(group, 4 * BLOCKS // FINE - 1)
        reached = tl.maximum(
            tl.maximum(_last(coarse0, over0), _last(coarse1, over1)),
            tl.maximum(_last(coarse2, over2), _last(coarse3, over3)),
        )
        fine = tl.load(bound + (group * FINE)[:, None] + tl.arange(0, FINE)[None, :])
        over = fine <= target[:, None]
        block = tl.minimum(group * FINE + tl.sum(over.to(tl.int32), 1), 4 * BLOCKS - 1)
        reached = tl.maximum(reached, tl.max(tl.where(over, fine, 0), 1))
        place = (block % BLOCKS) * BLOCK
        first = (block // BLOCKS) * quarter + place
        length = tl.minimum(quarter - place, a - first)
        _draw(h, value, out, mask, t, missing, first, length, reached, target, power1, power2, inverse_l1, r,
              RECTIFY, MASK, BLOCK)  # fmt: skip
        start += DRAWS


@triton.jit
def _bounds(magnitude, bound, before, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, FINE: tl.constexpr):
    """Store the cumulated weights of a run's blocks; return those of FINE blocks together."""
    fine = before + tl.cumsum(_block_sums(magnitude, BLOCKS, BLOCK), 0)
    tl.store(bound + tl.arange(0, BLOCKS), fine)
    return tl.max(tl.reshape(fine, (BLOCKS // FINE, FINE)), 1)


@triton.jit
def _inverse_l1(total, bad):
    """1 / sum of magnitudes; 0 for a map of zeros, nan for one that holds nan or inf."""
    inverse = tl.where(total > 0, 1.0 / (tl.maximum(total, 1).to(tl.float64) * TWO_M40), 0.0).to(tl.float32)
    return tl.where(bad == 0, inverse, float("nan"))


@triton.jit
def _missing(count, excess, total, bad, r, seed, name, number, tag):
    """How many draws are missing after the first arrivals and the repeats; negative if there are too many."""
    missing = tl.zeros_like(r)
    if (total > 0) & (r > 0) & (bad == 0):
        repeats = _poisson(excess.to(tl.float64) * TWO_M32, seed, name, number, tag | (REPEATS << 16))
        missing = r - count - repeats
    return missing


@triton.jit
def _last(bound, over):
    """The last bound that each draw is over, 0 if none."""
    return tl.max(tl.where(over, bound[None, :], 0), 1)


@triton.jit(do_not_specialize=["r", "seed", "layer", "blocks", "steps"])
def _large_map(h, value, out, mask, bound, ids, passes, a, quarter, r: tl.int64, seed: tl.uint64, layer: tl.int32,
               blocks, steps, RECTIFY: tl.constexpr, MASK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
               DRAWS: tl.constexpr):  # fmt: skip
    """A map in tiles, its blocks' cumulated weights in `bound`, (N, blocks); steps = ceil(log2(blocks))."""
    row = tl.program_id(0).to(tl.int64)
    h, value, out, mask, bound = h + row * a, value + row * a, out + row * a, mask + row * a, bound + row * blocks
    name, number = tl.load(ids + row).to(tl.uint32), tl.load(passes + row).to(tl.uint32)
    units = tl.arange(0, TILE)

    largest = tl.full((), 0.0, tl.float32)
    bad = tl.full((), 0, tl.int32)
    for start in range(0, a, TILE):
        magnitude, more = _load(h + start + units, start + units < a, RECTIFY)
        largest = tl.maximum(largest, tl.max(magnitude, 0))
        bad += more
    power1, power2 = _powers(largest)

    BLOCKS: tl.constexpr = TILE // BLOCK
    total = tl.full((), 0, tl.int64)
    for start in range(0, a, TILE):
        magnitude, _ = _load(h + start + units, start + units < a, RECTIFY)
        cumulated = total + tl.cumsum(_block_sums(magnitude * power1 * power2, BLOCKS, BLOCK), 0)
        block = start // BLOCK + tl.arange(0, BLOCKS)
        tl.store(bound + block, cumulated, mask=block < blocks)
        total = tl.max(cumulated, 0)
    rate, inverse_l1 = _rate(total, r), _inverse_l1(total, bad)

    missing = tl.zeros_like(r)
    attempt = tl.zeros_like(layer)
    todo = a > 0
    while todo:
        tag = layer | (attempt << 24)
        count = tl.full((), 0, tl.int32)
        excess = tl.full((), 0, tl.int64)
        for start in range(0, quarter, TILE):
            j = start + units
            words = tl.philox(seed, j.to(tl.uint32), name, number, tag | (FIRST_ARRIVALS << 16))
            for w in tl.static_range(4):
                unit = w * quarter + j
                valid = (j < quarter) & (unit < a)
                magnitude, _ = _load(h + unit, valid, RECTIFY)
                magnitude = magnitude * power1 * power2
                since = _time_since_arrival(words[w], magnitude, rate)
                count += tl.sum((since > 0).to(tl.int32), 0)
                excess += tl.sum((since * TWO_32).to(tl.int64), 0)
                _write(value, out, mask, unit, valid, since > 0, magnitude, inverse_l1, r, MASK)
        missing = _missing(count, excess, total, bad, r, seed, name, number, tag)
        todo = missing < 0
        attempt += 1
        tl.debug_barrier()  # what comes next may be written over what other threads wrote

    start = tl.zeros_like(missing)
    while start < missing:
        t = start + tl.arange(0, DRAWS)
        target = _targets(t, total, seed, name, number, layer | (MISSING << 16))
        low, high = tl.zeros_like(t).to(tl.int32), tl.zeros_like(t).to(tl.int32) + blocks - 1
        for _ in range(steps):
            middle = (low + high) // 2
            over = tl.load(bound + middle) <= target
            low, high = tl.where(over, middle + 1, low), tl.where(over, high, middle)
        reached = tl.load(bound + low - 1, mask=low > 0, other=0)
        _draw(h, value, out, mask, t, missing, low * BLOCK, a - low * BLOCK, reached, target, power1, power2,
              inverse_l1, r, RECTIFY, MASK, BLOCK)  # fmt: skip
        start += DRAWS


def scaled(
    h: Tensor, value: Tensor, r: int, seed: int, ids: Tensor, passes: Tensor, layer: int, rectify: bool, want_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """value * factor for the factor that SAP of h (of relu(h) with `rectify`) gives, and the mask if it is wanted.

    h, value: (N, ...), float32, bfloat16 or float16. With value = h this is SAP, with value = gradient its
    backward pass. A map that holds nan or inf gives nan: a check would have the host wait for the device.
    """
    rows, values = to_units(h.detach()).contiguous(), to_units(value.detach()).contiguous()
    n, a = rows.shape
    if a > LARGEST_MAP:
        raise SapcoreError(f"the map has {a} units, but SAP takes {LARGEST_MAP} at most")
    out = torch.empty_like(values)
    mask = torch.zeros_like(rows, dtype=torch.bool) if want_mask else out
    if not rows.numel():
        return from_units(out, h), from_units(mask, h) if want_mask else None
    split_seed(seed)
    names = ids.to(h.device, torch.int64).contiguous(), passes.to(h.device, torch.int64).contiguous()
    quarter = -(-a // 4)
    run = triton.next_power_of_2(quarter)
    small = run <= LONGEST_RUN
    warps = max(4, min(16, run // 256)) if small else 16
    block = min(run, BLOCK)
    blocks = 4 * run // block if small else -(-a // block)
    bound = torch.empty((n, blocks), dtype=torch.int64, device=h.device)
    arguments = rows, values, out, mask, bound, *names, a, quarter, r, seed, layer
    with torch.cuda.device(h.device) if h.is_cuda else contextlib.nullcontext():
        if small:
            _small_map[(n,)](*arguments, rectify, want_mask, run, block, min(32, run // block),
                             DRAWS_PER_WARP * warps, num_warps=warps)  # fmt: skip
        else:
            _large_map[(n,)](*arguments, blocks, blocks.bit_length(), rectify, want_mask, TILE, block,
                             DRAWS_PER_WARP * warps, num_warps=warps)  # fmt: skip
    return from_units(out, h), from_units(mask, h) if want_mask else None
