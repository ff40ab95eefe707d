"""CIFAR-10 through torchvision, and `digits`, the embedded data set on which everything runs offline."""

import contextlib
import functools
import io

import numpy as np
import torch
from torch import Tensor

from sapcore.errors import SapcoreError
from sapcore.paths import data_root

DATASETS = ("cifar10", "digits")
SPLITS = ("train", "test")


class DataMissingError(SapcoreError):
    """The data set is neither on disk nor downloadable."""


def load(dataset: str = "cifar10", split: str = "test") -> tuple[Tensor, Tensor]:
    """Load a data set.

    Returns images, uint8 (N, 3, 32, 32) in 0-255, and labels, int64 (N,) in 0-9.
    `cifar10` has 50,000 training and 10,000 test images; `digits` has 1,297 and 500.
    Raises `DataMissingError` if CIFAR-10 is not on disk and cannot be downloaded.
    """
    if dataset not in DATASETS:
        raise SapcoreError(f"dataset is {dataset!r}, but must be one of {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise SapcoreError(f"split is {split!r}, but must be one of {', '.join(SPLITS)}")
    images, labels = _cifar10(split) if dataset == "cifar10" else _digits(split)
    return images.clone(), labels.clone()  # the cache stays whole, whatever becomes of them


@functools.cache
def _cifar10(split: str) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10  # here, because it takes seconds

    root = data_root()
    try:
        dataset = CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                dataset = CIFAR10(str(root), train=split == "train", download=True)
        except Exception as error:
            raise DataMissingError(
                f"CIFAR-10 is not under {root} and could not be downloaded ({type(error).__name__}); "
                "set SAPCORE_DATA to the folder that holds cifar-10-batches-py, run `sapcore data` where there is "
                "a network, or use the embedded data set: `-p dataset digits` in a notebook, "
                "`--dataset digits` on the command line"
            ) from None
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(dataset.targets, dtype=torch.int64)


@functools.cache
def _digits(split: str) -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits (8 x 8, 0-16), resized to 32 x 32 x 3 and 0-255."""
    from sklearn.datasets import load_digits  # here, because they take seconds
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    small = torch.from_numpy(bunch.images * (255.0 / 16.0)).float()[:, None]
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1)
    train, test = train_test_split(np.arange(len(images)), test_size=500, random_state=0, stratify=bunch.target)
    chosen = train if split == "train" else test
    return images[chosen].contiguous(), torch.from_numpy(bunch.target[chosen]).long()
