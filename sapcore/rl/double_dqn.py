"""Double DQN (van Hasselt et al. 2016) as the paper's appendix A has it, on several games of a kind at once.

All randomness of a step comes from (seed, step). The replay lies in files of its own, and the rest of the state is
written every `SAVED` steps, so that a killed training goes on from there with all it has seen; only the games that
were being played begin anew, as ALE's vectorised games cannot be stored.
"""

import copy
import dataclasses
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from sapcore import checkpoints, provenance
from sapcore.bfloat16 import arithmetic
from sapcore.errors import SapcoreError, check_count
from sapcore.models import QNetwork, initialize
from sapcore.paths import STATE
from sapcore.rl.environments import GAMES, Rules, make
from sapcore.rl.replay import Replay
from sapcore.rl.rmsprop import RMSProp

SAVED = 20_000
"""Agent steps between two saves."""
ROWS = 10_000
"""Agent steps per point of the learning curve."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an agent learns; written into its model card. Steps are agent steps of all games together."""

    game: str
    steps: int = 1_000_000
    games: int = 16
    """Played at once."""
    minibatch: int = 64
    """Not larger: the gradient is a sum, so that a larger minibatch takes larger steps."""
    samples_per_step: int = 8
    """Transitions learnt from per step played, as with minibatches of 32 after every fourth step."""
    replay: int = 1_000_000
    learning_starts: int = 50_000
    """Steps played at random before."""
    target_update: int = 2_500
    """Steps between copies; the paper's 10,000, shortened like `epsilon_steps`: each copy lets rewards spread by about
    one step further back, and a million steps would see a hundred copies."""
    discount: float = 0.99
    epsilon: float = 0.1
    """The share of random actions at the end."""
    epsilon_steps: int = 250_000
    """Steps, counted from the start, on which it falls from 1."""
    learning_rate: float = 2.5e-4
    """Of centered RMSProp on the gradient's sum over a minibatch, as Mnih et al. (2015) have it."""
    gamma1: float = 0.95
    """The decay of the gradient's average."""
    gamma2: float = 0.95
    """The decay of the average of its square."""
    rmsprop_epsilon: float = 0.01
    seed: int = 0
    rules: Rules = dataclasses.field(default_factory=Rules)

    def __post_init__(self) -> None:
        for name in ("steps", "games", "minibatch", "samples_per_step", "replay", "target_update", "epsilon_steps"):
            check_count(name, getattr(self, name))
        if not 0 <= self.learning_starts < self.steps:
            raise SapcoreError(
                f"learning_starts is {self.learning_starts!r}, but must be a whole number from 0 to steps - 1 = "
                f"{self.steps - 1}, or nothing is learnt"
            )

    def epsilon_at(self, step: int) -> float:
        """The share of random actions: all of them before anything is learnt."""
        if step < self.learning_starts:
            return 1.0
        return 1 - (1 - self.epsilon) * min(1.0, step / self.epsilon_steps)


RECIPES = {f"double-dqn-{game}": Recipe(game) for game in GAMES}
RECIPES["double-dqn-Bowling"] = Recipe("Bowling", rules=Rules(clipped_rewards=False))
"""By their signs ten pins would be worth no more than one."""


def train(
    name: str,
    recipe: Recipe | None = None,
    device: str | None = None,
    state_folder: Path = STATE,
    progress: bool = True,
) -> nn.Module:
    """Train the agent called `name`, or go on with it, and commit it in half precision to `data/checkpoints/`.

    Raises `SapcoreError` for a name without a recipe, for a state that another recipe left behind, and while another
    process trains it.
    """
    if recipe is None:
        if name not in RECIPES:
            raise SapcoreError(f"no recipe is named {name!r}; there are {', '.join(RECIPES)}")
        recipe = RECIPES[name]
    with checkpoints.alone(name, state_folder):
        run = _Run(name, recipe, provenance.device(device), state_folder)
        bar = tqdm(total=recipe.steps, initial=run.step, desc=name, unit="step", disable=not progress)
        with bar:
            while run.step < recipe.steps:
                before = run.step
                run.advance()
                bar.update(run.step - before)
                if run.history and run.step % ROWS < recipe.games:
                    row = run.history[-1]
                    bar.set_postfix(epsilon=f"{row['epsilon']:.2f}", mean_return=row["mean_return"])
        return run.finish()


