"""The fused kernel against its slow twin: the same units, and the same factors but for rounding."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sapcore import sap
from sapcore.errors import SapcoreError
from sapcore.sap import cpu
from sapcore.sap.reference import LARGEST_MAP, WEIGHT_BITS
from tests.sap.laws import percent_for

MAPS: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "rectified normal": lambda g, a: torch.randn(a, generator=g).relu(),
    "signed normal": lambda g, a: torch.randn(a, generator=g),
    "flat": lambda g, a: torch.ones(a),
    "one in a hundred": lambda g, a: torch.rand(a, generator=g) * (torch.rand(a, generator=g) < 0.01),
    "lognormal": lambda g, a: torch.exp(6 * torch.randn(a, generator=g)),
    "halves of halves": lambda g, a: 2.0 ** -(torch.arange(a) % 60),
}
SIZES = (1, 2, 3, 5, 63, 64, 65, 511, 513, 2048, 2049, 4096, 16384)
PERCENTS = (1, 5, 37.5, 100, 200, 1000)


def masks(h: Tensor, percent: float, **names: object) -> tuple[Tensor, Tensor]:
    found = [sap(h, percent, return_mask=True, backend=b, **names)[1] for b in ("reference", "cpu")]  # type: ignore[call-overload]
    return found[0], found[1]


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_and_reference_keep_the_same_units(kind: str, dtype: torch.dtype) -> None:
    """On maps of all sizes at all percentages.

    The kernel's logarithm is off by about one unit in the last place, so a unit whose first draw comes at
    the very end may go either way: at most 1 in 100,000, and hardly any map in which it happens.
    """
    generator = torch.Generator().manual_seed(0)
    units = differing = differing_maps = maps = 0
    for number, size in enumerate(SIZES):
        for percent in PERCENTS:
            h = torch.stack([MAPS[kind](generator, size) for _ in range(3)]).to(dtype)
            names = {"seed": number << 40, "ids": torch.tensor([0, 7, 10**6]), "passes": number, "layer": number}
            expected, found = masks(h, percent, **names)
            units += expected.numel()
            maps += len(h)
            differing += int((found != expected).sum())
            differing_maps += int((found != expected).any(1).sum())
    assert differing <= 1e-5 * units
    assert differing_maps <= 0.02 * maps


@pytest.mark.parametrize("size", [2**16 + 17, 2**20 + 17, LARGEST_MAP])
def test_kernel_and_reference_keep_the_same_units_of_large_maps(size: int) -> None:
    """Whose missing draws go down four levels and five; at most one unit in 100,000 may go either way."""
    h = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    expected, found = masks(h, 5, seed=3, layer=2)
    assert int((found != expected).sum()) <= 1e-5 * h.numel()


def check_the_packing() -> None:
    """Every set of bits of LANES packs as numpy's indexing, unpacks to what it was, and weighs what it weighs.

    So do units, of float32 and bfloat16, and with a scale and a shift for each channel.
    """
    generator = np.random.default_rng(0)
    groups = 2**16
    filled = np.arange(groups, dtype=np.uint16)
    set_ = (filled[:, None] >> np.arange(cpu.LANES) & 1).astype(bool).ravel()
    values = generator.random(groups * cpu.LANES, dtype=np.float32) ** 8 + np.float32(1e-6)
    packed = np.zeros(len(values) + cpu.LANES, np.float32)
    n = cpu._pack_words(values, filled, packed, 0)
    assert n == set_.sum()
    np.testing.assert_array_equal(packed[:n], values[set_])
    units = np.where(set_, values * np.where(values > 0.01, np.float32(-1), np.float32(1)), np.float32(0))
    affine = cpu.affine_of(torch.tensor([1.0, 2.0, -4.0]), torch.tensor([0.0, 0.5, 0.0]))
    scale, shift = (np.resize(t[:3], len(units)) for t in affine)
    for h, dtype in ((units, torch.float32), (_array(torch.from_numpy(units).bfloat16()), torch.bfloat16)):
        of_h = torch.from_numpy(units).to(dtype).double()
        for pair, wide in (((None, None), of_h), (affine, of_h * torch.from_numpy(scale) + torch.from_numpy(shift))):
            x = wide.to(dtype).float().numpy()
            for rectify in (False, True):
                check_the_runs(h, pair, x, rectify)
    power = np.float32(2.0**WEIGHT_BITS)
    weights = (values * power).astype(np.int64).reshape(-1, cpu.LANES)
    drawn = generator.integers(0, weights[:500].sum(1))
    for block in range(500):
        assert _block_weight(values, block * cpu.LANES, power) == weights[block].sum()
        unit = _unit_of(values, block * cpu.LANES, power, drawn[block])
        assert unit == np.searchsorted(weights[block].cumsum(), drawn[block], side="right")


def check_the_runs(h: Any, affine: tuple[Any, Any], x: Any, rectify: bool) -> None:
    """Units h that `affine` takes to x, packed and, as their own scales, written back."""
    noted, packed = np.zeros(len(h) // cpu.LANES, np.uint16), np.zeros(len(h) + cpu.LANES, np.float32)
    n = cpu._pack_run(h, 0, *affine, 0, rectify, None, noted, packed, 0)
    active = x > 0 if rectify else x != 0
    np.testing.assert_array_equal(np.unpackbits(noted.view(np.uint8), bitorder="little").astype(bool), active)
    np.testing.assert_array_equal(packed[:n], np.abs(x[active]))
    out, factor = np.ones_like(h), np.ones_like(h)
    assert cpu._write_run(h, 0, *affine, 0, noted, packed, 0, out, factor, 0) == n
    scales = np.where(active, np.abs(x), np.float32(0))
    derivative = scales if affine[0] is None else scales * np.resize(affine[0][:3], len(h))
    for found, expected in ((out, np.maximum(x, 0) * scales if rectify else x * scales), (factor, derivative)):
        wanted = torch.from_numpy(expected)
        np.testing.assert_array_equal(found, wanted.numpy() if h.dtype == np.float32 else _array(wanted.bfloat16()))


def _array(x: torch.Tensor) -> Any:
    """bfloat16 as the kernel has it."""
    return x.view(torch.int16).numpy().view(np.uint16)


_block_weight = numba.njit(lambda magnitude, i, power: cpu._block_weight(magnitude, i, power))
_unit_of = numba.njit(lambda magnitude, i, power, target: cpu._unit_of(magnitude, i, power, target))


@pytest.mark.parametrize(("processor", "features"), [("", ()), ("generic", ()), ("haswell", ("avx2", "fma", "popcnt"))])
def test_packing_with_the_instructions_of_every_processor(processor: str, features: tuple[str, ...]) -> None:
    """This one's, those that all have, and those of AVX2, which has no instruction for it and uses tables."""
    lacking = [name for name in features if not llvmlite.binding.get_host_cpu_features().get(name)]
    if lacking:
        pytest.skip(f"this processor has no {lacking[0]}")
    if not processor:
        check_the_packing()
        return
    environment = {
        **os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in features),
    }  # fmt: skip
    command = [sys.executable, "-c", "from tests.sap.test_cpu import check_the_packing as check; check()"]
    subprocess.run(command, check=True, env=environment)


