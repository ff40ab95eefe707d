"""The six games of Table 1, through the Arcade Learning Environment's own vectorised preprocessing."""

import dataclasses
from typing import Any

from sapcore.errors import SapcoreError, check_count

GAMES = ("Assault", "Asterix", "BankHeist", "BattleZone", "BeamRider", "Bowling")


@dataclasses.dataclass(frozen=True)
class Rules:
    """How the games are played, in learning and in evaluation. One agent step is `frameskip` frames."""

    sticky_actions: float = 0.25
    """The probability that the emulator repeats the action before instead (Machado et al. 2018)."""
    frameskip: int = 4
    max_over_frames: bool = True
    """Each pixel is the larger one of the last two frames, because some sprites flicker."""
    side: int = 84
    """Grey pixels per side of an observation."""
    stack: int = 4
    """Observations that the agent sees at once; those before the start of an episode are 0."""
    noops: int = 30
    """An episode begins with fewer than so many frames without an action, drawn from its seed."""
    fire_at_start: bool = True
    """Before these frames, in the games that have it."""
    frames_per_episode: int = 18_000
    """Five minutes (Mnih et al. 2015); then the episode is cut off."""
    all_actions: bool = False
    """False: the actions that the game distinguishes, 6 to 18."""
    evaluation_epsilon: float = 0.05
    """The share of random actions of every player in evaluation (Mnih et al. 2015), so that none is caught in a loop
    that the noise of another would break."""
    clipped_rewards: bool = True
    """In learning alone: of each reward the agent sees its sign (Mnih et al. 2015)."""
    life_ends_return: bool = True
    """In learning alone: nothing is expected after the loss of a life, though the game goes on (Mnih et al. 2015)."""

    def __post_init__(self) -> None:
        for name in ("sticky_actions", "evaluation_epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise SapcoreError(f"{name} is {getattr(self, name)!r}, but must be a number from 0 to 1")
        if self.noops < 0:
            raise SapcoreError(f"noops is {self.noops!r}, but must be a whole number of 0 or more")
        for name in ("frameskip", "frames_per_episode"):
            check_count(name, getattr(self, name))
        if (self.side, self.stack) != (84, 4):
            raise SapcoreError(
                f"side and stack are {self.side!r} and {self.stack!r}, but must be 84 and 4, which the network takes"
            )


def make(game: str, count: int, rules: Rules | None = None) -> Any:
    """`count` games side by side, a `gymnasium.vector.VectorEnv`; observations are uint8 (count, 4, 84, 84).

    A game that has ended begins anew with the next step, which ignores its action. Rewards are the game's own.
    Raises `SapcoreError` for an unknown game, and without gymnasium and ALE.
    """
    rules = rules or Rules()
    check_game(game)
    check_count("count", count)
    return _gymnasium().make_vec(
        f"ALE/{game}-v5",
        num_envs=count,
        vectorization_mode="vector_entry_point",
        repeat_action_probability=rules.sticky_actions,
        frameskip=rules.frameskip,
        maxpool=rules.max_over_frames,
        img_height=rules.side,
        img_width=rules.side,
        stack_num=rules.stack,
        noop_max=rules.noops,
        use_fire_reset=rules.fire_at_start,
        max_num_frames_per_episode=rules.frames_per_episode,
        full_action_space=rules.all_actions,
        episodic_life=False,
        reward_clipping=False,
    )


def _gymnasium() -> Any:
    """The package, with ALE's games in its register."""
    try:
        import ale_py
        import gymnasium
    except ImportError:
        raise SapcoreError(
            "Atari needs gymnasium and ALE: install them with `pip install -e '.[rl]'` in the checkout"
        ) from None
    gymnasium.register_envs(ale_py)
    return gymnasium


def action_names(game: str) -> list[str]:
    """What the actions do, in their order, such as UPRIGHT."""
    env = _gymnasium().make(f"ALE/{check_game(game)}-v5")
    names: list[str] = env.unwrapped.get_action_meanings()
    env.close()
    return names


def check_game(game: str) -> str:
    """The game's name; raises `SapcoreError` if it is none of the six."""
    if game not in GAMES:
        raise SapcoreError(f"game is {game!r}, but must be one of {', '.join(GAMES)}")
    return game
