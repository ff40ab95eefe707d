"""Episodes are a function of their seed; an attack moves what the agent sees, within eps, against its own choice."""

import dataclasses
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sapcore import evaluation, with_sap
from sapcore.attacks import fgsm
from sapcore.errors import SapcoreError
from sapcore.models import QNetwork, initialize
from sapcore.randomness import stream
from sapcore.rl.environments import Rules, make
from sapcore.rl.playing import interval_of_mean, moments, play, relative_change, values

pytest.importorskip("ale_py", reason="Atari is an extra: pip install -e '.[rl]'")

SHORT = Rules(frames_per_episode=160)


def untrained(actions: int, seed: int = 0) -> nn.Module:
    """An agent with clear preferences all the same."""
    network = QNetwork(actions)
    initialize(network, torch.Generator().manual_seed(seed))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def agent() -> nn.Module:
    return untrained(6)


def test_every_episode_is_played_to_its_own_end(agent: nn.Module) -> None:
    found = play(agent, "Bowling", 3, rules=SHORT)
    assert len(found.returns) == 3
    assert 3 * 30 <= found.steps <= 3 * 40
    assert found.mean == np.mean(found.returns)


def test_in_bfloat16_the_values_keep_their_differences(agent: nn.Module) -> None:
    x = torch.randint(0, 256, (20, 4, 84, 84), generator=torch.Generator().manual_seed(0))
    exact, rounded = (values(agent, x, precision=precision) for precision in ("float32", "bfloat16"))
    assert not torch.equal(rounded, rounded.bfloat16().double())
    error, spread = ((t - t.mean(1, keepdim=True)).abs().mean() for t in (rounded - exact, exact))
    assert error < spread / 100


def test_an_agents_noisy_passes_share_the_first_layer(agent: nn.Module) -> None:
    begun = evaluation.begin(with_sap(agent, 100), torch.zeros(2, 4, 84, 84), "bfloat16")
    assert [tuple(part.shape) for part in begun.parts] == [(2, 32, 20, 20)]


def test_the_same_seed_plays_the_same_game_and_another_another(agent: nn.Module) -> None:
    def seen(seed: int) -> list[Tensor]:
        shown: list[Tensor] = []
        play(
            with_sap(agent, 100), "Bowling", 2, 2, 3, gradient_passes=2, seed=seed, rules=SHORT,
            watch=lambda step, x, x_adv, before, after: shown.append(x_adv),
        )  # fmt: skip
        return shown

    first, second, other = seen(0), seen(0), seen(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=False))


def test_what_the_agent_sees_is_fgsm_against_its_own_choice(agent: nn.Module) -> None:
    noisy = with_sap(agent, 100)
    steps: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
    play(noisy, "Bowling", 2, 4, 3, gradient_passes=5, seed=7, rules=SHORT, watch=lambda *step: steps.append(step))
    number, x, x_adv, before, after = steps[11]
    now, ids = stream(7, f"step {number}"), torch.arange(2)
    assert torch.equal(before, values(noisy, x, 3, stream(now, "label"), ids))
    assert torch.equal(x_adv, fgsm(noisy, x, before.argmax(1), 4, 5, now, ids))
    assert torch.equal(after, values(noisy, x_adv, 3, stream(now, "evaluation"), ids))
    change = (x_adv - x.float()).abs()
    assert float(change.max()) <= 4
    assert float((change > 0).float().mean()) > 0.2
    assert float(x_adv.min()) >= 0