@pytest.mark.parametrize("size", [1, 511, cpu.CHUNK])
@pytest.mark.parametrize("largest", [0.5, 100.0, 1130.0, 2.0**20])
def test_arrivals_are_counted_with_every_bit(size: int, largest: float) -> None:
    generator = np.random.default_rng(size)
    since = (largest * generator.random(size) ** 20 * (generator.random(size) < 0.7)).astype(np.float32)
    keep = np.zeros(size, dtype=bool)
    r = int(since.sum(dtype=np.float64)) + 1
    assert (size, largest) != (cpu.CHUNK, 1130.0) or 32_000 < r <= 2**15, "just below what one of the sums holds"
    count, excess = cpu._count_arrivals(since, r, keep)
    np.testing.assert_array_equal(keep, since > 0)
    assert count == keep.sum()
    assert excess == (since.astype(np.float64) * 2**32).astype(np.int64).sum()


@pytest.mark.parametrize("blocks", [1, 16, 17, 256, 257, 4096, 4097, 65536])
def test_every_level_holds_the_sums_before_its_blocks(blocks: int) -> None:
    lower, begins = np.full(2 * blocks + 96, -1), np.zeros(cpu.LEVELS, dtype=np.int64)
    lower[:blocks] = 3 * np.arange(blocks)
    levels = cpu._build_levels(lower, blocks, 3 * blocks, begins)
    for level in range(levels):
        sums = 3 * np.arange(0, blocks, cpu.LANES**level)
        found = lower[begins[level] :][: -(-len(sums) // cpu.LANES) * cpu.LANES]
        assert (found[: len(sums)] == sums).all()
        assert (found[len(sums) :] == 3 * blocks).all()
    assert len(found) == cpu.LANES


@given(
    size=st.integers(1, 300),
    percent=st.floats(0.5, 1000),
    kind=st.sampled_from(sorted(MAPS)),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**32 - 4),
    passes=st.integers(0, 2**32 - 1),
    layer=st.integers(0, 2**16 - 1),
)
def test_kernel_and_reference_agree_under_any_name(
    size: int, percent: float, kind: str, seed: int, first: int, passes: int, layer: int
) -> None:
    h = torch.stack([MAPS[kind](torch.Generator().manual_seed(seed % 2**63), size)] * 3)
    expected, found = masks(h, percent, seed=seed, ids=first + torch.arange(3), passes=passes, layer=layer)
    assert int((found != expected).sum()) <= 2


def test_kernel_and_reference_agree_on_names_beyond_32_bits() -> None:
    h = torch.ones(4, 2000)
    expected, found = masks(
        h, 50, ids=torch.tensor([-1, 2**32, 2**40 + 3, 2**62]), passes=torch.tensor([-1, 0, 1, 2**33])
    )
    assert torch.equal(found, expected)


def exact_factor(h: Tensor, mask: Tensor, r: int) -> Tensor:
    """mask / (1 - (1 - p)^r) in float64."""
    p = h.double().abs() / h.double().abs().sum(1, keepdim=True)
    return torch.where(mask, -1 / torch.expm1(r * torch.log1p(-p)), 0.0)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("percent", PERCENTS)
def test_the_kernels_output_is_exact_to_float32_rounding(kind: str, percent: float) -> None:
    h = torch.stack([MAPS[kind](torch.Generator().manual_seed(i), 3000) for i in range(4)])
    r = int(percent * 30)
    out, mask = sap(h, percent, return_mask=True, backend="cpu")
    expected = h.double() * exact_factor(h, mask, r)
    assert torch.equal(out != 0, mask & (h != 0))
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("p", "r"), [(1e-8, 200_000), (1e-7, 20_000), (1e-6, 2000), (1e-4, 30)])
def test_the_scale_of_a_unit_of_tiny_probability_is_exact_to_float32_rounding(backend: str, p: float, r: int) -> None:
    """It is kept once in 500 maps; there the naive formula in float32 is far off or divides by zero."""
    n = 5_000 if backend == "reference" else 20_000
    h = torch.tensor([[1.0, p]]).expand(n, -1)
    ids = torch.arange(n)
    if backend == "reference":  # the same units as the kernel keeps: look only where there is something to see
        kept = sap(h, percent_for(r, 2), ids=ids, return_mask=True, backend="cpu")[1][:, 1]
        ids = ids[kept]
    out, mask = sap(h[: len(ids)], percent_for(r, 2), ids=ids, return_mask=True, backend=backend)
    assert mask[:, 1].any()
    torch.testing.assert_close(out.double(), h[: len(ids)] * exact_factor(h[: len(ids)], mask, r), rtol=2e-6, atol=0)


