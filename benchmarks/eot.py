"""The iterative attack through the noise: 20 passes per step on SAP-100, ours against torchattacks' EOTPGD.

    python benchmarks/eot.py

Both attack the same defence, the kernel included; EOTPGD calls it 20 times per step, with fresh passes each.
"""

import torchattacks
from common import alternate, arguments, network, percentiles, report, test_images
from torch import Tensor, nn

from sapcore import evaluation, with_sap
from sapcore.attacks import iterative
from sapcore.randomness import NoisyModel


class FreshPasses(nn.Module):
    """The defence as a network of pixels in 0-1 that draws new noise at each call, as EOTPGD expects."""

    def __init__(self, noisy: NoisyModel) -> None:
        super().__init__()
        self.noisy = noisy
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.noisy(255 * x, passes=self.calls)


def main() -> None:
    options = arguments(__doc__, rounds=3, examples=64, eps=4, steps=10, passes=20)
    device, eps, steps, passes = options.device, options.eps, options.steps, options.passes
    x, y = test_images(options.dataset, options.examples)
    noisy = with_sap(network(options.dataset, device), 100)
    batch_size = evaluation.most_rows(device)
    eotpgd = torchattacks.EOTPGD(FreshPasses(noisy).eval(), eps=eps / 255, alpha=1 / 255, steps=steps, eot_iter=passes,
                                 random_start=False)  # fmt: skip
    candidates = {
        "ours, bfloat16": lambda: iterative(noisy, x, y, eps, 1, steps, passes, batch_size=batch_size,
                                            precision="bfloat16"),
        "ours, float32": lambda: iterative(noisy, x, y, eps, 1, steps, passes, batch_size=batch_size),
        "torchattacks, EOTPGD": lambda: 255 * eotpgd((x / 255).to(device), y.to(device)).cpu(),
    }  # fmt: skip
    seconds = alternate(candidates, options.rounds, device)
    table: list[dict[str, object]] = []
    for name, attack in candidates.items():
        p = evaluation.predict(noisy, attack(), 100, batch_size=batch_size, precision="bfloat16")
        a = evaluation.accuracy(p, y)
        table.append(
            {"attack": name, **percentiles(len(x) / seconds[name]), "unit": "images/s",
             "robust accuracy": round(a.value, 4), "interval": f"{a.low:.3f}-{a.high:.3f}"}
        )  # fmt: skip
    report(
        "eot", options, table, examples=len(x), eps=eps, steps=steps, passes=passes,
        times_faster=percentiles(seconds["torchattacks, EOTPGD"] / seconds["ours, bfloat16"]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
