"""The list of cells per figure, the check of a chapter's parameters, and the tidy frame."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sapcore import experiments, results, runner
from sapcore.calibration import BINS
from sapcore.checkpoints import CheckpointError
from sapcore.errors import SapcoreError
from sapcore.experiments import EPS, PERCENTS, Settings, cells, points, settings, stored, table
from sapcore.results import Attack, Defence
from sapcore.training import DROPOUT_RATES
from tests.test_results import ORIGIN, RESULT

FIGURES = ("fig1a", "fig1b", "fig1c")


@pytest.fixture
def cifar10_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of weights, also where the network for CIFAR-10 is not there yet."""
    monkeypatch.setattr("sapcore.checkpoints.sha256", lambda name: "ab" * 32)


SENSELESS: list[tuple[dict[str, Any], str]] = [
    ({"dataset": "imagenet"}, "dataset is 'imagenet', but must be one of cifar10, digits"),
    ({"dataset": None}, "dataset is None, but must be one of cifar10, digits"),
    ({"eps": -1}, "eps is -1, but must be a number of 0 or more, in pixel units (0-255), such as 4"),
    ({"eps": "8/255"}, "eps is '8/255', but must be a number of 0 or more, in pixel units (0-255), such as 4"),
    ({"eps": "4"}, "eps is '4', but must be a number of 0 or more, in pixel units (0-255), such as 4"),
    ({"eps": float("nan")}, "eps is nan, but must be a number of 0 or more, in pixel units (0-255), such as 4"),
    ({"eps": float("inf")}, "eps is inf, but must be a number of 0 or more, in pixel units (0-255), such as 4"),
    ({"eps": True}, "eps is True, but must be a number of 0 or more, in pixel units (0-255), such as 4"),
    ({"eps": [1, -2]}, "eps is -2, but must be a number of 0 or more, in pixel units (0-255), such as 4"),
    ({"eps": [1, None]}, "eps is None, but must be a number of 0 or more, in pixel units (0-255), such as 4"),
    ({"eps": []}, "eps is an empty list, but must hold one number or more, in pixel units (0-255)"),
    ({"examples": 0}, "examples is 0, but must be a whole number from 1 to 10000"),
    ({"examples": -5}, "examples is -5, but must be a whole number from 1 to 10000"),
    ({"examples": 10_001}, "examples is 10001, but must be a whole number from 1 to 10000"),
    ({"examples": 501, "dataset": "digits"}, "examples is 501, but must be a whole number from 1 to 500"),
    ({"examples": 1.5}, "examples is 1.5, but must be a whole number from 1 to 10000"),
    ({"examples": "all"}, "examples is 'all', but must be a whole number from 1 to 10000"),
    ({"examples": True}, "examples is True, but must be a whole number from 1 to 10000"),
    ({"passes": 0}, "passes is 0, but must be a whole number from 1 on"),
    ({"passes": 2.0}, "passes is 2.0, but must be a whole number from 1 on"),
    ({"seed": -1}, "seed is -1, but must be a whole number from 0 to 2**64 - 1"),
    ({"seed": 2**64}, "seed is 18446744073709551616, but must be a whole number from 0 to 2**64 - 1"),
    ({"seed": None}, "seed is None, but must be a whole number from 0 to 2**64 - 1"),
    ({"seed": "0"}, "seed is '0', but must be a whole number from 0 to 2**64 - 1"),
    ({"steps": 0}, "steps is 0, but must be a whole number from 1 on"),
    ({"steps": None}, "steps is None, but must be a whole number from 1 on"),
    ({"step": 0}, "step is 0, but must be a positive number, in pixel units"),
    ({"step": "2/255"}, "step is '2/255', but must be a positive number, in pixel units"),
    ({"step": float("inf")}, "step is inf, but must be a positive number, in pixel units"),
]


@pytest.mark.parametrize(("arguments", "message"), SENSELESS, ids=str)
def test_a_senseless_parameter_stops_with_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SapcoreError) as caught:
        settings(**arguments)
    assert str(caught.value) == message
    assert caught.value._render_traceback_() == [f"SapcoreError: {message}"]


