"""The paper's claims, and later ones about SAP: each with its rule of judgement, and a verdict computed from the store.

"Clearly above" means that the lower end of one 95 % interval lies above the upper end of the other, "above" alone that
the number itself is. A clear loss at one place counts against a claim where its rule says so.
A claim whose cells are not all there cannot be judged, unless nothing that they can say would change the verdict.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import pandas as pd
from scipy.stats import binomtest

from sapcore import adaptive, experiments, results
from sapcore.errors import SapcoreError
from sapcore.evaluation import difference
from sapcore.experiments import LEVELS, Point
from sapcore.published import PUBLISHED, TABLE_1, Published
from sapcore.results import Defence
from sapcore.rl.environments import GAMES
from sapcore.rl.playing import in_percent, relative_change
from sapcore.training import DROPOUT_RATES

HOLDS, DIRECTION, FAILS, OPEN = "holds", "holds in direction", "does not hold", "cannot be judged"
VERDICTS = (HOLDS, DIRECTION, FAILS, OPEN)
BEFORE, PART, AFTER = "before its numbers", "when part of its numbers was known", "when its numbers were known"
"""When a rule took the words that it has now."""
_BLANK = "the claim; which λ is lost from the copies that we could read"
GUESSING = 0.1
"""The accuracy of a network that knows nothing, on ten classes."""
SMALL = (1, 2, 4)
"""The paper speaks of small perturbations where SAP gains; its numbers are for these."""
ATTACKED = (1, 2, 4, 8)
"""Table 1's perturbations, in the games."""


class Verdict(NamedTuple):
    """One of `VERDICTS`, and the numbers behind it."""

    verdict: str
    why: str


class Missing(Exception):
    """A number that a rule needs is not in the store."""


PLACES = {
    "sec2": ("00_preliminaries", "fig-fgsm"),
    "fig1a": ("01_sap", "fig-1a"),
    "fig1b": ("01_sap", "fig-1b"),
    "fig1c": ("04_iterative", "fig-1c"),
    "fig2a": ("02_dropout", "fig-2a"),
    "fig2b": ("02_dropout", "fig-2b"),
    "fig2c": ("02_dropout", "fig-2c"),
    "fig3": ("03_adversarial_training", "fig-3"),
    "fig4": ("05_calibration", "fig-4"),
    "fig5": ("07_baselines", "fig-5"),
    "fig6": ("08_mc_samples", "fig-6"),
    "ladder": ("11_adaptive_attacks", "fig-ladder"),
    "table1": ("06_reinforcement_learning", "table-1"),
    "network": ("10_performance", "fig-network"),
}
"""Where the book shows a figure: chapter and anchor. `network` is a benchmark."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of a paper that numbers can test."""

    name: str
    place: str
    sentence: str
    """In our words."""
    rule: str
    """When it holds."""
    figure: str
    """The one of `PLACES` whose numbers test it."""
    judge: Callable[["Numbers"], Verdict]
    published: str = ""
    """The number, where a public source has one, with that source."""
    written: str = BEFORE
    """`BEFORE`, `PART` or `AFTER`: what was known of the numbers when the rule was written or last changed."""
    later: bool = False
    """Whether it is another paper's about SAP, and not this one's own."""


class Numbers:
    """The stored numbers of the book's figures, and which cells were asked for."""

    def __init__(self) -> None:
        self._frames: dict[str, pd.DataFrame] = {}
        self._points: dict[str, list[Point]] = {}
        self.cells: list[str] = []
        """Files in the store, such as `cifar10/dense-0123456789abcdef.json`, there or not; anyone may empty it."""

    def frame(self, figure: str) -> pd.DataFrame:
        """A figure's numbers, read once."""
        if figure not in self._frames:
            self._frames[figure] = experiments.stored(figure, experiments.Settings())
        return self._frames[figure]

    def at(self, figure: str, series: str, eps: float, panel: str = "", steps: int | None = None) -> pd.Series:
        """One point, with its accuracy and interval; raises `Missing` if it is not there."""
        frame = self.frame(figure)
        self._note(
            figure, lambda p: (p.series, p.cell.attack.eps) == (series, eps) and panel in ("", p.panel)
            and steps in (None, p.cell.attack.steps),
        )  # fmt: skip
        found = frame[(frame["series"] == series) & (frame["eps"] == eps)]
        if panel:
            found = found[found["panel"] == panel]
        if steps is not None:
            found = found[found["steps"] == steps]
        if found.empty:
            raise Missing(f"{panel + ', ' if panel in GAMES else ''}{series} at λ = {eps:g} is not computed")
        return found.iloc[0]

    def said(self, figure: str, series: str, eps: float, panel: str = "", steps: int | None = None) -> str:
        """A point's accuracy with its interval in words, for prose."""
        try:
            return _shown(self.at(figure, series, eps, panel, steps))
        except Missing:
            return "(not computed yet)"

    def between(self, figure: str, series: Collection[str], eps: float, panel: str = "", less_than: str = "") -> str:
        """From the least to the largest accuracy of these series, in words, for prose.

        less_than: another panel; by how much each is less than the same series there, in points.
        """
        try:
            found = [self.at(figure, name, eps, panel)["accuracy"] for name in series]
            if less_than:
                found = [self.at(figure, s, eps, less_than)["accuracy"] - x for s, x in zip(series, found, strict=True)]
        except Missing:
            return "(not computed yet)"
        return f"{100 * min(found):.0f} to {100 * max(found):.0f} {'points' if less_than else '%'}"

    def left(self, panel: str, eps: float) -> str:
        """What the strongest of the attacks of chapter 11 so far leaves a defence, in words, for prose."""
        frame = pd.concat([self.frame(name) for name in ("ladder", "ladder_checks", "noisy_statistics")])
        rows = adaptive.strongest(frame[(frame["panel"] == panel) & (frame["eps"] == eps)])
        return "(not computed yet)" if rows.empty else _shown(rows.iloc[0])

    def all_tried(self, panels: Sequence[str], eps: Sequence[float]) -> bool:
        """Whether every attack of the ladder and its checks is computed, on these defences at these eps."""
        lacking = self.frame("ladder").attrs["lacking"] | self.frame("ladder_checks").attrs["lacking"]
        return not lacking & set(itertools.product(panels, eps))

    def games(self) -> str:
        """What SAP-100 does to the agents that have learnt and whose cells are all there, in words, for prose."""
        clean: dict[str, tuple[float, float, float]] = {}
        attacked: list[tuple[float, float, float]] = []
        gained: list[str] = []
        lost = 0
        for game in GAMES:
            try:
                changes = [_change(self, e, game) for e in (0, *ATTACKED)] if _has_learnt(self, game) else []
            except Missing:
                continue
            if changes:
                clean[game] = changes[0]
                attacked += changes[1:]
                gained += [game] * any(low > 0 for _, low, _ in changes[1:])
                lost += sum(not _better_than_chance(self, e, game) for e in ATTACKED)
        if not clean:
            return "(not computed yet)"
        return (
            f"without an attack it changes the return by {_said(clean)}; of {len(attacked)} changes under attack, "
            f"each player along its own gradient, {_signs(attacked)}. "
            + (f"All clear gains are in {', '.join(gained)}. " if gained else "")
            + f"In {lost} of the {len(attacked)} the attacked agent without SAP is itself not clearly better than at "
            "random, so that its change says little."
        )

    def whole(self, figure: str) -> pd.DataFrame:
        """All of a figure's numbers; raises `Missing` if any is not there."""
        frame = self.frame(figure)
        self._note(figure, lambda _: True)
        if frame.attrs["missing"]:
            raise Missing(f"{len(frame.attrs['missing'])} cells are not computed")
        return frame

    def _note(self, figure: str, asked: Callable[[Point], bool]) -> None:
        if figure not in self._points:
            self._points[figure] = experiments.points(figure)
        paths = [p.cell.path for p in self._points[figure] if p.cell.computable and asked(p)]
        self.cells = list(dict.fromkeys([*self.cells, *(f"{path.parent.name}/{path.name}" for path in paths)]))


def judged(claim: Claim, numbers: Numbers | None = None) -> Verdict:
    """The verdict on a claim."""
    try:
        return claim.judge(numbers or Numbers())
    except Missing as missing:
        return Verdict(OPEN, str(missing))


