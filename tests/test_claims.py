"""Every claim of the paper has a rule, and its verdict follows from the numbers in the store and from nothing else."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sapcore import claims, experiments, results
from sapcore.claims import AFTER, BEFORE, CLAIMS, DIRECTION, FAILS, HOLDS, OPEN, PART, PLACES, Claim, Numbers, judged
from sapcore.errors import SapcoreError
from sapcore.experiments import FIGURES, Settings
from sapcore.paths import ROOT, results_root
from sapcore.results import Defence
from sapcore.rl.environments import GAMES

BY_NAME = {claim.name: claim for claim in CLAIMS}
PLACE = r"((Abstract|Sec\. \d(\.\d)?|App\. B\.\d|\d(\.\d)?)(, )?)+|[A-Z]\w+ (et al\.|and [A-Z]\w+) \(\d{4}\)"
Points = dict[tuple[str, float], float]


def numbers(monkeypatch: pytest.MonkeyPatch, points: Points, panel: str = "", margin: float = 0.02) -> Numbers:
    """Every figure shows these accuracies by (series, eps), with intervals of this half-width."""
    rows = [
        {"panel": panel, "series": series, "eps": eps, "accuracy": a, "low": a - margin, "high": a + margin,
         "returns": [a - margin, a, a + margin], "gradients": 1}
        for (series, eps), a in points.items()
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["panel", "series", "eps", "accuracy", "low", "high", "returns", "gradients"])
    frame.attrs = {"missing": [], "settings": Settings()}
    ASKED.clear()

    def stored(figure: str, settings: Settings) -> pd.DataFrame:
        ASKED.append(figure)
        return frame

    monkeypatch.setattr(experiments, "stored", stored)
    return Numbers()


ASKED: list[str] = []
"""The figures that `numbers` was asked for last."""


def test_there_are_twenty_claims_or_more_each_with_its_place_rule_and_chapter() -> None:
    assert len(BY_NAME) == len(CLAIMS) >= 20
    for claim in CLAIMS:
        assert re.fullmatch(PLACE, claim.place), claim.place
        assert claim.sentence.endswith(".")
        assert claim.rule.endswith(".")
        assert claim.figure in PLACES
        assert claim.written in (BEFORE, PART, AFTER)


def test_every_place_is_in_the_book() -> None:
    """The table of the games has a heading for an anchor, the others have their figures' names."""
    assert PLACES.keys() - {"network"} == {claim.figure for claim in CLAIMS} - {"network"}
    assert PLACES.keys() - {"network"} <= FIGURES.keys()
    for chapter, anchor in PLACES.values():
        text = (ROOT / "book" / f"{chapter}.ipynb").read_text()
        assert f'"{anchor}"' in text or f"# {anchor.replace('-', ' ').capitalize()}" in text


