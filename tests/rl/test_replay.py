"""The replay gives back what was seen, transition by transition, and nothing that never happened."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from sapcore.errors import SapcoreError
from sapcore.rl.replay import Replay

SIDE = 3


def play(
    replay: Replay, steps: int, seed: int, start: int = 0
) -> dict[tuple[int, int], tuple[NDArray[np.uint8], int, int, bool, NDArray[np.uint8]]]:
    """Games of made-up frames; returns every true transition by (step, game)."""
    rng = np.random.default_rng(seed)
    games, stack = replay.games, replay.stack
    seen = np.zeros((games, stack, SIDE, SIDE), np.uint8)
    seen[:, -1] = rng.integers(1, 256, (games, SIDE, SIDE))
    first, ended = np.ones(games, bool), np.zeros(games, bool)
    true = {}
    for step in range(start, start + steps):
        actions, rewards = rng.integers(0, 18, games), rng.integers(-1, 2, games)
        ends, dies = rng.random(games) < 0.2, rng.random(games) < 0.1
        after = np.concatenate([seen[:, 1:], rng.integers(1, 256, (games, 1, SIDE, SIDE), dtype=np.uint8)], axis=1)
        after[ended, :-1] = 0  # the step after an end begins an episode
        ends &= ~ended
        replay.add(seen[:, -1], first, actions, rewards, ends | dies, ~ended)
        for game in np.flatnonzero(~ended):
            terminal = bool(ends[game] | dies[game])
            true[step, int(game)] = seen[game], int(actions[game]), int(rewards[game]), terminal, after[game]
        seen, first, ended = after, ended, ends
    return true


def pixels(states: torch.Tensor) -> NDArray[np.uint8]:
    """The frames that a minibatch's states were made of."""
    return np.ascontiguousarray((states.float() * 255).round().byte().numpy())


