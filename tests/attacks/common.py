"""Small networks and measures for the tests of the attacks."""

import torch
from torch import Tensor, nn


class UnitRange(nn.Module):
    """A network on 0-255 as torchattacks wants it: on 0-1, with logits in float64, so that its loss loses no digits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x * 255).double()


class Linear(nn.Module):
    """A linear network that does not see the first columns of an image."""

    def __init__(self, blind_columns: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(10, 3, 32, 32, generator=generator) / 1000
        weight[..., :blind_columns] = 0
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,kchw->nk", x, self.weight)


def share_that_differs(one: Tensor, other: Tensor) -> float:
    """The share of pixels that differ by more than 1e-3."""
    return float(((one - other).abs() > 1e-3).double().mean())