def scorecard(chapter: str = "") -> pd.DataFrame:
    """All claims with their verdicts, one row each: every field of `Claim` but its rule as code, and `cells`, the files
    in the store that test it, up to the first that is not there.

    chapter: such as "01_sap", for those claims alone that its figures test; raises `SapcoreError` where there are none.
    """
    wanted = [c for c in CLAIMS if chapter in ("", PLACES[c.figure][0])]
    if not wanted:
        chapters = ", ".join(sorted({PLACES[c.figure][0] for c in CLAIMS}))
        raise SapcoreError(f"no claim is tested in chapter {chapter!r}; there are {chapters}")
    numbers = Numbers()
    names = [field.name for field in dataclasses.fields(Claim) if field.name != "judge"]
    rows = []
    for c in wanted:
        numbers.cells = []
        verdict = judged(c, numbers)._asdict()
        rows.append({**{name: getattr(c, name) for name in names}, **verdict, "cells": numbers.cells})
    return pd.DataFrame(rows)


def counts(card: pd.DataFrame) -> dict[str, int]:
    """How many claims have each verdict."""
    return {verdict: int((card["verdict"] == verdict).sum()) for verdict in VERDICTS}


def _percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def _shown(row: pd.Series) -> str:
    return f"{_percent(row['accuracy'])} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _compared(pairs: list[tuple[str, pd.Series, pd.Series]]) -> Verdict:
    """Is the first of every pair clearly above the second? In direction: its accuracy is at least above."""
    why = "; ".join(f"{label}: {_shown(a)} against {_shown(b)}" for label, a, b in pairs)
    if all(a["low"] > b["high"] for _, a, b in pairs):
        return Verdict(HOLDS, why)
    if all(a["accuracy"] > b["accuracy"] for _, a, b in pairs):
        return Verdict(DIRECTION, why)
    return Verdict(FAILS, why)


def _above(figure: str, series: str, other: str, grid: tuple[float, ...]) -> Callable[[Numbers], Verdict]:
    """`series` is clearly above `other` at each eps."""
    return lambda n: _compared([(f"λ = {e:g}", n.at(figure, series, e), n.at(figure, other, e)) for e in grid])


def _published(figure: str, series: str, eps: float, minus: str = "") -> Published:
    (found,) = (p for p in PUBLISHED if (p.figure, p.series, p.eps, p.minus) == (figure, series, eps, minus))
    return found


def published(figure: str, series: str, eps: float) -> str:
    """A published accuracy in words, for prose."""
    return _published(figure, series, eps).text + " %"


def _source(figure: str, series: str, eps: float, minus: str = "") -> str:
    found = _published(figure, series, eps, minus)
    return f"{found.text} {'points' if minus else '%'} ({found.source})"


def _minus(a: float, b: float) -> float:
    """The difference of two accuracies, so that one of exactly five points is, though floats are a little off."""
    return round(float(a) - float(b), 9)


def _clear_by_five(a: pd.Series, b: pd.Series) -> bool:
    """Whether the first is clearly above the second, and by five points or more."""
    return bool(a["low"] > b["high"] and _minus(a["accuracy"], b["accuracy"]) >= 0.05)


def _is_the_published(figure: str, series: str, eps: float) -> Callable[[Numbers], Verdict]:
    """The published accuracy lies in our interval; in direction: within five points of it."""

    def judge(n: Numbers) -> Verdict:
        ours, theirs = n.at(figure, series, eps), _published(figure, series, eps)
        why = f"{_shown(ours)}, published {theirs.text} %"
        if ours["low"] <= theirs.value <= ours["high"]:
            return Verdict(HOLDS, why)
        return Verdict(DIRECTION if abs(_minus(ours["accuracy"], theirs.value)) <= 0.05 else FAILS, why)

    return judge


def _gain_is_the_published(n: Numbers) -> Verdict:
    sap, dense = (tuple(n.at("fig1b", name, 1)[["accuracy", "low", "high"]]) for name in ("SAP-100", "dense"))
    gain, low, high = difference(sap, dense)
    theirs = _published("fig1b", "SAP-100", 1, "dense")
    why = f"{100 * gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], published {theirs.text}"
    if low <= theirs.value <= high:
        return Verdict(HOLDS, why)
    return Verdict(DIRECTION if gain > 0 else FAILS, why)


def _clearly_above_at_two(series: str, other: str, grid: tuple[float, ...]) -> Callable[[Numbers], Verdict]:
    """In Figure 1b `series` is clearly above `other`, and above guessing, at two of these eps; in direction: at one."""

    def judge(n: Numbers) -> Verdict:
        pairs = [(e, n.at("fig1b", series, e), n.at("fig1b", other, e)) for e in grid]
        clear = [pair for pair in pairs if pair[1]["low"] > max(pair[2]["high"], GUESSING)]
        shown = clear or [max(pairs, key=lambda pair: float(pair[1]["accuracy"] - pair[2]["accuracy"]))]
        why = f"{series} is clearly above {other} " + ("" if clear else "nowhere, most ") + "at "
        why += "; ".join(f"λ = {e:g}: {_shown(a)} against {_shown(b)}" for e, a, b in shown)
        return Verdict(HOLDS if len(clear) >= 2 else DIRECTION if clear else FAILS, why)

    return judge


def _keeps_accuracy(n: Numbers) -> Verdict:
    sap, dense = n.at("fig1b", "SAP-100", 0), n.at("fig1b", "dense", 0)
    why = f"SAP-100 {_shown(sap)}, dense {_shown(dense)}"
    if sap["high"] >= dense["low"]:
        return Verdict(HOLDS, why)
    return Verdict(DIRECTION if _minus(dense["accuracy"], sap["accuracy"]) <= 0.1 else FAILS, why)


def _converges_to_dense(n: Numbers) -> Verdict:
    distances = []
    for k in experiments.PERCENTS:
        gaps = [
            abs(n.at("fig1b", f"SAP-{k}", e)["accuracy"] - n.at("fig1b", "dense", e)["accuracy"])
            for e in experiments.EPS
        ]
        distances.append(sum(gaps) / len(gaps))
    why = "mean distance from dense over λ: " + ", ".join(
        f"SAP-{k} {100 * d:.1f}" for k, d in zip(experiments.PERCENTS, distances, strict=True)
    )
    falling = all(a >= b for a, b in itertools.pairwise(distances[2:]))
    clean = _minus(n.at("fig1b", "dense", 0)["accuracy"], n.at("fig1b", "SAP-200", 0)["accuracy"])
    if falling and clean <= 0.03:
        return Verdict(HOLDS, why)
    return Verdict(DIRECTION if falling else FAILS, why)


def _few_samples(n: Numbers) -> Verdict:
    rows = [n.at("fig1b", f"SAP-{k}", 0) for k in experiments.PERCENTS]
    why = ", ".join(f"SAP-{k} {_percent(r['accuracy'])}" for k, r in zip(experiments.PERCENTS, rows, strict=True))
    ordered = all(_minus(a["accuracy"], b["accuracy"]) <= 0.02 for a, b in itertools.pairwise(rows))
    return Verdict(HOLDS if ordered and rows[0]["high"] < rows[-1]["low"] else FAILS, why)


def _few_samples_help(n: Numbers) -> Verdict:
    """Some SAP-k of fewer samples than 100 is clearly above dense at every small eps."""
    helped = []
    for e in SMALL:
        dense = n.at("fig1b", "dense", e)
        rows = {k: n.at("fig1b", f"SAP-{k}", e) for k in experiments.PERCENTS if k < 100}
        best = max(rows, key=lambda k: rows[k]["accuracy"])
        helped.append((f"λ = {e:g}, SAP-{best}", rows[best], dense))
    why = "; ".join(f"{label} {_shown(a)}, dense {_shown(b)}" for label, a, b in helped)
    above = [a["low"] > b["high"] for _, a, b in helped]
    lost = any(a["high"] < b["low"] for _, a, b in helped)
    return Verdict(HOLDS if all(above) else DIRECTION if any(above) and not lost else FAILS, why)


def _best_percent(n: Numbers) -> Verdict:
    grid = (0, *SMALL)
    means = {k: sum(n.at("fig1b", f"SAP-{k}", e)["accuracy"] for e in grid) / len(grid) for k in experiments.PERCENTS}
    best = max(means, key=means.__getitem__)
    why = "mean accuracy over λ = 0, 1, 2, 4: " + ", ".join(f"SAP-{k} {_percent(v)}" for k, v in means.items())
    if best == 100:
        return Verdict(HOLDS, why)
    return Verdict(DIRECTION if _minus(means[best], means[100]) <= 0.02 else FAILS, why)


