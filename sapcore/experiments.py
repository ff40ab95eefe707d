"""The list of cells per figure of the paper, and the tidy frame of a figure's numbers."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd

from sapcore import checkpoints, data, results, runner
from sapcore.attacks.steps import check_eps
from sapcore.bfloat16 import PRECISIONS
from sapcore.errors import SapcoreError, is_number
from sapcore.randomness import split_seed
from sapcore.results import Attack, Cell, Defence
from sapcore.rl.environments import GAMES, Rules, check_game
from sapcore.training import CONTROL, DROPOUT_RATES

EPS = (0, 1, 2, 4, 8, 16, 32, 64)
"""The paper's perturbations, in pixel units."""
EPS_ITERATIVE = (0, 1, 2, 4, 8, 16)
"""The paper's 0 to 4, and on."""
EPS_CALIBRATION = EPS[:-1]
EPS_GAMES = (0, 1, 2, 4, 8)
EPS_PRECISION = (0, 1, 2, 4)
PERCENTS = (5, 10, 25, 50, 100, 200)
STEPS = (1, 3, 10, 30, 100)
MC_SAMPLES = {"cifar10": (1, 10, 100, 1000), "digits": (1, 10, 100)}
"""Passes per gradient in Fig. 6."""
SIZES = {"cifar10": (1000, 100), "digits": (100, 10)}
"""Images and passes of a noisy cell; deterministic networks, SAP-100 in Fig. 1b and all in Fig. 3 and 4 are run on the
whole test set."""
ALL_IMAGES = {"cifar10": 10_000, "digits": 500}
EPS_ATHALYE = round(0.031 * 255, 3)
"""Where "Obfuscated Gradients" attacked SAP."""
EPS_LADDER = {"cifar10": (1, 2, 4, EPS_ATHALYE, 8), "digits": (8, 32)}
EPS_STEPS: dict[str, tuple[float, ...]] = {"cifar10": (1, 2, 4), "digits": (32,)}
"""Where the checks of the ladder take ever more steps."""
EPS_UNDER_SAP: dict[str, tuple[float, ...]] = {"cifar10": (1, 2, 4, EPS_ATHALYE), "digits": (32,)}
"""Where SAP-100 with statistics of its own passes is attacked."""
REACH = 2.5
"""How far PGD's steps of one direction go together, in λ."""
EPS_UNBOUNDED = 255
"""An image within this reach of any other."""
EPISODES, EPISODES_NOISY_ATTACKED = 30, 15
"""Episodes of a cell of Table 1; each observation of those where SAP-100 is attacked costs over a hundred passes."""
GAME_PASSES, GAME_GRADIENT_PASSES = 30, 100
"""Passes of a noisy agent per observation, of the values and of the gradient: the latter as on images (Sec. 4.4)."""
DENSE = Defence()
SAP_100 = Defence("sap", 100)
BERNOULLI_SAP = Defence("bernoulli-sap", 200)
TEST_RATES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.4)
"""Rates of dropout on the pretrained network (Fig. 2a)."""
LEVELS: dict[str, tuple[float, ...]] = {
    "rnw": (0.02, 0.05, 0.07, 0.1),
    "rsw": (0.2, 0.4, 0.5, 0.8),
    "dwp": (80, 60, 50, 40, 35, 25),
    "swp": (400, 200, 100, 50),
    "rna": (0.1, 0.2, 0.3, 0.7),
    "rsa": (0.05, 0.1, 0.2, 0.4, 0.8),
}
"""Fig. 5: from "like dense" to a quarter of the images or less at eps 0; the paper's own levels are not known."""


