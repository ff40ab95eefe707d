"""What the ladder of attacks says: the strongest attack for each eps, and the checks that a sound evaluation passes.

The checks are those of Athalye et al. (2018, Sec. 3.1) and Carlini et al. (2019). "Clearly" means that two 95 %
intervals do not touch.
"""

import itertools

import pandas as pd

from sapcore.experiments import EPS_UNBOUNDED, REACH

BLACK_BOX = "Square (black box)"
KNOWS_NOTHING = ("no attack", "random noise")
TRANSFERRED = ("FGSM on dense", "iterative on dense")
STRONGEST_FIRST = ["accuracy", "gradients"]
"""Of attacks that leave the same the cheapest is first."""
PASS, SO_FAR, FAIL, OPEN = "pass", "pass, so far", "fail", "not computed"


def strongest(frame: pd.DataFrame) -> pd.DataFrame:
    """Of `experiments.ladder`'s and its checks' rows, for each defence and eps that with the lowest accuracy, and of
    several the cheapest.

    Accuracy is, as everywhere, that of the mean softmax over fresh passes, and `gradients` says what it costs. The
    columns of the two other ways of counting hold what these would claim, each by the attack that is strongest by it.
    """
    attacked = frame[(frame["eps"] > 0) & (frame["eps"] < EPS_UNBOUNDED)].reset_index(drop=True)
    if attacked.empty:
        return attacked
    groups = attacked.groupby(["panel", "eps"], sort=False)
    ranked = attacked.sort_values(STRONGEST_FIRST, kind="stable").drop_duplicates(["panel", "eps"])
    found = attacked[["panel", "eps"]].drop_duplicates().merge(ranked, how="left")[attacked.columns]
    for counted in ("single_pass", "every_pass"):
        found[counted] = groups[counted].min().to_numpy()
    return found


def checks(frame: pd.DataFrame, steps: pd.DataFrame, fgsm: pd.DataFrame, iterative: pd.DataFrame) -> pd.DataFrame:
    """Each sanity check of each defence: columns panel, check, verdict and why.

    The verdict is pass, "pass, so far" where `.attrs["lacking"]` of its frame has cells of the defence, fail, or "not
    computed".

    frame: `experiments.ladder`'s rows; steps: those of `experiments.ladder_checks`; fgsm, iterative: those of Fig. 1b
    and 1c, whose more images tell the paper's own attacks apart better where they have the defence.
    """
    rows = []
    for panel in dict.fromkeys([*frame["panel"], *steps["panel"]]):
        rungs, more = frame[frame["panel"] == panel], steps[steps["panel"] == panel]
        usual = more[more["steps"] * more["step"] < 1.01 * REACH * more["eps"]]
        own = pd.concat([
            fgsm[fgsm["series"] == panel].assign(series="FGSM"),
            iterative[iterative["series"] == f"{panel} vs {panel}"].assign(series="iterative"),
        ])  # fmt: skip
        whole = own["series"].nunique() == 2
        own = own if whole else rungs
        lacks, lacks_more = (any(panel == p for p, _ in part.attrs.get("lacking", ())) for part in (frame, steps))
        for check, lacking, (verdict, why) in (
            ("More and finer steps never help the defence.", lacks_more, _more(usual, "steps", "gradient_passes")),
            (
                "More steps of the same size never help the defence.", lacks_more,
                _more(more, "steps", "gradient_passes", "step"),
            ),
            ("More passes per gradient never help the defence.", lacks_more, _more(usual, "gradient_passes", "steps")),
            ("A larger λ never helps the defence.", lacks, _larger_eps(rungs)),
            ("With unbounded λ nothing is left.", False, _unbounded(more)),
            (
                "The best attack of many steps is no weaker than one step.", lacks,
                _no_weaker(rungs, _iterated(rungs), ("FGSM", "FGSM on dense")),
            ),
            (
                "The paper's iterative attack is no weaker than its FGSM.", lacks and not whole,
                _no_weaker(own, ["iterative"], ("FGSM",)),
            ),
            ("Attacks do no less than random noise.", lacks, _all_no_weaker(rungs, "random noise")),
            (
                "The best white-box attack is no weaker than a black-box or transferred one.", lacks,
                _no_weaker(rungs, _white_box(rungs), (BLACK_BOX, *TRANSFERRED)),
            ),
        ):  # fmt: skip
            verdict = SO_FAR if lacking and verdict == PASS else verdict
            rows.append({"panel": panel, "check": check, "verdict": verdict, "why": why})
    return pd.DataFrame(rows, columns=["panel", "check", "verdict", "why"])