def _degrades_quickly(n: Numbers) -> Verdict:
    clean, *attacked = (n.at("sec2", "dense", e) for e in (0, 1, 2))
    why = f"{_shown(clean)} at λ = 0, {_shown(attacked[0])} at 1, {_shown(attacked[1])} at 2"
    lost = _minus(clean["accuracy"], attacked[0]["accuracy"])
    return Verdict(HOLDS if lost >= 0.1 else DIRECTION if attacked[0]["high"] < clean["low"] else FAILS, why)


def _near_random(n: Numbers) -> Verdict:
    frame = n.whole("fig1a")
    rows = frame[frame["eps"] == 64]
    worst = rows.sort_values("accuracy").iloc[-1]
    why = f"at λ = 64 the best of {len(rows)} is {worst['series']}: {_shown(worst)}"
    return Verdict(HOLDS if worst["accuracy"] <= 0.2 else FAILS, why)


def _no_gain(figure: str, grid: tuple[float, ...]) -> Callable[[Numbers], Verdict]:
    """No series of this name is clearly above the network without dropout at any eps; in direction: at one."""

    def judge(n: Numbers) -> Verdict:
        frame = n.whole(figure)
        names, gains = [f"dropout-{rate:g}" for rate in DROPOUT_RATES], []
        for e in grid:
            without = n.at(figure, "dropout-0", e)
            rows = frame[frame["series"].isin(names) & (frame["eps"] == e)]
            gains.append((e, rows.sort_values("accuracy").iloc[-1], without))
        why = "; ".join(f"λ = {e:g}: best {b['series']} {_shown(b)}, without {_shown(d)}" for e, b, d in gains)
        clear = sum(b["low"] > d["high"] for _, b, d in gains)
        return Verdict((HOLDS, DIRECTION)[clear] if clear < 2 else FAILS, why)

    return judge


def _no_gain_at_test_time(n: Numbers) -> Verdict:
    """No rate at test time is clearly above dense by five points at small eps; in direction: at one of them."""
    gains = []
    for e in SMALL:
        rows = {rate: n.at("fig2a", f"dropout-{rate:g}", e) for rate in experiments.TEST_RATES}
        best = max(rows, key=lambda rate: rows[rate]["accuracy"])
        gains.append((f"λ = {e:g}: best dropout-{best:g}", rows[best], n.at("fig2a", "dense", e)))
    why = "; ".join(f"{label} {_shown(a)}, dense {_shown(b)}" for label, a, b in gains)
    clear = sum(_clear_by_five(a, b) for _, a, b in gains)
    return Verdict((HOLDS, DIRECTION)[clear] if clear < 2 else FAILS, why)


def _low_dropout(n: Numbers) -> Verdict:
    """A low rate at test time is like dense for small eps, and below it for larger ones."""
    lowest = f"dropout-{experiments.TEST_RATES[0]:g}"
    rows = {e: (n.at("fig2a", lowest, e), n.at("fig2a", "dense", e)) for e in (0, 1, 2, 4, 8, 16)}
    why = f"{lowest} against dense, " + "; ".join(f"λ = {e:g}: {_shown(a)}, {_shown(b)}" for e, (a, b) in rows.items())
    like = all(abs(_minus(a["accuracy"], b["accuracy"])) <= 0.03 for a, b in (rows[e] for e in (0, 1, 2)))
    lost = any(a["high"] < b["low"] for a, b in (rows[e] for e in (4, 8, 16)))
    return Verdict(HOLDS if like and lost else DIRECTION if like else FAILS, why)


def _sap_costs_less_than_dropout(n: Numbers) -> Verdict:
    """SAP-100 is clearly above every rate of 0.25 or more, and within ten points of dense; in direction: the former."""
    sap, dense = n.at("fig1b", "SAP-100", 0), n.at("fig1b", "dense", 0)
    rows = [n.at("fig2a", f"dropout-{rate:g}", 0) for rate in experiments.TEST_RATES]
    why = f"SAP-100 {_shown(sap)}, dense {_shown(dense)}; dropout " + ", ".join(
        f"{rate:g}: {_shown(row)}" for rate, row in zip(experiments.TEST_RATES, rows, strict=True)
    )
    high = [row for rate, row in zip(experiments.TEST_RATES, rows, strict=True) if rate >= 0.25]
    if not all(sap["low"] > row["high"] for row in high):
        return Verdict(FAILS, why)
    return Verdict(HOLDS if _minus(dense["accuracy"], sap["accuracy"]) <= 0.1 else DIRECTION, why)


def _additive(n: Numbers) -> Verdict:
    """ADV+SAP-100 is clearly above ADV at two of the larger eps and clearly below at none, where more than guessing is
    left to one of them."""
    pairs = [(e, n.at("fig3", "ADV+SAP-100", e), n.at("fig3", "ADV", e)) for e in (4, 8, 16, 32, 64)]
    why = "; ".join(f"λ = {e:g}: {_shown(a)} against {_shown(b)}" for e, a, b in pairs)
    pairs = [(e, a, b) for e, a, b in pairs if max(a["low"], b["low"]) > GUESSING]
    clear, above = (
        sum(a["low"] > b["high"] for _, a, b in pairs), sum(a["accuracy"] > b["accuracy"] for _, a, b in pairs)
    )  # fmt: skip
    if any(a["high"] < b["low"] for _, a, b in pairs):
        return Verdict(FAILS, why)
    return Verdict(HOLDS if clear >= 2 else DIRECTION if above >= 2 else FAILS, why)


def _similar(figure: str, series: str, other: str, grid: tuple[float, ...]) -> Callable[[Numbers], Verdict]:
    """Within five points of each other at each eps; in direction: within ten."""

    def judge(n: Numbers) -> Verdict:
        pairs = [(e, n.at(figure, series, e), n.at(figure, other, e)) for e in grid]
        why = "; ".join(f"λ = {e:g}: {_shown(a)} against {_shown(b)}" for e, a, b in pairs)
        gap = max(abs(_minus(a["accuracy"], b["accuracy"])) for _, a, b in pairs)
        return Verdict(HOLDS if gap <= 0.05 else DIRECTION if gap <= 0.1 else FAILS, why)

    return judge


FOUR = ("dense", "SAP-100", "ADV", "ADV+SAP-100")


def _four(n: Numbers, e: float) -> dict[str, pd.Series]:
    return {name: n.at("fig3", name, e) for name in FOUR}


def _best_of_four(n: Numbers) -> Verdict:
    """ADV+SAP-100 is the highest of the four at each larger eps where one is clearly above guessing."""
    why, won, lost = [], [], False
    for e in (4, 8, 16, 32):
        rows = _four(n, e)
        if max(row["low"] for row in rows.values()) <= GUESSING:
            continue
        ours = rows.pop("ADV+SAP-100")
        best = max(rows, key=lambda name: rows[name]["accuracy"])
        why.append(f"λ = {e:g}: ADV+SAP-100 {_shown(ours)}, the best other is {best} {_shown(rows[best])}")
        won.append(ours["accuracy"] > rows[best]["accuracy"])
        lost |= ours["high"] < rows[best]["low"]
    verdict = HOLDS if won and all(won) else DIRECTION if 2 * sum(won) > len(won) and not lost else FAILS
    return Verdict(verdict, f"where one is clearly above {_percent(GUESSING)}, " + ("; ".join(why) or "nowhere"))


def _high_for_small_eps(n: Numbers) -> Verdict:
    """SAP-100 is within five points of the best of the four at eps 1 and 2; in direction: within ten."""
    gaps, why = [], []
    for e in (1, 2):
        rows = _four(n, e)
        best = max(rows, key=lambda name: rows[name]["accuracy"])
        gaps.append(_minus(rows[best]["accuracy"], rows["SAP-100"]["accuracy"]))
        why.append(f"λ = {e:g}: SAP-100 {_shown(rows['SAP-100'])}, the best is {best} {_shown(rows[best])}")
    return Verdict(HOLDS if max(gaps) <= 0.05 else DIRECTION if max(gaps) <= 0.1 else FAILS, "; ".join(why))


def _calibrations(n: Numbers) -> dict[str, dict[float, pd.Series]]:
    """The calibration errors of Fig. 4 with their intervals, by network and eps."""
    n.whole("fig4")
    frame = experiments.calibrations(experiments.Settings()).drop_duplicates(["series", "eps"])
    return {str(name): {row["eps"]: row for _, row in part.iterrows()} for name, part in frame.groupby("series")}


def _errors(n: Numbers) -> dict[str, dict[float, float]]:
    return {name: {e: float(row["ece"]) for e, row in rows.items()} for name, rows in _calibrations(n).items()}