def test_all_sections_with_claims_are_covered() -> None:
    places = " ".join(claim.place for claim in CLAIMS)
    assert all(section in places for section in ("Abstract", "3.1", "4.1", "4.2", "4.3", "4.4", "4.5", "App. B"))


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.figure in FIGURES], ids=lambda claim: claim.name)
def test_without_numbers_no_claim_is_judged(claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = numbers(monkeypatch, {})
    empty.frame("fig1b").attrs["missing"] = ["everything"]
    verdict = judged(claim, empty)
    assert verdict.verdict == OPEN
    assert "not computed" in verdict.why


def test_verdicts_follow_from_the_files_they_name() -> None:
    """Arithmetic of its own on the files of three claims."""
    card = claims.scorecard().set_index("name")
    assert sum(claims.counts(card).values()) == len(CLAIMS)

    def stored(name: str) -> list[dict[str, Any]]:
        files = [json.loads((results_root() / cell).read_text()) for cell in card["cells"][name]]
        return [{**file["result"], "eps": file["spec"]["attack"]["eps"], **file["spec"]["defence"]} for file in files]

    of = {(r["kind"], r["eps"]): r for r in stored("gain at two more")}
    assert sorted(of) == [(kind, e) for kind in ("dense", "sap") for e in (2, 4, 8, 16, 32, 64)]
    clear = sum(of["sap", e]["low"] > of["dense", e]["high"] for e in (2, 4, 8, 16, 32, 64))
    assert (clear >= 2) == (card["verdict"]["gain at two more"] == HOLDS)

    (clean,) = stored("SAP-100 clean")
    assert (clean["kind"], clean["level"], clean["eps"], clean["images"]) == ("sap", 100, 0, 10_000)
    distance = abs(clean["correct"] / clean["images"] - 0.83)
    assert (distance > 0.05) == (card["verdict"]["SAP-100 clean"] == FAILS)

    low = {(r["level"], r["eps"]): r["accuracy"] for r in stored("low dropout is like dense")}
    assert {level for level, _ in low} == {None, 0.01}
    like = all(abs(low[0.01, e] - low[None, e]) <= 0.03 for e in (0, 1, 2))
    assert like == (card["verdict"]["low dropout is like dense"] != FAILS)


# Which networks by their training, which defences (or how many of a kind), which attacks and which eps.
READ = {
    "keeps accuracy": "dense; dense, SAP-100; none; 0",
    "converges to dense": "dense; dense, 6 sap; fgsm, none; 0 1 2 4 8 16 32 64",
    "few samples cost accuracy": "dense; 6 sap; none; 0",
    "few samples help under attack": "dense; dense, 4 sap; fgsm; 1 2 4",
    "SAP-100 is best": "dense; 6 sap; fgsm, none; 0 1 2 4",
    "dense degrades": "dense; dense; fgsm, none; 0 1 2",
    "large noise": "dense; dense, 6 sap; noise, none; 0 1 2 4 8 16 32 64",
    "SAP-100 clean": "dense; SAP-100; none; 0",
    "SAP-100 at 4": "dense; SAP-100; fgsm; 4",
    "gain at 1": "dense; dense, SAP-100; fgsm; 1",
    "gain at two more": "dense; dense, SAP-100; fgsm; 2 4 8 16 32 64",
    "loss at two": "dense; dense, SAP-100; fgsm, none; 0 1 2 4 8 16 32 64",
    "dropout helps little": "dense; dense, 6 dropout; fgsm; 1 2 4",
    "SAP costs less than dropout": "dense; dense, 6 dropout, SAP-100; none; 0",
    "low dropout is like dense": "dense; dense, dropout-0.01; fgsm, none; 0 1 2 4 8 16",
    "dropout, on": "dense, dropout-0, dropout-0.05, dropout-0.1, dropout-0.25; dense, 3 dropout; fgsm, none; "
    "0 1 2 4 8 16 32 64",
    "dropout, off": "dense, dropout-0, dropout-0.05, dropout-0.1, dropout-0.25; dense; fgsm, none; 0 1 2 4 8 16 32 64",
    "ADV clean": "adv; dense; none; 0",
    "ADV and ADV+SAP-100 alike": "adv; dense, SAP-100; fgsm; 1 2",
    "SAP adds to ADV": "adv; dense, SAP-100; fgsm; 4 8 16 32 64",
    "SAP-100 for smaller λ": "adv, dense; dense, SAP-100; fgsm; 1 2",
    "best for larger λ": "adv, dense; dense, SAP-100; fgsm; 4 8 16 32",
    "dense is not calibrated": "adv, dense; dense, SAP-100; fgsm, none; 0 1 2 4 8 16 32",
    "the others are calibrated": "adv, dense; dense, SAP-100; fgsm, none; 0 1 2 4 8 16 32",
    "SAP improves calibration": "adv, dense; dense, SAP-100; fgsm, none; 0 1 2 4 8 16 32",
    "SAP preserves calibration": "adv, dense; dense, SAP-100; fgsm, none; 0 1 2 4 8 16 32",
    "ADV+SAP-100 is best calibrated": "adv, dense; dense, SAP-100; fgsm, none; 0 1 2 4 8 16 32",
    "no baseline matches": "dense; 4 rna, 4 rnw, 5 rsa, 4 rsw, SAP-100, 4 swp; fgsm; 1 2 4",
    "baselines are below dense": "dense; dense, 4 rna, 4 rnw, 5 rsa, 4 rsw; fgsm, none; 0 1 2 4",
    "no robustness by other noise": "dense; dense, 4 rna, 4 rnw, 5 rsa, 4 rsw, 4 swp; fgsm; 1 2 4",
    "other noise is like dense": "dense; dense, RNW-0.02, RSA-0.05, RSW-0.2, SWP-400; fgsm, none; 0 1 2 4",
    "noise on weights costs": "dense; 4 rnw; fgsm; 1 2 4",
    "pruned weights": "dense; dense, 6 dwp; fgsm, none; 0 1 2 4",
    "weights pruned at random": "dense; 4 swp; fgsm; 1 2 4",
    "noisy activations drop": "dense; 4 rna; fgsm, none; 0 1",
    "dense's examples hurt SAP": "dense; SAP-100; fgsm on dense, none; 0 1 2 4",
    "more passes hurt more": "dense; SAP-100; fgsm; 1 2 4",
    "above dense at 1,000 passes": "dense; dense, SAP-100; fgsm; 1 2",
    "the iterative attack is stronger": "dense; dense; fgsm, iterative; 1 2 4",
    "SAP-100 holds out": "dense; dense, SAP-100; iterative; 1 2 4",
    "robust": "dense; dense, SAP-100; "
    "autoattack, autoattack_standard, fgsm, fgsm on dense, iterative, iterative on dense, noise, none, square; 0 1 2 4",
    "robust with ADV": "adv; dense, SAP-100; "
    "autoattack, autoattack_standard, fgsm, fgsm on dense, iterative, iterative on dense, noise, none, square; 0 1 2 4",
    "dense's iterates hurt more": "dense; SAP-100; iterative, iterative on dense; 1 2 4",
    "broken at 0.031": "dense; Bernoulli-SAP-200; iterative; 7.905",
    "that attack, SAP as published": "dense; Bernoulli-SAP-200, SAP-100; iterative, none; 0 7.905",
    "BPDA breaks SAP as published": "dense; SAP-100; iterative; 7.905",
}


def test_every_verdict_rests_on_the_cells_that_its_rule_is_about() -> None:
    """Those of another network, defence, attack or eps would give a verdict, too, and a wrong one."""
    cells = {
        f"{cell.path.parent.name}/{cell.path.name}": cell
        for figure in FIGURES for cell in experiments.cells(figure) if cell.computable
    }  # fmt: skip

    def read(names: Sequence[str]) -> str:
        asked, kinds = [cells[name] for name in names], dict[str, set[str]]()
        for cell in asked:
            kinds.setdefault(cell.defence.kind, set()).add(cell.defence.label)
        networks = {cell.checkpoint.removeprefix("resnet20-cifar10").removeprefix("-") or "dense" for cell in asked}
        attacks = {
            cell.attack.kind + " on dense" * (cell.defence.noisy and cell.attack.source == Defence()) for cell in asked
        }
        levels = [f"{len(of)} {kind}" if len(of) > 1 else of.copy().pop() for kind, of in sorted(kinds.items())]
        eps = " ".join(f"{e:g}" for e in sorted({cell.attack.eps for cell in asked}))
        return "; ".join([", ".join(sorted(networks)), ", ".join(levels), ", ".join(sorted(attacks)), eps])

    judged = [row for row in claims.scorecard().to_dict(orient="records") if row["verdict"] != OPEN]
    open_for_another_reason = {"other noise is like dense"}  # its cells are there
    judged += [row for row in claims.scorecard().to_dict(orient="records") if row["name"] in open_for_another_reason]
    assert {row["name"] for row in judged} >= READ.keys()
    assert {row["name"]: read(row["cells"]) for row in judged if row["name"] in READ} == READ
    assert {row["figure"] for row in judged if row["name"] not in READ} <= {"table1", "ladder"}, "waited for cells"


def test_the_front_page_counts_the_rules_that_changed() -> None:
    text = (ROOT / "book" / "intro.md").read_text()
    listed = text[text.index("Some rules were changed") :].split("\n\n")[1]
    assert "Thirteen of these changes decided a verdict" in text
    assert len(re.findall("^- ", listed, re.MULTILINE)) == 12, "one line is about two rules"


def test_what_the_front_page_says_of_changed_rules_is_true_of_the_store() -> None:
    n = Numbers()
    sap, dropout = n.at("fig1b", "SAP-100", 0), [n.at("fig2a", f"dropout-{rate}", 0) for rate in (0.05, 0.25)]
    assert [bool(sap["low"] > row["high"]) for row in dropout] == [False, True]
    learnt, _ = claims._learnt(n)
    changes = [claims._change(n, e, game) for game in learnt for e in claims.ATTACKED]
    up, gained, down, lost = claims._counted(changes)
    assert up > down, "it held in direction"
    assert gained > lost
    assert claims._change(n, 1, "Bowling")[1] > 0, "so did Bowling's"
    best = {e: max(claims.FOUR, key=lambda name: n.at("fig3", name, e)["accuracy"]) for e in (4, 8, 16, 32)}
    assert best == {4: "ADV+SAP-100", 8: "ADV+SAP-100", 16: "ADV+SAP-100", 32: "SAP-100"}
    assert max(n.at("fig3", name, 32)["low"] for name in claims.FOUR) < claims.GUESSING
    assert n.at("fig3", "ADV+SAP-100", 32)["high"] > n.at("fig3", "SAP-100", 32)["low"], "in direction"

    def mean(k: int) -> float:
        return sum(float(n.at("fig1b", f"SAP-{k}", e)["accuracy"]) for e in SMALL)

    assert max(experiments.PERCENTS, key=mean) == 100, "the best balance without λ = 0"
    errors = claims._errors(n)
    dense = errors.pop("dense")
    better = [row[e] < dense[e] for row in errors.values() for e in dense]
    assert 2 * sum(better) > len(better) > sum(better), "better calibrated than dense"
    assert errors["SAP-100"][32] > dense[32]
    assert claims._similar("fig3", "ADV+SAP-100", "ADV", (0, 1, 2))(n).verdict == FAILS
    first, second, *_, last = claims._levels(n, "rna", 1)
    assert last["high"] < first["low"]
    assert first["high"] < n.at("fig5", first["series"], 0, "RNA")["low"]
    assert first["high"] < second["low"], "the clear rise"
    assert n.at("fig1b", "SAP-50", 1)["high"] < n.at("fig1b", "dense", 1)["low"]
    assert n.at("fig1b", "dense", 16)["accuracy"] < n.at("fig1b", "SAP-100", 16)["accuracy"]
    assert "a milder level would be nearer" in judged(BY_NAME["other noise is like dense"], n).why
    assert judged(BY_NAME["SAP adds to ADV"], n).verdict == FAILS
    gains = {e: n.at("fig3", "ADV+SAP-100", e)["low"] - n.at("fig3", "ADV", e)["high"] for e in (4, 8, 16)}
    assert min(gains.values()) > 0
    assert n.at("fig3", "ADV+SAP-100", 64)["high"] < n.at("fig3", "ADV", 64)["low"]


def test_what_is_said_of_a_number_is_the_stores() -> None:
    numbers = claims.Numbers()
    frame = numbers.frame("fig1c_steps")
    row = frame[(frame["series"] == "SAP-100 vs SAP-100, λ = 4") & (frame["steps"] == 100)].iloc[0]
    said = numbers.said("fig1c_steps", row["series"], 4, steps=100)
    assert said == "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * row[name] for name in ("accuracy", "low", "high")))
    assert numbers.said("fig1c_steps", row["series"], 4, steps=1) != said
    assert len(numbers.cells) == 2
    assert numbers.said("fig1c_steps", row["series"], 4, steps=99) == "(not computed yet)"


def test_another_number_in_the_store_is_another_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = claims.scorecard().set_index("name")["cells"]["SAP-100 clean"]
    shutil.copytree(results_root() / "cifar10", tmp_path / "cifar10")
    monkeypatch.setenv("SAPCORE_RESULTS", str(tmp_path))
    content = json.loads((tmp_path / name).read_text())
    for accuracy, verdict in ((0.63, FAILS), (0.80, DIRECTION), (0.825, HOLDS)):
        content["result"] |= {"accuracy": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01}
        (tmp_path / name).write_text(json.dumps(content))
        assert judged(BY_NAME["SAP-100 clean"]).verdict == verdict
    (tmp_path / name).unlink()
    assert judged(BY_NAME["SAP-100 clean"]) == (OPEN, "SAP-100 at λ = 0 is not computed")


SMALL = (1, 2, 4)


def flat(series: str, value: float, grid: tuple[float, ...] = (0, 1, 2, 4, 8, 16, 32, 64)) -> Points:
    return {(series, e): value for e in grid}


OTHERS = {
    **flat("dropout-0.01", 0.9),
    **flat("dropout-0.02", 0.88),
    **flat("dropout-0.05", 0.6),
    **flat("dropout-0.1", 0.4),
    **flat("dropout-0.25", 0.1),
    **flat("dropout-0.4", 0.1),
}


def rna(*levels: tuple[float, float]) -> Points:
    """Accuracy at λ = 0 and 1 by level."""
    names = [f"RNA-{level:g}" for level in experiments.LEVELS["rna"]]
    return {(name, e): a for name, pair in zip(names, levels, strict=True) for e, a in enumerate(pair)}


def four(*values: float) -> Points:
    """Of dense, SAP-100, ADV and ADV+SAP-100, at every eps."""
    return {point: a for name, value in zip(claims.FOUR, values, strict=True) for point, a in flat(name, value).items()}


CASES: list[tuple[str, Points, str]] = [
    ("keeps accuracy", {("SAP-100", 0): 0.89, ("dense", 0): 0.9}, HOLDS),
    ("keeps accuracy", {("SAP-100", 0): 0.82, ("dense", 0): 0.9}, DIRECTION),
    ("keeps accuracy", {("SAP-100", 0): 0.6, ("dense", 0): 0.9}, FAILS),
    ("SAP-100 clean", {("SAP-100", 0): 0.84}, HOLDS),
    ("SAP-100 clean", {("SAP-100", 0): 0.79}, DIRECTION),
    ("SAP-100 clean", {("SAP-100", 0): 0.6}, FAILS),
    ("gain at 1", {("SAP-100", 1): 0.5, ("dense", 1): 0.38}, HOLDS),
    ("gain at 1", {("SAP-100", 1): 0.5, ("dense", 1): 0.45}, DIRECTION),
    ("gain at 1", {("SAP-100", 1): 0.4, ("dense", 1): 0.45}, FAILS),
    ("gain at two more", flat("SAP-100", 0.4) | flat("dense", 0.4) | {("SAP-100", 2): 0.5, ("SAP-100", 8): 0.5}, HOLDS),
    ("gain at two more", flat("SAP-100", 0.4) | flat("dense", 0.4) | {("SAP-100", 1): 0.5, ("SAP-100", 8): 0.5},
     DIRECTION),
    ("gain at two more", flat("SAP-100", 0.41) | flat("dense", 0.4) | {("SAP-100", 1): 0.5}, FAILS),
    ("SAP-100 at 4", {("SAP-100", 4): 0.52}, HOLDS),
    ("SAP-100 at 4", {("SAP-100", 4): 0.3}, FAILS),
    ("loss at two", flat("SAP-100", 0.5) | flat("dense", 0.4) | {("dense", 0): 0.9, ("dense", 16): 0.6}, HOLDS),
    ("loss at two", flat("SAP-100", 0.5) | flat("dense", 0.51) | {("dense", 0): 0.9}, DIRECTION),
    ("loss at two", flat("SAP-100", 0.5) | flat("dense", 0.51), FAILS),
    ("ADV clean", {("ADV", 0): 0.74}, HOLDS),
    ("ADV clean", {("ADV", 0): 0.5}, FAILS),
    ("dense degrades", {("dense", 0): 0.9, ("dense", 1): 0.5, ("dense", 2): 0.4}, HOLDS),
    ("dense degrades", {("dense", 0): 0.9, ("dense", 1): 0.85, ("dense", 2): 0.8}, DIRECTION),
    ("dense degrades", flat("dense", 0.9), FAILS),
    ("large noise", flat("dense", 0.1) | flat("SAP-100", 0.2), HOLDS),
    ("large noise", flat("dense", 0.1) | flat("SAP-100", 0.3), FAILS),
    ("low dropout is like dense", flat("dropout-0.01", 0.89) | flat("dense", 0.9) | {("dropout-0.01", 8): 0.2}, HOLDS),
    ("low dropout is like dense", flat("dropout-0.01", 0.89) | flat("dense", 0.9), DIRECTION),
    ("low dropout is like dense", flat("dropout-0.01", 0.95) | flat("dense", 0.9), FAILS),
    ("SAP costs less than dropout", flat("SAP-100", 0.85) | OTHERS | flat("dense", 0.9), HOLDS),
    ("SAP costs less than dropout", flat("SAP-100", 0.7) | OTHERS | flat("dense", 0.9), DIRECTION),
    ("SAP costs less than dropout", flat("SAP-100", 0.6) | OTHERS | flat("dense", 0.9), DIRECTION),
    ("SAP costs less than dropout", flat("SAP-100", 0.12) | OTHERS | flat("dense", 0.9), FAILS),
    ("dropout helps little", OTHERS | flat("dense", 0.9), HOLDS),
    ("dropout helps little", OTHERS | flat("dense", 0.9) | {("dense", 2): 0.8}, DIRECTION),
    ("dropout helps little", OTHERS | flat("dense", 0.86), HOLDS),
    ("dropout helps little", OTHERS | flat("dense", 0.8), FAILS),
    ("dropout, on", flat("dropout-0.1", 0.4) | flat("dropout-0", 0.4) | flat("dense", 0.2), HOLDS),
    ("dropout, on", flat("dropout-0.1", 0.4) | flat("dropout-0", 0.4) | {("dropout-0.1", 2): 0.5}, DIRECTION),
    ("dropout, on", flat("dropout-0.1", 0.5) | flat("dropout-0", 0.4) | flat("dense", 0.9), FAILS),
    ("dropout, off", flat("dropout-0.1", 0.4) | flat("dropout-0", 0.4), HOLDS),
    ("dropout, off", flat("dropout-0.1", 0.5) | flat("dropout-0", 0.4), FAILS),
    ("ADV and ADV+SAP-100 alike", flat("ADV", 0.5) | flat("ADV+SAP-100", 0.46), HOLDS),
    ("ADV and ADV+SAP-100 alike", flat("ADV", 0.5) | flat("ADV+SAP-100", 0.42), DIRECTION),
    ("ADV and ADV+SAP-100 alike", flat("ADV", 0.5) | flat("ADV+SAP-100", 0.3), FAILS),
    ("SAP adds to ADV", flat("ADV", 0.3) | flat("ADV+SAP-100", 0.3) | flat("ADV+SAP-100", 0.5, (8, 16)), HOLDS),
    ("SAP adds to ADV", flat("ADV", 0.3) | flat("ADV+SAP-100", 0.31), DIRECTION),
    ("SAP adds to ADV", flat("ADV", 0.3) | flat("ADV+SAP-100", 0.2) | flat("ADV+SAP-100", 0.5, (8, 16)), FAILS),
    ("SAP adds to ADV", flat("ADV", 0.3) | flat("ADV+SAP-100", 0.3) | {("ADV+SAP-100", 8): 0.5}, FAILS),
    ("SAP adds to ADV", flat("ADV", 0.05) | flat("ADV+SAP-100", 0.11), FAILS),
    ("best for larger λ", four(0.2, 0.3, 0.4, 0.5), HOLDS),
    ("best for larger λ", four(0.2, 0.3, 0.5, 0.4), FAILS),
    ("best for larger λ", four(0.2, 0.3, 0.4, 0.5) | {("ADV", 8): 0.51}, DIRECTION),
    ("best for larger λ", four(0.2, 0.3, 0.4, 0.5) | {("ADV", 8): 0.6}, FAILS),
    ("best for larger λ", four(0.2, 0.3, 0.4, 0.5) | {(name, 32): 0.1 for name in claims.FOUR}, HOLDS),
    ("best for larger λ", four(0.1, 0.1, 0.1, 0.1), FAILS),
    ("SAP-100 for smaller λ", four(0.2, 0.5, 0.54, 0.5), HOLDS),
    ("SAP-100 for smaller λ", four(0.2, 0.5, 0.58, 0.5), DIRECTION),
    ("SAP-100 for smaller λ", four(0.2, 0.5, 0.7, 0.5), FAILS),
    ("the iterative attack is stronger", flat("dense vs dense", 0.1) | flat("dense", 0.2), HOLDS),
    ("the iterative attack is stronger", flat("dense vs dense", 0.19) | flat("dense", 0.2), DIRECTION),
    ("the iterative attack is stronger", flat("dense vs dense", 0.3) | flat("dense", 0.2), FAILS),
    ("noisy activations drop", rna((0.9, 0.7), (0.8, 0.5), (0.6, 0.3), (0.2, 0.15)), HOLDS),
    ("noisy activations drop", rna((0.9, 0.7), (0.8, 0.71), (0.6, 0.3), (0.2, 0.15)), DIRECTION),
    ("noisy activations drop", rna((0.9, 0.7), (0.8, 0.79), (0.6, 0.3), (0.2, 0.15)), FAILS),
    ("noisy activations drop", rna((0.9, 0.7), (0.8, 0.7), (0.8, 0.7), (0.8, 0.7)), FAILS),
    ("noisy activations drop", rna((0.9, 0.88), (0.8, 0.5), (0.6, 0.3), (0.2, 0.15)), FAILS),
    ("SAP-100 holds out", flat("SAP-100 vs SAP-100", 0.5) | flat("dense vs dense", 0.1), HOLDS),
    ("dense's iterates hurt more", flat("SAP-100 vs SAP-100", 0.5) | flat("SAP-100 vs dense", 0.49), DIRECTION),
    ("dense's iterates hurt more", flat("SAP-100 vs SAP-100", 0.4) | flat("SAP-100 vs dense", 0.49), FAILS),
    ("dense's examples hurt SAP", flat("dense's gradient", 0.4) | {("dense's gradient", 0): 0.6}, HOLDS),
    ("dense's examples hurt SAP", flat("dense's gradient", 0.6), FAILS),
]  # fmt: skip


@pytest.mark.parametrize(("name", "points", "verdict"), CASES)
def test_the_verdict_follows_from_the_numbers(
    name: str, points: Points, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel = "RNA" if name == "noisy activations drop" else ""
    found = judged(BY_NAME[name], numbers(monkeypatch, points, panel))
    assert found.verdict == verdict, found.why
    assert "%" in found.why or "points" in found.why
    assert BY_NAME[name].figure in ASKED


def test_a_rise_at_one_eps_outweighs_a_fall_at_another(monkeypatch: pytest.MonkeyPatch) -> None:
    points = passes(0.3, 0.4, 0.5, 0.6)
    points |= {("1 MC pass", 1): 0.33, ("1,000 MC passes", 1): 0.32}
    assert judged(BY_NAME["more passes hurt more"], numbers(monkeypatch, points)).verdict == FAILS


def passes(*values: float) -> Points:
    names = ("1 MC pass", "10 MC passes", "100 MC passes", "1,000 MC passes")
    return {(name, e): value for name, value in zip(names, values, strict=True) for e in SMALL}


@pytest.mark.parametrize(
    ("name", "points", "verdict"),
    [
        ("more passes hurt more", passes(0.6, 0.5, 0.4, 0.3), HOLDS),
        ("more passes hurt more", passes(0.6, 0.4, 0.5, 0.3), DIRECTION),
        ("more passes hurt more", passes(0.33, 0.32, 0.31, 0.3), DIRECTION),
        ("more passes hurt more", passes(0.3, 0.4, 0.5, 0.6), FAILS),
        ("above dense at 1,000 passes", passes(0.6, 0.5, 0.4, 0.3) | flat("dense", 0.2), HOLDS),
        ("above dense at 1,000 passes", passes(0.6, 0.5, 0.4, 0.3) | flat("dense", 0.4), FAILS),
    ],
)
def test_claims_about_passes(name: str, points: Points, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(BY_NAME[name], numbers(monkeypatch, points)).verdict == verdict


def grid_of_percents(**values: float) -> Points:
    return {(f"SAP-{k[1:]}", e): value for k, value in values.items() for e in experiments.EPS}


@pytest.mark.parametrize(
    ("name", "points", "verdict"),
    [
        ("SAP-100 is best", grid_of_percents(k5=0.1, k10=0.1, k25=0.1, k50=0.3, k100=0.5, k200=0.4), HOLDS),
        ("SAP-100 is best", grid_of_percents(k5=0.1, k10=0.1, k25=0.1, k50=0.3, k100=0.5, k200=0.51), DIRECTION),
        ("SAP-100 is best", grid_of_percents(k5=0.1, k10=0.1, k25=0.1, k50=0.3, k100=0.5, k200=0.8), FAILS),
        (
            "SAP-100 is best",
            grid_of_percents(k5=0.1, k10=0.1, k25=0.1, k50=0.3, k100=0.5, k200=0.4) | {("SAP-200", 0): 0.9}, FAILS,
        ),
        ("few samples cost accuracy", grid_of_percents(k5=0.1, k10=0.1, k25=0.1, k50=0.3, k100=0.5, k200=0.8), HOLDS),
        ("few samples cost accuracy", grid_of_percents(k5=0.9, k10=0.1, k25=0.1, k50=0.3, k100=0.5, k200=0.8), FAILS),
        (
            "converges to dense",
            grid_of_percents(k5=0.1, k10=0.1, k25=0.1, k50=0.3, k100=0.5, k200=0.78) | flat("dense", 0.8), HOLDS,
        ),
        (
            "converges to dense",
            grid_of_percents(k5=0.1, k10=0.1, k25=0.1, k50=0.3, k100=0.5, k200=0.6) | flat("dense", 0.8), DIRECTION,
        ),
        (
            "converges to dense",
            grid_of_percents(k5=0.1, k10=0.1, k25=0.1, k50=0.7, k100=0.5, k200=0.6) | flat("dense", 0.8), FAILS,
        ),
        (
            "few samples help under attack",
            grid_of_percents(k5=0.1, k10=0.1, k25=0.1, k50=0.3) | flat("dense", 0.2), HOLDS,
        ),
        (
            "few samples help under attack",
            grid_of_percents(k5=0.1, k10=0.1, k25=0.1, k50=0.3) | flat("dense", 0.4), FAILS,
        ),
    ],
)  # fmt: skip
def test_claims_about_the_share_of_samples(
    name: str, points: Points, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judged(BY_NAME[name], numbers(monkeypatch, points)).verdict == verdict


def baselines(dense: float, **given: float | Sequence[float]) -> pd.DataFrame:
    """Fig. 5 with these accuracies of a baseline at every eps, for all levels or level by level; others have 0.2."""
    rows = []
    for kind, levels in experiments.LEVELS.items():
        values = given.get(kind.upper(), 0.2)
        values = [values] * len(levels) if isinstance(values, float) else values
        named = zip((Defence(kind, level).label for level in levels), values, strict=True)
        rows += [
            {"panel": kind.upper(), "series": series, "eps": e, "accuracy": a, "low": a - 0.02, "high": a + 0.02}
            for series, a in (("dense", dense), *named) for e in experiments.EPS
        ]  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs = {"missing": [], "settings": Settings()}
    return frame


@pytest.mark.parametrize(
    ("name", "frame", "verdict"),
    [
        ("no baseline matches", baselines(0.3), HOLDS),
        ("no baseline matches", baselines(0.3, RNA=0.49), DIRECTION),
        ("no baseline matches", baselines(0.3, RNA=0.6), FAILS),
        ("no baseline matches", baselines(0.3, DWP=0.6), HOLDS),
        ("baselines are below dense", baselines(0.3), HOLDS),
        ("baselines are below dense", baselines(0.3, SWP=0.4, RNA=0.29), DIRECTION),
        ("baselines are below dense", baselines(0.3, RSA=(0.3, 0.3, 0.2, 0.2, 0.1)), HOLDS),
        ("baselines are below dense", baselines(0.3, RNA=0.4), FAILS),
        ("no robustness by other noise", baselines(0.3, DWP=0.4), HOLDS),
        ("no robustness by other noise", baselines(0.3, RNA=0.4), FAILS),
        ("no robustness by other noise", baselines(0.3, RNA=0.34), HOLDS),
        ("no robustness by other noise", baselines(0.17), HOLDS),
        ("other noise is like dense", baselines(0.24, RNA=0.5), HOLDS),
        ("other noise is like dense", baselines(0.28), DIRECTION),
        ("other noise is like dense", baselines(0.35), OPEN),
        ("noise on weights costs", baselines(0.3, RNW=(0.5, 0.4, 0.3, 0.2)), HOLDS),
        ("noise on weights costs", baselines(0.3, RNW=(0.5, 0.4, 0.41, 0.2)), DIRECTION),
        ("noise on weights costs", baselines(0.3, RNW=(0.5, 0.3, 0.4, 0.2)), FAILS),
        ("noise on weights costs", baselines(0.3), FAILS),
        ("pruned weights", baselines(0.3, DWP=(0.3, 0.3, 0.3, 0.2, 0.2, 0.1)), HOLDS),
        ("pruned weights", baselines(0.3, DWP=0.3), DIRECTION),
        ("pruned weights", baselines(0.3), FAILS),
        ("weights pruned at random", baselines(0.3, SWP=(0.3, 0.5, 0.3, 0.1)), HOLDS),
        ("weights pruned at random", baselines(0.3, SWP=(0.3, 0.35, 0.3, 0.1)), HOLDS),
        ("weights pruned at random", baselines(0.3, SWP=(0.3, 0.31, 0.3, 0.1)), FAILS),
        ("weights pruned at random", baselines(0.3, SWP=(0.3, 0.3, 0.3, 0.1)), FAILS),
        ("weights pruned at random", baselines(0.3, SWP=(0.3, 0.31, 0.3, 0.28)), FAILS),
    ],
)
def test_claims_about_the_baselines(
    name: str, frame: pd.DataFrame, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sap = pd.DataFrame(
        [{"panel": "", "series": "SAP-100", "eps": e, "accuracy": 0.5, "low": 0.48, "high": 0.52} for e in SMALL]
    )
    sap.attrs = frame.attrs
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame if figure == "fig5" else sap)
    assert judged(BY_NAME[name], Numbers()).verdict == verdict


def test_weights_pruned_at_random_that_help_at_one_eps_hold_in_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = baselines(0.3, SWP=0.3)
    frame.loc[(frame["series"] == "SWP-200") & (frame["eps"] == 2), ["accuracy", "low", "high"]] = (0.5, 0.48, 0.52)
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame)
    assert judged(BY_NAME["weights pruned at random"], Numbers()).verdict == DIRECTION
    between = frame["series"].isin(["SWP-200", "SWP-100"])
    frame.loc[between & (frame["eps"] == 1), ["accuracy", "low", "high"]] = (0.2, 0.18, 0.22)
    assert judged(BY_NAME["weights pruned at random"], Numbers()).verdict == FAILS, "clearly the other way at another"


@pytest.mark.parametrize(
    ("name", "sap", "verdict"),
    [
        ("games lose without an attack", [5.0, 5.2, 5.1], HOLDS),
        ("games lose without an attack", [9.7, 10.1, 9.9], DIRECTION),
        ("games lose without an attack", [9.9, 10.1, 10.0], FAILS),
        ("games lose without an attack", [15.0, 15.2, 15.1], FAILS),
        ("games gain under attack", [15.0, 15.2, 15.1], HOLDS),
        ("games gain under attack", [9.9, 10.1, 10.3], HOLDS),
        ("games gain under attack", [9.9, 10.1, 10.0], FAILS),
        ("games gain under attack", [5.0, 5.2, 5.1], FAILS),
        ("Bowling at 1", [15.0, 15.2, 15.1], DIRECTION),
        ("Bowling at 1", [352.0, 353.0, 352.6], HOLDS),
        ("Bowling at 1", [5.0, 5.2, 5.1], FAILS),
    ],
)
def test_claims_about_games(name: str, sap: list[float], verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = games(dict.fromkeys(GAMES, sap))
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame)
    found = judged(BY_NAME[name], Numbers())
    assert found.verdict == verdict
    assert "random policy" not in found.why


def test_a_chapter_has_the_claims_that_its_figures_test() -> None:
    whole = claims.scorecard()
    chapters = {claims.PLACES[figure][0] for figure in whole["figure"]}
    parts = {chapter: claims.scorecard(chapter) for chapter in chapters}
    assert sum(map(len, parts.values())) == len(whole)
    assert set(parts["01_sap"]["figure"]) == {"fig1a", "fig1b"}
    rows = whole[whole["figure"] == "fig6"].reset_index(drop=True)
    pd.testing.assert_frame_equal(parts["08_mc_samples"], rows)
    with pytest.raises(
        SapcoreError, match="no claim is tested in chapter '12_more'; there are 00_preliminaries, 01_sap"
    ):
        claims.scorecard("12_more")


def test_agents_that_have_not_learnt_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unlearnt lose under attack and gain without one, against the claims."""
    frame = games({game: [5.0, 5.2, 5.1] for game in GAMES})
    gains = (frame["series"] == "SAP-100") & (frame["eps"] > 0)
    frame.loc[gains, "returns"] = pd.Series([[15.0, 15.2, 15.1]] * len(frame))[gains]
    other = (frame["panel"] == "Bowling") & (frame["series"] == "SAP-100")
    frame.loc[other, "returns"] = frame.loc[other, "eps"].map(lambda e: [5.0, 5.1, 5.2] if e else [15.0, 15.2, 15.1])
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame)
    both = [BY_NAME[name] for name in ("games lose without an attack", "games gain under attack")]
    assert [judged(claim, Numbers()).verdict for claim in both] == [FAILS, DIRECTION]
    chance = frame["series"] == "random"
    frame.loc[chance & (frame["panel"] == "Bowling"), ["low", "high"]] = [9.0, 9.9]
    for claim in both:
        found = judged(claim, Numbers())
        assert found.verdict == HOLDS
        assert found.why.endswith("; not judged, as not clearly above a random policy: Bowling")
    found = judged(BY_NAME["Bowling at 1"], Numbers())
    assert found == (OPEN, "the agent for Bowling is not clearly above a random policy, so that a change says nothing")
    said = Numbers().games()
    assert said.startswith("without an attack it changes the return by Assault -49.0 [")
    assert "Bowling" not in said
    assert said.endswith(
        "; of 20 changes under attack, each player along its own gradient, 20 are gains, 20 of them clear, "
        "and 0 losses, 0 clear. All clear gains are in Assault, Asterix, BankHeist, BattleZone, BeamRider. "
        "In 0 of the 20 the attacked agent without SAP is itself not clearly better than at random, so that its "
        "change says little."
    )
    whole = (frame["panel"] == "Assault") | (frame["eps"] != 8)
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame[whole])
    assert "of 4 changes under attack" in Numbers().games()
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame[~whole])
    assert Numbers().games() == "(not computed yet)"
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame)
    frame.loc[(frame["series"] == "dense") & (frame["eps"] == 4), "low"] = -1.5
    assert "In 5 of the 20 the attacked agent" in Numbers().games()
    frame.loc[chance & ~frame["panel"].isin(["Assault", "Asterix"]), ["low", "high"]] = [9.0, 9.9]
    assert [judged(claim, Numbers()).verdict for claim in both] == [OPEN, OPEN]


def test_nearer_to_a_random_policy_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = games({game: [15.0, 15.2, 15.1] for game in GAMES})
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame)
    frame.loc[frame["series"] == "random", ["low", "high"]] = [8.0, 9.0]
    frame.loc[frame["eps"] > 0, ["low", "high"]] = [1.0, 2.0]
    found = [judged(BY_NAME[name], Numbers()) for name in ("games gain under attack", "Bowling at 1")]
    assert [verdict for verdict, _ in found] == [OPEN, OPEN]
    assert found[0].why.startswith("in 0 of 24 comparisons one of the two is clearly above a random policy, in fewer ")
    assert found[1].why.endswith("not clearly above a random policy's, which would gain as well")
    plays = (frame["series"] == "SAP-100") & (frame["eps"] > 0) & ~frame["panel"].isin(GAMES[:3])
    frame.loc[plays, ["low", "high"]] = [14.0, 16.0]
    assert judged(BY_NAME["games gain under attack"], Numbers()).why.startswith("of 12 changes 12 are gains, ")


def test_gains_that_do_not_outnumber_losses_by_chance_alone_hold_in_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 of 24: a sign test gives 7.6 %. Two clear losses among 24 are one too many."""
    gain, loss = [15.0, 15.2, 15.1], [5.0, 5.2, 5.1]
    frame = games({game: gain if i < 4 else loss for i, game in enumerate(GAMES)})
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame)
    found = judged(BY_NAME["games gain under attack"], Numbers())
    assert found.verdict == DIRECTION
    assert found.why.startswith("of 24 changes 16 are gains, 16 of them clear, and 8 losses, 8 clear: BeamRider at λ")
    frame = games(dict.fromkeys(GAMES, gain))
    lost = (frame["series"] == "SAP-100") & frame["eps"].isin([1, 2]) & (frame["panel"] == "Assault")
    frame.loc[lost, "returns"] = pd.Series([loss] * len(frame))[lost]
    assert judged(BY_NAME["games gain under attack"], Numbers()).verdict == DIRECTION
    frame.loc[lost & (frame["eps"] == 1), "returns"] = pd.Series([gain] * len(frame))[lost]
    assert judged(BY_NAME["games gain under attack"], Numbers()).verdict == HOLDS


def test_an_interval_without_an_end_proves_no_published_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's returns are nearly all 0, so that the change could be anything."""
    frame = games({game: [0.0, 1.0, 2.0] for game in GAMES}, dense=[0.0, 0.0, 0.1])
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame)
    assert judged(BY_NAME["Bowling at 1"], Numbers()).verdict == FAILS
    sap = [0.0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 6, 6, 7, 8, 9]
    frame = games(dict.fromkeys(GAMES, sap), dense=[0.0] * 29 + [4.0])
    found = judged(BY_NAME["Bowling at 1"], Numbers())
    assert found.verdict == DIRECTION
    assert "+inf" in found.why


def games(sap: dict[str, list[float]], dense: Sequence[float] = (10.0, 10.2, 9.8)) -> pd.DataFrame:
    """Table 1 with these returns of SAP-100 and of the agent at every eps; a random policy's are worse."""
    rows = [
        {"panel": game, "series": series, "eps": e, "returns": list(returns), "low": min(returns), "high": max(returns)}
        for game in GAMES
        for series, returns in (("dense", dense), ("SAP-100", sap[game]), ("random", [-2.0, -1.0]))
        for e in experiments.EPS_GAMES
    ]
    frame = pd.DataFrame(rows)
    frame.attrs = {"missing": [], "settings": Settings()}
    return frame


def ladder(given: dict[tuple[str, str], float], otherwise: float = 0.5) -> pd.DataFrame:
    """All attacks of the ladder at every eps."""
    points = [*experiments.points("ladder"), *experiments.points("ladder_checks")]
    attacks = {(p.panel, p.series, p.cell.attack.eps) for p in points}
    rows = [
        {"panel": panel, "series": series, "eps": e, "accuracy": a, "low": a - 0.02, "high": a + 0.02, "gradients": 1}
        for panel, series, e in sorted(attacks)
        for a in [given.get((panel, series), otherwise)]
    ]
    frame = pd.DataFrame(rows)
    frame.attrs = {"missing": [], "settings": Settings()}
    return frame


OURS, THEIRS = "SAP-100", "Bernoulli-SAP-200"
SINGLE, CONSTANT = "single passes, through the scale", "single passes, constant scale"
BLACK_BOX = "Square (black box)"


def test_what_is_left_is_that_of_the_strongest_attack_of_the_ladder_or_its_checks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rungs = ladder({(OURS, "FGSM"): 0.4, (OURS, BLACK_BOX): 0.3}).assign(single_pass=0.1, every_pass=0.0)
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: rungs)
    assert Numbers().left(OURS, 2).startswith("30.0 % [")
    more = rungs[rungs["series"] == "FGSM"].assign(accuracy=0.2)
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: rungs if figure == "ladder" else more)
    assert Numbers().left(OURS, 2).startswith("20.0 % [")
    assert Numbers().left(OURS, 3) == "(not computed yet)"


