"""SAP's fused CPU kernel: `reference.sample` and its scaling in short loops over each map, rows in parallel.

The loops are written so that LLVM turns each into vector instructions: no branches, 32-bit words, and
logarithms and exponentials as polynomials. Units that are 0, half of them after a ReLU, cost no more than a random
word: the others are packed side by side first. Integer sums (fixed point) make the result independent of the order
of additions. Rows of float32 or bfloat16 units in channels_last order are read twice, the second time from the cache
unless they are large, and written once; each worker's scratch rows stay in the cache too.

Numba caches what it compiles by the time stamp of this file alone: touch it after a change of a constant elsewhere.
"""

import functools
import math
import threading

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from torch import Tensor

from sapcore.errors import SapcoreError
from sapcore.randomness import split_seed
from sapcore.sap.reference import (
    FIRST_ARRIVALS,
    LARGEST_MAP,
    MARGIN,
    MISSING,
    REPEATS,
    WEIGHT_BITS,
    from_units,
    to_units,
)

f32, i32, u16, u32, i64, u64 = np.float32, np.int32, np.uint16, np.uint32, np.int64, np.uint64

LOW = u64(0xFFFFFFFF)
M0, M1 = u64(0xD2511F53), u64(0xCD9E8D57)
W0, W1 = u64(0x9E3779B9), u64(0xBB67AE85)
S32 = u64(32)

LANES = 16  # units that are packed at a time
LEVELS = 6  # more than LARGEST_MAP needs
CHUNK = 1024  # counters whose random words are made at once
TWO_16, TWO_M32, TWO_M33 = f32(2.0**16), f32(2.0**-32), f32(2.0**-33)
TWO_40 = f32(2.0**WEIGHT_BITS)
LN2 = f32(math.log(2))
SQRT_HALF_BITS = 0x3F3504F3
EXPONENT_BITS = 0x7F800000
FAST = {"error_model": "numpy", "fastmath": {"contract"}}  # allow fused multiply-add, nothing else


@intrinsic
def _as_int(typingctx, x):
    """The bits of a float32 as int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(numba.int32))

    return numba.int32(numba.float32), codegen


@intrinsic
def _as_float(typingctx, x):
    """The float32 with these bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(numba.float32))

    return numba.float32(numba.int32), codegen


FLOATS = ir.VectorType(ir.FloatType(), LANES)
DOUBLES = ir.VectorType(ir.DoubleType(), LANES)
LONGS = ir.VectorType(ir.IntType(64), LANES)
BITS = ir.IntType(LANES)
PLACES = ir.VectorType(ir.IntType(32), LANES)
FLAGS = ir.VectorType(ir.IntType(1), LANES)
SHORTS = ir.VectorType(ir.IntType(16), LANES)
EIGHT_FLOATS = ir.VectorType(ir.FloatType(), 8)
EIGHT_PLACES = ir.VectorType(ir.IntType(32), 8)
EIGHT_BYTES = ir.VectorType(ir.IntType(8), 8)


def _pointer(context, builder, kind, array, index, vector):
    """Where LANES elements of an array begin, as a pointer to a vector."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _vector(context, builder, kind, array, index):
    """LANES elements of an array as floats: 32 bits of any type as they are, bfloat16, given as uint16, widened."""
    if kind.dtype != numba.uint16:
        return builder.load(_pointer(context, builder, kind, array, index, FLOATS), align=4)
    return _widened(builder, builder.load(_pointer(context, builder, kind, array, index, SHORTS), align=2))


def _widened(builder, halves):
    """LANES bfloat16 numbers, given as integers, as floats."""
    return builder.bitcast(builder.shl(builder.zext(halves, PLACES), ir.Constant(PLACES, [16] * LANES)), FLOATS)


def _repeated(builder, vector, value):
    """A number LANES times."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, PLACES.element(0))
    return builder.shuffle_vector(first, first, ir.Constant(PLACES, None))


def _how_many(builder, mask):
    """The number of bits that are set."""
    count = builder.call(_llvm(builder, BITS, [BITS], f"ctpop.i{LANES}"), [builder.bitcast(mask, BITS)])
    return builder.zext(count, ir.IntType(64))


def _has(context, feature):
    """Whether the processor that is compiled for has these instructions, such as avx2."""
    return f"+{feature}" in context.codegen().magic_tuple()[2].split(",")


def _takes_eight(context):
    """Whether 32-bit numbers are best moved between places eight at a time, as AVX2 does; AVX-512 takes LANES."""
    return _has(context, "avx2") and not _has(context, "avx512f")


def _half(builder, vector, which):
    """The first eight of LANES floats, or the last."""
    places = ir.Constant(EIGHT_PLACES, [8 * which + i for i in range(8)])
    return builder.shuffle_vector(vector, ir.Constant(FLOATS, ir.Undefined), places)


def _moved(builder, values, places):
    """Eight floats, of which place i takes values[places[i]]."""
    permute = _llvm(builder, EIGHT_FLOATS, [EIGHT_FLOATS, EIGHT_PLACES], "x86.avx2.permps")
    return builder.call(permute, [values, places])


def _places(builder, name, bits, row):
    """`row(bits)`, eight places, of a table with a row for each of the 256 sets of eight bits."""
    kind = ir.ArrayType(EIGHT_BYTES, 256)
    table = builder.module.globals.get(name)
    if table is None:
        table = ir.GlobalVariable(builder.module, kind, name)
        table.linkage, table.global_constant = "internal", True
        table.initializer = ir.Constant(kind, [ir.Constant(EIGHT_BYTES, row(bits)) for bits in range(256)])
    places = builder.load(builder.gep(table, [ir.IntType(64)(0), builder.zext(bits, ir.IntType(64))], inbounds=True))
    return builder.zext(places, EIGHT_PLACES)


def _places_of_set(bits):
    """The places of the bits that are set, and zeros."""
    places = [i for i in range(8) if bits >> i & 1]
    return places + [0] * (8 - len(places))