@pytest.mark.parametrize(
    ("eps", "expected"),
    [
        (None, None),
        (4, (4,)),
        (4.0, (4,)),
        (0.5, (0.5,)),
        ([4, 1, 4.0], (1, 4)),
        ((0,), (0,)),
        (-0.0, (0,)),
        (300, (300,)),
    ],
)
def test_eps_is_one_value_or_a_list_in_order_and_each_once(eps: Any, expected: Any) -> None:
    found = settings(eps=eps).eps
    assert found == expected
    assert [type(e) for e in found or ()] == [type(e) for e in expected or ()]


def test_settings_that_mean_the_same_are_the_same() -> None:
    assert settings(step=1.0, eps=[4.0]) == settings(step=1, eps=4)
    ones: tuple[Any, Any, Any] = 1, 1.0, np.float32(1)
    for figure in FIGURES:
        one, other, third = (cells(figure, settings("digits", 4, step=step)) for step in ones)
        assert [cell.key for cell in one] == [cell.key for cell in other] == [cell.key for cell in third]
    kinds: tuple[Any, Any] = int, np.int64
    plain, numpys = (settings("digits", 4, k(5), k(2), k(3), steps=k(4)) for k in kinds)
    assert [cell.key for cell in cells("fig1c", plain)] == [cell.key for cell in cells("fig1c", numpys)]


def test_the_books_own_settings_are_the_default_ones() -> None:
    assert settings() == Settings()
    assert settings().default
    for change in ({"eps": 4}, {"dataset": "digits"}, {"seed": 1}, {"examples": 5}, {"passes": 5}, {"steps": 5}):
        assert not settings(**change).default


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_figure_1a_is_dense_and_six_levels_of_sap_under_noise_on_the_papers_grid() -> None:
    found = cells("fig1a")
    assert len(found) == 7 * 8
    assert {(cell.defence.label, cell.attack.eps) for cell in found} == {
        (label, eps)
        for label in ("dense", "SAP-5", "SAP-10", "SAP-25", "SAP-50", "SAP-100", "SAP-200")
        for eps in (0, 1, 2, 4, 8, 16, 32, 64)
    }
    assert {cell.attack.kind for cell in found if cell.attack.eps} == {"noise"}
    assert {cell.attack.source for cell in found} == {None}


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_figure_1b_attacks_each_network_by_its_own_gradient() -> None:
    for cell in cells("fig1b"):
        if cell.attack.eps:
            passes = 100 if cell.defence.noisy else 1
            assert cell.attack == Attack("fgsm", cell.attack.eps, cell.defence, "mean_of_gradients", passes)


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_figure_1c_is_dense_sap_against_itself_and_sap_against_dense() -> None:
    found = [(cell.defence.label, cell.attack.source and cell.attack.source.label) for cell in cells("fig1c")]
    assert {cell.attack.eps for cell in cells("fig1c")} == {0, 1, 2, 4, 8, 16}
    assert list(dict.fromkeys(pair for pair in found if pair[1])) == [
        ("dense", "dense"), ("SAP-100", "SAP-100"), ("SAP-100", "dense"),
    ]  # fmt: skip
    assert {(c.attack.step, c.attack.steps) for c in cells("fig1c") if c.attack.eps} == {(1, 10)}
    assert {c.attack.passes for c in cells("fig1c") if c.attack.eps} == {1, 10}


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_the_default_sizes_are_those_of_the_first_round() -> None:
    """1,000 test images and 100 passes for noisy networks, all 10,000 images for dense, and for SAP-100 in Fig. 1b."""
    for figure in FIGURES:
        for cell in cells(figure):
            noisy, whole = cell.defence.noisy, figure == "fig1b" and cell.defence == Defence("sap", 100)
            images = 1000 if noisy and not whole else 10_000
            assert (cell.dataset, cell.examples, cell.passes) == ("cifar10", images, 100 if noisy else 1)
            assert cell.seed == 0
    for cell in cells("fig1b", settings("digits")):
        whole = cell.defence in (Defence(), Defence("sap", 100))
        assert (cell.examples, cell.passes) == (500 if whole else 100, 10 if cell.defence.noisy else 1)


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_figures_share_the_cells_without_perturbation() -> None:
    clean = {figure: {cell for cell in cells(figure) if not cell.attack.eps} for figure in FIGURES}
    assert len(clean["fig1a"] & clean["fig1b"]) == len(clean["fig1a"]) - 1  # SAP-100 is run on all images in Fig. 1b
    assert clean["fig1c"] == {cell for cell in clean["fig1a"] if cell.defence in (Defence(), Defence("sap", 100))}
    shared = {cell for cell in cells("fig1b") if cell.defence in (Defence(), Defence("sap", 100))}
    assert shared <= set(cells("fig3"))
    assert all(cell.attack == Attack() for cell in clean["fig1a"])


