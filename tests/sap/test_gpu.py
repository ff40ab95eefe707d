"""The Triton kernels against the reference, on a GPU or, without one, in Triton's interpreter."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sapcore import sap, with_sap
from sapcore.errors import SapcoreError
from sapcore.sap.reference import draws
from tests.sap.test_cpu import MAPS, exact_factor

triton = pytest.importorskip("triton", reason="Triton runs on Linux only")
tl = pytest.importorskip("triton.language")
from sapcore.sap import gpu, reference  # noqa: E402 - not before Triton is known to be there

DEVICE = "cpu" if gpu.INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # the interpreter cuts bfloat16 off
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """Where a GPU silently makes inf of what is thrown away afterwards, numpy would warn."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(params=["whole", "in tiles"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kernels on the same maps: the one for large maps with tiles so small that it needs many."""
    if request.param == "in tiles":
        monkeypatch.setattr(gpu, "LONGEST_RUN", 0)
        monkeypatch.setattr(gpu, "TILE", 256)
    return request.param


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(DEVICE) for t in tensors)


def both(h: Tensor, percent: float, **names: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference's mask and output, and the kernel's, all on the CPU."""
    expected, mask = sap(h, percent, return_mask=True, backend="reference", **names)  # type: ignore[call-overload]
    out, kept = sap(h.to(DEVICE), percent, return_mask=True, backend="gpu", **names)  # type: ignore[call-overload]
    return mask, expected, kept.cpu(), out.cpu()


@pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, torch.float32) for kind in MAPS] + [("rectified normal", t) for t in DTYPES[1:]]
)
def test_kernel_and_reference_keep_the_same_units(kind: str, dtype: torch.dtype, path: str) -> None:
    """At most 1 unit in 10,000 may differ, where a first draw comes at the very end; and the output is exact."""
    generator = torch.Generator().manual_seed(0)
    units = differing = 0
    for number, size in enumerate((1, 2, 5, 65, 513, 2049)):
        for percent in (5, 100, 1000):
            h = torch.stack([MAPS[kind](generator, size) for _ in range(2)]).to(dtype)
            h = h.clamp(max=6e4) if dtype == torch.float16 else h
            names = {"seed": number << 60, "ids": torch.tensor([7, 10**10]), "passes": number, "layer": number}
            expected, _, found, out = both(h, percent, **names)
            units += expected.numel()
            differing += int((found != expected).sum())
            exact = h.double() * exact_factor(h, found, draws(percent, size))
            torch.testing.assert_close(out.double(), exact, rtol=ROUNDING[dtype], atol=1e-7 * float(h.abs().max()))
    assert differing <= 1e-4 * units


@pytest.mark.parametrize("size", [16384, 32768, 40_000])
def test_kernel_and_reference_agree_on_maps_of_a_networks_size(size: int) -> None:
    h = torch.randn(1, size, generator=torch.Generator().manual_seed(0)).relu()
    expected, _, found, _ = both(h, 100, seed=3)
    assert int((found != expected).sum()) <= 2


@every_dtype
@pytest.mark.parametrize("rectify", [False, True])
def test_the_gradient_is_scaled_by_the_same_factors(dtype: torch.dtype, rectify: bool, path: str) -> None:
    """The backward pass makes the mask anew: exactly the forward pass's, unit by unit."""
    h = torch.randn(2, 3, 10, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad = torch.randn(2, 3, 10, 11, generator=torch.Generator().manual_seed(1)).to(dtype)
    model = with_sap(nn.Sequential(nn.ReLU()), 60, backend="gpu") if rectify else None
    (leaf,) = on_device(h)
    leaf.requires_grad_()
    out = (
        sap(leaf, 60, seed=5, ids=torch.tensor([3, 9]), backend="gpu")
        if model is None
        else model(leaf, seed=5, ids=torch.tensor([3, 9]))
    )
    (found,) = torch.autograd.grad(out, leaf, grad.to(DEVICE))
    rectified = h.relu() if rectify else h
    mask = sap(rectified, 60, seed=5, ids=torch.tensor([3, 9]), return_mask=True, backend="reference")[1]
    flat = rectified.movedim(1, -1).flatten(1)
    factor = exact_factor(flat, mask.movedim(1, -1).flatten(1), draws(60, 330)).reshape(2, 10, 11, 3).movedim(-1, 1)
    for value, result in ((rectified, out.detach()), (grad, found)):
        assert torch.equal(result.cpu() != 0, mask & (value != 0))
        torch.testing.assert_close(result.cpu().double(), value.double() * factor, rtol=ROUNDING[dtype], atol=1e-7)


def test_a_map_of_zeros_stays_zero_and_does_not_disturb_others(path: str) -> None:
    h = torch.rand(3, 500, generator=torch.Generator().manual_seed(0))
    h[1] = 0
    mask, expected, kept, out = both(h, 100)
    assert torch.equal(kept, mask)
    torch.testing.assert_close(out, expected)
    assert not out[1].any()


def test_no_draws_keep_nothing(path: str) -> None:
    _, _, kept, out = both(torch.ones(2, 99), 1)
    assert not kept.any()
    assert not out.any()


@pytest.mark.parametrize("power", [-140, -80, 80, 120])
def test_tiny_and_huge_maps_are_pruned_alike(power: int, path: str) -> None:
    h = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)).clamp(min=2**-6)
    mask, _, kept, _ = both(torch.ldexp(h, torch.tensor(power)), 50)
    assert torch.equal(kept, mask)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_map_with_nan_or_inf_becomes_nan_and_does_not_disturb_others(bad: float, path: str) -> None:
    h = torch.rand(3, 300, generator=torch.Generator().manual_seed(0))
    clean = sap(h.to(DEVICE), backend="gpu")
    h[1, 17] = bad
    out = sap(h.to(DEVICE), backend="gpu")
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_an_empty_batch_and_an_empty_map_are_left_alone() -> None:
    for shape in ((0, 7), (3, 0), (0, 3, 5, 7)):
        assert sap(torch.zeros(shape, device=DEVICE), backend="gpu").shape == shape