def _set_before(bits):
    """For each place how many bits are set before it."""
    return [(bits & (1 << i) - 1).bit_count() for i in range(8)]


def _halves(builder, bits):
    """The low and the high eight of LANES bits, and how many of the low ones are set."""
    byte = ir.IntType(8)
    low, high = builder.trunc(bits, byte), builder.trunc(builder.lshr(bits, BITS(8)), byte)
    count = builder.call(_llvm(builder, byte, [byte], "ctpop.i8"), [low])
    return low, high, builder.zext(count, ir.IntType(64))


def _weights(context, builder, kind, magnitude, index, power):
    """The whole numbers magnitude * power of LANES units; the products are below 2**52."""
    values = builder.fmul(_vector(context, builder, kind, magnitude, index), _repeated(builder, FLOATS, power))
    if _has(context, "avx512dq"):
        return builder.fptosi(values, LONGS)
    # Others convert to 64 bits one by one; added to 2**52, a whole number stands in the low bits of the sum.
    whole = builder.call(_llvm(builder, DOUBLES, [DOUBLES], f"trunc.v{LANES}f64"), [builder.fpext(values, DOUBLES)])
    raised = builder.fadd(whole, ir.Constant(DOUBLES, [2.0**52] * LANES))
    return builder.and_(builder.bitcast(raised, LONGS), ir.Constant(LONGS, [2**52 - 1] * LANES))


def _at_most(builder, values, target):
    """How many of LANES whole numbers are no larger than the target."""
    return _how_many(builder, builder.icmp_signed("<=", values, _repeated(builder, LONGS, target)))


def _llvm(builder, result, arguments, name):
    return get_or_insert_function(builder.module, ir.FunctionType(result, arguments), f"llvm.{name}")


def _expanded(context, builder, kind, source, n, bits):
    """source[n:] at those of LANES places whose bit is set, 0 at the others."""
    mask = builder.bitcast(bits, FLAGS)
    if _takes_eight(context):
        low, high, count = _halves(builder, bits)
        found = []
        for part, at in ((low, n), (high, builder.add(n, count))):
            read = builder.load(_pointer(context, builder, kind, source, at, EIGHT_FLOATS), align=4)
            moved = _moved(builder, read, _places(builder, "set_before", part, _set_before))
            flags = builder.bitcast(part, ir.VectorType(ir.IntType(1), 8))
            found.append(builder.select(flags, moved, ir.Constant(EIGHT_FLOATS, None)))
        return builder.shuffle_vector(*found, ir.Constant(PLACES, list(range(LANES))))
    first = builder.gep(context.make_array(kind)(context, builder, source).data, [n])
    expand = _llvm(builder, FLOATS, [first.type, mask.type, FLOATS], f"masked.expandload.v{LANES}f32")
    return builder.call(expand, [first, mask, ir.Constant(FLOATS, None)])


def _units(context, builder, kinds, h, i, scale, shift, j):
    """LANES units from i on, with scale and shift h * scale + shift rounded to the type of h; `kinds` are the types."""
    units = _vector(context, builder, kinds[0], h, i)
    if isinstance(kinds[2], numba.types.NoneType):
        return units
    factor, more = (_vector(context, builder, kind, t, j) for kind, t in ((kinds[2], scale), (kinds[3], shift)))
    units = builder.call(_llvm(builder, FLOATS, [FLOATS] * 3, f"fmuladd.v{LANES}f32"), [units, factor, more])
    return units if kinds[0].dtype == numba.float32 else _widened(builder, _as_bfloat16(builder, units, PLACES))


def _store_packed(context, builder, values, bits, kind, target, n):
    """Write those of LANES floats whose bits are set to target[n:]; returns how many."""
    mask = builder.bitcast(bits, FLAGS)
    if _takes_eight(context):
        low, high, count = _halves(builder, bits)
        for which, part, at in ((0, low, n), (1, high, builder.add(n, count))):
            places = _places(builder, "places_of_set", part, _places_of_set)
            packed = _moved(builder, _half(builder, values, which), places)
            builder.store(packed, _pointer(context, builder, kind, target, at, EIGHT_FLOATS), align=4)
    else:
        compress = _llvm(builder, FLOATS, [FLOATS, mask.type, FLOATS], f"experimental.vector.compress.v{LANES}f32")
        packed = builder.call(compress, [values, mask, ir.Constant(FLOATS, ir.Undefined)])
        builder.store(packed, _pointer(context, builder, kind, target, n, FLOATS), align=4)
    return _how_many(builder, mask)


@intrinsic
def _pack(typingctx, source, i, bits, target, n):
    """Write those 32-bit numbers source[i : i + LANES] whose bits are set to target[n:]; returns how many.

    Up to LANES numbers after them are overwritten too.
    """

    def codegen(context, builder, signature, args):
        source, i, bits, target, n = args
        values = _vector(context, builder, signature.args[0], source, i)
        return _store_packed(context, builder, values, bits, signature.args[3], target, n)

    return numba.int64(source, i, bits, target, n), codegen


@intrinsic
def _pack_units(typingctx, h, i, scale, shift, j, rectify, among, filled, g, target, n):
    """Write the magnitudes of those of LANES `_units` that are not 0, as `_pack` does, and note in filled[g] which.

    With `rectify` those that are not 0 after their relu; nan is not. If `among` is not None, only those of its bits.
    """

    def codegen(context, builder, signature, args):
        *units, rectify, among, filled, g, target, n = args
        values, zero = _units(context, builder, signature.args, *units), ir.Constant(FLOATS, None)
        positive, other = (builder.bitcast(builder.fcmp_unordered(kind, values, zero), BITS) for kind in (">", "!="))
        bits = builder.select(rectify, positive, other)
        if not isinstance(signature.args[6], numba.types.NoneType):
            bits = builder.and_(bits, among)
        noted = context.make_array(signature.args[7])(context, builder, filled).data
        builder.store(bits, builder.gep(noted, [g]))
        magnitudes = builder.call(_llvm(builder, FLOATS, [FLOATS], f"fabs.v{LANES}f32"), [values])
        return _store_packed(context, builder, magnitudes, bits, signature.args[9], target, n)

    return numba.int64(h, i, scale, shift, j, rectify, among, filled, g, target, n), codegen


