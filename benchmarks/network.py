"""SAP-100 on ResNet-20, forward pass and input gradient for 512 examples, against the same network without SAP.

    python benchmarks/network.py

The paper (Sec. 4.4) reports 20 seconds for one backward pass of 512 examples on 8 GPUs. The same network with
Algorithm 1 as printed, on torch.multinomial, is timed once for comparison.
"""

from common import alternate, arguments, network, percentiles, report, seconds_of, test_images
from torch import Tensor, nn

from sapcore import bfloat16, evaluation, with_sap
from sapcore.attacks.fgsm import fgsm_direction
from sapcore.sap import reference
from sapcore.sap.layer import replace_modules

PUBLISHED_SECONDS = 20


class Algorithm1(nn.Module):
    """ReLU, then SAP-100 as printed."""

    def forward(self, h: Tensor) -> Tensor:
        h = h.relu()
        return reference.algorithm1(h.float(), h[0].numel()).to(h.dtype)


def main() -> None:
    options = arguments(__doc__, rounds=9, examples=512)
    device = options.device
    x, y = test_images(options.dataset, options.examples)
    dense = network(options.dataset, device)
    batch_size = evaluation.BATCH_SIZE if device.type == "cpu" else len(x)
    printed = replace_modules(dense, (nn.ReLU,), lambda _: Algorithm1())

    def gradient(model: nn.Module, precision: str) -> None:
        fgsm_direction(model, x, y, passes=1, batch_size=batch_size, precision=precision)

    models = {"dense": dense, "SAP-100": with_sap(dense, 100)}
    candidates = {
        (name, precision): (lambda m=model, p=precision: gradient(m, p))
        for precision in bfloat16.PRECISIONS
        for name, model in models.items()
    }
    seconds = alternate({f"{name}, {precision}": run for (name, precision), run in candidates.items()},
                        options.rounds, device)  # fmt: skip
    table: list[dict[str, object]] = []
    for name, precision in candidates:
        p = evaluation.predict(models[name], x, 10, batch_size=batch_size, precision=precision)
        a = evaluation.accuracy(p, y)
        table.append(
            {"network": name, "precision": precision, **percentiles(seconds[f"{name}, {precision}"]),
             "unit": f"s for {len(x)} examples", "accuracy": round(a.value, 4),
             "interval": f"{a.low:.3f}-{a.high:.3f}"}
        )  # fmt: skip
    once = seconds_of(lambda: gradient(printed, "float32"), device)
    table.append({"network": "SAP-100, Algorithm 1 as printed, once", "precision": "float32", "p50": round(once, 3),
                  "unit": f"s for {len(x)} examples"})  # fmt: skip
    report(
        "network", options, table, examples=len(x), batch_size=batch_size,
        published_seconds=PUBLISHED_SECONDS, printed_seconds=round(once, 3),
        share_of_dense_throughput={
            precision: percentiles(seconds[f"dense, {precision}"] / seconds[f"SAP-100, {precision}"])
            for precision in bfloat16.PRECISIONS
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