class Point(NamedTuple):
    """A point of a figure: its cell, and the curve and the panel on which it lies."""

    cell: Cell
    series: str
    panel: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The parameters of a chapter, checked. None stands for the default of the data set or figure."""

    dataset: str = "cifar10"
    eps: tuple[float, ...] | None = None
    examples: int | None = None
    passes: int | None = None
    seed: int = 0
    step: float = 1
    steps: int = 10
    game: str | None = None
    episodes: int | None = None

    @property
    def default(self) -> bool:
        """Whether these are the settings of the printed book."""
        return self == Settings()


def settings(
    dataset: str = "cifar10",
    eps: Any = None,
    examples: int | None = None,
    passes: int | None = None,
    seed: int = 0,
    step: float = 1,
    steps: int = 10,
    game: str | None = None,
    episodes: int | None = None,
) -> Settings:
    """Check a chapter's parameters; what makes no sense raises `SapcoreError` with one sentence.

    eps: one number or a list, in pixel units; examples: how many test images; passes: Monte Carlo passes
    of the output, and of FGSM's gradient except in Fig. 6; a tenth of it per step of the iterative attack;
    game, episodes: of Table 1, which has no data set and no examples.
    """
    if dataset not in data.DATASETS:
        raise SapcoreError(f"dataset is {dataset!r}, but must be one of {', '.join(data.DATASETS)}")
    values = None
    if eps is not None:
        listed = list(eps) if isinstance(eps, list | tuple) else [eps]
        if not listed:
            raise SapcoreError("eps is an empty list, but must hold one number or more, in pixel units (0-255)")
        values = tuple(sorted({int(e) if e == int(e) else e for e in map(check_eps, listed)}))
    most = ALL_IMAGES[dataset]
    counts: dict[str, tuple[Any, float]] = {
        "examples": (examples, most), "passes": (passes, math.inf), "steps": (steps, math.inf),
        "episodes": (episodes, math.inf),
    }  # fmt: skip
    for name, (number, limit) in counts.items():
        if number is None and name != "steps":
            continue
        whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)
        if not whole or not 1 <= number <= limit:
            upto = f"to {limit}" if limit < math.inf else "on"
            raise SapcoreError(f"{name} is {number!r}, but must be a whole number from 1 {upto}")
    if not is_number(step) or not 0 < step < math.inf:
        raise SapcoreError(f"step is {step!r}, but must be a positive number, in pixel units")
    split_seed(seed)
    if game is not None:
        check_game(game)
    examples, passes, episodes = (None if n is None else int(n) for n in (examples, passes, episodes))
    step = int(step) if step == int(step) else float(step)  # numpy's numbers have no JSON
    return Settings(dataset, values, examples, passes, int(seed), step, int(steps), game, episodes)


def _cell(s: Settings, defence: Defence, attack: Attack, trained: str = "", whole: bool = False) -> Cell:
    """A cell; without a perturbation every attack is the same as none, and is stored once.

    trained: what distinguishes the network from the dense one, such as "adv"; while that is not trained the cell is
    without a checkpoint. whole: on all test images.
    """
    checkpoint = f"resnet20-{s.dataset}" + (f"-{trained}" if trained else "")
    lacking = trained and checkpoint not in checkpoints.names()
    images, passes = SIZES[s.dataset]
    return Cell(
        dataset=s.dataset,
        checkpoint=checkpoint,
        checkpoint_sha256="" if lacking else checkpoints.sha256(checkpoint),
        defence=defence,
        attack=attack if attack.eps else Attack(),
        examples=s.examples or (images if defence.noisy and not whole else ALL_IMAGES[s.dataset]),
        passes=(s.passes or passes) if defence.noisy else 1,
        seed=s.seed,
        precision="bfloat16" if defence.noisy and s.dataset == "cifar10" else "float32",
    )


def _gradient_passes(s: Settings, source: Defence, share: int = 1) -> int:
    return max(1, (s.passes or SIZES[s.dataset][1]) // share) if source.noisy else 1


def _fgsm(
    s: Settings, defence: Defence, series: str = "", panel: str = "", trained: str = "", whole: bool = False
) -> list[Point]:
    """A curve: FGSM on the network's own gradient, by Monte Carlo if it is noisy, for every eps."""
    attacks = (Attack("fgsm", e, defence, "mean_of_gradients", _gradient_passes(s, defence)) for e in s.eps or EPS)
    found = [_cell(s, defence, attack, trained, whole) for attack in attacks]
    return [Point(cell, series or cell.defended, panel) for cell in found]


def sec2(s: Settings) -> list[Point]:
    """The dense model under FGSM."""
    return _fgsm(s, DENSE)


