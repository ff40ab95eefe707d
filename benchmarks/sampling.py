"""SAP-100 of the 19 maps of one image: the kernel against torch.multinomial and scatter.

    python benchmarks/sampling.py

Each call treats `passes` Monte Carlo passes of one image, map by map. Error: the distance between how often a unit
was kept and the law 1 - (1 - p)^r, in standard errors, root mean square over all units whose law lies in 0.05 to
0.95; an exact sampler has 1. On a CPU the kernel is also measured on one thread, because virtual cores may share a real
one. On a GPU each candidate is a CUDA graph. A plain copy of the same maps shows how much memory alone would take.
"""

import math
from collections.abc import Callable, Iterable

import numba
import torch
from common import alternate, arguments, network, percentiles, report, test_images
from torch import Tensor, nn

from sapcore import sap, with_sap
from sapcore.bfloat16 import autocast
from sapcore.sap import SAP

KERNEL, ONE_THREAD = "kernel, scaling included", "kernel on one thread"
MULTINOMIAL, COPY = "torch.multinomial and scatter", "plain copy"
SAPS = {"cpu": "cpu", "cuda": "gpu"}


@torch.no_grad()
def maps_of(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The 19 rectified maps of one image, bfloat16 as in the network's forward pass."""
    found: list[Tensor] = []
    noisy = with_sap(model, 100)
    for module in noisy.modules():
        if isinstance(module, SAP):
            module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].relu()))
    with autocast("bfloat16", image.device):
        noisy(image)
    return found


def recorded(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same work on a GPU without Python's part in it, as a CUDA graph; elsewhere as it is."""
    if device.type != "cuda":
        return run
    run()  # what is compiled at the first call cannot be recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def kept_by_kernel(h: Tensor, backend: str) -> Tensor:
    names = torch.arange(len(h), device=h.device)
    return sap(h, 100, passes=names, return_mask=True, backend=backend)[1]


def kept_by_multinomial(p: Tensor) -> Tensor:
    drawn = torch.multinomial(p, p.shape[1], replacement=True)
    return torch.zeros_like(p, dtype=torch.bool).scatter_(1, drawn, True)


def one_by_one(results: Iterable[Tensor]) -> None:
    """Make them all and keep none, as a network does that has no backward pass to come."""
    for _ in results:
        pass


def on_one_thread(run: Callable[[], object]) -> None:
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        run()
    finally:
        numba.set_num_threads(threads)


def error(kept: list[Tensor], p: list[Tensor]) -> float:
    scores = []
    for mask, probability in zip(kept, p, strict=True):
        law = -torch.expm1(probability.shape[1] * torch.log1p(-probability[0].double()))
        share = mask.double().mean(0)
        score = (share - law) / (law * (1 - law) / len(mask)).sqrt()
        scores.append(score[(law > 0.05) & (law < 0.95)])
    return math.sqrt(torch.cat(scores).square().mean())


def main() -> None:
    options = arguments(__doc__, rounds=15, passes=100)
    device, passes = options.device, options.passes
    image = test_images(options.dataset, 1)[0].to(device)
    maps = [h.repeat(passes, 1, 1, 1).contiguous(memory_format=torch.channels_last)
            for h in maps_of(network(options.dataset, device), image)]  # fmt: skip
    flat = [h.movedim(1, -1).flatten(1).float() for h in maps]
    p = [h / h.sum(1, keepdim=True) for h in flat]
    names, backend = torch.arange(passes, device=device), SAPS[device.type]
    outputs = [torch.empty_like(h) for h in maps]

    def kernel() -> None:
        one_by_one(sap(h, 100, ids=names, passes=names, backend=backend) for h in maps)

    candidates: dict[str, Callable[[], object]] = {
        KERNEL: kernel,
        MULTINOMIAL: lambda: one_by_one(kept_by_multinomial(row) for row in p),
        COPY: lambda: one_by_one(out.copy_(h) for out, h in zip(outputs, maps, strict=True)),
    }
    if device.type == "cpu":
        candidates[ONE_THREAD] = lambda: on_one_thread(kernel)
    seconds = alternate({n: recorded(run, device) for n, run in candidates.items()}, options.rounds, device)
    ours, theirs, copy = seconds[KERNEL], seconds[MULTINOMIAL], seconds[COPY]
    alone = {"times_faster_on_one_thread": percentiles(theirs / seconds[ONE_THREAD])} if ONE_THREAD in seconds else {}
    errors = {
        KERNEL: error([kept_by_kernel(h, backend).movedim(1, -1).flatten(1) for h in maps], p),
        MULTINOMIAL: error([kept_by_multinomial(row) for row in p], p),
    }
    table = [
        {"sampler": name, **percentiles(1e3 * seconds[name] / passes), "unit": "ms per image",
         "error": round(errors[name], 4) if name in errors else None}
        for name in candidates
    ]  # fmt: skip
    units = sum(h[0].numel() for h in maps)
    report(
        "sampling", options, table, passes=passes, units=units,
        bytes_per_image=2 * sum(h[0].numel() * h.element_size() for h in maps),
        times_faster=percentiles(theirs / ours), share_of_copy_bandwidth=percentiles(copy / ours),
        **alone,
    )  # fmt: skip


if __name__ == "__main__":
    main()