def _store(context, builder, values, kind, array, index):
    """Write LANES floats to an array, of bfloat16 rounded to the nearest."""
    if kind.dtype == numba.uint16:
        values = _as_bfloat16(builder, values, PLACES)
    align = 2 if kind.dtype == numba.uint16 else 4
    builder.store(values, _pointer(context, builder, kind, array, index, values.type), align=align)


@intrinsic
def _write_scaled(typingctx, h, i, scale, shift, j, scales, n, bits, out, at):
    """Write LANES `_units`, each times its `_expanded` scale, or 0 without one, to out[at:]; how many are set."""

    def codegen(context, builder, signature, args):
        *units, scales, n, bits, out, at = args
        kinds, mask = signature.args, builder.bitcast(bits, FLAGS)
        values = _units(context, builder, kinds, *units)
        values = builder.fmul(values, _expanded(context, builder, kinds[5], scales, n, bits))
        values = builder.select(mask, values, ir.Constant(FLOATS, None))
        _store(context, builder, values, kinds[8], out, at)
        return _how_many(builder, mask)

    return numba.int64(h, i, scale, shift, j, scales, n, bits, out, at), codegen


@intrinsic
def _write_factor(typingctx, scale, j, scales, n, bits, factor, at):
    """Write the derivative of what `_write_scaled` writes by h."""

    def codegen(context, builder, signature, args):
        scale, j, scales, n, bits, factor, at = args
        values = _expanded(context, builder, signature.args[2], scales, n, bits)
        if not isinstance(signature.args[0], numba.types.NoneType):
            values = builder.fmul(values, _vector(context, builder, signature.args[0], scale, j))
        _store(context, builder, values, signature.args[5], factor, at)
        return context.get_dummy_value()

    return numba.none(scale, j, scales, n, bits, factor, at), codegen


def _as_bfloat16(builder, values, whole):
    """A float, or a vector of them, rounded to the nearest bfloat16, given as integers; `whole` is their bits' type."""

    def number(x):
        return ir.Constant(whole, [x] * LANES if isinstance(whole, ir.VectorType) else x)

    bits = builder.bitcast(values, whole)
    odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    up = builder.add(builder.add(bits, number(0x7FFF)), odd)
    return builder.trunc(builder.lshr(up, number(16)), SHORTS if isinstance(whole, ir.VectorType) else ir.IntType(16))


@intrinsic
def _block_weight(typingctx, magnitude, i, power):
    """The sum of the whole numbers magnitude * power over LANES units from i on."""

    def codegen(context, builder, signature, args):
        values = _weights(context, builder, signature.args[0], *args)
        add = _llvm(builder, ir.IntType(64), [LONGS], f"vector.reduce.add.v{LANES}i64")
        return builder.call(add, [values])

    return numba.int64(magnitude, i, power), codegen


@intrinsic
def _unit_of(typingctx, magnitude, i, power, target):
    """Of LANES units from i on the one at which the sum of the whole numbers magnitude * power exceeds the target."""

    def codegen(context, builder, signature, args):
        *unit, target = args
        sums = _weights(context, builder, signature.args[0], *unit)
        for step in (1, 2, 4, 8):
            shifted = [LANES] * step + list(range(LANES - step))  # LANES: the first of the zeros
            sums = builder.add(
                sums, builder.shuffle_vector(sums, ir.Constant(LONGS, None), ir.Constant(PLACES, shifted))
            )
        return _at_most(builder, sums, target)

    return numba.int64(magnitude, i, power, target), codegen


@intrinsic
def _count_at_most(typingctx, lower, i, target):
    """How many of LANES whole numbers from lower[i] on are no larger than the target."""

    def codegen(context, builder, signature, args):
        lower, i, target = args
        values = builder.load(_pointer(context, builder, signature.args[0], lower, i, LONGS), align=8)
        return _at_most(builder, values, target)

    return numba.int64(lower, i, target), codegen


@intrinsic
def _load(typingctx, x):
    """A float32 as it is; a bfloat16, given as uint16, as a float32."""

    def codegen(context, builder, signature, args):
        if signature.args[0] == numba.float32:
            return args[0]
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(args[0], word), word(16)), ir.FloatType())

    return numba.float32(x), codegen


@intrinsic
def _rounded(typingctx, x, like):
    """A float32 as an element of `like`: as it is, or rounded to the nearest bfloat16, given as uint16."""

    def codegen(context, builder, signature, args):
        if signature.return_type == numba.float32:
            return args[0]
        return _as_bfloat16(builder, args[0], ir.IntType(32))

    return like.dtype(numba.float32, like), codegen


@intrinsic
def _with_longest_vectors(typingctx):
    """Let LLVM use vectors of 512 bits, where there are such, in this function's loops; on Intel it prefers half."""

    def codegen(context, builder, signature, args):
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own add knows no such name
        return context.get_dummy_value()

    return numba.none(), codegen


@njit(inline="always", **FAST)
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in range(10):
        p0 = (c0 & LOW) * M0
        p1 = (c2 & LOW) * M1
        c0 = (p1 >> S32) ^ c1 ^ k0
        c1 = p1 & LOW
        c2 = (p0 >> S32) ^ c3 ^ k1
        c3 = p0 & LOW
        k0 = (k0 + W0) & LOW
        k1 = (k1 + W1) & LOW
    return c0, c1, c2, c3


