"""What the authors' released notebook does and the paper does not say: how a network sees images, and its adversary.

Read off `SAP.ipynb` and the MXNet that it needs. The images of a network are those of its recipe, in training and test.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapcore.errors import SapcoreError
from sapcore.sap.layer import replace_modules

MEAN = (123.68, 116.779, 103.939)
"""Subtracted from red, green and blue: ImageNet's."""
JITTER = (36, 50, 50)
"""Most that is added to hue (of 180), lightness and saturation (of 255)."""


@dataclasses.dataclass(frozen=True)
class Images:
    """What is done to the images, the same for all of a network's."""

    crop: int = 0
    """The side of a crop, in the centre for tests; 0: none."""
    wrap: bool = False
    """Subtract `MEAN` and cast to 8 bits without a sign, where what is below 0 wraps round to bright."""

    def of_test(self, images: Tensor) -> Tensor:
        """Test images, uint8 (N, 3, H, W), as the network sees them, uint8."""
        if self.crop:
            top, left = ((side - self.crop) // 2 for side in images.shape[-2:])
            images = images[..., top : top + self.crop, left : left + self.crop]
        return wrapped(images) if self.wrap else images


def images_of(recipe: dict[str, Any]) -> Images:
    """What the recipe of a model card says; older cards, and agents', say nothing."""
    return Images(recipe.get("crop", 0), recipe.get("wrap", False))


def wrapped(images: Tensor) -> Tensor:
    """(images - MEAN) as whole numbers modulo 256, uint8; images: uint8 (N, 3, H, W).

    The fraction is cut off towards 0, as C does.
    """
    mean = torch.tensor(MEAN, device=images.device)[:, None, None]
    return ((images.float() - mean).to(torch.int32) & 255).to(torch.uint8)


def jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with a random change of hue, lightness and saturation, as MXNet's; uint8 (N, 3, H, W) -> the same.

    All three are 8-bit numbers by OpenCV, and cut off at their ends. Raises `SapcoreError` without OpenCV.
    """
    try:
        import cv2  # here, because only a training on the authors' terms needs it
    except ImportError:
        raise SapcoreError(
            "colour jitter needs OpenCV: install it with `pip install -e '.[released]'` in the checkout"
        ) from None
    n, _, height, width = images.shape
    shift = ((2 * torch.rand((n, 3), generator=generator) - 1) * torch.tensor(JITTER)).trunc()
    pixels = images.permute(0, 2, 3, 1).reshape(n * height, width, 3).contiguous().cpu().numpy()
    hls = torch.from_numpy(cv2.cvtColor(pixels, cv2.COLOR_RGB2HLS)).reshape(n, height, width, 3).to(torch.int32)
    hls = torch.minimum((hls + shift.to(torch.int32)[:, None, None]).clamp(min=0), torch.tensor([180, 255, 255]))
    changed = cv2.cvtColor(hls.to(torch.uint8).reshape(n * height, width, 3).numpy(), cv2.COLOR_HLS2RGB)
    return torch.from_numpy(changed).reshape(n, height, width, 3).permute(0, 3, 1, 2).to(images.device)


class BatchStatistics(nn.Module):
    """A BatchNorm that normalizes by the mean and variance of its batch, in eval mode too; it keeps none."""

    one_pass_at_a_time = True

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy of a network as the released adversary runs it: bound for training, so that BatchNorm uses its batch's.

    The batch is that of a call, 500 images in the released code, each in one pass. Raises `SapcoreError` if there is no
    BatchNorm2d.
    """

    def replaced(norm: nn.Module) -> nn.Module:
        assert isinstance(norm, nn.BatchNorm2d)
        return BatchStatistics(norm)

    return replace_modules(model, (nn.BatchNorm2d,), replaced)


class ByDevice(nn.BatchNorm2d):
    """A BatchNorm whose batch is spread over devices in training: each normalizes its own images alone.

    What is kept for use is the mean over devices. Parameters and buffers are those of `norm`.
    """

    def __init__(self, norm: nn.BatchNorm2d, devices: int) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.weight, self.bias, self.devices = norm.weight, norm.bias, devices
        self.running_mean, self.running_var = norm.running_mean, norm.running_var

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        parts = x.tensor_split(min(self.devices, len(x)))
        means = [self.running_mean.clone() for _ in parts]
        variances = [self.running_var.clone() for _ in parts]
        normalized = [
            F.batch_norm(*part, self.weight, self.bias, True, self.momentum, self.eps)
            for part in zip(parts, means, variances, strict=True)
        ]
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        return torch.cat(normalized)


def by_device(model: nn.Module, devices: int) -> nn.Module:
    """A copy of a network that is trained as if on so many devices, the batch divided among them."""

    def replaced(norm: nn.Module) -> nn.Module:
        assert isinstance(norm, nn.BatchNorm2d)
        return ByDevice(norm, devices)

    return replace_modules(model, (nn.BatchNorm2d,), replaced)