def fig1a(s: Settings) -> list[Point]:
    """SAP-k under random noise of size eps."""
    return [
        Point(_cell(s, defence, Attack("noise", e)), defence.label)
        for defence in (DENSE, *(Defence("sap", k) for k in PERCENTS))
        for e in s.eps or EPS
    ]


def fig1b(s: Settings) -> list[Point]:
    """SAP-k under FGSM on its own Monte Carlo gradient."""
    curves = (_fgsm(s, defence, whole=defence == SAP_100) for defence in (Defence("sap", k) for k in PERCENTS))
    return _fgsm(s, DENSE) + [point for curve in curves for point in curve]


def _iterative(s: Settings, defence: Defence, source: Defence, e: float, steps: int, passes: int) -> Cell:
    return _cell(s, defence, Attack("iterative", e, source, "mean_of_gradients", passes, s.step, steps))


_DUELS = ((DENSE, DENSE), (SAP_100, SAP_100), (SAP_100, DENSE))


def fig1c(s: Settings) -> list[Point]:
    """The iterative attack: dense, SAP-100 on its own gradient, SAP-100 on dense's examples."""
    return [
        Point(
            _iterative(s, defence, source, e, s.steps, _gradient_passes(s, source, share=10)),
            f"{defence.label} vs {source.label}",
        )
        for defence, source in _DUELS
        for e in s.eps or EPS_ITERATIVE
    ]


def fig1c_steps(s: Settings) -> list[Point]:
    """The same duels at eps 4, against the number of steps, all on the images of a noisy cell."""
    s = dataclasses.replace(s, examples=s.examples or SIZES[s.dataset][0])
    return [
        Point(
            _iterative(s, defence, source, e, steps, _gradient_passes(s, source, share=10)),
            f"{defence.label} vs {source.label}, λ = {e:g}",
        )
        for e in s.eps or (4,)
        for defence, source in _DUELS
        for steps in STEPS
        if e
    ]


def fig2a(s: Settings) -> list[Point]:
    """Dropout on the pretrained network, at test time."""
    return _fgsm(s, DENSE) + [point for rate in TEST_RATES for point in _fgsm(s, Defence("dropout", rate))]


def _without_dropout(s: Settings) -> list[Point]:
    """Dense, and the network that was trained as those with dropout are, but without it."""
    return _fgsm(s, DENSE) + _fgsm(s, DENSE, "dropout-0", "", CONTROL[s.dataset])


def fig2b(s: Settings) -> list[Point]:
    """Networks trained with dropout, which stays on at test time."""
    curves = (_fgsm(s, Defence("dropout", p), f"dropout-{p:g}", "", f"dropout-{p:g}") for p in DROPOUT_RATES)
    return _without_dropout(s) + [point for curve in curves for point in curve]


def fig2c(s: Settings) -> list[Point]:
    """Networks trained with dropout, which is off at test time."""
    curves = (_fgsm(s, DENSE, f"dropout-{p:g}", "", f"dropout-{p:g}") for p in DROPOUT_RATES)
    return _without_dropout(s) + [point for curve in curves for point in curve]


def fig2c_iterative(s: Settings) -> list[Point]:
    """The iterative attack on the networks of Fig. 2c, each on its own gradient, and Fig. 1c's two on SAP-100.

    All on the images of a noisy cell.
    """
    s = dataclasses.replace(s, examples=s.examples or SIZES[s.dataset][0])
    attacks = [_iterative(s, DENSE, DENSE, e, s.steps, 1).attack for e in s.eps or EPS_ITERATIVE]
    points = [
        Point(dataclasses.replace(cell, attack=attack), series)
        for cell, series, _ in fig2c(dataclasses.replace(s, eps=(0,)))
        for attack in attacks
    ]
    on_sap = (p for p in fig1c(s) if p.cell.defence == SAP_100)
    return points + [Point(p.cell, p.series.removesuffix(" vs SAP-100")) for p in on_sap]


def fig3(s: Settings) -> list[Point]:
    """Dense, SAP-100, ADV and ADV+SAP-100 under FGSM, on all test images."""
    return [
        point
        for trained in ("", "adv")
        for defence in (DENSE, SAP_100)
        for point in _fgsm(s, defence, "", "", trained, whole=True)
    ]


