"""The strongest attack is the lowest number, and every sanity check can pass, fail and say that nothing is there."""

import pandas as pd
import pytest

from sapcore import adaptive
from sapcore.adaptive import FAIL, OPEN, PASS, SO_FAR

COLUMNS = (
    "panel", "series", "eps", "steps", "step", "gradient_passes", "accuracy", "low", "high", "correct", "images",
    "single_pass", "every_pass", "gradients",
)  # fmt: skip


def rows(*given: tuple[str, float, float], panel: str = "SAP-100", steps: dict[str, int] | None = None) -> pd.DataFrame:
    """Attacks as (series, eps, accuracy) on 200 images, with intervals of five points to each side."""
    made = [
        (
            panel,
            name,
            e,
            (steps or {}).get(name, 40),
            2.5 * e / max(1, (steps or {}).get(name, 40)),
            10,
            a,
            max(0, a - 0.05),
            min(1, a + 0.05),
            round(200 * a),
            200,
            a - 0.01,
            a / 2,
            10 * (steps or {}).get(name, 40),
        )
        for name, e, a in given
    ]
    return pd.DataFrame(made, columns=COLUMNS)


def checks(
    frame: pd.DataFrame, more: pd.DataFrame, fgsm: pd.DataFrame | None = None, iterative: pd.DataFrame | None = None
) -> pd.DataFrame:
    return adaptive.checks(frame, more, rows() if fgsm is None else fgsm, rows() if iterative is None else iterative)


def verdict(check: str, frame: pd.DataFrame, more: pd.DataFrame | None = None) -> str:
    found = checks(frame, rows() if more is None else more)
    (row,) = found[found["check"].str.contains(check)].to_dict(orient="records")
    return str(row["verdict"])


def test_the_strongest_attack_is_the_lowest_number_of_each_defence_and_eps() -> None:
    frame = pd.concat([
        rows(("no attack", 0, 0.6), ("FGSM", 4, 0.5), ("PGD", 4, 0.2), ("BPDA", 4, 0.2), ("PGD", 8, 0.3)),
        rows(("FGSM", 4, 0.1), ("PGD", 4, 0.2), panel="ADV+SAP-100"),
    ], ignore_index=True)  # fmt: skip
    found = adaptive.strongest(frame)
    assert set(zip(found["panel"], found["eps"], found["series"], strict=True)) == {
        ("ADV+SAP-100", 4, "FGSM"), ("SAP-100", 4, "PGD"), ("SAP-100", 8, "PGD"),
    }  # fmt: skip
    assert adaptive.strongest(rows(("no attack", 0, 0.6), ("BPDA", 255, 0.0))).empty
    frame.loc[2, "gradients"] = 500
    again = adaptive.strongest(frame)
    assert list(again["series"]) == ["BPDA", "PGD", "FGSM"], "of two alike the cheaper"
    assert list(again["panel"]) == ["SAP-100", "SAP-100", "ADV+SAP-100"]
    frame.loc[1, ["single_pass", "every_pass"]] = [0.02, 0.03]  # FGSM is strongest by these, not by the mean output
    (row,) = adaptive.strongest(frame).query("panel == 'SAP-100' and eps == 4").to_dict(orient="records")
    assert (row["series"], row["accuracy"], row["single_pass"], row["every_pass"]) == ("BPDA", 0.2, 0.02, 0.03)


