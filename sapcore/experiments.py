"""The list of cells per figure of the paper, and the tidy frame of a figure's numbers."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from sapcore import checkpoints, data, results, runner
from sapcore.attacks.steps import check_eps
from sapcore.errors import SapcoreError
from sapcore.randomness import split_seed
from sapcore.results import Attack, Cell, Defence

EPS = (0, 1, 2, 4, 8, 16, 32, 64)
"""The paper's perturbations, in pixel units."""
EPS_ITERATIVE = (0, 1, 2, 4)
PERCENTS = (5, 10, 25, 50, 100, 200)
SIZES = {"cifar10": (1000, 100), "digits": (100, 10)}
"""Images and passes of a noisy cell. The dense network is run on the whole test set."""
DENSE = Defence()


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
) -> Settings:
    """Check a chapter's parameters; what makes no sense raises `SapcoreError` with one sentence.

    eps: one number or a list, in pixel units; examples: how many test images; passes: Monte Carlo passes
    of the output, and of the gradient in Fig. 1b; a tenth of it per step of the iterative attack.
    """
    if dataset not in data.DATASETS:
        raise SapcoreError(f"dataset is {dataset!r}, but must be one of {', '.join(data.DATASETS)}")
    values = None
    if eps is not None:
        listed = list(eps) if isinstance(eps, list | tuple) else [eps]
        if not listed:
            raise SapcoreError("eps is an empty list, but must hold one number or more, in pixel units (0-255)")
        values = tuple(sorted({int(e) if e == int(e) else e for e in map(check_eps, listed)}))
    most = {"cifar10": 10_000, "digits": 500}[dataset]
    for name, number, limit in (("examples", examples, most), ("passes", passes, math.inf), ("steps", steps, math.inf)):
        if number is None and name != "steps":
            continue
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= limit:
            upto = f"to {limit}" if limit < math.inf else "on"
            raise SapcoreError(f"{name} is {number!r}, but must be a whole number from 1 {upto}")
    if isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < math.inf:
        raise SapcoreError(f"step is {step!r}, but must be a positive number, in pixel units")
    split_seed(seed)
    return Settings(dataset, values, examples, passes, seed, step, steps)


def _cell(s: Settings, defence: Defence, attack: Attack) -> Cell:
    """A cell; without a perturbation every attack is the same as none, and is stored once."""
    checkpoint = f"resnet20-{s.dataset}"
    images, passes = SIZES[s.dataset]
    return Cell(
        dataset=s.dataset,
        checkpoint=checkpoint,
        checkpoint_sha256=checkpoints.sha256(checkpoint),
        defence=defence,
        attack=attack if attack.eps else Attack(),
        examples=s.examples or (images if defence.noisy else {"cifar10": 10_000, "digits": 500}[s.dataset]),
        passes=(s.passes or passes) if defence.noisy else 1,
        seed=s.seed,
        precision="bfloat16" if defence.noisy and s.dataset == "cifar10" else "float32",
    )


def _gradient_passes(s: Settings, source: Defence, share: int = 1) -> int:
    return max(1, (s.passes or SIZES[s.dataset][1]) // share) if source.noisy else 1


def sec2(s: Settings) -> list[Cell]:
    """The dense model under FGSM."""
    return [_cell(s, DENSE, Attack("fgsm", e, DENSE, "mean_of_gradients", 1)) for e in s.eps or EPS]


def fig1a(s: Settings) -> list[Cell]:
    """SAP-k under random noise of size eps."""
    return [
        _cell(s, defence, Attack("noise", e))
        for defence in (DENSE, *(Defence("sap", k) for k in PERCENTS))
        for e in s.eps or EPS
    ]


def fig1b(s: Settings) -> list[Cell]:
    """SAP-k under FGSM on its own Monte Carlo gradient."""
    cells = []
    for defence in (DENSE, *(Defence("sap", k) for k in PERCENTS)):
        for e in s.eps or EPS:
            passes = _gradient_passes(s, defence)
            cells.append(_cell(s, defence, Attack("fgsm", e, defence, "mean_of_gradients", passes)))
    return cells


def fig1c(s: Settings) -> list[Cell]:
    """The iterative attack: dense, SAP-100 on its own gradient, SAP-100 on dense's examples."""
    sap = Defence("sap", 100)
    cells = []
    for defence, source in ((DENSE, DENSE), (sap, sap), (sap, DENSE)):
        for e in s.eps or EPS_ITERATIVE:
            passes = _gradient_passes(s, source, share=10)
            attack = Attack("iterative", e, source, "mean_of_gradients", passes, s.step, s.steps)
            cells.append(_cell(s, defence, attack))
    return cells


FIGURES: dict[str, Callable[[Settings], list[Cell]]] = {
    "sec2": sec2,
    "fig1a": fig1a,
    "fig1b": fig1b,
    "fig1c": fig1c,
}


def cells(figure: str, s: Settings | None = None) -> list[Cell]:
    """The cells of a figure, each once, in the order in which they are best computed."""
    if figure not in FIGURES:
        raise SapcoreError(f"no figure is named {figure!r}; there are {', '.join(FIGURES)}")
    return list(dict.fromkeys(FIGURES[figure](s or Settings())))


def table(figure: str, s: Settings, device: str | None = None) -> pd.DataFrame:
    """A figure's numbers (see `stored`), after computing the cells that are not in the store.

    The book's own settings are the exception: their missing cells take hours, so they are left to
    `sapcore run`, and counted in `.attrs["missing"]`.
    Raises `DataMissingError` where CIFAR-10 is needed and not to be had.
    """
    if not s.default:
        failed = runner.run(cells(figure, s), device=device)
        if failed:
            raise failed[0][1]
    return stored(figure, s)


def stored(figure: str, s: Settings) -> pd.DataFrame:
    """A figure's numbers that are in the store, one row per point.

    Columns: series, eps, accuracy, low, high (95 % Wilson interval), correct, images, passes,
    gradient_passes, device, commit, date. `.attrs["missing"]` names the cells that are not there.
    """
    cells(figure, s)
    rows, missing = [], []
    for cell, series, e in _points(figure, s, FIGURES[figure](s)):
        found = results.read(cell)
        if found is None:
            missing.append(cell.label)
        else:
            rows.append({"series": series, "eps": e, **_row(cell, found)})
    frame = pd.DataFrame(rows, columns=["series", "eps", *_COLUMNS])
    frame.attrs = {"figure": figure, "missing": missing, "settings": s}
    return frame


_COLUMNS = ("accuracy", "low", "high", "correct", "images", "passes", "gradient_passes", "device", "commit", "date")


def _row(cell: Cell, stored: dict[str, Any]) -> dict[str, Any]:
    origin = stored["provenance"]
    return {
        **{name: stored["result"][name] for name in ("accuracy", "low", "high", "correct", "images")},
        "passes": cell.passes,
        "gradient_passes": cell.attack.passes,
        **{name: origin[name] for name in ("device", "commit", "date")},
    }


def _points(figure: str, s: Settings, wanted: list[Cell]) -> list[tuple[Cell, str, float]]:
    """Each cell with the name of its curve and its eps; a cell without perturbation may lie on several curves."""
    grid = s.eps or (EPS_ITERATIVE if figure == "fig1c" else EPS)
    points = []
    for i, cell in enumerate(wanted):
        label = cell.defence.label
        if figure == "fig1c":
            label += " vs " + ("dense", "SAP-100", "dense")[i // len(grid)]
        points.append((cell, label, grid[i % len(grid)]))
    return points
