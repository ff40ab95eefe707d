"""Random numbers as a function of what they are for, and the wrapper that hands them to a noisy network.

Every random number is Philox4x32-10 (Salmon et al. 2011) of a counter that names its use: the seed is
the key; the counter holds (unit, image, pass, layer and purpose). So a number depends on nothing else:
not on the batch size, the chunking, the memory layout, the number of workers or any global state.
"""

import copy
import dataclasses
import hashlib
import math
import numbers
import operator
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sapcore.errors import SapcoreError, check_count, check_module, check_tensor
from sapcore.splitting import has_hooks, split

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor | int], key: Sequence[Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four independent 32-bit words per counter.

    `counter` holds four and `key` two int64 tensors (or ints) in 0..2**32-1 that broadcast together.
    """
    device = next((c.device for c in counter if isinstance(c, Tensor)), None)
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, device=device) for c in counter))
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product; int64 wraps round, which leaves both words right."""
    product = x * factor
    return (product >> 32) & LOW, product & LOW


def split_seed(seed: int) -> tuple[int, int]:
    """The two key words of a seed in 0..2**64-1."""
    given: object = seed  # numpy's whole numbers are no int by their types
    if isinstance(given, bool) or not isinstance(given, numbers.Integral) or not 0 <= seed < 2**64:
        raise SapcoreError(f"seed is {seed!r}, but must be a whole number from 0 to 2**64 - 1")
    return int(seed) & LOW, int(seed) >> 32


def stream(seed: int, name: str) -> int:
    """The seed of a stream of its own ("attack", "evaluation", ...), derived from one seed."""
    split_seed(seed)
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def words(seed: int, ids: Tensor, passes: Tensor, layer: int, count: int, purpose: int = 0, attempt: int = 0) -> Tensor:
    """32-bit random words for `count` units of each example, int64 (N, count) in 0..2**32-1.

    Unit j takes word j // ceil(count/4) of counter j % ceil(count/4), so that a vector unit fills
    four contiguous runs at once.
    """
    quarter = -(-count // 4)
    block = torch.arange(quarter, device=ids.device)[None, :]
    counter = (block, (ids & LOW)[:, None], (passes & LOW)[:, None], layer | purpose << 16 | attempt << 24)
    return torch.cat(philox(counter, split_seed(seed)), dim=1)[:, :count]


def normal(seed: int, ids: Tensor, passes: Tensor, layer: int, count: int, purpose: int = 0) -> Tensor:
    """Standard normal numbers for `count` units of each example, float64 (N, count), by Box and Muller (1958).

    Words 0 and 1 of a counter make the radius and the angle of its units 0 and 1, words 2 and 3 those of 2 and 3.
    """
    quarter = -(-count // 4)
    w = words(seed, ids, passes, layer, 4 * quarter, purpose).double().reshape(len(ids), 2, 2, quarter)
    radius = (-2 * ((w[:, :, 0] + 0.5) * 2.0**-32).log()).sqrt()
    angle = 2 * math.pi * (w[:, :, 1] * 2.0**-32)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2)
    return pairs.reshape(len(ids), 4 * quarter)[:, :count]


def per_example(n: int, ids: Tensor | None, passes: Tensor | int) -> tuple[Tensor, Tensor]:
    """ids (default 0..n-1) and passes (one number serves all) as int64 (n,)."""
    ids = torch.arange(n) if ids is None else torch.as_tensor(ids)
    passes = torch.as_tensor(passes)
    for name, t in (("ids", ids), ("passes", passes)):
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise SapcoreError(f"{name} are {str(t.dtype).removeprefix('torch.')}, but must be whole numbers, as int64")
    if ids.shape != (n,):
        raise SapcoreError(f"ids has shape {tuple(ids.shape)}, but must be ({n},), one per example")
    if passes.shape not in ((), (n,)):
        raise SapcoreError(f"passes has shape {tuple(passes.shape)}, but must be one number or ({n},), one per example")
    return ids.long(), passes.long().expand(n)


class Noise(threading.local):
    """Which random numbers the layers of a network draw now: shared by them, set by `NoisyModel.forward`.

    Each thread has its own, so that several may call one network at a time, once it has `begin`.
    """

    def __init__(self) -> None:
        self.seed = 0
        self.ids: Tensor | None = None
        self.passes: Tensor | None = None
        self.layer = 0

    def next_layer(self) -> int:
        """The place of the calling layer in this forward pass; a module that is used twice gets two."""
        self.layer += 1
        return self.layer - 1

    def __reduce__(self) -> tuple[type["Noise"], tuple[()]]:
        return Noise, ()  # a copy of a network begins between two passes


@dataclasses.dataclass(frozen=True)
class Begun:
    """What a network computed of a batch before its first noisy layer: `NoisyModel.begin`.

    `parts` are tensors (n, ...), `model` is what goes on from them.
    """

    model: nn.Module
    parts: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    def repeated(self, times: int) -> "Begun":
        """The whole batch, several times over."""
        if times == 1:
            return self
        return Begun(self.model, tuple(torch.cat([part] * times) for part in self.parts))  # channels last stay so

    def cloned(self) -> "Begun":
        """The same in memory of its own, for a network that may change its input in place."""
        return Begun(self.model, tuple(part.clone() for part in self.parts))


def check_plain(model: nn.Module) -> None:
    """Raises `SapcoreError` for what is no network, and for one that is noisy already."""
    check_module(model)
    if any(isinstance(module, NoisyModel) for module in model.modules()):
        raise SapcoreError("the network is noisy already, and only one kind of noise goes into a network")


class NoisyModel(nn.Module):
    """A network with noise inside, whose every output is a function of (input, seed, ids, passes).

    `noise` is the object that the noisy layers of `model` share. The noise does not look at
    `.training`: it is always on.
    """

    def __init__(self, model: nn.Module, noise: Noise, description: dict[str, object]) -> None:
        super().__init__()
        check_plain(model)
        self.model, self.noise, self.description = model, noise, description
        self.training = model.training
        self.plain: tuple[nn.Module, ...] = ()  # the network without noise, if it is known; not a part of this one
        self._split_of: tuple[list[object], list[Tensor]] = ([], [])
        self._halves: tuple[nn.Module, nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is saved, finds out for itself where its noise begins."""
        return {**self.__dict__, "_split_of": ([], []), "_halves": None}

    def forward(self, x: Tensor | Begun, seed: int = 0, ids: Tensor | None = None, passes: Tensor | int = 0) -> Tensor:
        """One noisy pass per row.

        x: (N, ...), or what `begin` made of it; ids: int64 (N,) names the examples, default 0..N-1; passes: the
        number of the pass, one for all rows or int64 (N,). Both count modulo 2**32. Calling again with the same
        arguments gives the same output.
        Raises `SapcoreError` if no noisy layer is reached.
        """
        split_seed(seed)
        device = x.parts[0].device if isinstance(x, Begun) else x.device
        self._draw_for(seed, *(t.to(device) for t in per_example(len(x), ids, passes)))
        try:
            out: Tensor = x.model(*x.parts) if isinstance(x, Begun) else self.model(x)
        finally:  # so that no layer that is called again, by activation checkpointing say, draws other numbers unseen
            self.noise.ids = self.noise.passes = None
        if not self.noise.layer:
            raise SapcoreError("the network's forward reaches none of its noisy layers, so that nothing is random")
        return out

    def _draw_for(self, seed: int, ids: Tensor, passes: Tensor) -> None:
        self.noise.seed, self.noise.ids, self.noise.passes, self.noise.layer = seed, ids, passes, 0

    def begin(self, x: Tensor) -> Begun:
        """Compute of x what all passes have in common, the part before the first noisy layer.

        Nothing, where torch.fx cannot follow the network. While it does, at the first call and after a change of the
        network, no other thread may call a network, whichever. What goes on from there has a gradient by x, and none
        by the weights of a BatchNorm that is one step with its SAP.
        """
        if not len(x):
            return Begun(self.model, (x,))
        steps, tensors = self._what_is_split()
        alike = len(tensors) == len(self._split_of[1]) and all(map(operator.is_, tensors, self._split_of[1]))
        if not alike or self._split_of[0] != steps:
            watched = any(map(has_hooks, self.model.modules()))  # and must not be called once too often
            is_noisy = lambda module: getattr(module, "noise", None) is self.noise  # noqa: E731
            self._halves = split(self.model, is_noisy, lambda traced: watched or self._is_the_same(traced, x[:1]))
            self._split_of = steps, tensors
        if self._halves is None:
            return Begun(self.model, (x,))
        beginning, rest = self._halves
        parts = beginning(x)
        follows_x = all(isinstance(part, Tensor) and part.dim() and len(part) == len(x) for part in parts)
        if not follows_x or any(
            not part.requires_grad for part in parts if x.requires_grad and torch.is_grad_enabled()
        ):
            return Begun(self.model, (x,))
        return Begun(rest, parts)

    def _what_is_split(self) -> tuple[list[object], list[Tensor]]:
        """All that a traced network takes as given: its modules with their plain attributes, and which tensors."""
        steps: list[object] = [
            (
                module,
                has_hooks(module),
                {k: v if isinstance(v, bool | int | float | str) else repr(v) for k, v in _own(module, _VALUES)},
            )
            for module in self.model.modules()
        ]
        plain = [tensor for module in self.model.modules() for _, tensor in _own(module, Tensor)]
        return steps, [*self.model.parameters(), *self.model.buffers(), *plain]

    @torch.no_grad()
    def _is_the_same(self, traced: nn.Module, x: Tensor) -> bool:
        """Whether the traced network does what the network does: a forward may ask what torch.fx answers otherwise."""
        names = tuple(t.to(x.device) for t in per_example(1, None, 0))
        try:
            self._draw_for(0, *names)
            expected = self.model(x.clone())
        except Exception:  # which the pass that is to come will raise again
            return True
        try:
            self._draw_for(0, *names)
            return bool(torch.equal(expected, traced(x.clone())))
        except Exception:  # what was traced is another network
            return False


_OF_TORCH = vars(nn.Module()).keys()
_VALUES = (bool, int, float, str, tuple, list, dict, set, type(None))


def _own(module: nn.Module, kinds: Any) -> Iterator[tuple[str, Any]]:
    """The module's attributes of these types, but for those that torch keeps on every module."""
    return ((k, v) for k, v in vars(module).items() if isinstance(v, kinds) and k not in _OF_TORCH)


def copy_of(model: nn.Module) -> nn.Module:
    """A copy of a network; raises `SapcoreError` for what is no network, or cannot be copied."""
    check_module(model)
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        raise SapcoreError(
            "the network cannot be copied, because one of its tensors is computed from others; "
            "after weight_norm, torch.nn.utils.remove_weight_norm makes it a weight of its own"
        ) from error


@torch.no_grad()
def with_noisy_statistics(noisy: nn.Module, images: Tensor, seed: int = 0, batch_size: int = 500) -> NoisyModel:
    """A copy of a noisy network whose BatchNorm has the running statistics of its own noisy passes.

    Those that it came with are of the network without noise, and noise adds variance to every later map. Each batch of
    images is seen in a pass of its own; a statistic is the mean over the batches. Weights stay as they are, and so does
    `plain`. Measure what it does: strong SAP, dropout and noise that scales activations gain by it on the digits, and
    noise that is added to them, or to weights, may lose.

    images: (N, ...), training images as the network takes them, of any type of numbers; batch_size: the most to a
    batch, all batches being of about the same size.
    Raises `SapcoreError` for a network without noise or without a BatchNorm that has running statistics, if `images` is
    no tensor or holds none, and for a batch_size below 1.
    """
    check_tensor("images", images)
    check_count("batch_size", batch_size)
    if not isinstance(noisy, NoisyModel):
        raise SapcoreError(f"the network is a {type(noisy).__name__}, but must be a noisy one, such as with_sap makes")
    copied = copy.deepcopy(noisy)
    norms = [m for m in copied.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise SapcoreError("the network has no BatchNorm with running statistics, so there are none to take anew")
    if not len(images):
        raise SapcoreError("there is no image to take the statistics of, but one or more are needed")
    were = [(norm, norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # of all batches alike
    device = next(copied.buffers()).device
    batches = torch.arange(len(images)).tensor_split(-(-len(images) // batch_size))
    for number, chosen in enumerate(batches):
        try:
            copied(images[chosen].to(device).float(), stream(seed, "statistics"), chosen, number)
        except ValueError as error:  # of torch, where a map is one number to a channel
            if "more than 1 value per channel" not in str(error):
                raise
            raise SapcoreError(
                f"a batch of {len(chosen)} gives this network's BatchNorm no variance; take more, or larger batches"
            ) from None
    for norm, training, momentum in were:
        norm.train(training)
        norm.momentum = momentum
    return copied