def _dense_uncalibrated(n: Numbers) -> Verdict:
    errors = _errors(n)["dense"]
    why = "calibration error of dense: " + ", ".join(f"{_percent(v)} at λ = {e:g}" for e, v in errors.items())
    bad = sum(v >= UNCALIBRATED for v in errors.values())
    return Verdict(HOLDS if bad == len(errors) else DIRECTION if 2 * bad > len(errors) else FAILS, why)


UNCALIBRATED = 0.1
"""A calibration error from which on a network counts as not calibrated; the paper has no number, only pictures."""


def _others_calibrated(n: Numbers) -> Verdict:
    errors = _errors(n)
    well = [v < UNCALIBRATED for name in FOUR[1:] for v in errors[name].values()]
    why = "; ".join(
        f"{name} " + ", ".join(f"{_percent(v)} at λ = {e:g}" for e, v in errors[name].items()) for name in FOUR[1:]
    )
    return Verdict(HOLDS if all(well) else DIRECTION if 2 * sum(well) > len(well) else FAILS, why)


def _calibration_pairs(n: Numbers) -> list[tuple[str, pd.Series, pd.Series]]:
    """The errors with SAP and without it, at each eps where the network with SAP is clearly above guessing.

    One that guesses and knows it has no error at all. Raises `Missing` if there is no such eps.
    """
    rows = _calibrations(n)
    pairs = [
        (f"{name}, λ = {e:g}", rows[name][e], rows[without][e])
        for name, without in (("SAP-100", "dense"), ("ADV+SAP-100", "ADV")) for e in rows[name]
        if n.at("fig3", name, e)["low"] > GUESSING
    ]  # fmt: skip
    if not pairs:
        raise Missing("at no λ is a network with SAP clearly above guessing")
    return pairs


def _errors_of(pairs: list[tuple[str, pd.Series, pd.Series]]) -> str:
    return "; ".join(f"{label}: {_percent(a['ece'])} against {_percent(b['ece'])}" for label, a, b in pairs)


def _improves_calibration(n: Numbers) -> Verdict:
    """Under attack, and where more than guessing is left, the errors with SAP are clearly below those without it."""
    pairs = [pair for pair in _calibration_pairs(n) if pair[1]["eps"]]
    clear = sum(a["ece_high"] < b["ece_low"] for _, a, b in pairs)
    worse = any(a["ece_low"] > b["ece_high"] for _, a, b in pairs)
    verdict = HOLDS if clear == len(pairs) else DIRECTION if 2 * clear > len(pairs) and not worse else FAILS
    return Verdict(verdict, _errors_of(pairs))


def _preserves_calibration(n: Numbers) -> Verdict:
    """Where more than guessing is left, the errors with SAP are not clearly above those without it."""
    pairs = _calibration_pairs(n)
    worse = [label for label, a, b in pairs if a["ece_low"] > b["ece_high"]]
    verdict = FAILS if 2 * len(worse) >= len(pairs) else DIRECTION if worse else HOLDS
    return Verdict(verdict, ("clearly above: " + " and ".join(worse) + "; " if worse else "") + _errors_of(pairs))


def _best_calibrated(n: Numbers) -> Verdict:
    errors = _errors(n)
    winners = {}
    for e in (8, 16):
        at = {name: row[e] for name, row in errors.items()}
        winners[e] = min(at, key=at.__getitem__)
    why = "smallest calibration error: " + ", ".join(
        f"{name} ({_percent(errors[name][e])}) at λ = {e:g}" for e, name in winners.items()
    )
    won = sum(name == "ADV+SAP-100" for name in winners.values())
    return Verdict(HOLDS if won == 2 else DIRECTION if won else FAILS, why)


def _returns(n: Numbers, series: str, eps: float, game: str) -> list[float]:
    found: list[float] = n.at("table1", series, eps, game)["returns"]
    return found


def _change(n: Numbers, eps: float, game: str) -> tuple[float, float, float]:
    return relative_change(_returns(n, "SAP-100", eps, game), _returns(n, "dense", eps, game))


def _better_than_chance(n: Numbers, eps: float, game: str, player: str = "dense") -> bool:
    """Whether the agent, without SAP if not told otherwise, attacked or not, is clearly above a random policy."""
    return bool(n.at("table1", player, eps, game)["low"] > n.at("table1", "random", 0, game)["high"])


def _has_learnt(n: Numbers, game: str) -> bool:
    """Whether it is when not attacked; if not, a change says nothing."""
    return _better_than_chance(n, 0, game)


def _learnt(n: Numbers) -> tuple[list[str], str]:
    """The games whose agents have learnt, and what to say of the others; raises `Missing` for fewer than three."""
    learnt = [game for game in GAMES if _has_learnt(n, game)]
    if len(learnt) < 3:
        raise Missing(f"{len(learnt)} of the agents are clearly above a random policy, fewer than three")
    rest = [game for game in GAMES if game not in learnt]
    return learnt, f"; not judged, as not clearly above a random policy: {', '.join(rest)}" if rest else ""


def _counted(changes: Collection[tuple[float, float, float]]) -> tuple[int, int, int, int]:
    """Gains, clear gains, losses and clear losses among changes with their intervals."""
    up, down = (sum(sign * change > 0 for change, _, _ in changes) for sign in (1, -1))
    return up, sum(low > 0 for _, low, _ in changes), down, sum(high < 0 for _, _, high in changes)


def _signs(changes: Collection[tuple[float, float, float]]) -> str:
    up, gained, down, lost = _counted(changes)
    return f"{up} are gains, {gained} of them clear, and {down} losses, {lost} clear"


def _said(changes: dict[str, tuple[float, float, float]]) -> str:
    return ", ".join(f"{label} {in_percent(*change)}" for label, change in changes.items()) + " (%)"


def _games_lose_when_clean(n: Numbers) -> Verdict:
    """Of what has learnt; "clearly" in the smallest losses of the paper, 4.5 % to 16 %, is beyond thirty episodes."""
    learnt, rest = _learnt(n)
    changes = {game: _change(n, 0, game) for game in learnt}
    below, lost = sum(change < 0 for change, _, _ in changes.values()), sum(high < 0 for _, _, high in changes.values())
    gained, total = any(low > 0 for _, low, _ in changes.values()), len(changes)
    verdict = (
        HOLDS if below == total and 2 * lost >= total else DIRECTION if 2 * below > total and not gained else FAILS
    )
    return Verdict(verdict, _said(changes) + rest)


FEWEST_CHANGES = 10
"""Of fewer comparisons under attack in which somebody still plays nothing is said."""


def _games_gain_when_attacked(n: Numbers) -> Verdict:
    learnt, rest = _learnt(n)
    changes = {
        f"{game} at λ = {e:g}": _change(n, e, game) for game in learnt for e in ATTACKED
        if any(_better_than_chance(n, e, game, player) for player in ("dense", "SAP-100"))
    }  # fmt: skip
    if len(changes) < FEWEST_CHANGES:
        raise Missing(
            f"in {len(changes)} of {len(ATTACKED) * len(learnt)} comparisons one of the two is clearly above a random "
            f"policy, in fewer than ten, and nearer to one is no gain: {_said(changes)}"
        )
    up, gained, down, _ = _counted(changes.values())
    losses = {label: change for label, change in changes.items() if change[2] < 0}
    why = f"of {len(changes)} changes {_signs(changes.values())}"
    by_sign = binomtest(up, max(1, up + down), alternative="greater").pvalue < 0.05
    more = up > down and gained > len(losses)
    verdict = HOLDS if by_sign and len(losses) <= 1 else DIRECTION if more else FAILS
    return Verdict(verdict, why + (f": {_said(losses)}" if losses else "") + rest)


def _bowling(n: Numbers) -> Verdict:
    if not _has_learnt(n, "Bowling"):
        raise Missing("the agent for Bowling is not clearly above a random policy, so that a change says nothing")
    change, low, high = _change(n, 1, "Bowling")
    if not _better_than_chance(n, 1, "Bowling", "SAP-100"):
        raise Missing(
            f"SAP-100 changes the return by {in_percent(change, low, high)} %, to one that is not clearly above a "
            "random policy's, which would gain as well"
        )
    value = TABLE_1[1][GAMES.index("Bowling")]
    why = f"{in_percent(change, low, high)}, published {100 * value:+.1f} (%)"
    ours = 0 < low <= value <= high < float("inf")
    return Verdict(HOLDS if ours else DIRECTION if low > 0 else FAILS, why)


_NOISES = ("rnw", "rsw", "swp", "rna", "rsa")
"""The baselines that are random; DWP is not."""


def _best_level(n: Numbers, kind: str, eps: float) -> pd.Series:
    return max(_levels(n, kind, eps), key=lambda row: float(row["accuracy"]))


