"""The networks of the paper. Both take pixels in 0-255 and normalize inside, so that an attack works in pixel units."""

import torch
from torch import Tensor, nn


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm as in the authors' notebook. MXNet's momentum 0.9 is the share of the old value, torch's of the new."""
    return nn.BatchNorm2d(channels, eps=2e-5, momentum=0.1)


def channels_last(model: nn.Module) -> None:
    """Lay the convolutions' weights out as the fast kernels want them."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


class PreActivationUnit(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv plus a shortcut (He et al. 2016, "Identity mappings", Fig. 1b).

    The first unit of each stage has a strided 1x1 convolution as its shortcut, taken after the
    first ReLU; the others add their input unchanged.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, project: bool) -> None:
        super().__init__()
        self.norm1 = batch_norm(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm2 = batch_norm(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu1(self.norm1(x))
        residual = x if self.shortcut is None else self.shortcut(h)
        h = self.relu2(self.norm2(self.conv1(h)))
        return self.conv2(h) + residual


class ResNet20(nn.Module):
    """Pre-activation ResNet-20 with 19 ReLU maps (Sec. 4.1, the authors' notebook).

    Filters 16/16/32/64, three stages of three units. A BatchNorm with its scale fixed at 1
    normalizes the pixels. Input: float (N, 3, 32, 32) in 0-255; output: logits (N, classes).
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.norm_input = batch_norm(3)
        self.norm_input.weight.requires_grad_(False)
        self.conv_input = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        units: list[nn.Module] = []
        in_channels = 16
        for out_channels, first_stride in ((16, 1), (32, 2), (64, 2)):
            for i in range(3):
                units.append(PreActivationUnit(in_channels, out_channels, first_stride if i == 0 else 1, i == 0))
                in_channels = out_channels
        self.units = nn.Sequential(*units)
        self.norm = batch_norm(64)
        self.relu = nn.ReLU()
        self.head = nn.Linear(64, classes)
        channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.units(self.conv_input(self.norm_input(x)))
        h = self.relu(self.norm(h))
        return self.head(h.mean(dim=(2, 3)))


class Float32Linear(nn.Linear):
    """A linear layer that stays in float32 within autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class QNetwork(nn.Module):
    """The deep Q-network of Mnih et al. (2015), one for all games (App. A).

    Convolutions of 32 filters of 8x8 with stride 4, 64 of 4x4 with stride 2 and 64 of 3x3 with stride 1, a layer of
    512 units, a ReLU after each. Input: float (N, 4, 84, 84) in 0-255, the newest frame last; output: the value of
    each action, (N, actions). The last layer is always in float32: values of actions differ by less than the digits
    of bfloat16.
    """

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(4, 32, 8, 4), nn.ReLU(inplace=True)
        self.conv2, self.relu2 = nn.Conv2d(32, 64, 4, 2), nn.ReLU(inplace=True)
        self.conv3, self.relu3 = nn.Conv2d(64, 64, 3), nn.ReLU(inplace=True)
        self.hidden, self.relu4 = nn.Linear(64 * 7 * 7, 512), nn.ReLU(inplace=True)
        self.head = Float32Linear(512, actions)
        channels_last(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x / 255)

    def scaled(self, x: Tensor) -> Tensor:
        """The values for pixels in 0-1."""
        h = self.relu1(self.conv1(x))
        h = self.relu2(self.conv2(h))
        h = self.relu3(self.conv3(h))
        h = self.relu4(self.hidden(h.flatten(1)))
        return self.head(h)


def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw weights N(0, 2 / fan_in) in place ("Xavier gaussian, fan-in, magnitude 2"); biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