def fig4(s: Settings) -> list[Point]:
    """The calibration of the four networks of Fig. 3, from the same cells."""
    return fig3(s if s.eps else dataclasses.replace(s, eps=EPS_CALIBRATION))


def fig5(s: Settings) -> list[Point]:
    """The six baselines at several levels, each against its own gradient; dense in every panel."""
    return [
        point
        for kind, levels in LEVELS.items()
        for defence in (DENSE, *(Defence(kind, level) for level in levels))
        for point in _fgsm(s, defence, "", kind.upper())
    ]


def fig6(s: Settings) -> list[Point]:
    """SAP-100 under FGSM on the dense network's gradient, and on its own with ever more Monte Carlo passes."""
    adversaries = [(DENSE, 1), *((SAP_100, passes) for passes in MC_SAMPLES[s.dataset])]
    return [
        Point(
            _cell(s, SAP_100, Attack("fgsm", e, source, "mean_of_gradients", passes)),
            "dense's gradient" if source == DENSE else f"{passes:,} MC pass" + "es" * (passes > 1),
        )
        for source, passes in adversaries
        for e in s.eps or EPS
    ]


def fig6_budget(s: Settings) -> list[Point]:
    """SAP-100 at eps 4 against what an attack costs: passes of FGSM, and of each of ten steps."""
    points = []
    for e in s.eps or (4,):
        if not e:
            continue
        for source, passes in [(DENSE, 1), *((SAP_100, n) for n in MC_SAMPLES[s.dataset])]:
            of = "dense" if source == DENSE else "SAP-100"
            fgsm = Attack("fgsm", e, source, "mean_of_gradients", passes)
            points.append(Point(_cell(s, SAP_100, fgsm), f"FGSM on {of}, λ = {e:g}"))
            if source == DENSE or passes >= s.steps:
                share = passes if source == DENSE else passes // s.steps
                cell = _iterative(s, SAP_100, source, e, s.steps, share)
                points.append(Point(cell, f"{s.steps} steps on {of}, λ = {e:g}"))
    return points


RELEASED_BATCH = 500
"""Images to a batch of the released code's adversary."""
NOISY_STATISTICS = {"cifar10": 5000, "digits": 1000}
"""Training images from whose noisy passes BatchNorm's statistics are taken."""


def precision(s: Settings) -> list[Point]:
    """SAP-100 of Fig. 1b in either arithmetic, its adversary's gradient included."""
    curve = _fgsm(dataclasses.replace(s, eps=s.eps or EPS_PRECISION), SAP_100)
    return [
        Point(dataclasses.replace(point.cell, precision=name), name) for name in reversed(PRECISIONS) for point in curve
    ]


class Reading(NamedTuple):
    """A way to read what the paper leaves open."""

    trained: str = ""
    """The network's recipe, where it is not the book's."""
    batch_statistics: bool = False
    """The adversary's; the attacked network's only if `everywhere`."""
    everywhere: bool = False
    backward: str = "constant"
    noisy_statistics: bool = False
    """SAP's network has the running statistics of its own passes; dense is as it was."""

    @property
    def changes_dense(self) -> bool:
        """Whether the dense network has numbers of its own."""
        return self.backward == "constant" and not self.noisy_statistics


READINGS = {
    "the paper's text": Reading(),
    "adversary on batch statistics": Reading(batch_statistics=True),
    "both on batch statistics": Reading(batch_statistics=True, everywhere=True),
    "statistics under SAP": Reading(noisy_statistics=True),
    "gradient through the scale": Reading(backward="scale"),
    "the paper's text, short training": Reading("reading-paper"),
    "adversary on batch statistics, short training": Reading("reading-paper", batch_statistics=True),
    "both on batch statistics, short training": Reading("reading-paper", batch_statistics=True, everywhere=True),
    "statistics under SAP, short training": Reading("reading-paper", noisy_statistics=True),
    "28 × 28 crops": Reading("reading-crop"),
    "wrapped pixels": Reading("reading-wrap"),
    "colour jitter": Reading("reading-jitter"),
    "eight devices": Reading("reading-devices"),
    "all of the released code": Reading("reading-released", batch_statistics=True),
    "all of it, and both on batch statistics": Reading("reading-released", batch_statistics=True, everywhere=True),
}