def _none_matches_sap(n: Numbers) -> Verdict:
    best = {(kind.upper(), e): _best_level(n, kind, e) for kind in _NOISES for e in SMALL}
    sap: dict[float, pd.Series] = {e: n.at("fig1b", "SAP-100", e) for e in SMALL}
    reached = [f"{p} at λ = {e:g} ({_shown(row)})" for (p, e), row in best.items() if row["high"] >= sap[e]["low"]]
    passed = [(row, sap[e]) for (_, e), row in best.items() if row["low"] > sap[e]["high"]]
    why = "SAP-100: " + ", ".join(f"{_shown(row)} at λ = {e:g}" for e, row in sap.items())
    why += "; reached by " + (", ".join(reached) if reached else "none at its best level")
    return Verdict(HOLDS if not reached else DIRECTION if not passed else FAILS, why)


def _levels(n: Numbers, kind: str, eps: float) -> list[pd.Series]:
    """A baseline's points at one eps, from its mildest level on."""
    return [n.at("fig5", Defence(kind, level).label, eps, kind.upper()) for level in LEVELS[kind]]


def _mildest(n: Numbers, kind: str, eps: float) -> pd.Series:
    return n.at("fig5", Defence(kind, LEVELS[kind][0]).label, eps, kind.upper())


def _dense_beside(n: Numbers, kind: str, eps: float) -> pd.Series:
    return n.at("fig5", "dense", eps, kind.upper())


def _worse_than_dense(n: Numbers) -> Verdict:
    """Of each method's points (level, eps), where dense is clearly above guessing, most are clearly below dense."""
    below, clearly, why = [], [], []
    for kind in ("rnw", "rsw", "rna", "rsa"):
        pairs = [(row, _dense_beside(n, kind, e)) for e in (0, *SMALL) for row in _levels(n, kind, e)]
        pairs = [(a, b) for a, b in pairs if b["low"] > GUESSING]
        lower, clear = (
            sum(a["accuracy"] < b["accuracy"] for a, b in pairs), sum(a["high"] < b["low"] for a, b in pairs)
        )  # fmt: skip
        below.append(2 * lower > len(pairs))
        clearly.append(2 * clear > len(pairs))
        why.append(f"{kind.upper()} at {lower} of {len(pairs)}, clearly at {clear}")
    verdict = HOLDS if all(clearly) else DIRECTION if all(below) else FAILS
    return Verdict(verdict, "below dense, of all levels at λ = 0, 1, 2, 4: " + "; ".join(why))


def _no_robustness(n: Numbers) -> Verdict:
    """No level of the five is clearly above dense by five points at a small eps."""
    gains = []
    for kind in _NOISES:
        for e in SMALL:
            best, dense = _best_level(n, kind, e), _dense_beside(n, kind, e)
            if _clear_by_five(best, dense):
                gains.append(f"{best['series']} at λ = {e:g}: {_shown(best)}, dense {_shown(dense)}")
    why = "clearly above dense by five points: " + ("; ".join(gains) if gains else "none at λ = 1, 2, 4")
    return Verdict(FAILS if gains else HOLDS, why)


def _mildest_like_dense(n: Numbers) -> Verdict:
    """The mildest level of each is within five points of dense at eps 0 to 4; in direction: within ten.

    Farther it says nothing, as the levels are ours.
    """
    gaps = {}
    for kind in ("rnw", "rsw", "swp", "rsa"):
        for e in (0, *SMALL):
            row = _mildest(n, kind, e)
            gaps[row["series"], e] = abs(_minus(row["accuracy"], _dense_beside(n, kind, e)["accuracy"]))
    (name, e), gap = max(gaps.items(), key=lambda item: item[1])
    why = f"the largest distance from dense is {name}'s at λ = {e:g}: {100 * gap:.1f} points"
    if gap > 0.1:
        raise Missing(f"{why}; a milder level would be nearer, and the paper's are not known")
    return Verdict(HOLDS if gap <= 0.05 else DIRECTION, why)


def _weights_noise_costs(n: Numbers) -> Verdict:
    """Under attack RNW falls from level to level, and clearly from the first to the last.

    In direction: the latter, and no level is clearly above the one before it.
    """
    grid = {e: _levels(n, "rnw", e) for e in SMALL}
    why = "; ".join(
        f"λ = {e:g}: " + ", ".join(f"{r['series']} {_percent(r['accuracy'])}" for r in rows) for e, rows in grid.items()
    )
    clear = all(rows[-1]["high"] < rows[0]["low"] for rows in grid.values())
    falling = all(a["accuracy"] > b["accuracy"] for rows in grid.values() for a, b in itertools.pairwise(rows))
    rising = any(_rises(rows) for rows in grid.values())
    return Verdict(HOLDS if clear and falling else DIRECTION if clear and not rising else FAILS, why)


def _rises(rows: list[pd.Series]) -> bool:
    """Whether a level is clearly above the one before it."""
    return any(a["high"] < b["low"] for a, b in itertools.pairwise(rows))


def _pruned_weights(n: Numbers) -> Verdict:
    """The mildest DWP is within three points of dense at eps 0 to 4, and the sparsest has lost half at 0."""
    mild = [(e, _mildest(n, "dwp", e), _dense_beside(n, "dwp", e)) for e in (0, *SMALL)]
    sparse, dense = _levels(n, "dwp", 0)[-1], mild[0][2]
    why = "; ".join(f"λ = {e:g}: {a['series']} {_shown(a)}, dense {_shown(b)}" for e, a, b in mild)
    why += f"; λ = 0: {sparse['series']} {_shown(sparse)}"
    if any(abs(_minus(a["accuracy"], b["accuracy"])) > 0.03 for _, a, b in mild):
        return Verdict(FAILS, why)
    return Verdict(HOLDS if sparse["accuracy"] <= dense["accuracy"] / 2 else DIRECTION, why)


def _pruned_weights_at_random(n: Numbers) -> Verdict:
    """Between the mildest SWP and the sparsest one is clearly above both, by however little.

    At each small eps; in direction: at one, and nowhere are all clearly below the mildest.
    """
    found, lost, why = [], False, []
    for e in SMALL:
        first, *between, last = _levels(n, "swp", e)
        best = max(between, key=lambda row: float(row["accuracy"]))
        found.append(best["low"] > max(first["high"], last["high"]))
        lost |= best["high"] < first["low"]
        why.append(f"λ = {e:g}: " + ", ".join(f"{row['series']} {_shown(row)}" for row in (first, best, last)))
    verdict = HOLDS if all(found) else DIRECTION if any(found) and not lost else FAILS
    return Verdict(verdict, "; ".join(why))


def _activations_noise_drops(n: Numbers) -> Verdict:
    """RNA loses with its level at eps 1, and from eps 0 to 1 ten points at each level that has half of the images.

    In direction: clearly from the first level to the last and from eps 0 to 1 at the first, and no level clearly rises.
    """
    clean, attacked = (
        [n.at("fig5", f"RNA-{level:g}", e, "RNA") for level in experiments.LEVELS["rna"]] for e in (0, 1)
    )
    pairs = list(zip(clean, attacked, strict=True))
    why = "λ = 0 and 1: " + ", ".join(
        f"{a['series']} {_percent(a['accuracy'])} {_percent(b['accuracy'])}" for a, b in pairs
    )
    falling = all(a["accuracy"] > b["accuracy"] for a, b in itertools.pairwise(attacked))
    clear = attacked[-1]["high"] < attacked[0]["low"] and pairs[0][1]["high"] < pairs[0][0]["low"]
    if not clear or _rises(attacked):
        return Verdict(FAILS, why)
    quick = all(_minus(a["accuracy"], b["accuracy"]) >= 0.1 for a, b in pairs if a["accuracy"] >= 0.5)
    return Verdict(HOLDS if falling and quick else DIRECTION, why)


def _transfer_hurts(n: Numbers) -> Verdict:
    clean = n.at("fig6", "dense's gradient", 0)
    return _compared([(f"λ = 0 against {e:g}", clean, n.at("fig6", "dense's gradient", e)) for e in SMALL])


_PASSES = [f"{count:,} MC pass" + "es" * (count > 1) for count in experiments.MC_SAMPLES["cifar10"]]