class _Run:
    """The state of a training: networks, optimizer, replay, steps, learning curve; and the games being played."""

    def __init__(self, name: str, recipe: Recipe, device: torch.device, folder: Path) -> None:
        self.name, self.recipe, self.device = name, recipe, device
        self.folder = folder / name
        self.path = self.folder / "state.safetensors"
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.origins: list[dict[str, object]] = []
        self.env = make(recipe.game, recipe.games, recipe.rules)
        self.actions = int(self.env.single_action_space.n)
        with torch.random.fork_rng():
            self.online = QNetwork(self.actions)
        # With weights up to 1 / sqrt(fan-in), as Mnih et al. have them, gradients are small against rmsprop_epsilon.
        initialize(self.online, torch.Generator().manual_seed(recipe.seed))
        self.online.to(device)
        self.rounded = copy.deepcopy(self.online).bfloat16()  # plays and learns; `online` keeps what rounding loses
        self.rounded.head = copy.deepcopy(self.online.head)  # in float32
        self.target = copy.deepcopy(self.rounded).requires_grad_(False)
        self.optimizer = RMSProp(
            self.online.parameters(), recipe.learning_rate, recipe.gamma1, recipe.gamma2, recipe.rmsprop_epsilon,
            copies=self.rounded.parameters(),
        )  # fmt: skip
        self._pool = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None
        self.replay = self._resumed() if self.path.exists() else self._replay()
        origin = provenance.collect(device, ("ale-py",))
        if origin not in self.origins:
            self.origins.append(origin)
        self._begin_games()
        self._clear_row()

    def _begin_games(self) -> None:
        games = self.recipe.games
        first_seed = (self.recipe.seed * 1_000_003 + self.step) % 2**30
        self.seen, info = self.env.reset(seed=first_seed)
        self.lives = info["lives"].copy()
        self.first = np.ones(games, dtype=bool)
        self.ended = np.zeros(games, dtype=bool)
        self.returns = np.zeros(games)

    def _replay(self, written: int | None = None) -> Replay:
        recipe = self.recipe
        newer = 2 * SAVED // recipe.games if written else 0  # at most: a save may still be under way at the next
        return Replay(recipe.replay, recipe.games, recipe.rules.side, recipe.rules.stack, self.folder, written, newer)

    def _clear_row(self) -> None:
        self.finished: list[float] = []
        self.losses: list[Tensor] = []
        self.values: list[Tensor] = []
        self.started, self.started_at = time.perf_counter(), self.step

    def advance(self) -> None:
        """One step of all games and, once enough is seen, a minibatch for as many samples as are due."""
        recipe = self.recipe
        generator = np.random.default_rng([recipe.seed, self.step])
        actions = self._act(generator)
        seen, rewards, terminated, truncated, info = self.env.step(actions)
        # The step after an end only begins the next episode.
        final = terminated
        if recipe.rules.life_ends_return:
            final = terminated | ((info["lives"] < self.lives) & ~self.ended)
        seen_rewards = np.sign(rewards) if recipe.rules.clipped_rewards else rewards
        self.replay.add(self.seen[:, -1], self.first, actions, seen_rewards, final, ~self.ended)
        self.returns += rewards
        ends = terminated | truncated
        self.finished += self.returns[ends].tolist()
        self.returns[ends] = 0
        self.seen, self.first, self.ended, self.lives = seen, self.ended, ends, info["lives"].copy()
        due_before = self._due(self.step)
        self.step += recipe.games
        for _ in range((self._due(self.step) - due_before) * self.replay.is_open):
            self._learn(generator)
        if self.step // recipe.target_update > (self.step - recipe.games) // recipe.target_update:
            self.target.load_state_dict(self.rounded.state_dict())
        if self.step // ROWS > (self.step - recipe.games) // ROWS or self.step >= recipe.steps:
            self._end_row()
        if self.step // SAVED > (self.step - recipe.games) // SAVED:
            self._save()

    def _due(self, step: int) -> int:
        """Minibatches that should have been learnt from by a step."""
        return max(0, step - self.recipe.learning_starts) * self.recipe.samples_per_step // self.recipe.minibatch

    def _act(self, generator: np.random.Generator) -> NDArray[Any]:
        """Greedy actions, some of them replaced by random ones."""
        games = self.recipe.games
        at_random = generator.random(games) < self.recipe.epsilon_at(self.step)
        actions: NDArray[Any] = generator.integers(0, self.actions, games)
        if not at_random.all():
            seen = torch.from_numpy(self.seen).to(self.device)
            with torch.no_grad(), arithmetic(self.device):
                values = self.rounded(seen.to(torch.bfloat16, memory_format=torch.channels_last))
            greedy = values.argmax(1).cpu().numpy()
            actions = np.where(at_random, actions, greedy)
        return actions

    def _learn(self, generator: np.random.Generator) -> None:
        """A step down the clipped error against r + discount Q_target(s', argmax Q_online(s'))."""
        recipe = self.recipe
        batch = self.replay.sample(recipe.minibatch, generator)
        states, actions, rewards, next_states, terminals = (t.to(self.device, non_blocking=True) for t in batch)
        with arithmetic(self.device):
            values = self.rounded.scaled(states).gather(1, actions[:, None])[:, 0]
        with torch.no_grad(), arithmetic(self.device):
            best = self.rounded.scaled(next_states).argmax(1, keepdim=True)
            follows = self.target.scaled(next_states).gather(1, best)[:, 0]
            goal = rewards + recipe.discount * follows * ~terminals
        loss = F.huber_loss(values, goal, reduction="sum")
        for parameter in self.rounded.parameters():
            parameter.grad = None
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach() / recipe.minibatch)
        self.values.append(values.detach().mean())

    def _end_row(self) -> None:
        passed = time.perf_counter() - self.started
        mean = lambda found: round(float(torch.stack(found).mean()), 5) if found else None  # noqa: E731
        self.history.append({
            "step": self.step,
            "epsilon": round(self.recipe.epsilon_at(self.step - self.recipe.games), 4),
            "episodes": len(self.finished),
            "mean_return": round(float(np.mean(self.finished)), 2) if self.finished else None,
            "loss": mean(self.losses),
            "value": mean(self.values),
            "steps_per_second": round((self.step - self.started_at) / passed, 1),
            "seconds": round(passed, 1),
        })  # fmt: skip
        self._clear_row()

    def _tensors(self) -> dict[str, Tensor]:
        parts = {"online": self.online.state_dict(), "target": self.target.state_dict()}
        parts["optimizer"] = self.optimizer.state()
        return {f"{part}.{k}": v.cpu().clone().contiguous() for part, kept in parts.items() for k, v in kept.items()}

    def _save(self) -> None:
        """Write the state from a thread of its own, while the games go on."""
        state = {
            "step": self.step, "written": self.replay.written, "history": list(self.history), "origins": self.origins,
        }  # fmt: skip
        tensors = self._tensors()
        self._saved()
        self._saving = self._pool.submit(checkpoints.write_state, self.path, tensors, self.recipe, state)

    def _saved(self) -> None:
        """Wait for the last save; raises `SapcoreError` if it failed."""
        if self._saving is None:
            return
        with checkpoints.writing(self.path):
            self._saving.result()

    def _resumed(self) -> Replay:
        """Take over what is saved; its replay."""
        tensors, state = checkpoints.read_state(self.path, self.recipe, self.folder)
        replay = self._replay(state["written"])
        self.step, self.history, self.origins = state["step"], state["history"], state["origins"]
        part = lambda name: {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}  # noqa: E731
        self.online.load_state_dict(part("online."))
        self.rounded.load_state_dict(self.online.state_dict())
        self.target.load_state_dict(part("target."))
        self.optimizer.load(part("optimizer."))
        return replay

    def finish(self) -> nn.Module:
        """Write the checkpoint with its model card and remove the half-finished state."""
        self._saved()
        agent = copy.deepcopy(self.online).cpu().half()
        late = [row for row in self.history if row["step"] > 0.9 * self.recipe.steps and row["episodes"]]
        played = sum(row["episodes"] for row in late)
        card = {
            "architecture": "QNetwork",
            "actions": self.actions,
            "recipe": dataclasses.asdict(self.recipe),
            "mean_return_at_the_end": (
                round(sum(row["mean_return"] * row["episodes"] for row in late) / played, 2) if played else None
            ),
            "training_precision": "bfloat16; weights and averages of gradients are kept in float32",
            "seconds": round(sum(row["seconds"] for row in self.history), 1),
            "provenance": self.origins,
            "history": self.history,
        }
        checkpoints.save(agent, self.name, card)
        self.env.close()
        self.path.unlink(missing_ok=True)  # first: without it the rest is no training that could go on
        shutil.rmtree(self.folder, ignore_errors=True)
        return checkpoints.load(self.name)
