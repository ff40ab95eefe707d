"""The CPU kernel of the baselines and of Bernoulli SAP: noise on activations in one pass or two over each map.

As in SAP's kernel the loops are written so that LLVM turns each into vector instructions. Four words of a counter
make four units: of dropout and of coins one each, of Gaussian noise two pairs (Box and Muller 1958).

Numba caches what it compiles by the time stamp of this file alone: touch it after a change of sap/cpu.py.
"""

import math

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from sapcore.randomness import split_seed
from sapcore.sap.cpu import (
    CHUNK,
    FAST,
    LOW,
    TWO_M32,
    _array,
    _as_float,
    _as_int,
    _contiguous,
    _fill_words,
    _like,
    _load,
    _log_of_complement,
    _one_minus_exp,
    _rounded,
    _sum_of_magnitudes,
    _with_longest_vectors,
)

f32, i32, u32, i64, u64 = np.float32, np.int32, np.uint32, np.int64, np.uint64

DTYPES = (torch.float32, torch.bfloat16)
DROPOUT, GAUSSIAN, COINS = 3, 4, 5
"""What the random words are for; SAP has 0 to 2."""
KINDS = {"dropout": 0, "rna": 1, "rsa": 2, "bernoulli-sap": 3}


@njit(**FAST)
def _keep_or_drop(words, threshold, scale, factor):
    _with_longest_vectors()
    for i in range(len(factor)):
        factor[i] = scale if words[i] >= threshold else f32(0.0)


@njit(**FAST)
def _coins(words, h, rectify, inverse_l1, r, factor):
    """1 / q where a coin of probability q = 1 - exp(-r p) says so, else 0."""
    _with_longest_vectors()
    for i in range(len(h)):
        x = _load(h[i])
        x = max(x, f32(0.0)) if rectify else abs(x)
        q = _one_minus_exp(-r * x * inverse_l1)
        kept = ((f32(words[i]) + f32(0.5)) * TWO_M32 <= q) & (q > f32(0.0))
        factor[i] = f32(1.0) / max(q, f32(1e-38)) if kept else f32(0.0)


@njit(**FAST)
def _normal_pairs(words0, words1, cosines, sines):
    """Two standard normal numbers from two words each: sqrt(-2 log u) times cosine and sine of 2 pi v."""
    _with_longest_vectors()
    for i in range(len(words0)):
        u = (f32(words0[i]) + f32(0.5)) * TWO_M32
        complement = (f32(u32(~words0[i])) + f32(0.5)) * TWO_M32
        radius = math.sqrt(max(f32(-2.0) * _log_of_complement(complement, u), f32(0.0)))
        # the angle in quarter turns, and what is left of it in [-1/2, 1/2] of a quarter turn
        quarter = i32((words1[i] + u32(1 << 29)) >> u32(30))
        x = f32(i32(words1[i] - (u32(quarter) << u32(30)))) * f32(math.pi * 2.0**-31)
        square = x * x
        s = f32(-1.9515295891e-4)
        s = s * square + f32(8.3321608736e-3)
        s = s * square - f32(1.6666654611e-1)
        s = s * square * x + x
        c = f32(2.443315711809948e-5)
        c = c * square - f32(1.388731625493765e-3)
        c = c * square + f32(4.166664568298827e-2)
        c = c * square * square - f32(0.5) * square + f32(1.0)
        turned = quarter & i32(1)
        cosine = s if turned else c
        sine = c if turned else s
        flip_cosine = i32((quarter + i32(1)) & i32(2)) << i32(30)
        flip_sine = i32(quarter & i32(2)) << i32(30)
        cosines[i] = radius * _as_float(_as_int(cosine) ^ flip_cosine)
        sines[i] = radius * _as_float(_as_int(sine) ^ flip_sine)


@njit(**FAST)
def _write_scaled(h, rectify, factor, std, offset, out, derivative):
    """h * (offset + std factor), or of its relu."""
    _with_longest_vectors()
    for i in range(len(out)):
        x = _load(h[i])
        f = factor[i] * std + offset
        passed = (x > f32(0.0)) | (not rectify)
        f = f if passed else f32(0.0)
        out[i] = _rounded(f * x, out)
    for i in range(len(derivative)):
        x = _load(h[i])
        f = factor[i] * std + offset
        passed = (x > f32(0.0)) | (not rectify)
        derivative[i] = _rounded(f if passed else f32(0.0), derivative)


