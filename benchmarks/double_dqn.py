"""Learning to play: agent steps per second of our Double DQN against stable-baselines3's DQN.

    python benchmarks/double_dqn.py

The same game and the same replay ratio of 8 samples per step. Theirs runs as its documentation has it: one game,
a minibatch of 32 after every fourth step, float32, and the plain DQN target, which takes one forward pass less. Ours
draws from a full replay, of copies of what was played, and theirs from the few thousand that it has played. Then what
a step of ours costs with fewer transitions to draw from.
"""

import dataclasses
import functools
import tempfile
import warnings
from pathlib import Path

import ale_py
import gymnasium
from common import alternate, arguments, percentiles, report

from sapcore.rl.double_dqn import Recipe, _Run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

GAME = "Assault"
gymnasium.register_envs(ale_py)


def advance(run: _Run, steps: int) -> None:
    goal = run.step + steps
    while run.step < goal:
        run.advance()


def fill(run: _Run, transitions: int) -> None:
    """Copy what was played until the replay holds so many."""
    replay, played = run.replay, run.replay.written
    slots = transitions // replay.games
    for array in (replay.frames, replay.first, replay.actions, replay.rewards, replay.terminals, replay.usable):
        for start in range(played, slots, played):
            stop = min(start + played, slots)
            array[start:stop] = array[: stop - start]
    replay.written = slots


def advance_on_newest(run: _Run, transitions: int, steps: int) -> None:
    """Draw from so many transitions only, and advance."""
    run.replay.oldest = max(0, run.replay.written - transitions // run.replay.games)
    advance(run, steps)


def main() -> None:
    options = arguments(__doc__, GAME, rounds=5, steps=1008, most=1_000_000)
    device, least = options.device, 10_000
    recipe = dataclasses.replace(
        Recipe(GAME), replay=max(options.most, least), learning_starts=1600, epsilon_steps=1, steps=10**9
    )
    game = make_atari_env(f"ALE/{GAME}-v5", n_envs=1, seed=0, env_kwargs={"frameskip": 1})  # their wrapper skips frames
    theirs = DQN(
        "CnnPolicy", VecFrameStack(game, 4), buffer_size=10_000,
        learning_starts=100, batch_size=32, train_freq=4, gradient_steps=1, target_update_interval=recipe.target_update,
        exploration_fraction=1e-4, device=device,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        ours = _Run("benchmark", recipe, device, Path(folder))
        advance(ours, recipe.learning_starts)
        theirs.learn(200)
        sizes = [size for size in (10_000, 100_000, 1_000_000) if size <= recipe.replay]
        fill(ours, sizes[-1])
        candidates = {
            "ours, Double DQN, bfloat16": lambda: advance(ours, options.steps),
            "stable-baselines3, DQN, float32": lambda: theirs.learn(options.steps, reset_num_timesteps=False),
        }
        seconds = alternate(candidates, options.rounds, device)
        table: list[dict[str, object]] = [
            {"agent": name, **percentiles(options.steps / seconds[name]), "unit": "steps/s"} for name in candidates
        ]
        growing = {
            f"ours, {size:,} transitions in the replay": functools.partial(advance_on_newest, ours, size, options.steps)
            for size in sizes
        }
        times = alternate(growing, options.rounds, device)
        table += [{"agent": name, **percentiles(options.steps / times[name]), "unit": "steps/s"} for name in growing]
    ratios = seconds.iloc[:, 1] / seconds.iloc[:, 0]
    report("double_dqn", options, table, steps=options.steps, times_faster=percentiles(ratios))


if __name__ == "__main__":
    main()