LADDER: list[tuple[str, list[tuple[str, float, float]], str]] = [
    ("larger λ", [("no attack", 0, 0.6), ("PGD", 1, 0.5), ("PGD", 4, 0.2)], PASS),
    ("larger λ", [("no attack", 0, 0.6), ("PGD", 1, 0.3), ("PGD", 4, 0.38)], PASS),
    ("larger λ", [("no attack", 0, 0.6), ("PGD", 1, 0.3), ("PGD", 4, 0.5)], FAIL),
    ("larger λ", [("no attack", 0, 0.6), ("noise", 1, 0.8)], FAIL),
    ("larger λ", [], OPEN),
    ("many steps", [("FGSM", 4, 0.5), ("PGD", 4, 0.2)], PASS),
    ("many steps", [("FGSM", 4, 0.2), ("PGD", 4, 0.5)], FAIL),
    ("many steps", [("FGSM", 4, 0.2), ("PGD", 4, 0.1), ("FGSM", 8, 0.1), ("PGD", 8, 0.4)], FAIL),
    ("many steps", [("PGD", 4, 0.5)], OPEN),
    ("random noise", [("random noise", 4, 0.6), ("PGD", 4, 0.2), ("FGSM", 4, 0.6)], PASS),
    ("random noise", [("random noise", 4, 0.6), ("PGD", 4, 0.2), ("FGSM", 4, 0.8)], FAIL),
    ("random noise", [("PGD", 4, 0.2)], OPEN),
    ("black-box", [("Square (black box)", 4, 0.3), ("PGD", 4, 0.35), ("random noise", 4, 0.1)], PASS),
    ("black-box", [("iterative on dense", 4, 0.3), ("PGD", 4, 0.35)], PASS),
    ("black-box", [("iterative on dense", 4, 0.2), ("FGSM on dense", 4, 0.5), ("PGD", 4, 0.35)], FAIL),
    ("paper's iterative", [("FGSM", 4, 0.5), ("iterative", 4, 0.45), ("PGD", 4, 0.1)], PASS),
    ("paper's iterative", [("FGSM", 4, 0.2), ("iterative", 4, 0.45), ("PGD", 4, 0.1)], FAIL),
    ("paper's iterative", [("FGSM", 4, 0.2), ("PGD", 4, 0.1)], OPEN),
    ("black-box", [("Square (black box)", 4, 0.3), ("PGD", 4, 0.5), ("random noise", 4, 0.1)], FAIL),
    ("black-box", [("random noise", 4, 0.1), ("PGD", 4, 0.5)], OPEN),
]


@pytest.mark.parametrize(("check", "given", "expected"), LADDER)
def test_each_check_of_the_ladder(check: str, given: list[tuple[str, float, float]], expected: str) -> None:
    more = rows(("BPDA", 4, 0.5))  # so that the defence is there
    assert verdict(check, rows(*given, steps={"FGSM": 0, "random noise": 0, "no attack": 0}), more) == expected


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [([0.5, 0.4, 0.2], PASS), ([0.2, 0.21, 0.29], PASS), ([0.2, 0.1, 0.35], FAIL), ([0.5], OPEN), ([], OPEN)],
)
def test_more_steps_may_not_help(accuracies: list[float], expected: str) -> None:
    parts = [rows(("BPDA", 4, a), steps={"BPDA": 10**i}) for i, a in enumerate(accuracies)]
    assert verdict("finer steps", rows(("PGD", 4, 0.1)), pd.concat([rows(), *parts])) == expected
    for part in parts:
        part["step"] = 20
    assert verdict("same size", rows(("PGD", 4, 0.1)), pd.concat([rows(), *parts])) == expected
    assert verdict("finer steps", rows(("PGD", 4, 0.1)), pd.concat([rows(), *parts])) == OPEN


def test_steps_are_compared_at_one_eps_only() -> None:
    parts = [
        rows(("BPDA", e, a), steps={"BPDA": n}) for e, n, a in ((8, 1, 0.9), (8, 4, 0.8), (32, 1, 0.2), (32, 4, 0))
    ]
    assert verdict("finer steps", rows(("PGD", 8, 0.1)), pd.concat(parts)) == PASS
    assert verdict("same size", rows(("PGD", 8, 0.1)), pd.concat(parts)) == OPEN
    parts.append(rows(("BPDA", 32, 0.5), steps={"BPDA": 10}))
    assert verdict("finer steps", rows(("PGD", 8, 0.1)), pd.concat(parts)) == FAIL


@pytest.mark.parametrize(("accuracy", "expected"), [(0.5, PASS), (0.2, PASS), (0.8, FAIL)])
def test_more_passes_may_not_help(accuracy: float, expected: str) -> None:
    more = pd.concat([rows(("BPDA", 4, 0.5)), rows(("BPDA", 4, accuracy)).assign(gradient_passes=40)])
    assert verdict("More passes", rows(("PGD", 4, 0.1)), more) == expected
    assert verdict("finer steps", rows(("PGD", 4, 0.1)), more) == OPEN
    assert verdict("More passes", rows(("PGD", 4, 0.1)), more[:1]) == OPEN