def _more_passes_hurt(n: Numbers) -> Verdict:
    steps = right = 0
    why, ends = [], []
    for e in SMALL:
        rows = [n.at("fig6", name, e) for name in _PASSES]
        why.append(f"λ = {e:g}: " + ", ".join(_percent(row["accuracy"]) for row in rows))
        right += sum(a["accuracy"] > b["accuracy"] for a, b in itertools.pairwise(rows))
        steps += len(rows) - 1
        ends.append((rows[0], rows[-1]))
    text = "with 1 to 1,000 passes, " + "; ".join(why)
    if right == steps and all(a["low"] > b["high"] for a, b in ends):
        return Verdict(HOLDS, text)
    return Verdict(DIRECTION if all(a["accuracy"] > b["accuracy"] for a, b in ends) else FAILS, text)


def _above_dense_at_1000(n: Numbers) -> Verdict:
    rows = [(f"λ = {e:g}", n.at("fig6", _PASSES[-1], e), n.at("fig1b", "dense", e)) for e in (1, 2)]
    return _compared(rows)


def _twenty_seconds(_: Numbers) -> Verdict:
    try:
        rows = results.benchmarks("network")
    except SapcoreError as error:
        raise Missing(str(error)) from None
    said = []
    for row in rows:
        ours = ", ".join(
            f"{entry['p50']:.2g} s in {entry['precision']}" for entry in row["table"] if entry["network"] == "SAP-100"
        )
        printed = (
            f", Algorithm 1 as printed {entry['p50']:.2g} s in {entry['precision']}, timed once"
            for entry in row["table"] if "as printed" in entry["network"]
        )  # fmt: skip
        said.append(f"{ours} on {row['provenance']['device']}" + "".join(printed))
    return Verdict(
        OPEN, "the paper's is a time of its code on GPUs that it does not name; ours takes " + "; ".join(said)
    )


def _strongest(n: Numbers, panel: str, eps: float, among: str = "", so_far: bool = False) -> pd.Series:
    """The strongest attack of the ladder and its checks whose name begins so.

    Raises `Missing` unless all are computed, or one leaves 1 %, or what is computed `so_far` is asked for.
    """
    wanted = {
        (p.series, figure) for figure in ("ladder", "ladder_checks") for p in experiments.points(figure)
        if p.panel == panel and p.cell.attack.eps == eps and p.series.startswith(among)
    }  # fmt: skip
    rows, lacking = [], None
    for name, figure in sorted(wanted):
        try:
            rows.append(n.at(figure, name, eps, panel))
        except Missing as missing:
            lacking = lacking or missing
    strongest = min(rows, key=lambda row: tuple(row[adaptive.STRONGEST_FIRST]), default=None)
    if strongest is None or (lacking and strongest["accuracy"] > 0.01 and not so_far):
        raise lacking or Missing(f"{panel} at λ = {eps:g} is not computed")
    return strongest


def _more_robust(panel: str, other: str) -> Callable[[Numbers], Verdict]:
    """Each under its strongest attack, the first is clearly above the other at each small eps, by five points, and
    above guessing.

    Where some of the attacks so far leave the first no more than that, those that are missing cannot make it more.
    """

    def judge(n: Numbers) -> Verdict:
        pairs = [(e, _strongest(n, panel, e, so_far=True), _strongest(n, other, e)) for e in SMALL]
        if any(_clear_by_five(a, b) for _, a, b in pairs):
            pairs = [(e, _strongest(n, panel, e), b) for e, _, b in pairs]
        why = "; ".join(
            f"λ = {e:g}: {_shown(a)} ({a['series']}) against {_shown(b)} ({b['series']})" for e, a, b in pairs
        )
        clean = (n.at("ladder", "no attack", 0, name) for name in (panel, other))
        why += "; without an attack " + " against ".join(map(_shown, clean))
        clear = sum(_clear_by_five(a, b) and a["low"] > GUESSING for _, a, b in pairs)
        lost = any(a["high"] < b["low"] for _, a, b in pairs)
        return Verdict(HOLDS if clear == len(pairs) else DIRECTION if clear and not lost else FAILS, why)

    return judge


def _broken(panel: str, among: str, stand_in: str = "") -> Callable[[Numbers], Verdict]:
    """One per cent of the images is left at most; in direction: no more than guessing would leave.

    Where the attack is a stand-in, its failure says nothing about the one that was claimed.
    """

    def judge(n: Numbers) -> Verdict:
        row = _strongest(n, panel, experiments.EPS_ATHALYE, among)
        if stand_in and row["accuracy"] > 0.1:
            raise Missing(f"{row['series']} leaves {_shown(row)}, and {stand_in} was not run")
        why = f"{panel} at λ = {experiments.EPS_ATHALYE:g} under {row['series']}: {_shown(row)}"
        return Verdict(HOLDS if row["accuracy"] <= 0.01 else DIRECTION if row["accuracy"] <= 0.1 else FAILS, why)

    return judge


def _their_attack_on_ours(n: Numbers) -> Verdict:
    """Through the scale, as it was run, and with the scale constant, as the authors' own code has it."""
    e = experiments.EPS_ATHALYE
    clean = n.at("ladder", "no attack", 0, "SAP-100")
    other = n.at("ladder", "single passes, through the scale", e, "Bernoulli-SAP-200")
    rows = {
        name: n.at("ladder", f"single passes, {name}", e, "SAP-100") for name in ("through the scale", "constant scale")
    }
    why = f"λ = {e:g}: SAP-100 {_shown(clean)} without an attack; " + ", ".join(
        f"{_shown(row)} {name}" for name, row in rows.items()
    )
    why += f"; Bernoulli-SAP-200 {_shown(other)} through the scale"
    withstood = [row["low"] > other["high"] and 2 * row["accuracy"] >= clean["accuracy"] for row in rows.values()]
    return Verdict(HOLDS if all(withstood) else DIRECTION if any(withstood) else FAILS, why)


def _iterative_breaks_dense(n: Numbers) -> Verdict:
    rows = [(e, n.at("fig1c", "dense vs dense", e), n.at("sec2", "dense", e)) for e in SMALL]
    return _compared([(f"λ = {e:g}, FGSM against iterative", b, a) for e, a, b in rows])


