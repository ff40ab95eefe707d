"""The input gradient in bfloat16: torch's own convolutions against those of rounded numbers in float32.

    python benchmarks/bfloat16.py

On a CPU `sapcore.bfloat16` takes the former where oneDNN knows bfloat16 (on x86: with AVX-512), and the latter
elsewhere. On a GPU both are torch's own.
"""

from unittest.mock import patch

import torch
from common import alternate, arguments, network, percentiles, report, test_images

from sapcore import bfloat16, evaluation
from sapcore.attacks.fgsm import fgsm_direction

OWN, ROUNDED = "bfloat16, torch's own", "bfloat16, of rounded numbers in float32"


def main() -> None:
    options = arguments(__doc__, rounds=9, examples=512)
    device = options.device
    x, y = test_images(options.dataset, options.examples)
    dense = network(options.dataset, device)
    takes_own = bfloat16.is_fast(device.type)

    def gradient(precision: str, own: bool = True) -> torch.Tensor:
        with patch.object(bfloat16, "is_fast", return_value=own):
            return fgsm_direction(dense, x, y, precision=precision)

    candidates = {
        "float32": lambda: gradient("float32"),
        OWN: lambda: gradient("bfloat16", own=True),
        ROUNDED: lambda: gradient("bfloat16", own=False),
    }
    seconds = alternate(candidates, options.rounds, device)
    exact = gradient("float32")
    table: list[dict[str, object]] = [
        {"arithmetic": name, **percentiles(seconds[name]), "unit": f"s for {len(x)} examples",
         "signs as in float32": round(float((run() == exact).float().mean()), 4)}
        for name, run in candidates.items()
    ]  # fmt: skip
    report("bfloat16", options, table, examples=len(x), batch_size=evaluation.BATCH_SIZE,
           taken=OWN if takes_own else ROUNDED, times_faster=percentiles(seconds[OWN] / seconds[ROUNDED]))  # fmt: skip


if __name__ == "__main__":
    main()