@njit(inline="always", **FAST)
def _log_of_complement(v, w):
    """log(w) where w = 1 - v, both float32 in [0, 1] and each as precise as it can be; about 1 ulp."""
    exponent, f = _exponent_and_rest(v, w)
    return _log_of_product(exponent, f)


@njit(inline="always", **FAST)
def _exponent_and_rest(v, w):
    """The e and f of w = 2**e (1 + f)."""
    bits = _as_int(w)
    exponent = i32(i32(bits - i32(SQRT_HALF_BITS)) >> i32(23))
    mantissa = _as_float(i32(bits - i32(exponent << i32(23))))
    return exponent, -v if exponent == i32(0) else mantissa - f32(1.0)


@njit(inline="always", **FAST)
def _log_of_product(exponent, f):
    """log(2**exponent (1 + f))."""
    y = f32(7.0376836292e-2)
    y = y * f - f32(1.1514610310e-1)
    y = y * f + f32(1.1676998740e-1)
    y = y * f - f32(1.2420140846e-1)
    y = y * f + f32(1.4249322787e-1)
    y = y * f - f32(1.6668057665e-1)
    y = y * f + f32(2.0000714765e-1)
    y = y * f - f32(2.4999993993e-1)
    y = y * f + f32(3.3333331174e-1)
    square = f * f
    return f32(exponent) * LN2 + (f - f32(0.5) * square + y * square * f)


@njit(inline="always", **FAST)
def _one_minus_exp(t):
    """1 - exp(t) for t <= 0, without cancellation near 0."""
    t = max(t, f32(-80.0))
    n = i32(t * f32(1.4426950408889634) - f32(0.5))
    f = t - f32(n) * LN2
    y = f32(1.9875691500e-4)
    y = y * f + f32(1.3981999507e-3)
    y = y * f + f32(8.3334519073e-3)
    y = y * f + f32(4.1665795894e-2)
    y = y * f + f32(1.6666665459e-1)
    y = y * f + f32(5.0000001201e-1)
    expm1 = y * f * f + f
    power = _as_float(i32(i32(n + i32(127)) << i32(23)))
    return (f32(1.0) - power) - power * expm1


@njit(**FAST)
def _fill_words(words, start, count, c1, c2, c3, k0, k1):
    """The four words of counters start..start+count-1, each word a contiguous run."""
    _with_longest_vectors()
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    for i in range(count):
        a, b, c, d = _philox(u64(start + i), c1, c2, c3, k0, k1)
        w0[i] = u32(a)
        w1[i] = u32(b)
        w2[i] = u32(c)
        w3[i] = u32(d)


@njit(**FAST)
def _times_since_arrival(words, magnitude, rate, times, exponents):
    """How long before m each unit first arrived, times its rate; 0 if it did not.

    In two short loops: a processor looks only so far ahead, and in one long one would wait.
    """
    _with_longest_vectors()
    for i in range(len(words)):
        v = f32(words[i]) * TWO_M32 + TWO_M33
        w = f32(u32(~words[i])) * TWO_M32 + TWO_M33
        exponents[i], times[i] = _exponent_and_rest(v, w)
    for i in range(len(words)):
        times[i] = max(magnitude[i] * rate + _log_of_product(exponents[i], times[i]), f32(0.0))


@njit(**FAST)
def _count_arrivals(times, r, keep):
    """Mark the units that arrived; return their number and the mean number of repeats, times 2**32.

    For CHUNK units at most. Each time times 2**32 is cut off to a whole number, in parts of 32 bits, which every
    processor converts side by side; to 64 bits few do. All times together are below r, and so are their whole parts.
    """
    _with_longest_vectors()
    count, whole, middle, low = i32(0), i32(0), i32(0), i32(0)
    if r <= 2**15:  # the upper two of three parts are one
        for i in range(len(keep)):
            time = times[i]
            keep[i] = time > f32(0.0)
            rest = time * TWO_16
            first = i32(rest)
            count = i32(count + i32(keep[i]))
            middle = i32(middle + first)
            low = i32(low + i32((rest - f32(first)) * TWO_16))
    else:
        for i in range(len(keep)):
            time = times[i]
            keep[i] = time > f32(0.0)
            first = i32(time)
            rest = (time - f32(first)) * TWO_16
            second = i32(rest)
            count = i32(count + i32(keep[i]))
            whole = i32(whole + first)
            middle = i32(middle + second)
            low = i32(low + i32((rest - f32(second)) * TWO_16))
    return count, (i64(whole) << 32) + (i64(middle) << 16) + i64(low)


@njit(**FAST)
def _poisson(mean, c1, c2, c3, k0, k1):
    """`reference._poisson` for one row."""
    if mean < 10.0:
        w, _, _, _ = _philox(u64(0), c1, c2, c3, k0, k1)
        u = (float(w) + 0.5) * 2.0**-32
        term = math.exp(-mean)
        cumulated = term
        k = 0
        while u >= cumulated and k < 63:
            k += 1
            term = term * mean / k
            cumulated += term
        return k
    b = 0.931 + 2.53 * math.sqrt(mean)
    a = -0.059 + 0.02483 * b
    inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
    v_r = 0.9277 - 3.6224 / (b - 2)
    trial = 0
    while True:
        w, x, _, _ = _philox(u64(trial), c1, c2, c3, k0, k1)
        trial += 1
        centred = (float(w) + 0.5) * 2.0**-32 - 0.5
        v = (float(x) + 0.5) * 2.0**-32
        us = 0.5 - abs(centred)
        k = math.floor((2 * a / us + b) * centred + mean + 0.43)
        if us >= 0.07 and v <= v_r:
            return int(k)
        if k < 0 or (us < 0.013 and v > us):
            continue
        bound = k * math.log(mean) - mean - math.lgamma(k + 1)
        if math.log(v) + math.log(inverse_alpha) - math.log(a / (us * us) + b) <= bound:
            return int(k)


