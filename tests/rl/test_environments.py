"""The six games as ALE preprocesses them, by rules that are all in one place."""

import dataclasses
import sys
import types
from importlib.util import find_spec

import numpy as np
import pytest

from sapcore.errors import SapcoreError
from sapcore.rl import environments
from sapcore.rl.environments import GAMES, Rules, make

needs_ale = pytest.mark.skipif(find_spec("ale_py") is None, reason="Atari is an extra: pip install -e '.[rl]'")


def test_an_unknown_game_names_the_six() -> None:
    sentence = "game is 'Pong', but must be one of Assault, Asterix, BankHeist, BattleZone, BeamRider, Bowling"
    with pytest.raises(SapcoreError, match=f"^{sentence}$"):
        make("Pong", 1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sticky_actions", 7, "sticky_actions is 7, but must be a number from 0 to 1"),
        ("evaluation_epsilon", -1, "evaluation_epsilon is -1, but must be a number from 0 to 1"),
        ("noops", -1, "noops is -1, but must be a whole number of 0 or more"),
        ("frameskip", 0, "frameskip is 0, but must be a whole number of 1 or more"),
        ("side", 42, "side and stack are 42 and 4, but must be 84 and 4, which the network takes"),
    ],
)
def test_senseless_rules_are_one_sentence(field: str, value: float, message: str) -> None:
    with pytest.raises(SapcoreError, match=f"^{message}$"):
        Rules(**{field: value})  # type: ignore[arg-type]
    with pytest.raises(SapcoreError, match=r"^count is 0, but must be a whole number of 1 or more$"):
        make("Bowling", 0)


def test_without_ale_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(SapcoreError, match=r"install them with `pip install -e '\.\[rl\]'`"):
        make("Bowling", 1)


def test_every_rule_reaches_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}
    gymnasium = types.SimpleNamespace(make_vec=lambda name, **options: asked.update(options, name=name))
    monkeypatch.setattr(environments, "_gymnasium", lambda: gymnasium)
    rules = Rules(
        sticky_actions=0.5, frameskip=3, max_over_frames=False, noops=7, fire_at_start=False, frames_per_episode=99,
        all_actions=True,
    )  # fmt: skip
    make("Bowling", 2, rules)
    assert asked == {
        "name": "ALE/Bowling-v5", "num_envs": 2, "vectorization_mode": "vector_entry_point",
        "repeat_action_probability": 0.5, "frameskip": 3, "maxpool": False, "img_height": 84, "img_width": 84,
        "stack_num": 4, "noop_max": 7, "use_fire_reset": False, "max_num_frames_per_episode": 99,
        "full_action_space": True, "episodic_life": False, "reward_clipping": False,
    }  # fmt: skip


@needs_ale
@pytest.mark.parametrize("game", GAMES)
def test_a_game_shows_stacks_of_grey_frames_that_begin_with_zeros(game: str) -> None:
    env = make(game, 3)
    seen, _ = env.reset(seed=0)
    assert (seen.shape, seen.dtype) == ((3, 4, 84, 84), np.uint8)
    assert not seen[:, :3].any()
    assert seen[:, 3].any()
    after, *_ = env.step(np.zeros(3, dtype=int))
    assert np.array_equal(after[:, :3], seen[:, 1:])
    assert 6 <= env.single_action_space.n <= 18
    env.close()


@needs_ale
def test_a_game_is_a_function_of_its_seed_and_not_of_its_neighbours() -> None:
    alone, among = make("Assault", 1), make("Assault", 3)
    a, _ = alone.reset(seed=np.array([8]))
    b, _ = among.reset(seed=np.array([7, 8, 9]))
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert np.array_equal(a[0], b[1])
        actions = rng.integers(0, 7, 3)
        a, b = alone.step(actions[1:2])[0], among.step(actions)[0]
    assert not np.array_equal(b[0], b[1])


@needs_ale
def test_an_episode_is_cut_off_where_the_rules_say() -> None:
    env = make("Bowling", 1, dataclasses.replace(Rules(), frames_per_episode=400))
    env.reset(seed=0)
    steps = 0
    while True:
        _, _, terminated, truncated, _ = env.step(np.zeros(1, dtype=int))
        steps += 1
        if terminated[0] or truncated[0]:
            break
    assert truncated[0]
    assert not terminated[0]
    assert 80 <= steps <= 100