def readings(s: Settings) -> list[Point]:
    """Dense and SAP-100 of Fig. 1b and 3 under FGSM; the series is the reading of the paper, the panel the defence."""
    points = []
    for defence in (DENSE, SAP_100):
        for name, reading in READINGS.items():
            if defence == DENSE and not reading.changes_dense:
                continue
            images = NOISY_STATISTICS[s.dataset] if reading.noisy_statistics else 0
            source = dataclasses.replace(defence, backward=reading.backward, noisy_statistics=images)
            passes = _gradient_passes(s, defence)
            for e in s.eps or EPS:
                batch = RELEASED_BATCH if reading.batch_statistics else 0
                attack = Attack("fgsm", e, source, "mean_of_gradients", passes, batch_statistics=batch)
                attacked = dataclasses.replace(source, backward="constant", batch_statistics=batch * reading.everywhere)
                cell = _cell(s, attacked, attack, reading.trained)
                points.append(Point(cell, name, defence.label))
    return points


class Effort(NamedTuple):
    """What the ladder spends on one image."""

    images: int
    passes: int
    """Per step of PGD and per query; twice as many per step of AutoAttack's rand version, ten times for FGSM."""
    steps: int
    single_passes: int
    autoattack_steps: int
    queries: int


EFFORT = {"cifar10": Effort(200, 10, 40, 500, 100, 500), "digits": Effort(50, 2, 10, 50, 10, 100)}