@njit(**FAST)
def _write_shifted(h, rectify, z, std, out, derivative):
    """h + std z, or of its relu."""
    _with_longest_vectors()
    for i in range(len(out)):
        x = _load(h[i])
        x = max(x, f32(0.0)) if rectify else x
        out[i] = _rounded(x + std * z[i], out)
    for i in range(len(derivative)):
        passed = (_load(h[i]) > f32(0.0)) | (not rectify)
        derivative[i] = _rounded(f32(1.0) if passed else f32(0.0), derivative)


@njit(parallel=True, nogil=True, cache=True, **FAST)
def noise_rows(workers, h, kind, level, rectify, k0, k1, ids, passes, layer, out, derivative):
    """Noise on rows of units (N, a), float32 or bfloat16 (as uint16); `derivative` as h, or (0, 0) if not wanted."""
    n, a = h.shape
    quarter = (a + 3) // 4
    purpose = u64((DROPOUT if kind == 0 else COINS if kind == 3 else GAUSSIAN) << 16)
    threshold = u32(0) if kind == 3 else u32(min(round(level * 2.0**32), 2.0**32 - 1))
    std, offset = (f32(1.0), f32(0.0)) if kind in (0, 3) else (f32(level), f32(1.0))
    for worker in prange(workers):
        words = np.empty((4, CHUNK), dtype=np.uint32)
        made = np.empty((4, CHUNK), dtype=np.float32)
        for row in range(worker * n // workers, (worker + 1) * n // workers):
            c1, c2 = u64(ids[row]) & LOW, u64(passes[row]) & LOW
            l1 = _sum_of_magnitudes(h[row], rectify) if kind == 3 else 0.0
            inverse_l1 = f32(1.0 / l1) if l1 > 0.0 else f32(0.0)
            for start in range(0, quarter, CHUNK):
                length = min(CHUNK, quarter - start)
                _fill_words(words, start, length, c1, c2, u64(layer) | purpose, k0, k1)
                if kind == 0:
                    for w in range(4):
                        _keep_or_drop(words[w, :length], threshold, f32(1.0 / (1.0 - level)), made[w, :length])
                elif kind != 3:
                    _normal_pairs(words[0, :length], words[1], made[0], made[1])
                    _normal_pairs(words[2, :length], words[3], made[2], made[3])
                for w in range(4):
                    low = min(a, w * quarter + start)
                    high = min(a, min((w + 1) * quarter, w * quarter + start + length))
                    wanted = derivative[row, low:high] if len(derivative) else out[row, :0]
                    if kind == 3:
                        _coins(words[w], h[row, low:high], rectify, inverse_l1, f32(level), made[w])
                    if kind == 1:
                        _write_shifted(h[row, low:high], rectify, made[w], f32(level), out[row, low:high], wanted)
                    else:
                        _write_scaled(h[row, low:high], rectify, made[w], std, offset, out[row, low:high], wanted)


def forward(
    h: Tensor,
    kind: str,
    level: float,
    rectify: bool,
    seed: int,
    ids: Tensor,
    passes: Tensor,
    layer: int,
    want_derivative: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`baselines.reference` by the kernel, for float32 and bfloat16 maps on the CPU."""
    rows = _contiguous(h.detach())
    out = torch.empty_like(rows)
    derivative = torch.empty_like(rows) if want_derivative else None
    if rows.numel():
        key = (u64(word) for word in split_seed(seed))
        names = (t.to("cpu", torch.int64).contiguous().numpy() for t in (ids, passes))
        wanted = _array(rows)[:0, :0] if derivative is None else _array(derivative)
        noise_rows(
            numba.get_num_threads(), _array(rows), KINDS[kind], float(level), rectify, *key, *names, layer,
            _array(out), wanted,
        )  # fmt: skip
    return _like(h, out), None if derivative is None else _like(h, derivative)