@triton.jit
def poisson_numbers(result, mean, seed, tag):
    name = tl.program_id(0)
    tl.store(result + name, gpu._poisson(tl.load(mean), seed, name.to(tl.uint32), (name * 3).to(tl.uint32), tag))


@pytest.mark.parametrize("mean", [0.0, 0.3, 9.9, 10.1, 40.0, 1e3, 1e6, 1e9])
def test_the_poisson_numbers_are_the_references(mean: float) -> None:
    n, tag = 200, 5 | reference.REPEATS << 16
    found = torch.empty(n, dtype=torch.int64, device=DEVICE)
    poisson_numbers[(n,)](found, torch.full((1,), mean, dtype=torch.float64, device=DEVICE), 2**63 + 17, tag)
    names = torch.arange(n)
    expected = reference._poisson(torch.full((n,), mean, dtype=torch.float64), 2**63 + 17, names, 3 * names, 5, 0)
    assert torch.equal(found.cpu(), expected)
    assert len(expected.unique()) > 5 or mean < 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_the_kernel_refuses_types_that_it_does_not_know(dtype: torch.dtype) -> None:
    with pytest.raises(SapcoreError, match="float"):
        sap(torch.ones(2, 5, dtype=dtype), backend="gpu")


def test_a_map_of_more_than_four_million_units_is_refused() -> None:
    with pytest.raises(SapcoreError, match="the map has 4194305 units, but SAP takes 4194304 at most"):
        sap(torch.zeros(1, 2**22 + 1, device=DEVICE), 1e-3, backend="gpu")


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sapcore.sap import gpu

POINTERS = {"h": 0, "value": 0, "out": 0, "mask": "*u1", "bound": "*i64", "ids": "*i64", "passes": "*i64"}
NUMBERS = {"a": "i32", "quarter": "i32", "r": "i64", "seed": "u64", "layer": "i32"}

def build(kernel, kind, warps, **constants):
    signature = {name: pointer or f"*{kind}" for name, pointer in POINTERS.items()} | NUMBERS
    signature |= {"blocks": "i32", "steps": "i32"} if kernel is gpu._large_map else {}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(9)}
    source = ASTSource(kernel, signature, constants, aligned)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(kernel.__name__, kind, constants, built.metadata.shared, "bytes shared")
    assert "cubin" in built.asm

for kind, run, rectify, mask in (("bf16", 4096, True, False), ("fp32", 1024, False, True), ("fp16", 1, True, True)):
    block, warps = min(run, gpu.BLOCK), max(4, min(16, run // 256))
    build(gpu._small_map, kind, warps, RECTIFY=rectify, MASK=mask, RUN=run, BLOCK=block, FINE=min(32, run // block),
          DRAWS=gpu.DRAWS_PER_WARP * warps)
build(gpu._large_map, "bf16", 16, RECTIFY=True, MASK=False, TILE=gpu.TILE, BLOCK=gpu.BLOCK,
      DRAWS=gpu.DRAWS_PER_WARP * 16)
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """Triton's compiler makes a program for compute capability 9.0, in a process of its own without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("bytes shared") == 4
