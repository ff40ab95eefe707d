"""Learning follows van Hasselt et al.'s target at the replay ratio that the recipe names, and goes on after a kill."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sapcore import checkpoints
from sapcore.errors import SapcoreError
from sapcore.rl import double_dqn
from sapcore.rl.double_dqn import RECIPES, Recipe, _Run, train
from sapcore.rl.environments import GAMES, Rules
from sapcore.rl.replay import Minibatch
from tests.rl.test_replay import pixels

pytest.importorskip("ale_py", reason="Atari is an extra: pip install -e '.[rl]'")

TINY = Recipe(
    "Bowling", steps=400, games=4, minibatch=16, replay=200, learning_starts=100, target_update=100, epsilon_steps=200
)
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkpoints and states of one's own."""
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(double_dqn, "ROWS", 100)
    monkeypatch.setattr(double_dqn, "SAVED", 100)
    return tmp_path


def test_every_game_has_the_same_recipe_but_for_bowlings_rewards() -> None:
    assert list(RECIPES) == [f"double-dqn-{game}" for game in GAMES]
    for game in GAMES:
        rules = dataclasses.replace(Rules(), clipped_rewards=game != "Bowling")
        assert RECIPES[f"double-dqn-{game}"] == dataclasses.replace(Recipe(game), rules=rules)
    recipe = Recipe("Assault")
    constants = recipe.learning_rate, recipe.gamma1, recipe.gamma2, recipe.rmsprop_epsilon
    assert constants == (2.5e-4, 0.95, 0.95, 0.01)
    assert (recipe.discount, recipe.target_update, recipe.learning_starts) == (0.99, 2_500, 50_000)
    assert recipe.samples_per_step == 32 / 4
    assert recipe.minibatch == 64
    assert (recipe.epsilon_at(0), recipe.epsilon_at(10**9)) == pytest.approx((1, 0.1))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("minibatch", 0, "minibatch is 0, but must be a whole number of 1 or more"),
        ("epsilon_steps", 0, "epsilon_steps is 0, but must be a whole number of 1 or more"),
        ("learning_starts", 400, "learning_starts is 400, but must be a whole number from 0 to steps - 1 = 399, or "),
    ],
)
def test_a_senseless_recipe_is_one_sentence(field: str, value: int, message: str) -> None:
    with pytest.raises(SapcoreError, match=f"^{message}"):
        dataclasses.replace(TINY, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("as_learnt", [True, False])
def test_what_is_learnt_from_is_what_the_games_showed(
    as_learnt: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On ALE itself: stacks after a reset, rewards, lives lost and episodes cut off, in a replay that went round.

    With rewards clipped and returns ended by the loss of a life, and with neither.
    """
    rules = Rules(frames_per_episode=600, clipped_rewards=as_learnt, life_ends_return=as_learnt)
    recipe = dataclasses.replace(
        TINY, game="Asterix", games=2, replay=600, steps=10**7, learning_starts=10**6, rules=rules
    )
    run = _Run("tiny", recipe, CPU, folder)
    shown: set[tuple[bytes, int, bytes, float, bool]] = set()
    counts = {"rewards": 0, "lives": 0, "ends": 0}
    step = run.env.step

    def watched(actions: Any) -> Any:
        before, lives, ended = run.seen, run.lives, run.ended
        after, rewards, terminated, truncated, info = step(actions)
        for i in np.flatnonzero(~ended):
            lost = bool(terminated[i] or info["lives"][i] < lives[i])
            reward = np.sign(rewards[i]) if as_learnt else rewards[i]
            final = lost if as_learnt else bool(terminated[i])
            shown.add((before[i].tobytes(), int(actions[i]), after[i].tobytes(), float(reward), final))
            counts["rewards"] += bool(rewards[i])
            counts["lives"] += lost
            counts["ends"] += bool(terminated[i] or truncated[i])
        return after, rewards, terminated, truncated, info

    monkeypatch.setattr(run.env, "step", watched)
    for _ in range(700):
        run.advance()
    assert min(counts.values()) > 4
    drawn = run.replay.sample(2000, np.random.default_rng(0))
    parts = pixels(drawn.states), drawn.actions, drawn.rewards, pixels(drawn.next_states), drawn.terminals
    for before, action, reward, after, terminal in zip(*parts, strict=True):
        found = before.tobytes(), int(action), after.tobytes(), float(reward), bool(terminal)
        assert found in shown
    assert drawn.terminals.any() or not as_learnt
    assert (drawn.rewards.abs().max() > 1) == (not as_learnt)


def test_a_training_leaves_an_agent_with_a_card_and_no_state(folder: Path) -> None:
    agent = train("tiny", TINY, "cpu", folder, progress=False)
    assert not (folder / "tiny").exists()
    card = checkpoints.card("tiny")
    assert (card["architecture"], card["actions"]) == ("QNetwork", 6)
    assert [row["step"] for row in card["history"]] == [100, 200, 300, 400]
    assert card["history"][0]["loss"] is None
    assert all(row["loss"] > 0 for row in card["history"][1:])
    assert card["recipe"] == json.loads(json.dumps(dataclasses.asdict(TINY)))
    x = torch.randint(0, 256, (2, 4, 84, 84), generator=torch.Generator().manual_seed(0)).float()
    assert agent(x).shape == (2, 6)
    assert all(p.dtype == torch.float32 and torch.equal(p, p.half().float()) for p in agent.parameters())
    path = folder / "checkpoints" / "tiny.safetensors"
    assert path.stat().st_size < 2.1 * sum(p.numel() for p in agent.parameters())


def test_the_replay_ratio_and_the_targets_age_are_the_recipes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run("tiny", TINY, CPU, folder)
    assert rounded(run)
    learnt: list[int] = []
    monkeypatch.setattr(run, "_learn", lambda generator: learnt.append(run.step))
    copied: list[int] = []
    monkeypatch.setattr(run.target, "load_state_dict", lambda state: copied.append(run.step))
    while run.step < TINY.steps:
        run.advance()
    assert len(learnt) * TINY.minibatch == (TINY.steps - TINY.learning_starts) * TINY.samples_per_step
    assert min(learnt) > TINY.learning_starts
    assert copied == [100, 200, 300, 400]


class Table(nn.Module):
    """Values of three states by their first pixel."""

    def __init__(self, values: list[list[float]]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float32))

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return self.values[x[:, 0, 0, 0].long()]


def test_the_target_is_double_dqns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The online network chooses, the target network values; nothing follows a terminal transition."""
    run = _Run("tiny", dataclasses.replace(TINY, minibatch=3), CPU, folder)
    online, target = Table([[0, 1], [3, 2], [5, 8]]), Table([[9, 0.5], [0.25, 7], [4, 6]])
    states = torch.arange(3.0)[:, None, None, None].expand(3, 4, 84, 84)
    actions, rewards, terminals = (torch.tensor(t) for t in ([0, 1, 0], [1.0, 0.0, -1.0], [False, False, True]))
    batch = Minibatch(states, actions, rewards, states, terminals)
    monkeypatch.setattr(run, "rounded", online)
    monkeypatch.setattr(run, "target", target)
    monkeypatch.setattr(run.replay, "sample", lambda n, generator: batch)
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    run._learn(np.random.default_rng(0))
    goal = torch.tensor([1 + 0.99 * 0.5, 0.99 * 0.25, -1.0])
    chosen = torch.tensor([0.0, 2.0, 5.0])
    assert float(run.losses[0]) == pytest.approx(float(F.huber_loss(chosen, goal)), rel=1e-5)
    gradient = torch.zeros(3, 2)
    gradient[[0, 1, 2], [0, 1, 0]] = (chosen - goal).clamp(-1, 1)
    assert online.values.grad is not None
    torch.testing.assert_close(online.values.grad, gradient)
    assert target.values.grad is None


def test_rewards_are_clipped_and_the_loss_of_a_life_ends_what_is_to_be_expected(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(TINY, game="Assault", steps=6000, replay=6000, learning_starts=5999)
    run = _Run("tiny", recipe, CPU, folder)
    lives, over = [run.lives.copy()], list[Any]()
    step, scores, returns = run.env.step, np.zeros(recipe.games), list[float]()

    def watched(actions: Any) -> Any:
        after = step(actions)
        over.append(after[2].copy())
        scores[:] += after[1]
        ends = after[2] | after[3]
        returns.extend(scores[ends])
        scores[ends] = 0
        return after

    monkeypatch.setattr(run.env, "step", watched)
    while run.step < recipe.steps:
        run.advance()
        lives.append(run.lives.copy())
    rewards = run.replay.rewards[: run.replay.written]
    assert set(np.unique(rewards)) <= {-1, 0, 1}
    rows = [row for row in run.history if row["episodes"]]
    assert sum(row["episodes"] for row in rows) == len(returns) > recipe.games, "some games have ended twice"
    total = sum(row["mean_return"] * row["episodes"] for row in rows)
    assert total == pytest.approx(sum(returns), abs=0.01 * len(returns)), "the game's own"
    assert max(returns) > 3
    lost = np.diff(np.array(lives), axis=0) < 0
    terminals, usable = run.replay.terminals[: len(lost)], run.replay.usable[: len(lost)]
    assert (terminals[usable] == (lost | np.array(over))[usable]).all()
    assert lost.any()


def rounded(run: _Run) -> bool:
    """Whether the network that plays is the one that is kept, rounded."""
    pairs = zip(run.online.parameters(), run.rounded.parameters(), strict=True)
    return all(torch.equal(kept.to(playing.dtype), playing) for kept, playing in pairs)


def test_a_killed_training_goes_on_with_replay_and_optimizer(folder: Path, tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from sapcore import checkpoints
from sapcore.rl import double_dqn
from tests.rl.test_double_dqn import TINY
import dataclasses
checkpoints.CHECKPOINTS = Path({str(tmp_path / "checkpoints")!r})
double_dqn.ROWS = double_dqn.SAVED = 100
recipe = dataclasses.replace(TINY, steps=10**7, replay=400)
double_dqn.train("tiny", recipe, "cpu", Path({str(tmp_path)!r}), progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2], env=os.environ)
    state = tmp_path / "tiny" / "state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() or int(re.findall(rb'step\\": (\d+)', state.read_bytes())[0]) < 200:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = dataclasses.replace(TINY, steps=10**7, replay=400)
    run = _Run("tiny", killed, CPU, folder)
    assert run.step >= 200
    assert len(run.replay) == min(run.step, 400)
    newer = 2 * double_dqn.SAVED // killed.games  # slots that may have been written after the save, over the oldest
    assert run.replay.oldest == max(0, run.replay.written + newer - run.replay.length + run.replay.stack) > 0
    assert run.replay.frames.any()
    assert [row["step"] for row in run.history] == list(range(100, run.step + 1, 100))
    assert all(t.any() for t in run.optimizer.state().values())
    before = [p.clone() for p in run.online.parameters()]
    assert rounded(run)
    for _ in range(30):
        run.advance()
    assert rounded(run)
    assert any(not torch.equal(a, b) for a, b in zip(before, run.online.parameters(), strict=True))
    with pytest.raises(SapcoreError, match="is a training by another recipe"):
        _Run("tiny", dataclasses.replace(killed, seed=1), CPU, folder)
    (tmp_path / "tiny" / "frames.npy").unlink()
    for _ in range(2):
        with pytest.raises(SapcoreError, match=r"frames.npy is not there or damaged; remove "):
            _Run("tiny", killed, CPU, folder)
    state.write_bytes(b"half")
    with pytest.raises(SapcoreError, match="is damaged; remove"):
        _Run("tiny", killed, CPU, folder)


def test_an_unknown_agent_names_the_six() -> None:
    with pytest.raises(SapcoreError, match=r"no recipe is named 'double-dqn-Pong'; there are double-dqn-Assault, "):
        train("double-dqn-Pong")


def test_a_training_is_a_function_of_its_seed(folder: Path) -> None:
    agents = [train("tiny", TINY, "cpu", folder, progress=False) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(agent.parameters() for agent in agents), strict=True))


def test_a_save_that_fails_stops_the_training_with_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    with pytest.raises(SapcoreError, match=r"cannot be written \(No space left on device\); make room"):
        train("tiny", TINY, "cpu", folder, progress=False)


def test_weights_begin_as_the_residual_networks_do_by_the_seed(folder: Path) -> None:
    before = torch.get_rng_state()
    networks = [_Run("tiny", dataclasses.replace(TINY, seed=seed), CPU, folder / "x").online for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (network.hidden.weight for network in networks)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for module in networks[0].modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.bias is not None
            assert not module.bias.any()
            assert float(module.weight.detach().std()) == pytest.approx((2 / module.weight[0].numel()) ** 0.5, rel=0.05)


def test_two_trainings_of_one_agent_do_not_run_at_once(folder: Path) -> None:
    with (
        checkpoints.alone("tiny", folder),
        pytest.raises(SapcoreError, match=r"^tiny is being trained by another process, with its state in "),
    ):
        train("tiny", TINY, "cpu", folder, progress=False)


def test_actions_are_greedy_but_for_a_share_at_random(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run("tiny", TINY, CPU, folder)
    run.seen = np.random.default_rng(0).integers(0, 256, run.seen.shape, dtype=np.uint8)
    best = run.rounded(torch.from_numpy(run.seen).bfloat16()).argmax(1).numpy()
    for epsilon in (0.0, 0.5, 1.0):
        monkeypatch.setattr(Recipe, "epsilon_at", lambda self, step, share=epsilon: share)
        taken = np.stack([run._act(np.random.default_rng(i)) for i in range(400)])
        assert (taken == best).mean() == pytest.approx(1 - epsilon * (1 - 1 / run.actions), abs=0.07)


def test_a_saved_state_is_taken_over_whole(folder: Path) -> None:
    """The target network too, which is older than the one that learns."""
    recipe = dataclasses.replace(TINY, target_update=140)
    run = _Run("tiny", recipe, CPU, folder)
    while run.step < 300:
        run.advance()
    run._saved()
    again = _Run("tiny", recipe, CPU, folder)

    def same(one: nn.Module, other: nn.Module) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    assert same(run.online, again.online)
    assert same(run.rounded, again.rounded)
    assert same(run.target, again.target)
    assert not same(again.target, again.rounded)
    before, after = run.optimizer.state(), again.optimizer.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (again.step, again.history) == (run.step, run.history)


def test_all_actions_are_random_before_anything_is_learnt() -> None:
    recipe = Recipe("Bowling")
    assert recipe.epsilon_at(recipe.learning_starts - 1) == 1
    assert recipe.epsilon_at(recipe.epsilon_steps) == pytest.approx(0.1)
    assert 0.1 < recipe.epsilon_at(recipe.learning_starts) < 1
