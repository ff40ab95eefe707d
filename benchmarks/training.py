"""Training ResNet-20: images per second of our loop against a plain float32 PyTorch loop, the same recipe.

    python benchmarks/training.py

The plain loop is a tutorial's: a DataLoader over torchvision's transforms, SGD, cross-entropy. Both train from the
same weights, an epoch a round, on the same images; the error is the loss on the test images afterwards.
"""

import tempfile
from pathlib import Path

import torch
from common import alternate, arguments, percentiles, report
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from sapcore import data, training
from sapcore.models import ResNet20, initialize

RATE = 0.05


class PlainLoop:
    """One epoch as a tutorial writes it."""

    def __init__(self, images: Tensor, labels: Tensor, recipe: training.Recipe, device: torch.device) -> None:
        self.device = device
        self.model = ResNet20()
        initialize(self.model, torch.Generator().manual_seed(recipe.seed))
        self.model.to(device, memory_format=torch.contiguous_format)
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE, recipe.momentum, weight_decay=1e-4)
        augment = v2.Compose(
            [v2.RandomCrop(32, recipe.pad, fill=127), v2.RandomHorizontalFlip(float(recipe.mirror) / 2)]
        )
        pairs = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
        self.batches = torch.utils.data.DataLoader(
            _Transformed(pairs, augment), recipe.batch_size, shuffle=True, generator=torch.Generator().manual_seed(0)
        )

    def train_one_epoch(self) -> None:
        self.model.train()
        for x, y in self.batches:
            loss = F.cross_entropy(self.model(x.to(self.device).float()), y.to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class _Transformed(torch.utils.data.Dataset):
    def __init__(self, pairs: list[tuple[Tensor, int]], transform: nn.Module) -> None:
        self.pairs, self.transform = pairs, transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.pairs[index]
        return self.transform(image), label


@torch.no_grad()
def test_loss(model: nn.Module, dataset: str, device: torch.device) -> float:
    x, y = (t[:1000] for t in data.load(dataset, "test"))
    return float(F.cross_entropy(model.eval()(x.to(device).float()), y.to(device)))


def main() -> None:
    options = arguments(__doc__, rounds=3, examples=5120)
    device = options.device
    images, labels = (t[: options.examples] for t in data.load(options.dataset, "train"))
    recipe = training.Recipe(options.dataset, schedule=((1000, RATE),), batch_size=512, pad=4)
    with tempfile.TemporaryDirectory() as folder:
        ours = training._Run("benchmark", recipe, device, Path(folder))
        ours.padded, ours.labels = ours.padded[: len(images)], ours.labels[: len(images)]
        plain = PlainLoop(images, labels, recipe, device)
        candidates = {"ours, bfloat16": ours.train_one_epoch, "plain loop, float32": plain.train_one_epoch}
        seconds = alternate(candidates, options.rounds, device)
        table: list[dict[str, object]] = [
            {"loop": name, **percentiles(len(images) / seconds[name]), "unit": "images/s",
             f"test loss after {options.rounds + 1} epochs": round(test_loss(model, options.dataset, device), 3)}
            for name, model in zip(candidates, (ours.model, plain.model), strict=True)
        ]  # fmt: skip
    report(
        "training", options, table, examples=len(images), batch_size=recipe.batch_size,
        times_faster=percentiles(seconds["plain loop, float32"] / seconds["ours, bfloat16"]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