@pytest.mark.usefixtures("cifar10_checkpoint")
@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_lists_each_cell_once(figure: str) -> None:
    found = cells(figure)
    assert len(found) == len(set(found)) == len({cell.key for cell in found})


def test_given_sizes_count_for_every_cell_and_the_gradient() -> None:
    for cell in cells("fig1b", settings("digits", 4, examples=20, passes=3, seed=9)):
        assert (cell.examples, cell.passes, cell.seed) == (20, 3 if cell.defence.noisy else 1, 9)
        assert cell.attack.passes == cell.passes
    for cell in cells("fig1c", settings("digits", 4, passes=30)):
        assert cell.attack.passes in (1, 3)
    for cell in cells("fig1c", settings("digits", 4, passes=3, step=0.5, steps=7)):
        assert (cell.attack.passes, cell.attack.step, cell.attack.steps) == (1, 0.5, 7)


@pytest.mark.parametrize("figure", ["fig9", "", None])
def test_an_unknown_figure_is_refused(figure: Any) -> None:
    with pytest.raises(SapcoreError, match=r"no figure is named .*; there are .*fig1a, fig1b, fig1c"):
        cells(figure)
    with pytest.raises(SapcoreError, match="no figure is named"):
        stored(figure, settings("digits"))


def test_without_the_checkpoint_the_cells_cannot_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sapcore.checkpoints.CHECKPOINTS", tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint is named 'resnet20-digits'"):
        cells("fig1a", settings("digits"))


TINY: dict[str, Any] = {"dataset": "digits", "eps": [0, 3], "examples": 4, "passes": 2}


def test_a_table_computes_what_is_missing_and_has_one_row_per_point(store: Path) -> None:
    frame = table("fig1c", settings(**TINY, steps=2))
    assert list(frame["series"].unique()) == ["dense vs dense", "SAP-100 vs SAP-100", "SAP-100 vs dense"]
    assert frame.groupby("series")["eps"].apply(list).tolist() == [[0, 3]] * 3
    assert frame.attrs["missing"] == []
    assert frame.attrs["figure"] == "fig1c"
    assert (frame["low"] <= frame["accuracy"]).all()
    assert (frame["accuracy"] <= frame["high"]).all()
    assert (frame["images"] == 4).all()
    of_noise = ["level", "single_pass", "every_pass"]
    assert not frame.drop(columns=of_noise).isna().any(axis=None)
    assert not frame[frame["noisy"]].isna().any(axis=None)
    noisy = frame["series"] != "dense vs dense"
    assert frame["passes"].tolist() == [2 if n else 1 for n in noisy]
    clean = frame[(frame["eps"] == 0) & noisy]["accuracy"]
    assert clean.nunique() == 1


