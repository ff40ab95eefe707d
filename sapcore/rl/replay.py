"""The replay memory: the newest transitions of games played side by side, each frame kept once, in files if wanted."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor


class Minibatch(NamedTuple):
    """n transitions. States are uint8 (n, stack, side, side), channels last in memory; the rest is (n,)."""

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

    def __init__(self, capacity: int, games: int, side: int = 84, stack: int = 4, folder: Path | None = None) -> None:
        self.found = folder is not None and (folder / "frames.npy").exists()
        self.length, self.games, self.stack = max(capacity // games, stack + 2), games, stack
        self.written = 0
        shape = (self.length, games)
        self.frames = _array(folder, "frames", (*shape, side, side), np.uint8)
        self.actions = _array(folder, "actions", shape, np.uint8)
        self.rewards = _array(folder, "rewards", shape, np.int8)
        self.terminals = _array(folder, "terminals", shape, np.bool_)
        self.first = _array(folder, "first", shape, np.bool_)
        self.usable = _array(folder, "usable", shape, np.bool_)

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
        """
        slot = self.written % self.length
        self.frames[slot], self.first[slot], self.actions[slot] = frames, first, actions
        self.rewards[slot], self.terminals[slot], self.usable[slot] = rewards, terminals, usable
        self.written += 1

    def interrupt(self) -> None:
        """What is added next does not follow from what was added last, as after a restart."""
        if self.written:
            self.usable[(self.written - 1) % self.length] = False

    def sample(self, n: int, generator: np.random.Generator) -> Minibatch:
        """n transitions drawn uniformly, with replacement, from those whose every frame is still there."""
        newest = self.written - 1  # its next observation is not known yet
        oldest = max(0, self.written - self.length + self.stack - 1 if self.written > self.length else 0)
        times, games = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
        open_ = np.arange(n)
        while len(open_):
            times[open_] = generator.integers(oldest, newest, len(open_))
            games[open_] = generator.integers(0, self.games, len(open_))
            open_ = open_[~self.usable[times[open_] % self.length, games[open_]]]
        side = self.frames.shape[-1]
        states = np.empty((2, n, side, side, self.stack), dtype=np.uint8)
        _gather(self.frames, self.first, times, games, states)
        slots = times % self.length
        both = torch.from_numpy(states).permute(0, 1, 4, 2, 3)
        return Minibatch(
            both[0],
            torch.from_numpy(self.actions[slots, games].astype(np.int64)),
            torch.from_numpy(self.rewards[slots, games].astype(np.float32)),
            both[1],
            torch.from_numpy(self.terminals[slots, games]),
        )


def _array(folder: Path | None, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    if folder is None:
        return np.zeros(shape, dtype)
    path = folder / f"{name}.npy"
    if path.exists():
        found: NDArray[Any] = np.lib.format.open_memmap(path, mode="r+")
        if (found.shape, found.dtype) == (shape, np.dtype(dtype)):
            return found
    folder.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


@njit(parallel=True, nogil=True, cache=True)
def _gather(frames, first, times, games, states):
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
                        out[y, x] = frame[y, x]
                begun = first[time % length, games[i]]
