"""Playing a game, undisturbed or under attack: each observation is perturbed before the agent sees it (Sec. 4.2)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sapcore import attacks, evaluation
from sapcore.errors import SapcoreError, check_count
from sapcore.randomness import stream
from sapcore.rl.environments import Rules, make

Watcher = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""Is told of each step: its number, the observations as they are and as the agent sees them, the values of both."""


@dataclasses.dataclass(frozen=True)
class Episodes:
    """What became of some episodes."""

    returns: list[float]
    """The game's own score of each."""
    steps: int
    """Agent steps of all of them."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))


def play(
    agent: nn.Module | None,
    game: str,
    episodes: int = 30,
    eps: float = 0,
    passes: int = 30,
    source: nn.Module | None = None,
    gradient_passes: int = 100,
    seed: int = 0,
    rules: Rules | None = None,
    estimator: str = "mean_of_gradients",
    precision: str = "float32",
    watch: Watcher | None = None,
) -> Episodes:
    """Play `episodes` episodes side by side, each to its own end; `agent` None plays at random.

    The action is that of the largest mean value over `passes` fresh passes, or now and then a random one
    (`rules.evaluation_epsilon`), the same for every player of as many episodes. With eps > 0 the agent sees each
    observation after FGSM in 0-255 along the gradient of `source` (the agent itself, if none is given): the loss is
    the cross-entropy of the softmax over the values against the source's own greedy action (Huang et al. 2017), the
    gradient is over `gradient_passes` passes. Games, actions and noise follow from the seed, so that on a CPU the
    same call gives the same returns.
    Raises `SapcoreError` for senseless arguments, and for an agent or a source of another game's actions.
    """
    eps = attacks.steps.check_eps(eps)
    check_count("episodes", episodes)
    if agent is None and (eps or watch or source):
        raise SapcoreError("a random policy (agent None) sees nothing: it has no eps but 0, no source and no watch")
    rules = rules or Rules()
    env = make(game, episodes, rules)
    count = int(env.single_action_space.n)
    first_seed = stream(seed, f"games of {game}") % 2**30
    seen, _ = env.reset(seed=np.arange(first_seed, first_seed + episodes))
    returns, playing = np.zeros(episodes), np.arange(episodes)
    step = steps = 0
    source = source or agent
    while len(playing):
        actions, explored = _at_random(seed, step, episodes, count, rules.evaluation_epsilon)
        if agent is not None:
            assert source is not None
            x, ids, now = torch.from_numpy(seen[playing]), torch.from_numpy(playing), stream(seed, f"step {step}")
            shown, before = x.float(), None
            if eps or watch:
                before = _of_actions(count, game, values(source, shown, passes, stream(now, "label"), ids, precision))
            if eps:
                assert before is not None
                shown = attacks.fgsm(
                    source, shown, before.argmax(1), eps, gradient_passes, now, ids, estimator, precision=precision
                )
            after = _of_actions(count, game, values(agent, shown, passes, stream(now, "evaluation"), ids, precision))
            actions[playing] = np.where(explored[playing], actions[playing], after.argmax(1).numpy())
            if watch:
                assert before is not None
                watch(step, x, shown, before, after)
        seen, rewards, terminated, truncated, _ = env.step(actions)
        returns[playing] += rewards[playing]
        step, steps = step + 1, steps + len(playing)
        playing = playing[~(terminated | truncated)[playing]]
    env.close()
    return Episodes(returns.tolist(), steps)


def _of_actions(count: int, game: str, found: Tensor) -> Tensor:
    """The values as they are; the emulator waits for ever for an action that it does not have."""
    if found.shape[1] != count:
        raise SapcoreError(f"the agent knows {found.shape[1]} actions, but {game} has {count}: it is another game's")
    return found


class Moment(NamedTuple):
    """One step of an episode: uint8 (4, 84, 84) as it is, float32 as the agent sees it, and the values (actions,) of
    the attacked network for the first and of the agent for the second."""

    step: int
    seen: Tensor
    shown: Tensor
    before: Tensor
    after: Tensor


def moments(agent: nn.Module, game: str, steps: int, **arguments: Any) -> list[Moment]:
    """The first `steps` steps of one episode, or fewer where it ends before; `arguments` as in `play`."""
    found: list[Moment] = []

    def keep(step: int, *seen: Tensor) -> None:
        if step < steps:
            found.append(Moment(step, *(t[0].clone() for t in seen)))

    rules = arguments.pop("rules", None) or Rules()
    frames = min(rules.frames_per_episode, rules.frameskip * (steps + rules.noops))
    short = dataclasses.replace(rules, frames_per_episode=frames)
    play(agent, game, 1, rules=short, watch=keep, **arguments)
    return found


def _at_random(
    seed: int, step: int, episodes: int, actions: int, share: float
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """A random action for each episode, and whether it is to be taken."""
    generator = np.random.default_rng([stream(seed, "random policy"), step])
    return generator.integers(0, actions, episodes), generator.random(episodes) < share


@torch.no_grad()
def values(
    agent: nn.Module, x: Tensor, passes: int = 30, seed: int = 0, ids: Tensor | None = None, precision: str = "float32"
) -> Tensor:
    """The mean value of each action over `passes` fresh passes, float64 (N, actions); one pass of a plain network.

    x: (N, 4, 84, 84) in 0-255; ids: int64 (N,), names of the episodes, default 0..N-1.
    """
    evaluation.check_network(agent)
    count = evaluation.count_passes(agent, passes)
    found = []
    for rows, names in evaluation.batches(len(x), ids, evaluation.BATCH_SIZE):
        begun = evaluation.begin(agent, evaluation.as_pixels(x[rows], evaluation.device_of(agent)), precision)
        passed = evaluation.noisy_passes(agent, begun, names, seed, range(passes), evaluation.BATCH_SIZE, precision)
        found.append((torch.stack([out.double().sum(0) for _, out in passed]).sum(0) / count).cpu())
    return torch.cat(found)


RESAMPLES = 10_000


def interval_of_mean(returns: list[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % bootstrap interval of the mean (percentiles of 10,000 resamples); none of a single return."""
    if len(returns) < 2:
        return None, None
    low, high = np.quantile(_resampled_means(returns, 0), (0.025, 0.975))
    return float(low), float(high)