def test_all_attacks_are_tried_where_none_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, cells = results.read, [p.cell for p in experiments.points("ladder") if p.panel == OURS]
    (gone,) = (c for c in cells if (c.attack.kind, c.attack.eps) == ("autoattack", 2))
    assert Numbers().all_tried((OURS, "dense"), (1, 2, 4))
    monkeypatch.setattr(results, "read", lambda cell, also=(): None if cell == gone else real(cell, also))
    assert not Numbers().all_tried((OURS, "dense"), (1, 2, 4))
    assert Numbers().all_tried((OURS, "dense"), (1, 4))
    assert Numbers().all_tried(("dense",), (1, 2, 4))


@pytest.mark.parametrize("n", [1000, 10_000])
def test_exactly_five_points_are_five_points(n: int) -> None:
    """In floats 0.051 - 0.001 is less than 0.05."""
    for k in range(0, n - n // 20, 7):
        a, b = ({"accuracy": c / n, "low": c / n, "high": c / n} for c in (k + n // 20, k))
        assert claims._clear_by_five(pd.Series(a), pd.Series(b))
        assert not claims._clear_by_five(pd.Series(a), pd.Series(b | {"accuracy": (k + 1) / n}))


@pytest.mark.parametrize(
    ("name", "given", "verdict"),
    [
        ("robust", {("dense", "PGD, margin"): 0.1}, HOLDS),
        ("robust", {("dense", "PGD, margin"): 0.1, (OURS, "BPDA, identity"): 0.05}, FAILS),
        ("robust", {("dense", "PGD, margin"): 0.1, (OURS, "BPDA, identity"): 0.149}, FAILS),
        ("robust", {("dense", "PGD, margin"): 0.1, (OURS, "BPDA, identity"): 0.16}, HOLDS),
        ("robust", {(OURS, "BPDA, identity"): 0.4}, FAILS),
        ("robust with ADV", {("ADV", "PGD, margin"): 0.1}, HOLDS),
        ("robust with ADV", {("ADV", "PGD, margin"): 0.1, ("ADV+SAP-100", "FGSM"): 0.12}, FAILS),
        ("robust with ADV", {("dense", "PGD, margin"): 0.1}, FAILS),
        ("broken at 0.031", {(THEIRS, SINGLE): 0.0}, HOLDS),
        ("broken at 0.031", {(THEIRS, SINGLE): 0.09}, DIRECTION),
        ("broken at 0.031", {(THEIRS, SINGLE): 0.2, (THEIRS, CONSTANT): 0.0}, FAILS),
        ("broken at 0.031", {(THEIRS, SINGLE): 0.2, (THEIRS, "BPDA, identity"): 0.0}, FAILS),
        ("that attack, SAP as published", {(THEIRS, SINGLE): 0.3}, HOLDS),
        ("that attack, SAP as published", {(THEIRS, SINGLE): 0.1, (OURS, SINGLE): 0.2}, DIRECTION),
        ("that attack, SAP as published", {(THEIRS, SINGLE): 0.1, (OURS, CONSTANT): 0.1}, DIRECTION),
        ("that attack, SAP as published", {(THEIRS, SINGLE): 0.49}, FAILS),
        ("that attack, SAP as published", {(OURS, SINGLE): 0.1, (OURS, CONSTANT): 0.1}, FAILS),
        ("BPDA breaks SAP as published", {(OURS, "BPDA, identity"): 0.005}, HOLDS),
        ("BPDA breaks SAP as published", {(OURS, "BPDA, dense's backward"): 0.1}, DIRECTION),
        ("BPDA breaks SAP as published", {(OURS, "PGD, margin"): 0.0}, FAILS),
        ("broken without gradients", {(THEIRS, BLACK_BOX): 0.01}, HOLDS),
        ("broken without gradients", {(THEIRS, BLACK_BOX): 0.05}, DIRECTION),
        ("broken without gradients", {(THEIRS, SINGLE): 0.0}, OPEN),
    ],
)
def test_claims_about_the_ladder(
    name: str, given: dict[tuple[str, str], float], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = ladder(given)
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame)
    assert judged(BY_NAME[name], Numbers()).verdict == verdict


def test_more_robust_at_one_eps_holds_in_direction_and_a_missing_attack_leaves_it_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frame = ladder({})
    frame.loc[(frame["panel"] == "dense") & (frame["eps"] == 4), ["accuracy", "low", "high"]] = (0.1, 0.08, 0.12)
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame)
    assert judged(BY_NAME["robust"], Numbers()).verdict == DIRECTION
    frame = frame[frame["series"] != "AutoAttack (rand)"]
    frame.attrs = {"missing": ["one"], "settings": Settings()}
    verdict = judged(BY_NAME["robust"], Numbers())
    assert (verdict.verdict, verdict.why) == (OPEN, "AutoAttack (rand) at λ = 1 is not computed")
    frame = ladder({(OURS, "BPDA, identity"): 0.0})
    frame = frame[frame["series"] != "BPDA, identity, 3 restarts"]
    frame.attrs = {"missing": ["one"], "settings": Settings()}
    assert judged(BY_NAME["BPDA breaks SAP as published"], Numbers()).verdict == HOLDS, "nothing can be left to break"


@pytest.mark.parametrize(("left", "verdict"), [(0.52, FAILS), (0.6, OPEN)])
def test_more_robust_fails_for_certain_where_the_attacks_so_far_leave_no_more(
    left: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = ladder({(OURS, "BPDA, identity"): left}, otherwise=0.7)
    frame.loc[frame["panel"] == "dense", ["accuracy", "low", "high"]] = (0.5, 0.48, 0.52)
    frame = frame[(frame["panel"] != OURS) | (frame["series"] != BLACK_BOX)]
    frame.attrs = {"missing": ["one"], "settings": Settings()}
    monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame)
    assert judged(BY_NAME["robust"], Numbers()).verdict == verdict
    frame = frame[(frame["panel"] != "dense") | (frame["series"] != BLACK_BOX)]
    frame.attrs = {"missing": ["two"], "settings": Settings()}
    assert judged(BY_NAME["robust"], Numbers()).verdict == OPEN, "the other may fall, too"


WELL = {"SAP-100": 0.05, "ADV": 0.05, "ADV+SAP-100": 0.05}


@pytest.mark.parametrize(
    ("name", "errors", "verdict"),
    [
        ("dense is not calibrated", {"dense": 0.3}, HOLDS),
        ("dense is not calibrated", {"dense": 0.05}, FAILS),
        ("the others are calibrated", WELL, HOLDS),
        ("the others are calibrated", WELL | {"ADV": 0.2}, DIRECTION),
        ("the others are calibrated", {"dense": 0.3}, FAILS),
        ("SAP improves calibration", {"dense": 0.3, "ADV": 0.3}, HOLDS),
        ("SAP improves calibration", {"dense": 0.3, "ADV": 0.3, ("ADV", 4): 0.1, ("dense", 0): 0.01}, DIRECTION),
        ("SAP improves calibration", {"dense": 0.3, "ADV": 0.3, ("ADV", 4): 0.01}, FAILS),
        ("SAP improves calibration", {"dense": 0.3, "ADV": 0.3, ("ADV", 32): 0.01}, HOLDS),
        ("SAP improves calibration", {"dense": 0.3}, FAILS),
        ("SAP preserves calibration", {}, HOLDS),
        ("SAP preserves calibration", {("SAP-100", 0): 0.11}, HOLDS),
        ("SAP preserves calibration", {("SAP-100", 0): 0.13}, DIRECTION),
        ("SAP preserves calibration", {("SAP-100", 8): 0.13, ("ADV+SAP-100", 0): 0.13, ("ADV", 8): 0.05}, DIRECTION),
        ("SAP preserves calibration", {("SAP-100", 32): 0.5, ("ADV+SAP-100", 32): 0.5}, HOLDS),
        ("SAP preserves calibration", {"SAP-100": 0.13, ("ADV+SAP-100", 0): 0.13}, FAILS),
        ("ADV+SAP-100 is best calibrated", {"ADV+SAP-100": 0.02}, HOLDS),
        ("ADV+SAP-100 is best calibrated", {"ADV": 0.02}, FAILS),
    ],
)
def test_claims_about_calibration(
    name: str, errors: dict[Any, float], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"series": series, "eps": e, "ece": error, "ece_low": error - 0.01, "ece_high": error + 0.01}
        for series in claims.FOUR
        for e in experiments.EPS_CALIBRATION
        for error in [errors.get((series, e), errors.get(series, 0.1))]
    ]
    numbers(monkeypatch, four(0.5, 0.5, 0.5, 0.5) | {(series, 32): 0.1 for series in claims.FOUR})
    monkeypatch.setattr(experiments, "calibrations", lambda settings: pd.DataFrame(rows))
    assert judged(BY_NAME[name], Numbers()).verdict == verdict


@pytest.mark.parametrize("name", ["SAP improves calibration", "SAP preserves calibration"])
def test_a_network_that_guesses_and_knows_it_is_not_calibrated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"series": series, "eps": e, "ece": error, "ece_low": error, "ece_high": error}
        for series in claims.FOUR for e in experiments.EPS_CALIBRATION for error in [0.0 if "SAP" in series else 0.3]
    ]  # fmt: skip
    numbers(monkeypatch, four(0.5, 0.1, 0.5, 0.1))
    monkeypatch.setattr(experiments, "calibrations", lambda settings: pd.DataFrame(rows))
    assert judged(BY_NAME[name], Numbers()) == (OPEN, "at no λ is a network with SAP clearly above guessing")


