"""How the cost of SAP-100 grows: time and peak memory against images, passes and map size.

    python benchmarks/scaling.py

Each point is a process of its own, so that its peak memory is its own. Straight lines in time, a ceiling in memory.
Error: the largest deviation of a point from the straight line through all, in percent.
"""

import json
import resource
import subprocess
import sys

import numpy as np
import pandas as pd
import torch
from common import arguments, network, percentiles, report, seconds_of, test_images

from sapcore import evaluation, sap, with_sap

ONE_POINT = "--one-point"
UNITS = 2**21  # of the maps that are treated at once
IMAGES, PASSES, SIDES = (100, 300, 1000, 3000, 10_000), (1, 10, 100, 1000), (16, 32, 64, 128, 256)


def measure(what: str, number: int, dataset: str, device: torch.device) -> dict[str, object]:
    """Seconds and peak memory of one point: `number` images (1 pass), passes (16 images) or a map's side (64 maps)."""
    if what == "map side":
        h = torch.rand(64, 16, number, number, device=device).contiguous(memory_format=torch.channels_last)

        def run(examples: int = len(h)) -> None:
            for rows in h[:examples].split(UNITS // h[0].numel()):
                sap(rows)
    else:
        noisy = with_sap(network(dataset, device), 100)
        images = test_images(dataset, number if what == "images" else 16)[0]
        repeats = -(-number // len(images)) if what == "images" else 1  # digits has 500
        images = images.repeat(repeats, 1, 1, 1)[: max(16, number)]

        def run(examples: int = len(images)) -> None:
            evaluation.predict(noisy, images[:examples], number if what == "passes" else 1, precision="bfloat16")

    run(1)  # the kernel is compiled before the clock starts
    seconds = percentiles(seconds_of(run, device) for _ in range(5))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak_bytes()
    return {"grows": what, "number": number, **seconds, "unit": "s", "peak MiB": peak >> 20}


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    if sys.argv[1:2] == [ONE_POINT]:  # in a process of its own
        what, number, dataset, device = sys.argv[2:]
        print(json.dumps(measure(what, int(number), dataset, torch.device(device))))
        return
    options = arguments(__doc__, points=5)
    table: list[dict[str, object]] = []
    for what, numbers in (("images", IMAGES), ("passes", PASSES), ("map side", SIDES)):
        for number in numbers[: options.points]:
            command = [sys.executable, __file__, ONE_POINT, what, str(number), options.dataset, str(options.device)]
            table.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    lines = {}
    for what in ("images", "passes", "map side"):
        points = pd.DataFrame([row for row in table if row["grows"] == what])
        size, time = points["number"].to_numpy() ** (2.0 if what == "map side" else 1.0), points["p50"].to_numpy()
        slope, offset = np.polyfit(size, time, 1, w=1 / time)
        deviation = 100 * np.abs(slope * size + offset - time) / time
        lines[what] = {"slope": float(f"{slope:.4g}"), "offset": float(f"{offset:.4g}"),
                       "largest deviation (%)": round(float(deviation.max()), 1)}  # fmt: skip
    report("scaling", options, table, lines=lines)


if __name__ == "__main__":
    main()
