"""The replay memory: the newest transitions of games played side by side, each frame kept once, in files if wanted."""

import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from sapcore.errors import SapcoreError


class Minibatch(NamedTuple):
    """n transitions. States are bfloat16 (n, stack, side, side) in 0-1, channels last in memory; the rest is (n,)."""

    states: Tensor
    actions: Tensor
    """int64"""
    rewards: Tensor
    """float32"""
    next_states: Tensor
    terminals: Tensor
    """bool: nothing is to be expected after this transition."""


class Replay:
    """A ring of `capacity` transitions of `games` games that step together.

    A slot holds, for each game, the newest frame of an observation, and what came of the action taken on it; the
    stack and the next observation are put together from the slots beside it. With `folder` the ring lies in files
    that the operating system writes as it finds time, so that a killed process loses nothing and no save stalls.
    """

    def __init__(
        self, capacity: int, games: int, side: int = 84, stack: int = 4, folder: Path | None = None,
        written: int | None = None, newer: int = 0,
    ) -> None:  # fmt: skip
        """An empty ring; with `written`, that of `folder` as it was after so many slots were written.

        newer: how many slots may have been written since, over the oldest. Raises `SapcoreError` if the files are
        not those of such a ring, and leaves them as they are.
        """
        self.length, self.games, self.stack = max(capacity // games, stack + 2), games, stack
        self.written = written or 0
        self.oldest = max(0, self.written + newer - self.length + stack) if written else 0
        shape = (self.length, games)
        kinds = {
            "frames": ((*shape, side, side), np.uint8), "actions": (shape, np.uint8), "rewards": (shape, np.int16),
            "terminals": (shape, np.bool_), "first": (shape, np.bool_), "usable": (shape, np.bool_),
        }  # fmt: skip
        arrays = _opened(folder, kinds) if folder and written is not None else _made(folder, kinds)
        self.frames, self.actions, self.rewards = arrays["frames"], arrays["actions"], arrays["rewards"]
        self.terminals, self.first, self.usable = arrays["terminals"], arrays["first"], arrays["usable"]
        if written:  # what comes next does not follow from what was written last
            self.usable[(written - 1) % self.length] = False

    def __len__(self) -> int:
        """Transitions kept."""
        return min(self.written, self.length) * self.games

    def add(
        self, frames: NDArray[Any], first: NDArray[Any], actions: NDArray[Any], rewards: NDArray[Any],
        terminals: NDArray[Any], usable: NDArray[Any],
    ) -> None:  # fmt: skip
        """One step of all games; the oldest makes room.

        frames: uint8 (games, side, side), seen before the actions; first: where an episode begins with it; rewards
        and terminals follow the actions; usable: False where the action counted for nothing. All others (games,).
        Raises `SapcoreError` for rewards that int16 does not hold.
        """
        slot = self.written % self.length
        if not np.array_equal(rewards, np.asarray(rewards).astype(np.int16)):
            raise SapcoreError("a reward is no whole number from -32,768 to 32,767, and the replay keeps no others")
        self.frames[slot], self.first[slot], self.actions[slot] = frames, first, actions
        self.rewards[slot], self.terminals[slot], self.usable[slot] = rewards, terminals, usable
        self.written += 1

    @property
    def is_open(self) -> bool:
        """Whether there is a transition to draw; a small ring that was just taken up again has none for a while."""
        oldest, newest = self._bounds()
        return newest - oldest > 100 or bool(  # no game is without a usable step for so long
            self.usable[np.arange(oldest, newest) % self.length].any()
        )

    def _bounds(self) -> tuple[int, int]:
        """The oldest slot whose every frame is still there, and the newest, whose next observation is not known yet."""
        wrapped = self.written > self.length
        return max(self.oldest, self.written - self.length + self.stack - 1 if wrapped else 0), self.written - 1

    def sample(self, n: int, generator: np.random.Generator) -> Minibatch:
        """n transitions drawn uniformly, with replacement, from those whose every frame is still there.

        Raises `ValueError` if there is none.
        """
        oldest, newest = self._bounds()
        times, games = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
        open_ = np.arange(n)
        for _ in range(1000):
            if not len(open_) or newest <= oldest:
                break
            times[open_] = generator.integers(oldest, newest, len(open_))
            games[open_] = generator.integers(0, self.games, len(open_))
            open_ = open_[~self.usable[times[open_] % self.length, games[open_]]]
        if len(open_):
            raise ValueError("the replay holds no transition that could be drawn")
        side = self.frames.shape[-1]
        states = np.empty((2, n, side, side, self.stack), dtype=np.uint16)
        _gather(self.frames, self.first, times, games, SCALED, states)
        slots = times % self.length
        both = torch.from_numpy(states).view(torch.bfloat16).permute(0, 1, 4, 2, 3)
        return Minibatch(
            both[0],
            torch.from_numpy(self.actions[slots, games].astype(np.int64)),
            torch.from_numpy(self.rewards[slots, games].astype(np.float32)),
            both[1],
            torch.from_numpy(self.terminals[slots, games]),
        )


Kinds = dict[str, tuple[tuple[int, ...], Any]]


def _made(folder: Path | None, kinds: Kinds) -> dict[str, NDArray[Any]]:
    """Arrays of zeros, in files if a folder is given."""
    if folder is None:
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in kinds.items()}
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(math.prod(shape) for shape, _ in kinds.values())
    for path in folder.glob("*.npy"):
        path.unlink()
    too_little = SapcoreError(f"the replay needs {needed / 1e9:.1f} GB under {folder}, which has less")
    if shutil.disk_usage(folder).free < needed:
        raise too_little
    found: dict[str, NDArray[Any]] = {}
    for name, (shape, dtype) in kinds.items():
        path = folder / f"{name}.npy"
        found[name] = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):  # so that a disk that others fill later kills no training
            with path.open("r+b") as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
                except OSError as error:
                    raise too_little from error
    return found


def _opened(folder: Path, kinds: Kinds) -> dict[str, NDArray[Any]]:
    """The arrays that are there."""
    found: dict[str, NDArray[Any]] = {}
    for name, (shape, dtype) in kinds.items():
        path = folder / f"{name}.npy"
        try:
            found[name] = np.lib.format.open_memmap(path, mode="r+")
        except (OSError, ValueError):
            raise SapcoreError(f"{path} is not there or damaged; remove {folder} to train from the start") from None
        if (found[name].shape, found[name].dtype) != (shape, np.dtype(dtype)):
            raise SapcoreError(f"{path} is of another replay; remove {folder} to train from the start")
    return found


SCALED = (torch.arange(256, dtype=torch.bfloat16) / 255).view(torch.uint16).numpy()
"""The bits of a pixel of a frame as the network takes it: converted on the way, no pass over the pixels is needed."""


@njit(parallel=True, nogil=True, cache=True)
def _gather(frames, first, times, games, scaled, states):
    """states[0, i] and states[1, i]: the stacks before and after transition i; 0 from before its episode."""
    length, stack, side = frames.shape[0], states.shape[4], frames.shape[2]
    for i in prange(len(times)):
        for which in range(2):
            begun = False
            for back in range(stack):
                time = times[i] + which - back
                out = states[which, i, :, :, stack - 1 - back]
                if begun or time < 0:
                    out[:, :] = 0
                    continue
                frame = frames[time % length, games[i]]
                for y in range(side):
                    for x in range(side):
                        out[y, x] = scaled[frame[y, x]]
                begun = first[time % length, games[i]]