def _white_box(rungs: pd.DataFrame) -> list[str]:
    return [str(s) for s in rungs["series"].unique() if s not in (BLACK_BOX, *TRANSFERRED, *KNOWS_NOTHING)]


def _iterated(rungs: pd.DataFrame) -> list[str]:
    return [str(name) for name in rungs.loc[rungs["steps"] > 1, "series"].unique() if name != BLACK_BOX]


def _shown(row: pd.Series) -> str:
    return f"{100 * row['accuracy']:.1f} %"


def _clearly_above(a: pd.Series, b: pd.Series) -> bool:
    return bool(a["low"] > b["high"])


def _more(rows: pd.DataFrame, column: str, *fixed: str) -> tuple[str, str]:
    """With ever more of one number, and the others as they are, accuracy never clearly rises."""
    why, verdict = [], OPEN
    for (e, *_), part in rows[rows["eps"] < EPS_UNBOUNDED].sort_values(column).groupby(["eps", *fixed]):
        found = [row for _, row in part.iterrows()]
        if len(found) < 2:
            continue
        verdict = PASS if verdict == OPEN else verdict
        if any(_clearly_above(b, a) for a, b in itertools.combinations(found, 2)):
            verdict = FAIL
        name = min(part["series"], key=len)
        why.append(f"{name} at λ = {e:g}: " + ", ".join(f"{_shown(row)} with {row[column]}" for row in found))
    return verdict, "; ".join(why)


def _larger_eps(rungs: pd.DataFrame) -> tuple[str, str]:
    clean = rungs[rungs["series"] == "no attack"]
    broken, compared = [], 0
    for name, part in rungs[rungs["series"] != "no attack"].groupby("series", sort=False):
        rows = [row for _, row in pd.concat([clean, part.sort_values("eps")]).iterrows()]
        for a, b in itertools.combinations(rows, 2):
            compared += 1
            if _clearly_above(b, a):
                broken.append(f"{name}: {_shown(a)} at {a['eps']:g}, {_shown(b)} at {b['eps']:g}")
    return _unless(broken, compared, "pairs of λ")


def _unbounded(rows: pd.DataFrame) -> tuple[str, str]:
    rows = rows[rows["eps"] == EPS_UNBOUNDED]
    if rows.empty:
        return OPEN, ""
    row = rows.iloc[0]
    return (PASS if row["correct"] == 0 else FAIL), f"{row['correct']} of {row['images']} images at λ = {row['eps']:g}"


def _no_weaker(rungs: pd.DataFrame, strong: list[str], weak: tuple[str, ...]) -> tuple[str, str]:
    """At each eps the best of the strong attacks leaves no more, clearly, than the best of the weak ones.

    The others of the strong that do are named, and fail nothing.
    """
    why, verdict = [], OPEN
    for e, part in rungs[rungs["eps"] > 0].groupby("eps"):
        ours, theirs = (part[part["series"].isin(names)].sort_values("accuracy") for names in (strong, weak))
        if ours.empty or theirs.empty:
            continue
        a, b = ours.iloc[0], theirs.iloc[0]
        if _clearly_above(a, b):
            verdict = FAIL
        elif verdict == OPEN:
            verdict = PASS
        weaker = [f"{row['series']} {_shown(row)}" for _, row in ours.iloc[1:].iterrows() if _clearly_above(row, b)]
        why.append(
            f"λ = {e:g}: {_shown(a)} ({a['series']}) against {_shown(b)} ({b['series']})"
            + (f", clearly weaker: {', '.join(weaker)}" if weaker else "")
        )
    return verdict, "; ".join(why)


def _all_no_weaker(rungs: pd.DataFrame, weak: str) -> tuple[str, str]:
    """No attack at any eps leaves clearly more than `weak` does."""
    broken, compared = [], 0
    for e, part in rungs[rungs["eps"] > 0].groupby("eps"):
        for _, b in part[part["series"] == weak].iterrows():
            for _, a in part[part["series"] != weak].iterrows():
                compared += 1
                if _clearly_above(a, b):
                    broken.append(f"{a['series']} at λ = {e:g}: {_shown(a)} against {_shown(b)}")
    return _unless(broken, compared, "pairs of attacks")


def _unless(broken: list[str], compared: int, pairs: str) -> tuple[str, str]:
    if not compared:
        return OPEN, ""
    return (FAIL, "; ".join(broken)) if broken else (PASS, f"no violation in {compared} {pairs}")