def _rungs(s: Settings, defence: Defence, e: float) -> dict[str, Attack]:
    """The attacks of the ladder, from weak to strong as the literature has them, by name."""
    effort = EFFORT[s.dataset]
    few = (max(1, s.passes // 10) if s.passes else effort.passes) if defence.noisy else 1

    def pgd(source: Defence = defence, estimator: str = "mean_of_gradients", **more: Any) -> Attack:
        step = REACH * e / effort.steps
        return Attack("iterative", e, source, estimator, few, step, effort.steps, random_start=True, **more)

    def single_passes(source: Defence) -> Attack:
        count = effort.single_passes
        return Attack("iterative", e, source, "mean_of_gradients", 1, 50 / count, count, loss="margin")

    identity = dataclasses.replace(defence, backward="identity")
    through = dataclasses.replace(defence, backward="scale")
    rungs = {
        "random noise": Attack("noise", e),
        "FGSM on dense": Attack("fgsm", e, DENSE, "mean_of_gradients", 1),
        "FGSM": Attack("fgsm", e, defence, "mean_of_gradients", 10 * few if defence.noisy else 1),
        "iterative on dense": Attack("iterative", e, DENSE, "mean_of_gradients", 1, s.step, s.steps),
        "iterative": Attack("iterative", e, defence, "mean_of_gradients", few, s.step, s.steps),
        "PGD, mean of gradients": pgd(),
        "PGD, gradient of the mean": pgd(estimator="gradient_of_mean"),
        "PGD, through the scale": pgd(through),
        "single passes, through the scale": single_passes(through),
        "single passes, constant scale": single_passes(defence),
        "PGD, margin": pgd(loss="margin"),
        "BPDA, identity": pgd(identity),
        "BPDA, identity, margin": pgd(identity, loss="margin"),
        "BPDA, dense's backward": pgd(estimator="dense_backward"),
        "BPDA, dense's backward, margin": pgd(estimator="dense_backward", loss="margin"),
        "BPDA, identity, 3 restarts": pgd(identity, restarts=3),
        "AutoAttack (rand)": Attack(
            "autoattack", e, defence, "", 2 * few if defence.noisy else 1, steps=effort.autoattack_steps
        ),
        "AutoAttack (standard)": Attack("autoattack_standard", e, defence, "", 1, steps=effort.autoattack_steps),
        "Square (black box)": Attack("square", e, defence, "", few, steps=effort.queries),
    }
    if e != EPS_ATHALYE:  # a control of one claim, which is about this eps
        del rungs["single passes, constant scale"]
    if defence.noisy:
        del rungs["AutoAttack (standard)"]
    return rungs


RUNGS_OF_DENSE = (
    "random noise", "FGSM", "iterative", "PGD, mean of gradients", "PGD, margin", "AutoAttack (rand)",
    "AutoAttack (standard)", "Square (black box)",
)  # fmt: skip
"""What is run on a network without noise. Most others coincide there with one of these; restarts and the 500 steps of
single passes do not: AutoAttack's standard version is run in their place."""
LADDERS = (
    ("dense", DENSE, ""),
    ("SAP-100", SAP_100, ""),
    ("ADV", DENSE, "adv"),
    ("ADV+SAP-100", SAP_100, "adv"),
    ("Bernoulli-SAP-200", BERNOULLI_SAP, ""),
)
"""Each defence of the ladder: its name, what is done to the network, and how that was trained."""


def ladder(s: Settings) -> list[Point]:
    """The defences against ever stronger attacks; the series is the attack, the panel the defence."""
    s = dataclasses.replace(s, examples=s.examples or EFFORT[s.dataset].images)
    points = []
    for name, defence, trained in LADDERS:
        points.append(Point(_cell(s, defence, Attack(), trained), "no attack", name))
        attacks = [_rungs(s, defence, e) for e in s.eps or EPS_LADDER[s.dataset] if e]
        for rung in _rungs(s, defence, EPS_ATHALYE):
            if defence.noisy or rung in RUNGS_OF_DENSE:
                cells = (_cell(s, defence, of_eps[rung], trained) for of_eps in attacks if rung in of_eps)
                points += [Point(cell, rung, name) for cell in cells]
    return points


def ladder_checks(s: Settings) -> list[Point]:
    """The noisy ones of these defences against BPDA in ever finer steps, in more steps of the same size, with more
    passes, and without a bound."""
    s = dataclasses.replace(s, examples=s.examples or EFFORT[s.dataset].images)
    points, most = [], EFFORT[s.dataset].steps
    for name, defence, trained in LADDERS:
        if not defence.noisy:
            continue
        for e, steps, times, further in (
            *((e, n, 1, 1) for e in s.eps or EPS_STEPS[s.dataset] for n in (1, 4, most, 4 * most) if e),
            *((e, 4 * most, 1, 4) for e in s.eps or EPS_STEPS[s.dataset] if e),
            *((e, most, 4, 1) for e in s.eps or EPS_STEPS[s.dataset] if e),
            (EPS_UNBOUNDED, most, 1, 1),
        ):
            rung = _rungs(s, defence, e)["BPDA, identity"]
            step = further * REACH * e / steps
            attack = dataclasses.replace(rung, steps=steps, step=step, passes=times * rung.passes)
            if steps == 1:
                attack = dataclasses.replace(attack, step=e, random_start=False)
            series = "BPDA, identity" + (f", {steps} step{'s' * (steps > 1)}" if steps != most else "")
            series += f" of λ/{e / step:g}" if steps > most else ""
            series += f", {attack.passes} passes" if times > 1 else ""
            points.append(Point(_cell(s, defence, attack, trained), series, name))
    return points


STATISTICS_UNDER_SAP = "SAP-100, statistics under SAP"
RUNGS_UNDER_SAP = (
    "FGSM on dense", "FGSM", "PGD, mean of gradients", "single passes, through the scale",
    "single passes, constant scale", "BPDA, identity", "BPDA, identity, margin",
)  # fmt: skip
"""Enough to tell robustness from a gradient that misleads, and what claims of SAP's breaking are about."""


def noisy_statistics(s: Settings) -> list[Point]:
    """SAP-100 as it is, and with BatchNorm's statistics of its own passes, under the same attacks.

    They are those of `ladder`, and of `ladder_checks` the one that goes on with steps of the same size.
    """
    s = dataclasses.replace(s, examples=s.examples or EFFORT[s.dataset].images)
    own = dataclasses.replace(SAP_100, noisy_statistics=NOISY_STATISTICS[s.dataset])
    points, on = [], 4 * EFFORT[s.dataset].steps
    for name, defence in ((SAP_100.label, SAP_100), (STATISTICS_UNDER_SAP, own)):
        points.append(Point(_cell(s, defence, Attack()), "no attack", name))
        attacks = [_rungs(s, defence, e) for e in s.eps or EPS_UNDER_SAP[s.dataset] if e]
        for rung in RUNGS_UNDER_SAP:
            points += [Point(_cell(s, defence, of_eps[rung]), rung, name) for of_eps in attacks if rung in of_eps]
        for attack in (dataclasses.replace(of_eps["BPDA, identity"], steps=on) for of_eps in attacks):
            if s.eps or attack.eps in EPS_STEPS[s.dataset]:
                series = f"BPDA, identity, {on} steps of λ/{attack.eps / attack.step:g}"
                points.append(Point(_cell(s, defence, attack), series, name))
    return points


def table1(s: Settings) -> list[Point]:
    """Each game by a random policy, by the agent and by the agent with SAP-100, under FGSM on its own gradient, and
    by the agent with SAP-100 under FGSM on the gradient of the one without.

    The panel is the game. An agent that is not trained yet has no checkpoint in its cells.
    """
    points = []
    for game in (s.game,) if s.game else GAMES:
        name = f"double-dqn-{game}"
        sha256 = checkpoints.sha256(name) if name in checkpoints.names() else ""

        def cell(
            defence: Defence, source: Defence, e: float, game: str = game, name: str = name, sha256: str = sha256
        ) -> Cell:
            passes = (s.passes or GAME_PASSES) if defence.noisy else 1
            gradients = (s.passes or GAME_GRADIENT_PASSES) if source.noisy else 1
            attack = Attack("fgsm", e, source, "mean_of_gradients", gradients) if e else Attack()
            episodes = s.episodes or (EPISODES_NOISY_ATTACKED if e and defence.noisy else EPISODES)
            if defence.kind == "random":
                name = sha256 = ""
            return Cell(
                game, name, sha256, defence, attack, episodes, passes, s.seed,
                precision="bfloat16" if defence.noisy else "float32", rules=Rules(),
            )  # fmt: skip

        points.append(Point(cell(Defence("random"), DENSE, 0), "random", game))
        eps = s.eps or EPS_GAMES
        points += [Point(cell(d, d, e), d.label, game) for d in (DENSE, SAP_100) for e in eps]
        points += [Point(cell(SAP_100, DENSE, e), "SAP-100 vs dense", game) for e in eps if e]
    return points


FIGURES: dict[str, Callable[[Settings], list[Point]]] = {
    "sec2": sec2,
    "fig1a": fig1a,
    "fig1b": fig1b,
    "fig1c": fig1c,
    "fig1c_steps": fig1c_steps,
    "fig2a": fig2a,
    "fig2b": fig2b,
    "fig2c": fig2c,
    "fig2c_iterative": fig2c_iterative,
    "fig3": fig3,
    "fig4": fig4,
    "fig5": fig5,
    "fig6": fig6,
    "fig6_budget": fig6_budget,
    "precision": precision,
    "readings": readings,
    "ladder": ladder,
    "ladder_checks": ladder_checks,
    "noisy_statistics": noisy_statistics,
    "table1": table1,
}


ALSO = {"fig4": ("calibration",)}
"""What a figure needs of its cells besides their accuracy."""


def points(figure: str, s: Settings | None = None) -> list[Point]:
    """The points of a figure, curve by curve; a cell may lie on several curves."""
    if figure not in FIGURES:
        raise SapcoreError(f"no figure is named {figure!r}; there are {', '.join(FIGURES)}")
    return FIGURES[figure](s or Settings())


def cells(figure: str, s: Settings | None = None) -> list[Cell]:
    """The cells of a figure, each once, in the order in which they are best computed."""
    return list(dict.fromkeys(point.cell for point in points(figure, s)))


def table(figure: str, s: Settings, device: str | None = None) -> pd.DataFrame:
    """A figure's numbers (see `stored`), after computing the cells that are not in the store.

    The book's own cells are the exception, whichever of them are asked for: missing ones take hours, so they are
    left to `sapcore run`, and named in `.attrs["missing"]`.
    Raises `DataMissingError` where CIFAR-10 is needed and not to be had.
    """
    if not s.default:
        own = cells(figure) if s.dataset == Settings().dataset else []
        asked = [cell for cell in cells(figure, s) if cell not in own and cell.computable]
        failed = runner.run(asked, device=device, also=ALSO.get(figure, ()))
        if failed:
            raise failed[0][1]
    return stored(figure, s)


def stored(figure: str, s: Settings) -> pd.DataFrame:
    """A figure's numbers that are in the store, one row per point.

    Columns: panel, series, eps, accuracy, low, high (95 % Wilson interval), correct, images, single_pass and every_pass
    (what counting single passes would claim: their mean accuracy, and the share of images that all get right), passes,
    level of the defence, gradient_passes, steps, step (pixel units), gradients (of the whole attack, or queries),
    device, commit, date.
    Of games: mean return, low, high (95 % bootstrap interval) and the list of returns in place of accuracy to images;
    the panel is the game.
    `.attrs["missing"]` names the cells that are not there; "lacking" has the panel and eps of each, and "waiting" says
    how many of them want a network that is not trained yet.
    """
    rows, missing, lacking = [], {}, set()  # a cell may be several points
    for cell, series, panel in points(figure, s):
        found = results.read(cell, ALSO.get(figure, ()))
        if found is None:
            missing[cell] = cell.label
            lacking.add((panel, cell.attack.eps))
        else:
            rows.append({"panel": panel, "series": series, "eps": cell.attack.eps, **_row(cell, found)})
    frame = pd.DataFrame(rows, columns=["panel", "series", "eps", *_MEASURED[figure == "table1"], *_COLUMNS])
    frame = frame.astype({"low": float, "high": float})
    frame.attrs = {
        "figure": figure, "missing": list(missing.values()), "lacking": lacking,
        "waiting": sum(not cell.computable for cell in missing), "settings": s,
    }  # fmt: skip
    return frame


_MEASURED = {
    False: ("accuracy", "low", "high", "correct", "images", "single_pass", "every_pass"),
    True: ("mean", "low", "high", "returns", "episodes"),
}
"""What a frame takes over from the results of images, and of games."""
_COLUMNS = (
    "passes", "noisy", "level", "gradient_passes", "steps", "step", "gradients",
    "device", "commit", "date",
)  # fmt: skip


def _row(cell: Cell, stored: dict[str, Any]) -> dict[str, Any]:
    attack, origin = cell.attack, stored["provenance"]
    return {
        **{name: stored["result"].get(name) for name in _MEASURED[cell.plays]},
        **({"episodes": cell.examples} if cell.plays else {}),
        "passes": cell.passes,
        "noisy": cell.defence.noisy,
        "level": cell.defence.level,
        "gradient_passes": attack.passes,
        "steps": attack.steps,
        "step": attack.step,
        "gradients": attack.gradients,
        **{name: origin[name] for name in ("device", "commit", "date")},
    }


def calibrations(s: Settings, device: str | None = None) -> pd.DataFrame:
    """The reliability diagrams of Fig. 4 (see `stored_calibrations`), computed and missing as in `table`."""
    table("fig4", s, device)
    return stored_calibrations(s)


def stored_calibrations(s: Settings) -> pd.DataFrame:
    """The reliability diagrams of Fig. 4 that are in the store, one row per network, eps and bin.

    Columns: series, eps, bin, images, confidence (mean in the bin), accuracy, ece, ece_low, ece_high; `.attrs` as in
    `stored`.
    """
    rows = []
    for cell, series, _ in points("fig4", s):
        found = results.read(cell, ALSO["fig4"])
        if found is None:
            continue
        c = found["result"]["calibration"]
        for i, (images, confidence, correct) in enumerate(zip(c["images"], c["confidence"], c["correct"], strict=True)):
            accuracy = correct / images if images else math.nan
            rows.append((series, cell.attack.eps, i, images, confidence, accuracy, c["ece"], c["low"], c["high"]))
    names = ["series", "eps", "bin", "images", "confidence", "accuracy", "ece", "ece_low", "ece_high"]
    result = pd.DataFrame(rows, columns=names)
    result.attrs = stored("fig4", s).attrs
    return result
