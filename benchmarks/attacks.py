"""The iterative attack on the dense network: ours against torchattacks' and foolbox's PGD, the same steps.

    python benchmarks/attacks.py

All start at the image, and all are given batches of the same size. Theirs run as they come, in float32. Ours is
measured as it is and with `stop_at_success`, which leaves an image alone if the network errs on it after 1, 2, 4, ...
steps.
"""

import warnings

import torch
import torchattacks
from common import alternate, arguments, network, percentiles, report, test_images
from torch import Tensor, nn

from sapcore import evaluation
from sapcore.attacks import iterative

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its imports from scipy
    import foolbox


class OfUnitPixels(nn.Module):
    """A network of pixels in 0-255 as one of pixels in 0-1, which both libraries want."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(255 * x)


def main() -> None:
    options = arguments(__doc__, rounds=5, examples=512, eps=1, steps=10)
    device, eps, steps = options.device, options.eps, options.steps
    x, y = test_images(options.dataset, options.examples)
    dense = network(options.dataset, device)
    batch_size = evaluation.BATCH_SIZE if device.type == "cpu" else len(x)
    unit = OfUnitPixels(dense).eval()
    pgd = torchattacks.PGD(unit, eps=eps / 255, alpha=1 / 255, steps=steps, random_start=False)
    boxed = foolbox.PyTorchModel(unit, bounds=(0, 1), device=device)
    linf = foolbox.attacks.LinfPGD(abs_stepsize=1 / 255, steps=steps, random_start=False)

    def in_batches(attack) -> Tensor:  # type: ignore[no-untyped-def]
        return torch.cat([
            255 * attack(a.to(device), b.to(device)).cpu()
            for a, b in zip((x / 255).split(batch_size), y.split(batch_size), strict=True)
        ])  # fmt: skip

    candidates = {
        "ours, bfloat16, stops at success": lambda: iterative(
            dense, x, y, eps, 1, steps, batch_size=batch_size, precision="bfloat16", stop_at_success=True
        ),
        "ours, bfloat16": lambda: iterative(dense, x, y, eps, 1, steps, batch_size=batch_size, precision="bfloat16"),
        "ours, float32": lambda: iterative(dense, x, y, eps, 1, steps, batch_size=batch_size),
        "torchattacks": lambda: in_batches(pgd),
        "foolbox": lambda: in_batches(lambda a, b: linf(boxed, a, b, epsilons=eps / 255)[1]),
    }
    seconds = alternate(candidates, options.rounds, device)
    table: list[dict[str, object]] = []
    for name, attack in candidates.items():
        a = evaluation.accuracy(evaluation.predict(dense, attack(), batch_size=batch_size), y)
        table.append(
            {"attack": name, **percentiles(len(x) / seconds[name]), "unit": "images/s",
             "robust accuracy": round(a.value, 4), "interval": f"{a.low:.3f}-{a.high:.3f}"}
        )  # fmt: skip
    ours = seconds["ours, bfloat16, stops at success"]
    report(
        "attacks", options, table, examples=len(x), eps=eps, steps=steps, batch_size=batch_size,
        times_faster={name: percentiles(seconds[name] / ours) for name in ("torchattacks", "foolbox")},
    )  # fmt: skip


if __name__ == "__main__":
    main()