def scales(p: np.ndarray, r: int) -> np.ndarray:
    """The kernel's 1 / (1 - (1 - p)^r) for units that are all kept."""
    factor = p.copy()
    cpu._scales(factor, np.ones(len(p), dtype=np.bool_), np.float32(1), p.max(), r)
    return factor


@pytest.mark.parametrize("r", [1, 2, 10, 100, 819, 4096, 16384, 163_840])
@pytest.mark.parametrize("largest", [1e-5, 1e-3, 2.0**-7 - 1e-9, 2.0**-7, 0.02, 0.5, 1 - 1e-7])
def test_the_kernels_scale_is_exact_to_float32_rounding_for_all_probabilities(r: int, largest: float) -> None:
    """Also for the short series that serves maps without large probabilities."""
    p = np.concatenate([np.geomspace(1e-8, largest, 5_000), 1 - np.geomspace(1e-7, 0.5, 5_000)]).astype(np.float32)
    p = p[p <= np.float32(largest)]
    expected = -1 / np.expm1(r * np.log1p(-p.astype(np.float64)))
    np.testing.assert_allclose(scales(p, r), expected, rtol=1e-6)
    assert scales(np.ones(1, dtype=np.float32), r).tolist() == [1]


def test_the_naive_scale_in_float32_would_divide_by_zero() -> None:
    p = np.float32(1e-8)
    assert np.float32(1) - (np.float32(1) - p) ** 1000 == 0
    assert scales(np.array([p]), 1000)[0] == pytest.approx(1e5, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_wanted_is_not_made_and_changes_nothing(dtype: torch.dtype) -> None:
    h = torch.rand(3, 4, 5, 6).to(dtype)
    arguments = (h, 60, 1, torch.arange(3), torch.zeros(3, dtype=torch.int64), 0, False)
    full = cpu.forward(*arguments, want_factor=True, want_mask=True)
    bare = cpu.forward(*arguments, want_factor=False, want_mask=False)
    assert torch.equal(full[0], bare[0])
    assert bare[1:] == (None, None)
    assert full[1] is not None
    assert full[2] is not None
    assert torch.equal(full[1] != 0, full[2])


@pytest.mark.parametrize("a", [*range(1, 140), 1021, 16383, 16384, 16385, LARGEST_MAP])
def test_no_vector_reaches_beyond_a_workers_rows(a: int) -> None:
    memory = np.empty(cpu._bytes_of_scratch(a), dtype=np.uint8)
    rows = cpu._scratch(memory, a)
    places = [(row.ctypes.data, row.nbytes) for row in rows if np.may_share_memory(row, memory)]
    assert len(places) == 5
    before = [memory.ctypes.data, *(place + count for place, count in sorted(places))]
    assert all(end <= place for end, (place, _) in zip(before, sorted(places), strict=False)), "two rows overlap"
    assert before[-1] <= memory.ctypes.data + len(memory)
    filled, packed, keep, _, words, _, _, lower, begins, _, first = rows
    assert filled.shape == (4, ((a + 3) // 4 + cpu.LANES - 1) // cpu.LANES)
    assert len(keep) == len(words) == len(packed)
    ends = 0
    for low, high in (cpu._run(a, w) for w in range(4)):
        ends = (ends + high - low + 2 * cpu.LANES - 1) // cpu.LANES * cpu.LANES
    assert ends <= len(packed)
    assert len(first) == 5
    top, blocks, level = 0, len(packed) // cpu.LANES, 1
    while blocks > cpu.LANES:
        top, blocks, level = top + -(-blocks // cpu.LANES) * cpu.LANES, -(-blocks // cpu.LANES), level + 1
    assert top + cpu.LANES <= len(lower)
    assert level <= len(begins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [0, 3])
def test_no_vector_reaches_beyond_a_map(dtype: torch.dtype, channels: int) -> None:
    """What lies before and after a map of any size is neither looked at nor written to."""
    affine = cpu.affine_of(torch.ones(channels), torch.zeros(channels)) if channels else (cpu._NO_AFFINE,) * 2
    names, memory = np.zeros(1, np.int64), np.empty((1, cpu._bytes_of_scratch(200)), np.uint8)
    key = cpu.u64(1), cpu.u64(2)
    for a in range(1, 140):
        h, out, factor = (torch.full((1, a + 64), fill, dtype=dtype) for fill in (torch.nan, 7.0, 7.0))
        h[0, 32 : 32 + a] = torch.rand(a, generator=torch.Generator().manual_seed(a)) - 0.3
        rows = [_as_rows(t)[0, 32 : 32 + a].reshape(1, a) for t in (h, out, factor)]
        mask = np.empty((0, 0), np.bool_)
        assert cpu.sap_rows(memory, rows[0], True, *affine, a, *key, names, names, 3, *rows[1:], mask)
        for t in (out, factor):
            assert t[0, 32 : 32 + a].isfinite().all()
            assert (t[0, :32] == 7).all()
            assert (t[0, 32 + a :] == 7).all()


def _as_rows(t: Tensor) -> Any:
    return t.numpy() if t.dtype == torch.float32 else _array(t)


def test_bfloat16_conversions_are_torchs() -> None:
    x = torch.cat(
        [torch.randn(10_000, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, -0.0, 1.00390625])]
    )
    x = torch.cat([x, torch.ones(-len(x) % cpu.LANES)])
    narrow, all_ = np.empty(len(x), np.uint16), np.full(len(x) // cpu.LANES, 2**cpu.LANES - 1, np.uint16)
    cpu._write_run(x.numpy(), 0, None, None, 0, all_, np.ones(len(x), np.float32), 0, narrow, narrow[:0], 0)
    assert torch.equal(torch.from_numpy(narrow.view(np.int16)).view(torch.bfloat16), x.bfloat16())
    packed = np.empty(len(x) + cpu.LANES, np.float32)
    n = cpu._pack_run(narrow, 0, None, None, 0, False, None, all_, packed, 0)
    assert torch.equal(torch.from_numpy(packed[:n]), x[x != 0].bfloat16().float().abs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_kernel_refuses_types_that_it_does_not_know(dtype: torch.dtype) -> None:
    with pytest.raises(SapcoreError, match="float32"):
        sap(torch.ones(2, 5, dtype=dtype), backend="cpu")


def test_both_refuse_a_map_of_more_than_four_million_units() -> None:
    h = torch.zeros(1, 2**22 + 1)
    for backend in ("reference", "cpu"):
        with pytest.raises(SapcoreError, match="the map has 4194305 units, but SAP takes 4194304 at most"):
            sap(h, 1e-3, backend=backend)


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_rows_are_treated_each_for_itself(rows: int) -> None:
    h = torch.rand(9, 700, generator=torch.Generator().manual_seed(0))
    whole = sap(h, 100, seed=5, backend="cpu")
    parts = [
        sap(h[i : i + rows], 100, seed=5, ids=torch.arange(9)[i : i + rows], backend="cpu") for i in range(0, 9, rows)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_the_number_of_threads_changes_nothing() -> None:
    import numba

    h = torch.rand(8, 5000, generator=torch.Generator().manual_seed(0))
    before = numba.get_num_threads()
    outputs = []
    try:
        for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(threads)
            outputs.append(sap(h, 100, backend="cpu"))
    finally:
        numba.set_num_threads(before)
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_the_memory_of_a_larger_map_and_of_more_threads_changes_nothing() -> None:
    import numba

    def everything(n: int, a: int) -> list[torch.Tensor]:
        h = torch.randn(n, a, generator=torch.Generator().manual_seed(a))
        out, factor, mask = cpu.forward(h, a, 3, torch.arange(n), torch.arange(n), 0, False, True, True)
        assert factor is not None
        assert mask is not None
        return [out, factor, mask, cpu.through_scale(h, factor, torch.ones_like(h), a)]

    found = [everything(4, 100), everything(2, 70_000), everything(4, 100), everything(2, 70_000)]
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        found += [everything(4, 100), everything(2, 70_000)]
    finally:
        numba.set_num_threads(before)
    for later in range(2, len(found)):
        assert all(torch.equal(x, y) for x, y in zip(found[later % 2], found[later], strict=True))