CLAIMS = (
    Claim(
        "keeps accuracy",
        "Sec. 3",
        "SAP can be put into a pretrained network and keeps its accuracy.",
        "SAP-100's interval reaches dense's at λ = 0; in direction: it loses ten points at most.",
        "fig1b",
        _keeps_accuracy,
        written=AFTER,
    ),
    Claim(
        "converges to dense",
        "Sec. 3.1, 4.1",
        "The more samples SAP draws, the more it behaves as the dense network does.",
        "From SAP-25 on the mean distance from dense falls with k, and SAP-200 loses three points at most at λ = 0; "
        "in direction: it falls.",
        "fig1b",
        _converges_to_dense,
        written=AFTER,
    ),
    Claim(
        "few samples cost accuracy",
        "Sec. 3.1, 4.1",
        "With few samples accuracy without an attack is lower.",
        "At λ = 0 accuracy rises with k, give or take two points, and SAP-5 is clearly below SAP-200.",
        "fig1b",
        _few_samples,
        written=AFTER,
    ),
    Claim(
        "few samples help under attack",
        "Sec. 4.1",
        "With few samples accuracy under attack is higher than dense's.",
        "At λ = 1, 2 and 4 some SAP-k with k below 100 is clearly above dense; in direction: at one of them, and the "
        "best clearly below at none.",
        "fig1b",
        _few_samples_help,
        written=AFTER,
    ),
    Claim(
        "SAP-100 is best",
        "Sec. 4.1",
        "The best balance of accuracy without and under attack is SAP-100's.",
        "Of all k its mean accuracy over λ = 0, 1, 2, 4 is highest; in direction: within two points of the highest.",
        "fig1b",
        _best_percent,
        written=AFTER,
    ),
    Claim(
        "dense degrades",
        "Sec. 4.1",
        "FGSM takes much of the dense network's accuracy with perturbations hardly seen.",
        "At λ = 1 it loses ten points or more; in direction: it clearly loses.",
        "sec2",
        _degrades_quickly,
        written=AFTER,
    ),
    Claim(
        "large noise",
        "Sec. 4.1",
        "Random noise of large λ makes every model nearly random.",
        "At λ = 64, the largest of the paper's grid, none is above 20 %.",
        "fig1a",
        _near_random,
        _BLANK,
        written=AFTER,
    ),
    Claim(
        "SAP-100 clean",
        "Sec. 4.1",
        f"SAP-100 gets {published('fig1b', 'SAP-100', 0)} right without an attack.",
        "The published number lies in our interval; in direction: within five points.",
        "fig1b",
        _is_the_published("fig1b", "SAP-100", 0),
        _source("fig1b", "SAP-100", 0),
        written=AFTER,
    ),
    Claim(
        "SAP-100 at 4",
        "Sec. 4.1",
        f"SAP-100 gets {published('fig1b', 'SAP-100', 4)} right under FGSM at λ = 4.",
        "The published number lies in our interval; in direction: within five points.",
        "fig1b",
        _is_the_published("fig1b", "SAP-100", 4),
        _source("fig1b", "SAP-100", 4),
        written=AFTER,
    ),
    Claim(
        "gain at 1",
        "Sec. 4.1",
        f"SAP-100 gains {_published('fig1b', 'SAP-100', 1, 'dense').text.lstrip('+')} points over dense at λ = 1.",
        "The published gain lies in the interval of ours; in direction: it gains.",
        "fig1b",
        _gain_is_the_published,
        _source("fig1b", "SAP-100", 1, "dense"),
        written=AFTER,
    ),
    Claim(
        "gain at two more",
        "Sec. 4.1",
        "SAP-100 gains over dense at two other λ, too.",
        "It is clearly above dense, and above guessing, at two or more of λ = 2, 4, 8, 16, 32, 64; in direction: at "
        "one.",
        "fig1b",
        _clearly_above_at_two("SAP-100", "dense", tuple(e for e in experiments.EPS if e > 1)),
        _BLANK,
        written=AFTER,
    ),
    Claim(
        "loss at two",
        "Sec. 4.1",
        "SAP-100 loses against dense at two λ.",
        "Dense is clearly above it, and above guessing, at two or more of λ = 0, 1, 2, 4, 8, 16, 32, 64; in direction: "
        "at one.",
        "fig1b",
        _clearly_above_at_two("dense", "SAP-100", experiments.EPS),
        _BLANK,
        written=AFTER,
    ),
    Claim(
        "dropout helps little",
        "Sec. 3.1",
        "Dropout confers little advantage over dense; judged here on the pretrained network, though the paper blames "
        "training with dropout for it.",
        "At λ = 1, 2, 4 no rate is clearly above dense by five points or more; in direction: at one λ at most.",
        "fig2a",
        _no_gain_at_test_time,
        written=AFTER,
    ),
    Claim(
        "SAP costs less than dropout",
        "Sec. 3.1",
        "SAP, unlike dropout, costs a pretrained network little accuracy.",
        "At λ = 0 SAP-100 is clearly above dropout at every rate of 0.25 or more, and loses ten points at most; "
        "in direction: clearly above.",
        "fig2a",
        _sap_costs_less_than_dropout,
        written=AFTER,
    ),
    Claim(
        "low dropout is like dense",
        "Sec. 4.1",
        "A low rate of dropout at test time is like dense for small λ, and soon loses for larger ones.",
        "At λ = 0, 1, 2 the lowest rate is within three points of dense, and at 4, 8 or 16 clearly below it; "
        "in direction: the former.",
        "fig2a",
        _low_dropout,
    ),
    Claim(
        "dropout, on",
        "Sec. 4.1",
        "Networks trained with dropout, which stays on, are no more robust than dense against FGSM.",
        "At λ = 1, 2, 4 none is clearly above the network trained as long without dropout; in direction: at one λ.",
        "fig2b",
        _no_gain("fig2b", SMALL),
    ),
    Claim(
        "dropout, off",
        "Sec. 4.1",
        "Networks trained with dropout, which is off, are no more robust than dense against FGSM.",
        "At λ = 1, 2, 4 none is clearly above the network trained as long without dropout; in direction: at one λ.",
        "fig2c",
        _no_gain("fig2c", SMALL),
    ),
    Claim(
        "ADV clean",
        "Sec. 4.1",
        f"The adversarially trained network gets {published('fig3', 'ADV', 0)} right without an attack.",
        "The published number lies in our interval; in direction: within five points.",
        "fig3",
        _is_the_published("fig3", "ADV", 0),
        _source("fig3", "ADV", 0),
    ),
    Claim(
        "ADV and ADV+SAP-100 alike",
        "Sec. 4.1",
        "For small λ ADV+SAP-100 acts as ADV does.",
        "On adversarial examples, at λ = 1 and 2, they are within five points of each other; in direction: within ten.",
        "fig3",
        _similar("fig3", "ADV+SAP-100", "ADV", (1, 2)),
        written=PART,
    ),
    Claim(
        "SAP adds to ADV",
        "Sec. 4.1, 6",
        "SAP adds to adversarial training for larger λ.",
        "Of λ = 4 to 64 where one of them is clearly above guessing, ADV+SAP-100 is clearly above ADV at two, and "
        "clearly below at none; in direction: above at two.",
        "fig3",
        _additive,
    ),
    Claim(
        "SAP-100 for smaller λ",
        "Sec. 4.1",
        "For smaller λ SAP-100 achieves high accuracy.",
        "Read as: at λ = 1 and 2 it is within five points of the best of dense, SAP-100, ADV and ADV+SAP-100; in "
        "direction: within ten.",
        "fig3",
        _high_for_small_eps,
        written=AFTER,
    ),
    Claim(
        "best for larger λ",
        "Sec. 4.1",
        "For larger λ ADV+SAP-100 is the best of the four.",
        "Of λ = 4, 8, 16 and 32 where one of the four is clearly above guessing, its accuracy is the highest at each; "
        "in direction: at most, and clearly below the highest at none.",
        "fig3",
        _best_of_four,
        written=PART,
    ),
    Claim(
        "dense is not calibrated",
        "Sec. 4.1",
        "Dense is not calibrated at any λ.",
        "Its calibration error is 10 % or more at every λ; in direction: at most.",
        "fig4",
        _dense_uncalibrated,
        written=AFTER,
    ),
    Claim(
        "the others are calibrated",
        "Sec. 4.1",
        "SAP-100, ADV and ADV+SAP-100 are well calibrated.",
        "The calibration error of each is below 10 % at every λ; in direction: at most.",
        "fig4",
        _others_calibrated,
        written=AFTER,
    ),
    Claim(
        "SAP improves calibration",
        "Sec. 6",
        "Under attack SAP improves calibration.",
        "From λ = 1 on, where the one with SAP is clearly above guessing, the errors of SAP-100 and ADV+SAP-100 are "
        "clearly below dense's and ADV's; in direction: at most λ, and clearly above at none.",
        "fig4",
        _improves_calibration,
        written=AFTER,
    ),
    Claim(
        "SAP preserves calibration",
        "Abstract",
        "SAP preserves calibration.",
        "At no λ, where the one with SAP is clearly above guessing, is the error of SAP-100 or ADV+SAP-100 clearly "
        "above dense's or ADV's there; in direction: at fewer than half of them. The error without an attack is not "
        "what it is compared with.",
        "fig4",
        _preserves_calibration,
        written=AFTER,
    ),
    Claim(
        "ADV+SAP-100 is best calibrated",
        "Sec. 4.1",
        "For larger λ ADV+SAP-100 is calibrated best.",
        "At λ = 8 and 16 its error is the smallest of the four; in direction: at one of them. At 32 all only guess.",
        "fig4",
        _best_calibrated,
        written=AFTER,
    ),
    Claim(
        "games lose without an attack",
        "Sec. 4.2",
        "Without an attack SAP-100 lowers the return in every game.",
        "Of the agents that are clearly above a random policy without an attack, all get less with SAP-100, half of "
        "them clearly; in direction: most get less, and none clearly more.",
        "table1",
        _games_lose_when_clean,
        "-4.5 to -65.8 % (Table 1)",
    ),
    Claim(
        "games gain under attack",
        "Sec. 4.2",
        "Under attack SAP-100 raises the return, with one exception.",
        "Of the changes at λ = 1 to 8 of the agents that are clearly above a random policy without an attack, where "
        "one of the two still is with it, one at most is a clear loss, and gains outnumber losses by a sign test at "
        "5 %, which takes them as independent; in direction: more gains than losses, of the clear ones too. Judged "
        "only where there are ten such changes. The paper's table leaves 5 of its 24 blank.",
        "table1",
        _games_gain_when_attacked,
        written=AFTER,
    ),
    Claim(
        "Bowling at 1",
        "Sec. 4.2",
        "The return of Bowling at λ = 1 rises more than thirtyfold.",
        "The return clearly rises, and the published change lies in our interval, which has an end; in direction: it "
        "clearly rises. Judged only if the agent is clearly above a random policy without an attack, and with SAP-100 "
        "under it.",
        "table1",
        _bowling,
        f"{100 * TABLE_1[1][-1]:+.1f} % (Table 1)",
        written=AFTER,
    ),
    Claim(
        "no baseline matches",
        "Sec. 4.3",
        "No other way to add noise matches SAP.",
        "At λ = 1, 2, 4 the best level of RNW, RSW, SWP, RNA and RSA each stays clearly below SAP-100; in direction: "
        "none is clearly above it.",
        "fig5",
        _none_matches_sap,
        written=AFTER,
    ),
    Claim(
        "baselines are below dense",
        "Sec. 4.3",
        "RNW, RSW, RNA and RSA are worse than dense at most λ.",
        "Of the points (level, λ = 0, 1, 2, 4) of each, where dense is clearly above guessing, most are clearly below "
        "dense; in direction: below.",
        "fig5",
        _worse_than_dense,
        written=PART,
    ),
    Claim(
        "no robustness by other noise",
        "App. B.1, App. B.2, App. B.4, App. B.5, App. B.6",
        "RNW, RSW, SWP, RNA and RSA offer no robustness.",
        "At λ = 1, 2, 4 none of their levels is clearly above dense by five points or more.",
        "fig5",
        _no_robustness,
        written=PART,
    ),
    Claim(
        "other noise is like dense",
        "App. B.1, App. B.2, App. B.4, App. B.6",
        "RNW, RSW, SWP and RSA behave as dense does.",
        "At λ = 0, 1, 2, 4 the mildest level of each is within five points of dense; in direction: within ten. If "
        "farther, it cannot be judged: the levels are ours, the paper's are not known, and a milder one would be "
        "nearer.",
        "fig5",
        _mildest_like_dense,
        written=AFTER,
    ),
    Claim(
        "noise on weights costs",
        "App. B.1",
        "The larger the noise on the weights, the lower the accuracy under attack.",
        "At λ = 1, 2, 4 RNW falls from level to level, and clearly from the first to the last; in direction: the "
        "latter, and no level is clearly above the one before it.",
        "fig5",
        _weights_noise_costs,
        written=AFTER,
    ),
    Claim(
        "pruned weights",
        "App. B.3",
        "With few weights pruned DWP is like dense, also under attack; with many it loses much without one.",
        "At λ = 0, 1, 2, 4 DWP-80 is within three points of dense, and at 0 the sparsest has lost half of the "
        "accuracy; in direction: the former.",
        "fig5",
        _pruned_weights,
        written=AFTER,
    ),
    Claim(
        "weights pruned at random",
        "App. B.4",
        "The more weights SWP prunes, the better it gets for small λ, marginally, and then worse again.",
        "At λ = 1, 2, 4 a level between the mildest and the sparsest is clearly above both; "
        "in direction: at one of them, and at none are all clearly below the mildest. How much better is not asked.",
        "fig5",
        _pruned_weights_at_random,
        written=AFTER,
    ),
    Claim(
        "noisy activations drop",
        "App. B.5",
        "With noise on the activations accuracy drops quickly, with λ and with the noise.",
        "At λ = 1 accuracy falls from level to level, clearly from the first to the last, and every level that has "
        "50 % at λ = 0 loses ten points; in direction: clearly from the first to the last, and from λ = 0 to 1 at the "
        "first, and no level is clearly above the one before it.",
        "fig5",
        _activations_noise_drops,
        written=AFTER,
    ),
    Claim(
        "dense's examples hurt SAP",
        "Sec. 4.4",
        "Examples made on dense lower SAP-100's accuracy.",
        "It is clearly lower at λ = 1, 2, 4 than at 0; in direction: lower.",
        "fig6",
        _transfer_hurts,
    ),
    Claim(
        "more passes hurt more",
        "Sec. 4.4",
        "The more Monte Carlo passes the adversary takes, the lower the accuracy.",
        "At λ = 1, 2, 4 accuracy falls from each number of passes to the next, and clearly from 1 to 1,000; "
        "in direction: from 1 to 1,000.",
        "fig6",
        _more_passes_hurt,
        written=PART,
    ),
    Claim(
        "above dense at 1,000 passes",
        "Sec. 4.4",
        "Even against 1,000 passes SAP-100 is above dense for two small λ.",
        "It is clearly above at λ = 1 and 2; in direction: above.",
        "fig6",
        _above_dense_at_1000,
        "the claim; which two λ is lost from the copies that we could read",
    ),
    Claim(
        "20 seconds",
        "Sec. 4.4",
        "A backward pass of SAP-100 over 512 examples takes 20 seconds on 8 GPUs.",
        "None: a time holds for a machine and a code, and the paper's are not to be had. Ours stands beside it.",
        "network",
        _twenty_seconds,
        "20 s (the paper's text, Sec. 4.4)",
        written=AFTER,
    ),
    Claim(
        "the iterative attack is stronger",
        "Sec. 4.5",
        "On dense the iterative attack is stronger than FGSM.",
        "At λ = 1, 2, 4 accuracy is clearly lower; in direction: lower.",
        "fig1c",
        _iterative_breaks_dense,
        "implied: the text calls it the more sophisticated technique",
        written=AFTER,
    ),
    Claim(
        "SAP-100 holds out",
        "Sec. 4.5",
        "Under the iterative attack SAP-100 is above dense, each its own adversary.",
        "It is clearly above at λ = 1, 2, 4; in direction: above.",
        "fig1c",
        _above("fig1c", "SAP-100 vs SAP-100", "dense vs dense", SMALL),
        "implied: the text has accuracies, which are lost from the copies that we could read",
        written=AFTER,
    ),
    Claim(
        "robust",
        "Abstract",
        "SAP makes a pretrained network more robust to adversarial examples.",
        "At λ = 1, 2, 4 SAP-100 under the strongest attack of chapter 11 is clearly above dense under its strongest, "
        "by five points or more, and above guessing; in direction: at one of them, and clearly below at none.",
        "ladder",
        _more_robust("SAP-100", "dense"),
        written=AFTER,
    ),
    Claim(
        "robust with ADV",
        "Abstract, Sec. 6",
        "SAP adds to adversarial training, against an adversary who knows it.",
        "At λ = 1, 2, 4 ADV+SAP-100 under the strongest attack of chapter 11 is clearly above ADV under its strongest, "
        "by five points or more, and above guessing; in direction: at one of them, and clearly below at none.",
        "ladder",
        _more_robust("ADV+SAP-100", "ADV"),
        written=AFTER,
    ),
    Claim(
        "dense's iterates hurt more",
        "Sec. 4.5",
        "Iterates made on dense hurt SAP-100 more than those made on itself.",
        "SAP-100 is clearly above against itself at λ = 1, 2, 4; in direction: above.",
        "fig1c",
        _above("fig1c", "SAP-100 vs SAP-100", "SAP-100 vs dense", SMALL),
        written=AFTER,
    ),
    Claim(
        "broken at 0.031",
        "Athalye et al. (2018)",
        "At ε = 0.031 SAP's accuracy is 0 %, by 500 steps through its scale; said of their own SAP, which keeps each "
        "unit by a coin.",
        "Under it (single passes) Bernoulli-SAP-200 keeps 1 % at most; in direction: 10 %, as guessing does.",
        "ladder",
        _broken("Bernoulli-SAP-200", "single passes, through the scale"),
        "0 % (Athalye et al. 2018)",
        written=PART,
        later=True,
    ),
    Claim(
        "that attack, SAP as published",
        "Dhillon and Carlini (2020)",
        "Their attack, which was run on a weaker SAP, is not effective against SAP as published.",
        "Under single passes at ε = 0.031, through the scale and with the scale constant, SAP-100 is clearly above "
        "Bernoulli-SAP-200 and keeps half of its accuracy without an attack; in direction: under one of the two.",
        "ladder",
        _their_attack_on_ours,
        written=PART,
        later=True,
    ),
    Claim(
        "BPDA breaks SAP as published",
        "Dhillon and Carlini (2020)",
        "A new use of BPDA brings SAP as published to nearly nothing.",
        "At ε = 0.031 a BPDA of the ladder leaves SAP-100 1 % at most; in direction: 10 %, as by guessing.",
        "ladder",
        _broken("SAP-100", "BPDA"),
        "0.1 % (as recalled, unverified: not judged)",
        written=PART,
        later=True,
    ),
    Claim(
        "broken without gradients",
        "Li et al. (2019)",
        'A black-box attack breaks the SAP of "Obfuscated Gradients" at ε = 0.031; ours is Square, theirs was NATTACK.',
        "Under Square Bernoulli-SAP-200 keeps 1 % at most; in direction: 10 %, as by guessing. If it keeps more, "
        "NATTACK itself would have to be run.",
        "ladder",
        _broken("Bernoulli-SAP-200", "Square", "NATTACK"),
        "100 % success (Li et al. 2019)",
        written=PART,
        later=True,
    ),
)