def test_the_agent_does_what_it_values_most_where_it_thinks_it_is(
    agent: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[np.ndarray] = []

    def watched(*arguments: Any) -> Any:
        env = make(*arguments)
        step = env.step

        def remember(actions: np.ndarray) -> Any:
            done.append(actions.copy())
            return step(actions)

        env.step = remember
        return env

    monkeypatch.setattr("sapcore.rl.playing.make", watched)
    wanted: list[np.ndarray] = []
    greedy = dataclasses.replace(SHORT, evaluation_epsilon=0)
    play(agent, "Bowling", 2, 8, rules=greedy, watch=lambda *step: wanted.append(step[4].argmax(1).numpy()))
    both = [np.array_equal(a, b) for a, b in zip(done, wanted, strict=True) if len(b) == 2]
    assert len(both) >= 30
    assert all(both)


class Scripted:
    """Three episodes: one is over after 2 steps, one cut off after 5, one over after 3. What follows is another's."""

    single_action_space = types.SimpleNamespace(n=6)
    observation = np.full((3, 4, 84, 84), 100, np.uint8)

    def reset(self, seed: object) -> tuple[np.ndarray, dict[str, Any]]:
        self.step_number = 0
        return self.observation, {}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        self.step_number += 1
        ended, cut = self.step_number == np.array([2, 5, 3]), np.array([False, True, False])
        return self.observation, self.step_number * np.array([10.0, -3.0, 1.0]), ended & ~cut, ended & cut, {}

    def close(self) -> None:
        pass


def test_a_return_is_the_games_own_score_up_to_the_end_of_its_episode(
    agent: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an episode keeps its name, and so its noise, when others have ended."""
    monkeypatch.setattr("sapcore.rl.playing.make", lambda *_: Scripted())
    noisy, asked = with_sap(agent, 100), list[list[int]]()
    noisy.register_forward_pre_hook(lambda _model, _x, names: asked.append(names["ids"].tolist()), with_kwargs=True)
    for player in (None, noisy):
        found = play(player, "Bowling", 3, passes=1)
        assert (found.returns, found.steps) == ([30.0, -45.0, 6.0], 10)
    assert asked == [[0, 1, 2], [0, 1, 2], [1, 2], [1], [1]]


def test_now_and_then_every_player_does_the_same_at_random() -> None:
    agent, short = untrained(7), Rules(frames_per_episode=1600)
    chance = play(None, "Assault", 4, rules=short)
    assert play(agent, "Assault", 4, rules=dataclasses.replace(short, evaluation_epsilon=1)) == chance
    greedy = play(agent, "Assault", 4, rules=dataclasses.replace(short, evaluation_epsilon=0))
    assert greedy not in (chance, play(agent, "Assault", 4, rules=short))


def test_the_gradient_may_be_another_agents(agent: nn.Module) -> None:
    other = untrained(6, seed=1)
    steps: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
    play(agent, "Bowling", 1, 4, source=other, rules=SHORT, watch=lambda *step: steps.append(step))
    number, x, x_adv, _, _ = steps[5]
    expected = fgsm(other, x, other(x.float()).argmax(1), 4, 10, stream(0, f"step {number}"), torch.arange(1))
    assert torch.equal(x_adv, expected)


def test_the_random_policy_needs_no_agent() -> None:
    first, second = (play(None, "Assault", 4, rules=Rules(frames_per_episode=1600)) for _ in range(2))
    assert first == second
    assert max(first.returns) > 0


def test_values_are_the_mean_of_the_passes(agent: nn.Module) -> None:
    noisy = with_sap(agent, 50)
    x = torch.randint(0, 256, (3, 4, 84, 84), generator=torch.Generator().manual_seed(0))
    each = torch.stack([noisy(x.float(), seed=5, passes=number).double() for number in range(4)])
    torch.testing.assert_close(values(noisy, x, 4, 5), each.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values(agent, x), agent(x.float()).double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"game": "Pong"}, "game is 'Pong', but must be one of Assault, "),
        ({"episodes": 0}, "episodes is 0, but must be a whole number of 1 or more"),
        ({"eps": -1}, "eps is -1, but must be a number of 0 or more"),
        ({"passes": 0}, "passes is 0, but must be a whole number of 1 or more"),
        ({"agent": None, "eps": 4}, "a random policy .agent None. sees nothing: it has no eps but 0, no source and no"),
        ({"game": "Asterix"}, "the agent knows 6 actions, but Asterix has 9: it is another game's"),
        (
            {"source": untrained(7), "eps": 1},
            "the agent knows 7 actions, but Bowling has 6: it is another game's",
        ),
    ],
)
def test_senseless_arguments_are_one_sentence(agent: nn.Module, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SapcoreError, match=f"^{message}"):
        play(**({"agent": agent, "game": "Bowling", "rules": SHORT} | arguments))  # type: ignore[arg-type]


def test_moments_are_the_first_steps_of_an_episode(agent: nn.Module) -> None:
    found = moments(agent, "Bowling", 12, eps=2, passes=2)
    assert [moment.step for moment in found] == list(range(12))
    assert all(moment.seen.shape == moment.shown.shape == (4, 84, 84) for moment in found)
    assert max(float((moment.shown - moment.seen.float()).abs().max()) for moment in found) == 2
    short = moments(agent, "Bowling", 500, rules=SHORT)
    assert 30 <= len(short) <= 160, "the episode ends before"
    with pytest.raises(SapcoreError, match=r"^a random policy"):
        moments(None, "Bowling", 3)  # type: ignore[arg-type]


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    """95 % of 300 normal samples of 30, give or take what chance and the percentile method allow."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        low, high = interval_of_mean(rng.normal(3, 1, 30).tolist())
        assert low is not None
        assert high is not None
        covered += low <= 3 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_one_return_has_no_interval() -> None:
    assert interval_of_mean([3.0]) == (None, None)
    assert np.isnan(relative_change([1.0], [2.0])[1:]).all()


def test_a_relative_change_is_of_the_means_with_an_interval_round_it() -> None:
    change, low, high = relative_change([4.0, 6.0, 5.0, 5.0], [2.0, 3.0, 2.0, 3.0])
    assert change == pytest.approx(1.0)
    assert low < 1 < high
    assert relative_change([-1.0, -1.0], [-2.0, -2.0])[0] == pytest.approx(0.5)


@pytest.mark.filterwarnings("error")
def test_a_change_from_nothing_is_infinite_and_one_from_nearly_nothing_has_an_interval() -> None:
    assert relative_change([3.0, 5.0], [0.0, 0.0]) == (np.inf, np.inf, np.inf)
    nothing, *ends = relative_change([0.0, 0.0], [0.0, 0.0])
    assert np.isnan(nothing)
    assert ends == [0, 0]
    change, low, high = relative_change([50.0] * 29 + [40.0], [0.0] * 28 + [10.0, 20.0])
    assert change == pytest.approx(48.67, abs=0.01)
    assert 10 < low < change < high
    assert high == np.inf


def test_where_nearly_all_get_nothing_one_lucky_episode_is_no_clear_change() -> None:
    assert relative_change([0.0] * 14 + [1.0], [0.0] * 30) == (np.inf, 0, np.inf)
    assert relative_change([0.0] * 15, [0.0] * 29 + [10.0])[::2] == (-1, 0)
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(200):
        few, many = (10.0 * (rng.random(n) < 0.05) for n in (15, 30))
        _, low, high = relative_change(few.tolist(), many.tolist())
        false += low > 0 or high < 0
    assert false / 200 <= 0.06, "both have the same law"


def test_the_interval_of_a_change_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        _, low, high = relative_change(rng.normal(6, 2, 30).tolist(), rng.normal(4, 1, 30).tolist())
        covered += low <= 0.5 <= high
    assert 0.89 <= covered / 200 <= 0.99