@pytest.mark.parametrize(("accuracy", "expected"), [(0.0, PASS), (0.005, FAIL), (0.5, FAIL)])
def test_without_a_bound_nothing_may_be_left(accuracy: float, expected: str) -> None:
    more = rows(("BPDA", 4, 0.5), ("BPDA", 255, accuracy))
    assert verdict("unbounded", rows(), more) == expected
    assert verdict("unbounded", rows(), more[:1]) == OPEN


def test_every_defence_has_every_check_with_its_numbers() -> None:
    frame = pd.concat([rows(("FGSM", 4, 0.5), ("PGD", 4, 0.2), panel=n, steps={"FGSM": 0}) for n in ("a", "b")])
    found = checks(frame, rows())
    assert found.groupby("panel").size().to_dict() == {"a": 9, "b": 9}
    assert found[found["check"].str.contains("many steps")]["why"].unique().tolist() == [
        "λ = 4: 20.0 % (PGD) against 50.0 % (FGSM)"
    ]


def test_of_many_attacks_those_that_are_weaker_are_named() -> None:
    frame = rows(("iterative on dense", 4, 0.2), ("iterative", 4, 0.5), ("PGD", 4, 0.25), ("BPDA", 4, 0.1))
    found = checks(frame, rows()).set_index("check")
    (row,) = found[found.index.str.contains("black-box")].to_dict(orient="records")
    assert row["verdict"] == PASS
    assert row["why"] == "λ = 4: 10.0 % (BPDA) against 20.0 % (iterative on dense), clearly weaker: iterative 50.0 %"


def test_a_check_whose_cells_are_not_all_there_passes_so_far() -> None:
    frame = pd.concat([rows(("no attack", 0, 0.6), ("PGD", 4, 0.3), panel=panel) for panel in ("a", "b")])
    parts = [
        rows(("BPDA", 4, 0.5), ("BPDA", 255, 0), panel=panel, steps={"BPDA": n}) for panel in "ab" for n in (4, 40)
    ]
    more = pd.concat(parts)
    frame.attrs["lacking"], more.attrs["lacking"] = {("a", 8)}, {("b", 8)}
    found = checks(frame[frame["series"] != "FGSM"], more).set_index(["panel", "check"])["verdict"]
    assert found["a", "A larger λ never helps the defence."] == SO_FAR
    assert found["b", "A larger λ never helps the defence."] == PASS
    assert found["a", "More and finer steps never help the defence."] == PASS
    assert found["b", "More and finer steps never help the defence."] == SO_FAR
    assert found["b", "With unbounded λ nothing is left."] == PASS
    more.loc[more["steps"] == 40, ["accuracy", "low", "high"]] = [0.9, 0.85, 0.95]
    found = checks(frame, more).set_index(["panel", "check"])["verdict"]
    assert found["b", "More and finer steps never help the defence."] == FAIL


@pytest.mark.parametrize(("accuracy", "expected"), [(0.3, PASS), (0.5, FAIL)])
def test_the_papers_attacks_are_compared_on_the_images_of_its_figures(accuracy: float, expected: str) -> None:
    """Where these have the defence: the ladder's own few images say the opposite here."""
    frame = rows(("FGSM", 4, 0.2), ("iterative", 4, 0.3 if expected == FAIL else 0.9), ("PGD", 4, 0.1))
    fgsm = rows(("SAP-100", 4, 0.3), ("dense", 4, 0.1), panel="")
    iterative = rows(("SAP-100 vs SAP-100", 4, accuracy), ("SAP-100 vs dense", 4, 0.0), panel="")
    found = checks(frame, rows(), fgsm, iterative)
    (row,) = found[found["check"].str.contains("paper's iterative")].to_dict(orient="records")
    assert row["verdict"] == expected
    assert row["why"] == f"λ = 4: {100 * accuracy:.1f} % (iterative) against 30.0 % (FGSM)"