@given(
    games=st.integers(1, 5), capacity=st.integers(1, 60), steps=st.integers(12, 60), stack=st.integers(1, 4),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_sample_is_a_transition_that_happened_among_the_newest(
    games: int, capacity: int, steps: int, stack: int, seed: int
) -> None:
    replay = Replay(capacity, games, SIDE, stack)
    true = play(replay, steps, seed)
    assert len(replay) == min(steps, replay.length) * games
    batch = replay.sample(40, np.random.default_rng(seed))
    states, following = pixels(batch.states), pixels(batch.next_states)
    kept = {key: t for key, t in true.items() if steps - replay.length <= key[0] < steps - 1}
    for i in range(40):
        matches = [
            key for key, (state, action, reward, terminal, after) in kept.items()
            if np.array_equal(states[i], state) and np.array_equal(following[i], after)
            and (int(batch.actions[i]), float(batch.rewards[i]), bool(batch.terminals[i])) == (action, reward, terminal)
        ]  # fmt: skip
        assert matches, "a transition that never happened"


@pytest.mark.parametrize("reward", [0.5, 40_000])
def test_a_reward_that_would_be_stored_as_another_is_refused(reward: float) -> None:
    ring, one = Replay(100, 1), np.ones(1, dtype=bool)
    with pytest.raises(SapcoreError, match=r"^a reward is no whole number from -32,768 to 32,767"):
        ring.add(np.zeros((1, 84, 84), np.uint8), one, np.zeros(1, int), np.array([reward]), ~one, one)
    assert len(ring) == 0


def test_every_usable_transition_is_drawn_equally_often() -> None:
    """Chi-square; false alarm: 1e-6."""
    replay = Replay(40, 2, SIDE, 4)
    true = play(replay, 50, 3)
    batch = replay.sample(20_000, np.random.default_rng(0))
    newest = {key: t for key, t in true.items() if 50 - 20 + 3 <= key[0] < 49}
    counts = [int((pixels(batch.states) == t[0]).all(axis=(1, 2, 3)).sum()) for t in newest.values()]
    assert sum(counts) == 20_000
    assert stats.chisquare(counts).pvalue > 1e-6


def test_a_ring_in_files_survives_its_process_and_an_interruption_is_no_transition(tmp_path: Path) -> None:
    replay = Replay(60, 2, SIDE, 4, tmp_path)
    before = play(replay, 20, 1)
    again = Replay(60, 2, SIDE, 4, tmp_path, replay.written)
    after = play(again, 8, 2, start=20)
    true = {key: t for key, t in (before | after).items() if key[0] != 19}
    batch = again.sample(500, np.random.default_rng(0))
    states = {t[0].tobytes(): t[4].tobytes() for t in true.values()}
    for state, following in zip(pixels(batch.states), pixels(batch.next_states), strict=True):
        assert states[state.tobytes()] == following.tobytes()


def test_what_a_killed_process_wrote_over_the_oldest_is_not_drawn(tmp_path: Path) -> None:
    """It went on for seven slots after its state was saved, over slots that the state takes for the oldest."""
    replay = Replay(60, 2, SIDE, 4, tmp_path)
    saved = play(replay, 50, 1)
    written = replay.written
    play(replay, 7, 5, start=50)
    again = Replay(60, 2, SIDE, 4, tmp_path, written, newer=7)
    batch = again.sample(2000, np.random.default_rng(0))
    states = {t[0].tobytes(): t[4].tobytes() for t in saved.values()}
    for state, following in zip(pixels(batch.states), pixels(batch.next_states), strict=True):
        assert states[state.tobytes()] == following.tobytes()


@pytest.mark.parametrize("newer", [0, 20, 25, 26, 40])
def test_a_small_ring_that_is_taken_up_again_is_closed_until_there_is_something_to_draw(
    tmp_path: Path, newer: int
) -> None:
    replay = Replay(60, 2, SIDE, 4, tmp_path)
    play(replay, 50, 1)
    again = Replay(60, 2, SIDE, 4, tmp_path, replay.written, newer=newer)
    steps = 0
    while not again.is_open:
        with pytest.raises(ValueError, match="no transition that could be drawn"):
            again.sample(1, np.random.default_rng(0))
        play(again, 1, steps, start=50 + steps)
        steps += 1
    assert (steps > 0) == (newer >= 25)
    assert steps <= newer
    assert len(again.sample(5, np.random.default_rng(0)).states) == 5


@pytest.mark.parametrize("name", ["frames", "actions", "rewards", "terminals", "first", "usable"])
def test_a_lost_or_damaged_file_or_another_ring_is_one_sentence_and_nothing_is_lost(tmp_path: Path, name: str) -> None:
    replay = Replay(60, 2, SIDE, 4, tmp_path)
    play(replay, 20, 1)
    before = replay.frames.copy()
    with pytest.raises(SapcoreError, match=r"is of another replay; remove .* to train from the start$"):
        Replay(80, 2, SIDE, 4, tmp_path, 20)
    (tmp_path / f"{name}.npy").rename(tmp_path / "elsewhere")
    with pytest.raises(SapcoreError, match=rf"{name}.npy is not there or damaged; remove .* to train from the start$"):
        Replay(60, 2, SIDE, 4, tmp_path, 20)
    (tmp_path / f"{name}.npy").write_bytes(b"half")
    with pytest.raises(SapcoreError, match="is not there or damaged"):
        Replay(60, 2, SIDE, 4, tmp_path, 20)
    (tmp_path / "elsewhere").rename(tmp_path / f"{name}.npy")
    assert np.array_equal(Replay(60, 2, SIDE, 4, tmp_path, 20).frames, before)


def test_too_small_a_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(SapcoreError, match=r"^the replay needs 7.1 GB under .*, which has less$"):
        Replay(1_000_000, 16, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_files_have_their_room_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Replay(600, 2, SIDE, 4, tmp_path)
    for path in tmp_path.glob("*.npy"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SapcoreError, match=r"^the replay needs .* GB under .*, which has less$"):
        Replay(600, 2, SIDE, 4, tmp_path)


def test_an_empty_ring_or_one_of_useless_transitions_is_not_waited_for() -> None:
    replay = Replay(60, 2, SIDE, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match="no transition that could be drawn"):
            replay.sample(3, np.random.default_rng(0))
        play(replay, 20, 1)
        replay.usable[:] = False


def test_a_million_transitions_fit_in_8_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the room being taken: the files are sparse until something is written."""
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    replay = Replay(1_000_000, 16, folder=tmp_path)
    arrays = (replay.frames, replay.actions, replay.rewards, replay.terminals, replay.first, replay.usable)
    assert sum(array.nbytes for array in arrays) < 8e9
    assert replay.length * replay.games == 1_000_000


def test_states_are_laid_out_and_scaled_as_the_network_has_it() -> None:
    replay = Replay(60, 2, SIDE, 4)
    play(replay, 20, 1)
    states = replay.sample(5, np.random.default_rng(0)).states
    assert states.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(states, torch.from_numpy(pixels(states)).bfloat16() / 255)
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(torch.from_numpy(pixels(every.bfloat16() / 255)), every), "no two pixels become one"


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_is_a_function_of_the_generator(seed: int) -> None:
    replay = Replay(60, 2, SIDE, 4)
    play(replay, 20, 1)
    first, second = (replay.sample(9, np.random.default_rng(seed)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