@njit(**FAST)
def _bits_of_largest(magnitude):
    """EXPONENT_BITS or above if there is nan or inf."""
    _with_longest_vectors()
    bits = i32(0)
    for i in range(len(magnitude)):
        bits = max(bits, _as_int(magnitude[i]))
    return bits


@njit(**FAST)
def _multiply(x, power):
    for i in range(len(x)):
        x[i] *= power


@njit(**FAST)
def _targets(low, high, total, targets):
    """Whole numbers below total, each from 53 bits of two words."""
    for t in range(len(targets)):
        u = (float(low[t] >> u32(5)) * 2.0**26 + float(high[t] >> u32(6))) * 2.0**-53
        targets[t] = min(i64(u * float(total)), total - 1)


@njit(**FAST)
def _build_levels(lower, blocks, total, begins):
    """Over the sums of weights before each block those before LANES blocks, and so on; returns how many levels.

    Level k begins at lower[begins[k]] and ends on a whole number of LANES, filled up with the total.
    """
    level, n = 0, blocks
    begins[0] = 0
    while True:
        end = begins[level] + (n + LANES - 1) // LANES * LANES
        lower[begins[level] + n : end] = total
        level += 1
        if n <= LANES:
            return level
        n = (n + LANES - 1) // LANES
        for i in range(n):
            lower[end + i] = lower[begins[level - 1] + i * LANES]
        begins[level] = end