def relative_change(returns: list[float], of: list[float]) -> tuple[float, float, float]:
    """The change of the mean return as a fraction of the mean of `of`, with its 95 % bootstrap interval.

    From a mean of 0 any gain is infinite, and 0 to 0 is nan; so is the interval of a single return. A resample of 0 to
    0 is no change, so that the interval leaves 0 out where that of the difference does. Its ends are resamples, not
    between two, so that an infinite one does not spoil its neighbour.
    """
    change = float(_change(np.mean(returns), np.mean(of)))
    if len(returns) < 2 or len(of) < 2:
        return change, float("nan"), float("nan")
    changes = _change(_resampled_means(returns, 0), _resampled_means(of, 1))
    changes = np.sort(np.where(np.isnan(changes), 0, changes))
    last = len(changes) - 1
    return change, float(changes[int(0.025 * last)]), float(changes[math.ceil(0.975 * last)])


def in_percent(change: float, low: float, high: float) -> str:
    """What `relative_change` found, in words: `+12.0 [-3.0, +30.0]`; `from 0` or `0 to 0` where that is no number."""
    if not np.isfinite(change):
        return "0 to 0" if np.isnan(change) else "from 0"
    return f"{100 * change:+.1f}" + ("" if np.isnan(low) else f" [{100 * low:+.1f}, {100 * high:+.1f}]")


def _change(a: Any, b: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(np.subtract(a, b), np.abs(b))


def _resampled_means(returns: list[float], seed: int) -> NDArray[np.float64]:
    drawn = np.random.default_rng(seed).integers(0, len(returns), (RESAMPLES, len(returns)))
    return np.asarray(np.array(returns)[drawn].mean(axis=1))
