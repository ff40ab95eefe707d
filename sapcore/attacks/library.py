"""Attacks that others keep well: AutoAttack, for networks with noise and without, and Square, which asks no gradient.

They are torchattacks' (the extra `attacks`). They know nothing of seeds: here every call of the network
is a pass of its own, numbered from 0, so that the same arguments give the same images. And they give a clean image
back where a single pass says that it is broken already, or that nothing broke it: here each image is attacked, and
comes back as the best point of its attack (but by AutoAttack's standard version, where one pass is all there is).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sapcore.attacks.gradient import check_gradient, furthest_wrong
from sapcore.attacks.steps import check_eps, in_batches, project
from sapcore.bfloat16 import autocast
from sapcore.errors import SapcoreError, check_count, check_tensor
from sapcore.evaluation import (
    BATCH_SIZE,
    check_labels,
    check_logits,
    check_network,
    count_passes,
    device_of,
    predict,
)  # fmt: skip
from sapcore.randomness import NoisyModel, stream


def autoattack(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 100, passes: int = 20, seed: int = 0,
    batch_size: int = BATCH_SIZE, precision: str = "float32",
) -> Tensor:  # fmt: skip
    """AutoAttack's `rand` version (Croce and Hein 2020): APGD on two losses, `passes` passes to each gradient.

    x: (N, C, H, W) in 0-255; y: int64 (N,), of a network of three classes or more; eps: pixel units.
    Both draw anew for each batch, so that here its size is part of what is computed.
    Returns float32, shaped as x: of each loss's point of the largest loss and its last one on which a single pass
    erred, that whose mean softmax over `passes` more is furthest wrong. Put together from torchattacks' parts, because
    its `rand` version makes 10 steps instead of the paper's 100. Raises `SapcoreError` without torchattacks.
    """
    eps = check_eps(eps)
    count = count_passes(model, passes)
    check_count("steps", steps)

    def tries(torchattacks: Any, asked: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        found = []
        for loss in ("ce", "dlr"):
            apgd = torchattacks.APGD(asked, eps=eps / 255, loss=loss, eot_iter=count, steps=steps)
            most, _, _, wrong = apgd.attack_single_run(x, y)
            found += [most, wrong]
        return found

    return _by_torchattacks("AutoAttack", tries, model, x, y, eps, seed, count, 1, batch_size, precision, classes=3)


def autoattack_standard(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 100, seed: int = 0,
    batch_size: int = BATCH_SIZE, precision: str = "float32",
) -> Tensor:  # fmt: skip
    """AutoAttack's `standard` version (Croce and Hein 2020), for a network without noise.

    Four attacks, each on the images that those before it left: APGD on cross-entropy; APGD and FAB towards each of the
    wrong classes, the nine likeliest at most, all with `steps` steps; and Square with 50 queries per step, 5,000 as in
    the paper.
    x: (N, C, H, W) in 0-255; y: int64 (N,), of a network of four classes or more; eps: pixel units.
    Returns float32, shaped as x; an image that nothing broke comes back clean. Put together from torchattacks' parts,
    because its own makes 10 steps instead of the paper's 100. Raises `SapcoreError` without torchattacks, and for a
    network with noise, for which `autoattack` is.
    """
    eps = check_eps(eps)
    check_count("steps", steps)
    if isinstance(model, NoisyModel):
        raise SapcoreError(
            "AutoAttack's standard version is for a network without noise; take `library.autoattack`, which averages"
        )

    def tries(torchattacks: Any, asked: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        x = x.contiguous()  # FAB takes views of its images
        how: dict[str, Any] = {"eps": eps / 255, "seed": seed % 2**32}
        targeted = {"n_classes": min(asked(x[:1]).shape[-1], 10), "steps": steps, **how}
        parts = [
            torchattacks.APGD(asked, steps=steps, loss="ce", **how),
            torchattacks.APGDT(asked, **targeted),
            _fab(torchattacks.FAB)(asked, multi_targeted=True, **targeted),
            torchattacks.Square(asked, n_queries=50 * steps, resc_schedule=False, **how),  # as AutoAttack has it
        ]
        return [torchattacks.MultiAttack(parts)(x, y)]

    return _by_torchattacks("AutoAttack", tries, model, x, y, eps, seed, 1, 1, batch_size, precision, classes=4)


def _fab(fab: Any) -> Any:
    """torchattacks' FAB, without the gradients that it leaves on the network's parameters."""

    class Fab(fab):
        def get_diff_logits_grads_batch_targeted(
            self, imgs: Tensor, la: Tensor, la_target: Tensor
        ) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = imgs.detach().requires_grad_()
                logits = self.get_logits(leaf).float()
                lead = (logits.gather(1, la_target[:, None]) - logits.gather(1, la[:, None]))[:, 0]
                (gradient,) = torch.autograd.grad(lead.sum(), leaf)
            return lead.detach()[:, None], gradient.contiguous()[:, None]

    return Fab


def square(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, queries: int = 1000, passes: int = 1, seed: int = 0,
    batch_size: int = BATCH_SIZE, precision: str = "float32",
) -> Tensor:  # fmt: skip
    """The Square attack (Andriushchenko et al. 2020): random squares, kept if the margin of the output falls.

    Each query is the logarithm of the mean softmax over `passes` fresh passes; an image is left alone as soon as one
    query breaks it. Otherwise as `autoattack`.
    """
    eps = check_eps(eps)
    count = count_passes(model, passes)
    check_count("queries", queries)

    def tries(torchattacks: Any, asked: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
        attack = torchattacks.Square(asked, eps=eps / 255, n_queries=queries)
        attack.init_hyperparam(x)
        return [attack.attack_single_run(x, y)[1]]

    return _by_torchattacks("Square", tries, model, x, y, eps, seed, count, count, batch_size, precision)


Tries = Callable[[Any, nn.Module, Tensor, Tensor], list[Tensor]]


def _by_torchattacks(
    name: str, tries: Tries, model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int, passes: int, asked_for: int,
    batch_size: int, precision: str, classes: int = 2,
) -> Tensor:  # fmt: skip
    """The best, by `passes` passes, of `tries(torchattacks, network, x, y)` with x in 0-1.

    The network, of so many `classes` or more, answers each call with the mean of `asked_for` passes, if these are
    several, and else with one.
    """
    try:
        import torchattacks
    except ImportError:
        raise SapcoreError(
            f"{name} needs torchattacks: install it with `pip install -e '.[attacks]'` in the checkout"
        ) from None
    check_network(model)
    check_tensor("x", x)
    if x.dim() != 4:
        raise SapcoreError(f"the images have shape {tuple(x.shape)}, but {name} takes (N, C, H, W)")
    asked = _Asked(model, stream(seed, f"attack by {name}"), asked_for, batch_size, precision)

    def attack(x: Tensor, y: Tensor, ids: Tensor, rows: int) -> Tensor:
        asked.labels, asked.least_classes = y, classes
        # without gradients of the attack's own steps, which torchattacks would keep to its end
        with torch.no_grad(), _generators_of_its_own(seed % 2**32):
            found = [project(255 * found.detach(), x, eps) for found in tries(torchattacks, asked, x / 255, y)]
        return furthest_wrong(model, found, y, ids, passes, stream(seed, "choice"), rows, precision)

    return in_batches(model, x, y, None, batch_size, precision, attack)


@contextlib.contextmanager
def _generators_of_its_own(seed: int) -> Iterator[None]:
    """torchattacks draws from torch's global ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class _Asked(nn.Module):
    """A network of pixels in 0-1 that answers every call with fresh passes, in float64."""

    def __init__(self, model: nn.Module, seed: int, passes: int, batch_size: int, precision: str) -> None:
        super().__init__()
        self.model, self.seed, self.passes = model, seed, passes
        self.batch_size, self.precision = batch_size, precision
        self.calls = 0
        self.labels: Tensor | None = None
        self.least_classes = 2
        self.training = False
        self.place = nn.Parameter(torch.empty(0, device=device_of(model)), requires_grad=False)  # torchattacks looks

    def forward(self, x: Tensor) -> Tensor:
        logits = check_logits(self._answer(x.contiguous(memory_format=torch.channels_last)), len(x)).double()
        if self.labels is not None:  # once is enough
            check_labels(self.labels, len(self.labels), logits.shape[-1])
            if logits.shape[-1] < self.least_classes:
                raise SapcoreError(
                    f"the network has {logits.shape[-1]} classes, but must have {self.least_classes} or more"
                )
            if wrong := int((~logits.isfinite()).any(-1).sum()):
                raise SapcoreError(f"the network's output is nan or inf for {wrong} of {len(logits)} images")
            self.labels = None
        if torch.is_grad_enabled() and x.requires_grad:
            check_gradient(logits)
        return logits

    def _answer(self, x: Tensor) -> Any:
        self.calls += 1
        seed = stream(self.seed, str(self.calls))
        if not isinstance(self.model, NoisyModel):
            with autocast(self.precision, x.device):
                return self.model(255 * x)
        if self.passes > 1:  # only asked for, never differentiated
            p = predict(self.model, 255 * x, self.passes, seed, None, self.batch_size, self.precision)
            return p.clamp(min=1e-30).log().to(x.device)
        with autocast(self.precision, x.device):
            return self.model(255 * x, seed=seed)
