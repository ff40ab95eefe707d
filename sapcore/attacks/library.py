"""Attacks that others keep well: AutoAttack's version for randomized defences, and Square, which asks no gradient.

Both are torchattacks' (`pip install 'sapcore[attacks]'`). They know nothing of seeds: here every call of the network
is a pass of its own, numbered from 0, so that the same arguments give the same images.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sapcore.attacks.steps import check_eps, in_batches
from sapcore.errors import SapcoreError
from sapcore.evaluation import BATCH_SIZE, autocast, count_passes, predict
from sapcore.randomness import NoisyModel, stream


def autoattack(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 100, passes: int = 20, seed: int = 0,
    batch_size: int = BATCH_SIZE, precision: str = "float32",
) -> Tensor:  # fmt: skip
    """AutoAttack's `rand` version (Croce and Hein 2020): APGD on two losses, `passes` passes to each gradient.

    x: (N, ...) in 0-255; y: int64 (N,); eps: pixel units. Returns float32, shaped as x. An image counts as broken for
    it as soon as a single pass errs. Put together from torchattacks' parts, because its `rand` version makes 10 steps
    instead of the paper's 100. Raises `SapcoreError` without torchattacks.
    """
    eps = check_eps(eps)
    count = count_passes(model, passes)

    def make(torchattacks: Any, asked: nn.Module, seed: int) -> Any:
        losses = ({"loss": loss, "eot_iter": count, "steps": steps, "seed": seed} for loss in ("ce", "dlr"))
        return torchattacks.MultiAttack([torchattacks.APGD(asked, eps=eps / 255, **each) for each in losses])

    return _by_torchattacks("AutoAttack", make, model, x, y, eps, seed, 1, batch_size, precision)


def square(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, queries: int = 1000, passes: int = 1, seed: int = 0,
    batch_size: int = BATCH_SIZE, precision: str = "float32",
) -> Tensor:  # fmt: skip
    """The Square attack (Andriushchenko et al. 2020): random squares, kept if the margin of the output falls.

    Each query is the logarithm of the mean softmax over `passes` fresh passes. An image that no query broke comes
    back as it was. Otherwise as `autoattack`.
    """
    eps = check_eps(eps)

    def make(torchattacks: Any, asked: nn.Module, seed: int) -> Any:
        return torchattacks.Square(asked, eps=eps / 255, n_queries=queries, seed=seed)

    return _by_torchattacks("Square", make, model, x, y, eps, seed, passes, batch_size, precision)


def _by_torchattacks(
    name: str, make: Callable[[Any, nn.Module, int], Any], model: nn.Module, x: Tensor, y: Tensor, eps: float,
    seed: int, passes: int, batch_size: int, precision: str,
) -> Tensor:  # fmt: skip
    """The attack of `make(torchattacks, network, seed)`, on a network that answers with `passes` passes each time."""
    try:
        import torchattacks
    except ImportError:
        raise SapcoreError(f"{name} needs torchattacks: install it with `pip install 'sapcore[attacks]'`") from None
    asked = _Asked(model, stream(seed, f"attack by {name}"), passes, batch_size, precision)

    def attack(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
        with _generators_put_back():
            return 255 * make(torchattacks, asked, seed % 2**32)(x / 255, y)

    found = in_batches(model, x, y, None, batch_size, attack)
    return torch.clamp(torch.minimum(torch.maximum(found, x - eps), x + eps), 0, 255)


@contextlib.contextmanager
def _generators_put_back() -> Iterator[None]:
    """torchattacks seeds the global generators, and draws from them."""
    states = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


class _Asked(nn.Module):
    """A network of pixels in 0-1 that answers every call with fresh passes, in float64."""

    def __init__(self, model: nn.Module, seed: int, passes: int, batch_size: int, precision: str) -> None:
        super().__init__()
        self.model, self.seed, self.passes = model, seed, passes
        self.batch_size, self.precision = batch_size, precision
        self.calls = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        seed = stream(self.seed, str(self.calls))
        if not isinstance(self.model, NoisyModel):
            with autocast(self.precision, x.device):
                return self.model(255 * x).double()
        if self.passes > 1:  # only asked for, never differentiated
            p = predict(self.model, 255 * x, self.passes, seed, None, self.batch_size, self.precision)
            return p.clamp(min=1e-30).log().to(x.device)
        with autocast(self.precision, x.device):
            return self.model(255 * x, seed=seed).double()