def test_a_table_is_read_from_the_store_the_second_time(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = table("fig1a", settings(**TINY))

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(runner, "compute", refuse)
    assert table("fig1a", settings(**TINY)).equals(first)


def test_the_numbers_do_not_depend_on_which_cells_are_computed_together(store: Path) -> None:
    both = table("fig1b", settings(**TINY))
    for path in store.rglob("*.json"):
        path.unlink()
    alone = table("fig1b", settings(**{**TINY, "eps": 3}))
    expected = both[both["eps"] == 3].reset_index(drop=True)
    assert alone["correct"].tolist() == expected["correct"].tolist()


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_the_books_own_cells_are_never_computed_by_a_chapter(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a chapter began to compute for hours")

    monkeypatch.setattr(runner, "run", refuse)
    frame = table("fig1b", settings())
    assert frame.empty
    assert len(frame.attrs["missing"]) == 7 * 8


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_the_books_own_cells_are_left_to_a_run_also_if_only_some_are_asked_for(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise `-p eps 4` would take hours, and the data set, where a cell is not in the store yet."""
    asked: list[results.Cell] = []
    monkeypatch.setattr(runner, "run", lambda wanted, **_: asked.extend(wanted))
    for figure in ("fig1b", "fig1c", "fig1c_steps"):
        assert table(figure, settings(eps=4)).attrs["missing"]
        assert asked == []
        table(figure, settings(eps=[3, 4]))
        assert {cell.attack.eps for cell in asked} == {3}
        asked.clear()


def test_a_frame_names_the_cells_that_are_not_stored(store: Path) -> None:
    wanted = cells("fig1b", settings(**TINY))
    results.write(wanted[1], RESULT, ORIGIN)
    frame = stored("fig1b", settings(**TINY))
    assert frame[["series", "eps", "accuracy", "device", "commit"]].to_numpy().tolist() == [
        ["dense", 3, 0.5, "a computer", "abc"]
    ]
    assert len(frame.attrs["missing"]) == len(wanted) - 1
    assert "SAP-100 fgsm eps 3" in frame.attrs["missing"]


def test_a_table_raises_the_error_of_a_cell_that_failed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the middle")

    monkeypatch.setattr(runner, "compute", fail)
    with pytest.raises(ZeroDivisionError, match="in the middle"):
        table("fig1a", settings(**TINY))


@pytest.mark.usefixtures("cifar10_checkpoint")
@pytest.mark.parametrize("figure", experiments.FIGURES)
def test_every_curve_is_of_one_network_and_one_adversary_and_has_each_place_once(figure: str) -> None:
    curves: dict[tuple[str, str], list[results.Cell]] = {}
    for cell, series, panel in points(figure):
        curves.setdefault((panel, series), []).append(cell)
    for found in curves.values():
        assert len({(cell.checkpoint, cell.defence) for cell in found}) == 1
        assert len({cell.attack.source for cell in found if cell.attack.eps}) <= 1
        places = [(cell.attack.eps, cell.attack.steps, cell.attack.passes) for cell in found]
        assert len(places) == len(set(places))


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_figures_2b_and_2c_are_the_same_networks_with_dropout_on_and_off() -> None:
    for figure, kind in (("fig2b", "dropout"), ("fig2c", "dense")):
        trained = [point for point in points(figure) if point.series not in ("dense", "dropout-0")]
        control = {p.cell.checkpoint for p in points(figure) if p.series == "dropout-0"}
        assert control == {"resnet20-cifar10-dropout-0"}
        assert {p.cell.checkpoint for p in points(figure, settings("digits")) if p.series == "dropout-0"} == {
            "resnet20-digits"
        }
        assert {p.cell.checkpoint for p in trained} == {f"resnet20-cifar10-dropout-{r}" for r in DROPOUT_RATES}
        assert {p.cell.defence.kind for p in trained} == {kind}
        for point in trained:
            assert point.series.removeprefix("dropout-") == point.cell.checkpoint.rsplit("-", 1)[1]
            assert kind == "dense" or f"dropout-{point.cell.defence.level}" == point.series
    pretrained = {cell for cell in cells("fig2a") if cell.defence.noisy}
    assert {cell.checkpoint for cell in pretrained} == {"resnet20-cifar10"}
    assert {cell.defence.kind for cell in pretrained} == {"dropout"}


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_figures_3_and_4_are_four_networks_on_all_test_images_each_against_itself() -> None:
    found = cells("fig3")
    assert len(found) == 4 * 8
    assert {cell.defended for cell in found} == {"dense", "SAP-100", "ADV", "ADV+SAP-100"}
    assert {cell.examples for cell in found} == {10_000}
    assert {cell.passes for cell in found if cell.defence.noisy} == {100}
    assert all(cell.attack.source == cell.defence for cell in found if cell.attack.eps)
    assert {cell.attack.eps for cell in cells("fig4")} == {0, 1, 2, 4, 8, 16, 32}
    assert set(cells("fig4")) < set(found)


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_figure_5_has_six_panels_with_dense_and_several_levels() -> None:
    panels: dict[str, dict[str, set[results.Cell]]] = {}
    for cell, series, panel in points("fig5"):
        panels.setdefault(panel, {}).setdefault(series, set()).add(cell)
    assert list(panels) == ["RNW", "RSW", "DWP", "SWP", "RNA", "RSA"]
    for panel, curves in panels.items():
        assert "dense" in curves
        assert len(curves) >= 5  # dense and four levels
        for series, found in curves.items():
            assert series == "dense" or series.startswith(f"{panel}-")
            assert all(cell.attack.source == cell.defence for cell in found if cell.attack.eps)


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_bfloat16_is_compared_with_float32_on_a_published_curve() -> None:
    found = {p.series: [c.cell for c in points("precision") if c.series == p.series] for p in points("precision")}
    assert list(found) == ["bfloat16", "float32"]
    own = settings(eps=[0, 1, 2, 4], examples=1000)
    assert set(found["bfloat16"]) == {p.cell for p in points("fig1b", own) if p.series == "SAP-100"}
    assert {cell.precision for cell in found["float32"]} == {"float32"}
    assert [dataclasses.replace(cell, precision="bfloat16") for cell in found["float32"]] == found["bfloat16"]


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_figure_6_is_sap_against_dense_and_1_to_1000_passes() -> None:
    found = {(c.attack.source and c.attack.source.label, c.attack.passes) for c in cells("fig6") if c.attack.eps}
    assert found == {("dense", 1), ("SAP-100", 1), ("SAP-100", 10), ("SAP-100", 100), ("SAP-100", 1000)}
    assert {cell.defence.label for cell in cells("fig6")} == {"SAP-100"}
    assert {(c.examples, c.passes) for c in cells("fig6")} == {(1000, 100)}
    budget = points("fig6_budget")
    assert {p.cell.attack.eps for p in budget} == {4}
    gradients: dict[str, list[int]] = {}
    for point in budget:
        attack = point.cell.attack
        gradients.setdefault(point.series, []).append(attack.passes * max(1, attack.steps))
    assert gradients == {
        "FGSM on dense, λ = 4": [1], "10 steps on dense, λ = 4": [10],
        "FGSM on SAP-100, λ = 4": [1, 10, 100, 1000], "10 steps on SAP-100, λ = 4": [10, 100, 1000],
    }  # fmt: skip


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_the_ladder_is_two_networks_and_three_defences_under_the_same_attacks_up_to_what_each_knows() -> None:
    found = points("ladder")
    panels = {panel: [p for p in found if p.panel == panel] for panel in dict.fromkeys(p.panel for p in found)}
    assert list(panels) == ["dense", "SAP-100", "ADV", "ADV+SAP-100", "Bernoulli-SAP-200"]
    for name in ("dense", "ADV"):
        plain = panels.pop(name)
        assert [p.series for p in plain if p.cell.attack.eps == 4] == list(experiments.RUNGS_OF_DENSE)
        assert {(p.cell.examples, p.cell.passes, p.cell.attack.passes) for p in plain if p.cell.attack.source} == {
            (200, 1, 1)
        }
        assert {p.cell.checkpoint.endswith("-adv") for p in plain} == {name == "ADV"}
        (standard,) = {p.cell.attack.gradients for p in plain if p.series == "AutoAttack (standard)"}
        assert standard == 10 * 101 + 9 * 100 + 5001, "gradients of APGD and FAB, queries of Square"
    rungs = [[p.series for p in part] for part in panels.values()]
    assert rungs[0] == rungs[1] == rungs[2]
    assert len(set(rungs[0])) == 19
    assert "AutoAttack (standard)" not in rungs[0]
    for panel, part in panels.items():
        assert {p.cell.attack.eps for p in part} == {0, 1, 2, 4, 7.905, 8}
        assert {p.cell.defence.label for p in part} == {panel.removeprefix("ADV+")}
        assert {p.cell.checkpoint.endswith("-adv") for p in part} == {panel.startswith("ADV")}
        assert {(p.cell.examples, p.cell.passes) for p in part} == {(200, 100)}
        assert {p.cell.defence.backward for p in part} == {"constant"}, "the attack alone goes another way back"
        sources = {p.series: p.cell.attack.source for p in part}
        assert sources["BPDA, identity"].backward == "identity"  # type: ignore[union-attr]
        assert sources["FGSM on dense"] == experiments.DENSE
    costs = {p.series: p.cell.attack.gradients for p in panels["SAP-100"] if p.cell.attack.eps}
    assert costs["FGSM"] == 100
    assert costs["PGD, margin"] == 400
    assert costs["BPDA, identity, 3 restarts"] == 1200
    assert costs["AutoAttack (rand)"] == 2 * 101 * 20
    assert costs["Square (black box)"] == 501 * 10, "one query more finds out where it begins"
    assert costs["random noise"] == 0
    controls = [p.cell.attack for p in found if p.series == "single passes, constant scale"]
    assert [(a.eps, a.gradients, a.source and a.source.backward) for a in controls] == 3 * [(7.905, 500, "constant")]
    few = {p.cell.attack.passes for p in points("ladder", settings(passes=20)) if p.series == "PGD, margin"}
    assert few == {1, 2}, "1 on dense"


def test_a_network_that_is_not_trained_yet_leaves_its_rungs_without_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sapcore.checkpoints.names", lambda: ["resnet20-digits"])
    for figure in ("ladder", "ladder_checks"):
        found = points(figure, settings("digits"))
        assert {(p.panel, p.cell.computable) for p in found} == {
            ("SAP-100", True), ("ADV+SAP-100", False), ("Bernoulli-SAP-200", True),
        } | ({("dense", True), ("ADV", False)} if figure == "ladder" else set())  # fmt: skip


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_sap_with_statistics_of_its_own_is_attacked_by_who_knows_them() -> None:
    """Like SAP-100, whose cells are the ladder's; all but FGSM on dense follow the network that they attack."""
    found = points("noisy_statistics")
    plain, own = ([p for p in found if p.panel == panel] for panel in ("SAP-100", experiments.STATISTICS_UNDER_SAP))
    assert len(plain) + len(own) == len(found)
    on = "BPDA, identity, 160 steps of λ/16"
    assert {p.cell for p in plain if p.series != on} < {p.cell for p in points("ladder")}
    checked = [p.cell for p in points("ladder_checks") if (p.series, p.panel) == (on, "SAP-100")]
    assert [p.cell for p in plain if p.series == on] == checked
    assert len(checked) == 3
    assert [p.series for p in own] == [p.series for p in plain]
    for with_own, without in zip(own, plain, strict=True):
        cell, attack = with_own.cell, with_own.cell.attack
        assert cell.defence == Defence("sap", 100, noisy_statistics=5000)
        knows = attack.source is not None and attack.source != Defence()
        assert knows == (with_own.series not in ("no attack", "FGSM on dense"))
        if attack.source is not None and knows:
            assert attack.source.noisy_statistics == 5000
            attack = dataclasses.replace(attack, source=dataclasses.replace(attack.source, noisy_statistics=0))
        assert dataclasses.replace(cell, defence=Defence("sap", 100), attack=attack) == without.cell
    assert {p.cell.attack.eps for p in found} == {0, 1, 2, 4, experiments.EPS_ATHALYE}


def test_the_checks_of_the_ladder_are_ever_more_steps_more_passes_and_no_bound() -> None:
    for name in ("SAP-100", "ADV+SAP-100", "Bernoulli-SAP-200"):
        attacks = [p.cell.attack for p in points("ladder_checks") if p.panel == name]
        steps = [(e, n) for e in (1, 2, 4) for n in (1, 4, 40, 160)]
        same = [(e, n) for n in (160, 40) for e in (1, 2, 4)]
        assert [(a.eps, a.steps) for a in attacks] == [*steps, *same, (255, 40)]
        assert [a.passes for a in attacks] == 15 * [10] + 3 * [40] + [10]
        reach = [1, 2.5, 2.5, 2.5]  # in eps
        assert [a.steps * a.step / a.eps for a in attacks] == 3 * reach + 3 * [10] + 3 * [2.5] + [2.5]
        known = {(p.series, p.cell) for p in points("ladder") if p.panel == name}
        named = {(p.series, p.cell) for p in points("ladder_checks") if p.panel == name}
        assert {series for series, _ in known & named} == {"BPDA, identity"}
        assert {series for series, cell in named - known} == {
            "BPDA, identity, 1 step", "BPDA, identity, 4 steps", "BPDA, identity, 160 steps of λ/64",
            "BPDA, identity, 160 steps of λ/16", "BPDA, identity, 40 passes", "BPDA, identity",
        }  # fmt: skip
    assert {p.cell.attack.eps for p in points("ladder_checks", settings(eps=[0, 2]))} == {2, 255}


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_the_iterative_attack_takes_1_to_100_steps() -> None:
    assert {c.attack.steps for c in cells("fig1c_steps")} == {1, 3, 10, 30, 100}
    assert {(c.attack.eps, c.attack.step) for c in cells("fig1c_steps")} == {(4, 1)}
    assert {p.series for p in points("fig1c_steps")} == {
        "dense vs dense, λ = 4", "SAP-100 vs SAP-100, λ = 4", "SAP-100 vs dense, λ = 4",
    }  # fmt: skip


@pytest.mark.usefixtures("cifar10_checkpoint")
def test_the_iterative_attack_meets_the_networks_of_figure_2c_on_the_images_of_sap() -> None:
    found = points("fig2c_iterative")
    assert list(dict.fromkeys(p.series for p in found)) == [
        *dict.fromkeys(p.series for p in points("fig2c")), "SAP-100", "SAP-100 vs dense",
    ]  # fmt: skip
    for point in found:
        cell, plain = point.cell, [p.cell for p in points("fig2c") if p.series == point.series]
        assert (cell.examples, cell.seed) == (1000, 0)
        if cell.defence == experiments.SAP_100:
            assert cell in {p.cell for p in points("fig1c")}
        else:
            assert {(c.checkpoint, c.defence) for c in plain} == {(cell.checkpoint, cell.defence)}
        if cell.attack.eps:
            assert (cell.attack.kind, cell.attack.step, cell.attack.steps) == ("iterative", 1, 10)
            assert cell.attack.source == (experiments.DENSE if point.series.endswith("dense") else cell.defence)


def test_calibrations_have_a_row_per_network_eps_and_bin(store: Path) -> None:
    s = settings("digits", [0, 3], examples=6, passes=2)
    frame = experiments.calibrations(s)
    assert list(frame["series"].unique()) == ["dense", "SAP-100", "ADV", "ADV+SAP-100"]
    assert len(frame) == 4 * 2 * BINS
    assert (frame.groupby(["series", "eps"])["images"].sum() == 6).all()
    accuracy = table("fig4", s).set_index(["series", "eps"])["accuracy"]
    right = (frame["images"] * frame["accuracy"].fillna(0)).groupby([frame["series"], frame["eps"]]).sum()
    assert (right / 6 - accuracy).abs().max() < 1e-9
    assert (frame["ece_low"] <= frame["ece_high"]).all()
    assert frame.attrs["missing"] == []


def test_the_committed_cells_for_digits_are_all_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAPCORE_RESULTS", raising=False)
    for figure in experiments.FIGURES.keys() - {"table1"}:  # it has no data set
        assert {results.state(cell) for cell in cells(figure, settings("digits"))} == {("present", "")}


def test_constants_are_the_papers() -> None:
    assert EPS == (0, 1, 2, 4, 8, 16, 32, 64)
    assert PERCENTS == (5, 10, 25, 50, 100, 200)
    assert dataclasses.asdict(Settings())["dataset"] == "cifar10"


def test_table_1_is_each_game_at_random_plain_and_with_sap_under_its_own_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sapcore.checkpoints.names", lambda: ["double-dqn-Bowling"])
    monkeypatch.setattr("sapcore.checkpoints.sha256", lambda name: "ab" * 32)
    found = points("table1")
    assert len(found) == 6 * (1 + 2 * 5 + 4)
    for cell, series, game in found:
        noisy, attack = series in ("SAP-100", "SAP-100 vs dense"), cell.attack
        assert (cell.plays, cell.dataset, cell.examples) == (True, game, 15 if noisy and attack.eps else 30)
        assert cell.computable == (game == "Bowling" or series == "random")
        assert (cell.passes, cell.precision) == ((30, "bfloat16") if noisy else (1, "float32"))
        if attack.eps:
            assert attack.source == (experiments.DENSE if series == "SAP-100 vs dense" else cell.defence)
            assert attack.passes == (100 if series == "SAP-100" else 1)
        else:
            assert (attack.source, attack.passes) == (None, 0)
    assert {cell.attack.eps for cell, _, _ in found} == {0, 1, 2, 4, 8}
    few = points("table1", settings(game="Bowling", eps=2, episodes=12))
    assert [(cell.defence.label, cell.attack.eps, cell.examples) for cell, _, _ in few] == [
        ("random", 0, 12), ("dense", 2, 12), ("SAP-100", 2, 12), ("SAP-100", 2, 12),
    ]  # fmt: skip
    for senseless, sentence in (
        ({"game": "Pong"}, "game is 'Pong', but must be one of Assault, Asterix, BankHeist, BattleZone, "),
        ({"episodes": 0}, "episodes is 0, but must be a whole number from 1 on"),
    ):
        with pytest.raises(SapcoreError, match=f"^{sentence}"):
            settings(**senseless)