@njit(**FAST)
def _draw_missing(missing, magnitude, power, total, lower, begins, levels, keep, words, target, c1, c2, c3, k0, k1):
    """Make the missing draws: each goes down the levels to its block, then to its unit.

    No step has a branch that the processor would have to guess, and unsigned places need no test for a negative one.
    """
    targets, blocks = target
    for done in range(0, missing, 2 * CHUNK):
        count = min(2 * CHUNK, missing - done)
        half = (count + 1) // 2
        _fill_words(words, done // 2, half, c1, c2, c3, k0, k1)
        _targets(words[0, :half], words[1, :half], total, targets[:half])
        _targets(words[2, : count - half], words[3, : count - half], total, targets[half:count])
        for t in range(count):
            block = 0
            for level in range(levels - 1, -1, -1):
                block = block * LANES + _count_at_most(lower, begins[level] + block * LANES, targets[u64(t)]) - 1
            blocks[u64(t)] = block
        for t in range(count):
            block = blocks[u64(t)]
            rest = targets[u64(t)] - lower[u64(block)]
            keep[u64(block * LANES + _unit_of(magnitude, block * LANES, power, rest))] = True


@njit(**FAST)
def _scales(p, keep, inverse_l1, largest, r):
    """In place: magnitudes of kept units to 1 / (1 - (1 - p)^r), of others to 0."""
    _with_longest_vectors()
    r = f32(r)
    if largest * inverse_l1 < f32(2.0**-7):
        for i in range(len(p)):
            q = p[i] * inverse_l1
            log = -q * (f32(1.0) + q * (f32(1 / 2) + q * (f32(1 / 3) + q * f32(1 / 4))))
            p[i] = f32(1.0) / _one_minus_exp(r * log) if keep[i] else f32(0.0)
    else:
        for i in range(len(p)):
            q = min(p[i] * inverse_l1, f32(1.0))
            log = _log_of_complement(q, f32(1.0) - q)
            p[i] = f32(1.0) / _one_minus_exp(r * log) if keep[i] else f32(0.0)


@njit(**FAST)
def _run(a, w):
    """Where the units of word w begin and end."""
    quarter = (a + 3) // 4
    return min(a, w * quarter), min(a, (w + 1) * quarter)


@njit(**FAST)
def _period(scale):
    """After how many units `affine_of`'s numbers come again."""
    return len(scale) - LANES if scale is not None else LANES


@njit(**FAST)
def _pack_run(h, i, scale, shift, j, rectify, among, filled, packed, n):
    """Append the magnitudes of units from i on that are not 0, LANES to each of `filled`, and note there which.

    These units begin with the j-th of their row; `among` is as in `_pack_units`. What is not wanted is None, of a type
    of its own, so that Numba compiles each case for itself.
    """
    period = _period(scale)
    j %= period
    for g in range(len(filled)):
        n += _pack_units(h, i + g * LANES, scale, shift, j, rectify, among, filled, g, packed, n)
        j = j + LANES if j + LANES < period else j + LANES - period
    return n


@njit(**FAST)
def _write_run(h, i, scale, shift, j, filled, scales, n, out, factor, at):
    """The inverse, with the scales in the place of magnitudes: what is kept times its scale, to out[at:].

    And the derivative of that by h to the factor, if that is wanted.
    """
    period = _period(scale)
    j %= period
    for g in range(len(filled)):
        bits, to = filled[g], at + g * LANES
        if len(factor):
            _write_factor(scale, j, scales, n, bits, factor, to)
        n += _write_scaled(h, i + g * LANES, scale, shift, j, scales, n, bits, out, to)
        j = j + LANES if j + LANES < period else j + LANES - period
    return n


@njit(**FAST)
def _pack_runs(h, rectify, scale, shift, filled, packed, first, spare):
    """`_pack_run` of the units of each word; `first` is where each run begins, and where the last ends."""
    n = 0
    for w in range(4):
        low, high = _run(len(h), w)
        first[w], groups = n, (high - low) // LANES
        at, rest = low + groups * LANES, (high - low) % LANES
        whole, last = filled[w, :groups], filled[w, groups:]
        last[:] = u16(0)
        n = _pack_run(h, low, scale, shift, low, rectify, None, whole, packed, n)
        if rest:  # after which the row may end
            units, among = spare[0], u16((1 << rest) - 1)
            units[:rest] = h[at:high]
            n = _pack_run(units, 0, scale, shift, at, rectify, among, last[:1], packed, n)
        end = n
        n = (n + 2 * LANES - 1) // LANES * LANES  # words are packed LANES at a time, and must not reach the next run's
        packed[end:n] = f32(0.0)
    first[4] = n


@njit(**FAST)
def _write_runs(h, scale, shift, filled, scales, first, spare, out, factor):
    """`_write_run` of the units of each word."""
    for w in range(4):
        low, high = _run(len(h), w)
        groups = (high - low) // LANES
        at, rest = low + groups * LANES, (high - low) % LANES
        whole, last = filled[w, :groups], filled[w, groups:]
        n = _write_run(h, low, scale, shift, low, whole, scales, first[w], out, factor, low)
        if rest:
            units, out_of, factor_of = spare[0], spare[1], spare[2, : min(LANES, len(factor))]
            units[:rest] = h[at:high]
            _write_run(units, 0, scale, shift, at, last[:1], scales, n, out_of, factor_of, 0)
            out[at:high] = out_of[:rest]
            if len(factor):
                factor[at:high] = factor_of[:rest]


@njit(**FAST)
def _pack_words(words, filled, packed_words, n):
    for g in range(len(filled)):
        n += _pack(words, g * LANES, filled[g], packed_words, n)
    return n


@njit(**FAST)
def _scale_row(h, chosen, scratch, scale, shift, r, out, factor, spare):
    """Scale what is kept by 1 / (1 - (1 - p)^r), prune the rest."""
    filled, packed, keep, _, _, _, _, _, _, _, first = scratch
    inverse_l1, largest = chosen
    packed = packed[: first[4]]
    if inverse_l1 > f32(0.0):
        _scales(packed, keep, inverse_l1, largest, r)
    else:
        packed[:] = f32(0.0)
    if len(scale):
        _write_runs(h, scale, shift, filled, packed, first, spare, out, factor)
    else:
        _write_runs(h, None, None, filled, packed, first, spare, out, factor)


@njit(**FAST)
def _choose_row(h, rectify, scale, shift, r, scratch, c1, c2, layer, k0, k1, spare):
    """Choose one row's kept units, among those that are not 0, which are packed side by side first.

    Returns what a packed magnitude is to be multiplied by for p (0 if there is none, -1 for nan or inf), and the
    largest of them.
    """
    filled, packed, keep, words, packed_words, times, exponents, lower, begins, target, first = scratch
    a = len(h)
    if len(scale):
        _pack_runs(h, rectify, scale, shift, filled, packed, first, spare)
    else:
        _pack_runs(h, rectify, None, None, filled, packed, first, spare)
    n = first[4]
    bits = _bits_of_largest(packed[:n])
    if bits >= i32(EXPONENT_BITS):
        return f32(-1.0), f32(0.0)
    if bits == 0 or r == 0:
        return f32(0.0), f32(0.0)
    exponent = math.frexp(_as_float(bits))[1]
    ordinary = abs(exponent) < 60  # so that the power of two may as well go into the other factor
    if not ordinary:
        half = exponent // 2  # 2**149 is no float32
        _multiply(packed[:n], f32(math.ldexp(1.0, -half)))
        _multiply(packed[:n], f32(math.ldexp(1.0, half - exponent)))
    unit = f32(math.ldexp(1.0, -exponent)) if ordinary else f32(1.0)
    keep = keep[:n]
    total = i64(0)
    for b in range(n // LANES):
        lower[b] = total
        total += _block_weight(packed, b * LANES, unit * TWO_40)
    levels = _build_levels(lower, n // LANES, total, begins)
    l1 = math.ldexp(float(total), -WEIGHT_BITS)
    m = max(0.0, r - MARGIN * math.sqrt(r))
    rate = f32(m / l1) * unit
    quarter = (a + 3) // 4
    attempt = 0
    while True:
        tag = u64(layer | attempt << 24)
        at0, at1, at2, at3 = first[0], first[1], first[2], first[3]
        for start in range(0, quarter, CHUNK):
            length = min(CHUNK, quarter - start)
            _fill_words(words, start, length, c1, c2, tag | u64(FIRST_ARRIVALS << 16), k0, k1)
            part = filled[:, start // LANES : (start + length + LANES - 1) // LANES]
            at0 = _pack_words(words[0], part[0], packed_words, at0)
            at1 = _pack_words(words[1], part[1], packed_words, at1)
            at2 = _pack_words(words[2], part[2], packed_words, at2)
            at3 = _pack_words(words[3], part[3], packed_words, at3)
        count = 0
        excess = i64(0)
        for start in range(0, n, CHUNK):
            stop = min(n, start + CHUNK)
            _times_since_arrival(packed_words[start:stop], packed[start:stop], rate, times, exponents)
            arrivals, more = _count_arrivals(times, r, keep[start:stop])
            count += arrivals
            excess += more
        arrived = count + _poisson(float(excess) * 2.0**-32, c1, c2, tag | u64(REPEATS << 16), k0, k1)
        if arrived <= r:
            break
        attempt += 1
    tag = u64(layer | MISSING << 16)
    _draw_missing(
        r - arrived, packed, unit * TWO_40, total, lower, begins, levels, keep, words, target, c1, c2, tag, k0, k1
    )
    largest = f32(math.frexp(_as_float(bits))[0])
    return f32(1.0 / l1) * unit, largest / unit


@njit(**FAST)
def _write_mask(chosen, scratch, mask):
    filled, _, keep, _, _, _, _, _, _, _, first = scratch
    mask[:] = False
    if not chosen:
        return
    for w in range(4):
        n = first[w]
        low, high = _run(len(mask), w)
        for i in range(low, high):
            if filled[w, (i - low) // LANES] >> ((i - low) % LANES) & 1:
                mask[i] = keep[n]
                n += 1


@njit(parallel=True, nogil=True, cache=True, **FAST)
def sap_rows(memory, h, rectify, scale, shift, r, k0, k1, ids, passes, layer, out, factor, mask):
    """SAP on rows of units (N, a), float32 or bfloat16 (as uint16); True if all are finite.

    With `rectify` of their relu; with `scale` and `shift`, which `affine_of` made, of relu(h * scale + shift).
    `factor` (the derivative of out by h) and `mask` are (N, a), or (0, 0) if not wanted. The arithmetic is float32,
    rounded once at the end. `memory`, bytes, has a row for each worker.
    """
    n, a = h.shape
    workers = len(memory)
    finite = np.ones(n, dtype=np.bool_)
    for worker in prange(workers):
        scratch = _scratch(memory[worker], a)
        spare = np.empty((3, LANES), dtype=h.dtype)
        for row in range(worker * n // workers, (worker + 1) * n // workers):
            names = u64(ids[row]) & LOW, u64(passes[row]) & LOW
            chosen = _choose_row(h[row], rectify, scale, shift, r, scratch, names[0], names[1], layer, k0, k1, spare)
            finite[row] = chosen[0] >= f32(0.0)
            if len(mask):
                _write_mask(chosen[0] > f32(0.0), scratch, mask[row])
            wanted = factor[row] if len(factor) else out[row, :0]
            _scale_row(h[row], chosen, scratch, scale, shift, r, out[row], wanted, spare)
    return finite.all()


@njit(**FAST)
def _sum_of_magnitudes(h, rectify):
    total = 0.0
    for start in range(0, len(h), 1024):
        part = f32(0.0)
        for i in range(start, min(len(h), start + 1024)):
            x = _load(h[i])
            part += max(x, f32(0.0)) if rectify else abs(x)
        total += float(part)
    return total


@njit(**FAST)
def _shares(h, rectify, coins, inverse_l1, r, share, kept):
    """p of each unit, and the probability that it is kept."""
    _with_longest_vectors()
    for i in range(len(h)):
        x = _load(h[i])
        x = max(x, f32(0.0)) if rectify else x
        q = min(abs(x) * inverse_l1, f32(1.0))
        log = -q if coins else _log_of_complement(q, f32(1.0) - q)
        share[i] = q
        kept[i] = max(_one_minus_exp(r * log), f32(1e-30))


@njit(**FAST)
def _of_kept(grad, factor, out):
    """The gradient where a unit is kept, else 0."""
    _with_longest_vectors()
    for i in range(len(out)):
        out[i] = _load(grad[i]) if _load(factor[i]) != f32(0.0) else f32(0.0)


@njit(**FAST)
def _slopes(h, rectify, coins, r, share, direct, slope):
    """In place: gradients to these times the scale, and probabilities to grad h times the scale's derivative by p."""
    _with_longest_vectors()
    for i in range(len(h)):
        x = _load(h[i])
        x = max(x, f32(0.0)) if rectify else x
        g, kept = direct[i], slope[i]
        s = f32(1.0) / kept
        # the derivative of the probability by p, over r: exp(-r p), or (1 - p)^(r - 1)
        rest = (f32(1.0) - kept) / (f32(1.0) if coins else max(f32(1.0) - share[i], f32(1e-7)))
        direct[i] = g * s
        slope[i] = -g * x * r * rest * s * s


@njit(**FAST)
def _sum_of_products(x, y):
    """In order, so that vectors of any width give the same."""
    total = 0.0
    for start in range(0, len(x), 1024):
        part = f32(0.0)
        for i in range(start, min(len(x), start + 1024)):
            part += x[i] * y[i]
        total += float(part)
    return total


@njit(**FAST)
def _write_through_scale(h, rectify, inverse_l1, mean, direct, slope, out):
    _with_longest_vectors()
    for i in range(len(h)):
        x = _load(h[i])
        passed = (x > f32(0.0)) | ((x < f32(0.0)) & (not rectify))
        by_sum = (slope[i] - mean) * inverse_l1
        y = direct[i] + (by_sum if x > f32(0.0) else -by_sum)
        out[i] = _rounded(y if passed else f32(0.0), out)


@njit(parallel=True, nogil=True, cache=True, **FAST)
def through_scale_rows(memory, h, factor, grad, rectify, coins, r, out):
    """The gradient by h of SAP given its mask, through p and the scale too; `factor` is 0 where a unit is not kept.

    With `coins` of Bernoulli SAP, which keeps a unit with probability 1 - exp(-r p). `memory` is as in `sap_rows`.
    """
    n, a = h.shape
    workers, one = len(memory), _lines(a, 4)
    for worker in prange(workers):
        rows = memory[worker, : 3 * one].view(np.float32)
        share, direct, slope = rows[:a], rows[one // 4 :][:a], rows[one // 2 :][:a]
        for row in range(worker * n // workers, (worker + 1) * n // workers):
            l1 = _sum_of_magnitudes(h[row], rectify)
            inverse_l1 = f32(1.0 / l1) if l1 > 0.0 else f32(0.0)
            _shares(h[row], rectify, coins, inverse_l1, f32(r), share, slope)
            _of_kept(grad[row], factor[row], direct)
            _slopes(h[row], rectify, coins, f32(r), share, direct, slope)
            mean = f32(_sum_of_products(slope, share))
            _write_through_scale(h[row], rectify, inverse_l1, mean, direct, slope, out[row])


@njit(**FAST)
def _lines(count, size):
    """The bytes of so many elements, up to a whole cache line."""
    return (count * size + 63) // 64 * 64


@njit(**FAST)
def _lengths(a):
    """Of the rows that grow with the map: units packed, groups of each word, sums of weights."""
    packed = (a + LANES - 1) // LANES * LANES + 8 * LANES
    quarter = (a + 3) // 4
    return packed, (quarter + LANES - 1) // LANES, packed // (LANES - 1) + LEVELS * LANES


@functools.cache
def _bytes_of_scratch(a: int) -> int:
    """What `_scratch` takes of `memory`."""
    packed, groups, sums = _lengths(a)
    return int(2 * _lines(packed, 4) + _lines(packed, 1) + _lines(4 * groups, 2) + 8 * sums)


@njit(**FAST)
def _scratch(memory, a):
    """A worker's own rows, the long ones in `memory`.

    Which units are not 0; these units' magnitudes, their mask, words, words side by side, and times, with exponents
    on the way; sums of weights and where their levels begin, missing draws, and where the units of each word begin
    among what is packed.
    """
    packed, groups, sums = _lengths(a)
    at_words = _lines(packed, 4)
    at_keep = at_words + _lines(packed, 4)
    at_filled = at_keep + _lines(packed, 1)
    at_sums = at_filled + _lines(4 * groups, 2)
    return (
        memory[at_filled : at_filled + 8 * groups].view(np.uint16).reshape(4, groups),
        memory[: 4 * packed].view(np.float32),
        memory[at_keep : at_keep + packed].view(np.bool_),
        np.empty((4, CHUNK), dtype=np.uint32),
        memory[at_words : at_words + 4 * packed].view(np.uint32),
        np.empty(CHUNK, dtype=np.float32),
        np.empty(CHUNK, dtype=np.int32),
        memory[at_sums : at_sums + 8 * sums].view(np.int64),
        np.empty(LEVELS, dtype=np.int64),
        np.empty((2, 2 * CHUNK), dtype=np.int64),
        np.empty(5, dtype=np.int64),
    )


KEPT_BYTES = 2**25  # per worker: enough for maps of 3 million units
_kept = threading.local()


def _memory(workers: int, count: int) -> np.ndarray:
    """So many bytes for each worker, the same at the next call: fresh ones cost more than all else on a large map."""
    if count > KEPT_BYTES:
        return np.empty((workers, count), dtype=np.uint8)
    memory: np.ndarray | None = getattr(_kept, "memory", None)
    if memory is None or memory.shape[0] < workers or memory.shape[1] < count:
        _kept.memory = memory = np.empty((workers, count), dtype=np.uint8)
    return memory[:workers]


DTYPES = (torch.float32, torch.bfloat16)


def forward(
    h: Tensor,
    r: int,
    seed: int,
    ids: Tensor,
    passes: Tensor,
    layer: int,
    rectify: bool,
    want_factor: bool,
    want_mask: bool,
    affine: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`reference.forward` by the kernel, for float32 and bfloat16 maps on the CPU; what is not wanted is None.

    With `affine`, what `affine_of` made, it is that of relu(h * scale + shift), and the factor is the derivative by h.
    """
    rows = _contiguous(h.detach())
    a = rows.numel() // len(rows) if len(rows) else 0
    if a > LARGEST_MAP:
        raise SapcoreError(f"the map has {a} units, but SAP takes {LARGEST_MAP} at most")
    out = torch.empty_like(rows)
    factor = torch.empty_like(rows) if want_factor else None
    mask = torch.empty_like(rows, dtype=torch.bool) if want_mask else None
    if a:
        key = (u64(word) for word in split_seed(seed))
        names = (t.to("cpu", torch.int64).contiguous().numpy() for t in (ids, passes))
        arrays = (_array(t) if t is not None else _UNWANTED[h.dtype] for t in (out, factor))
        kept = mask.numpy().reshape(len(h), a) if mask is not None else _UNWANTED[torch.bool]
        affine = affine or (_NO_AFFINE, _NO_AFFINE)
        memory = _memory(numba.get_num_threads(), _bytes_of_scratch(a))
        if not sap_rows(memory, _array(rows), rectify, *affine, r, *key, *names, layer, *arrays, kept):
            raise SapcoreError("the activation map holds nan or inf, but SAP needs finite activations")
    return (_like(h, out), None if factor is None else _like(h, factor), None if mask is None else _like(h, mask))


def through_scale(
    h: Tensor, factor: Tensor, grad: Tensor, r: int, rectify: bool = False, coins: bool = False
) -> Tensor:
    """`layer.scaled_by_mask`'s gradient by h, of a map whose `forward` left `factor`; with `coins` Bernoulli SAP's."""
    rows, factors, grads = (_contiguous(t) for t in (h, factor, grad.to(h.dtype)))
    out = torch.empty_like(rows)
    if rows.numel():
        arrays = (_array(t) for t in (rows, factors, grads))
        memory = _memory(numba.get_num_threads(), 3 * _lines(rows[0].numel(), 4))
        through_scale_rows(memory, *arrays, rectify, coins, r, _array(out))
    return _like(h, out)


_UNWANTED = {
    torch.float32: np.empty((0, 0), dtype=np.float32),
    torch.bfloat16: np.empty((0, 0), dtype=np.uint16),
    torch.bool: np.empty((0, 0), dtype=np.bool_),
}


_NO_AFFINE = np.empty(0, dtype=np.float32)


def affine_of(scale: Tensor, shift: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A scale and a shift per channel, float32 (C,), repeated so that LANES of them follow on each of the first."""
    count = -(-LANES // len(scale)) * len(scale) + LANES
    return np.resize(scale.detach().numpy(), count), np.resize(shift.detach().numpy(), count)


def _contiguous(h: Tensor) -> Tensor:
    """h with its units in their order in memory, channels last; not copied if they are already."""
    if h.dim() == 4:  # by far the most frequent case, and so worth fewer steps
        return h.permute(0, 2, 3, 1).contiguous()
    return to_units(h).contiguous()


def _like(h: Tensor, rows: Tensor) -> Tensor:
    """What `_contiguous` laid out, shaped as h."""
    return rows.permute(0, 3, 1, 2) if h.dim() == 4 else from_units(rows, h)


def _array(rows: Tensor) -> np.ndarray:
    """As an array (N, a), bfloat16 as uint16."""
    array = rows.numpy() if rows.dtype == torch.float32 else rows.view(torch.uint16).numpy()
    return array.reshape(len(array), -1)