def test_twenty_seconds_are_shown_and_not_judged() -> None:
    verdict = judged(BY_NAME["20 seconds"])
    assert verdict.verdict == OPEN
    assert "AMD EPYC" in verdict.why


def test_some_games_that_lose_and_none_that_gains_hold_in_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three clearly, one unclearly, two not at all."""
    shown = [[5.0, 5.2, 5.1]] * 3 + [[9.9, 10.0, 10.0]] + [[9.9, 10.1, 10.0]] * 2
    returns = dict(zip(GAMES, shown, strict=True))

    def verdict() -> str:
        frame = games(returns)
        monkeypatch.setattr(experiments, "stored", lambda figure, settings: frame)
        return judged(BY_NAME["games lose without an attack"], Numbers()).verdict

    assert verdict() == DIRECTION
    returns["Bowling"] = [15.0, 15.2, 15.1]
    assert verdict() == FAILS


def test_costs_lie_between_the_least_and_the_largest_difference() -> None:
    numbers, names = Numbers(), ("28 × 28 crops", "wrapped pixels", "colour jitter")
    dense, sap = ([numbers.at("readings", n, 0, panel)["accuracy"] for n in names] for panel in ("dense", "SAP-100"))
    costs = [100 * (a - b) for a, b in zip(dense, sap, strict=True)]
    shown = numbers.between("readings", names, 0, "SAP-100", less_than="dense")
    assert shown == f"{min(costs):.0f} to {max(costs):.0f} points"
    assert numbers.between("readings", names, 0, "SAP-100") == f"{100 * min(sap):.0f} to {100 * max(sap):.0f} %"
    assert numbers.between("readings", ("no such way",), 0, "SAP-100") == "(not computed yet)"
