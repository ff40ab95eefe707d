"""Every figure has axes that say what they show, and beneath it numbers, origin and a CSV that agree with it."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch
from PIL import Image

from sapcore import checkpoints, claims, experiments, figures
from sapcore.experiments import READINGS, Settings, settings
from sapcore.published import PUBLISHED, TABLE_1
from sapcore.rl.environments import GAMES
from sapcore.rl.playing import Moment


@pytest.fixture(autouse=True)
def no_open_figures() -> Iterator[None]:
    yield
    plt.close("all")


def make(
    series: tuple[str, ...] = ("dense", "SAP-5", "SAP-100"),
    eps: tuple[float, ...] = (0, 1, 4),
    figure: str = "fig1b",
    dataset: str = "cifar10",
    missing: tuple[str, ...] = (),
) -> pd.DataFrame:
    """A frame as `experiments.stored` makes it."""
    rows: list[dict[str, Any]] = []
    for place, name in enumerate(series):
        for e in eps:
            accuracy = 0.9 - 0.1 * place - e / 10
            noisy = not name.startswith("dense")
            rows.append(
                {
                    "panel": "",
                    "series": name,
                    "eps": e,
                    "accuracy": accuracy,
                    "low": accuracy - 0.03,
                    "high": accuracy + 0.02,
                    "correct": int(1000 * accuracy),
                    "single_pass": accuracy - 0.05,
                    "every_pass": accuracy / 2,
                    "images": 1000 if noisy else 10_000,
                    "passes": 100 if noisy else 1,
                    "noisy": noisy,
                    "level": 100.0 if noisy else None,
                    "gradient_passes": (100 if noisy else 1) if e else 0,
                    "steps": 0,
                    "gradients": (100 if noisy else 1) if e else 0,
                    "device": "a GPU" if noisy else "a CPU",
                    "commit": "abc123",
                    "date": "2026-11-01",
                }
            )
    frame = pd.DataFrame(rows)
    frame.attrs = {"figure": figure, "missing": list(missing), "settings": settings(dataset)}
    return frame


def budget() -> pd.DataFrame:
    """A frame of two attacks at one eps, with 1 to 1000 gradients."""
    frame = pd.concat([make(("FGSM", "10 steps"), (4,), "fig6_budget").assign(gradients=n) for n in (1, 10, 1000)])
    frame.attrs = make().attrs | {"figure": "fig6_budget"}
    return frame


def reliability(bins: int = 4) -> pd.DataFrame:
    """A frame as `experiments.calibrations` makes it, with an empty bin each."""
    rows = [
        {"series": name, "eps": e, "bin": i, "images": 100 * i, "confidence": (i + 0.5) / bins,
         "accuracy": i / bins if i else float("nan"), "ece": 0.1, "ece_low": 0.05, "ece_high": 0.2}
        for name in ("dense", "SAP-100", "ADV", "ADV+SAP-100") for e in (0, 1, 2, 4, 8) for i in range(bins)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs = make().attrs | {"figure": "fig4"}
    return frame


def baselines() -> pd.DataFrame:
    """A frame of two panels with dense and two levels each."""
    parts = []
    for panel in ("RNW", "DWP"):
        frame = make(("dense", f"{panel}-1", f"{panel}-2"))
        frame["level"] = frame["series"].map({"dense": None, f"{panel}-1": 1.0, f"{panel}-2": 2.0})
        parts.append(frame.assign(panel=panel))
    whole = pd.concat(parts, ignore_index=True)
    whole.attrs = make().attrs | {"figure": "fig5"}
    return whole


def rungs() -> pd.DataFrame:
    """A frame of two defences under two attacks."""
    parts = []
    for panel in ("SAP-100", "Bernoulli-SAP-200"):
        frame = make(("FGSM", "PGD"), (1, 4), "ladder").assign(panel=panel)
        clean = make(("no attack",), (0,), "ladder").assign(panel=panel)
        parts += [clean, frame]
    whole = pd.concat(parts, ignore_index=True)
    whole.attrs = make().attrs | {"figure": "ladder"}
    return whole


CARD = {
    "name": "resnet20-small",
    "test_images": 10_000,
    "test_accuracy": 0.9123,
    "seconds": 90.0,
    "training_precision": "bfloat16 autocast",
    "recipe": {"schedule": [[3, 0.5], [2, 0.05]], "batch_size": 512, "momentum": 0.9, "weight_decay": 1e-4},
    "provenance": [{"device": "a CPU", "commit": "abc123", "date": "2026-11-01"}],
    "history": [
        {"epoch": e, "lr": 0.5 if e < 4 else 0.05, "loss": 2 / e, **({"test_accuracy": e / 6} if e % 2 else {})}
        for e in range(1, 6)
    ],
}
H = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
P = torch.tensor([0.5, 0.3, 0.15, 0.05, 1e-5])

DRAWINGS = {
    "fig1a": lambda: figures.fig1a(make(figure="fig1a")),
    "fig1b": lambda: figures.fig1b(make()),
    "fig1c": lambda: figures.fig1c(make(("dense vs dense", "SAP-100 vs SAP-100", "SAP-100 vs dense"), figure="fig1c")),
    "fig2": lambda: figures.fig2(make(("dense", "dropout-0.1"), figure="fig2a"), "dropout"),
    "fig3": lambda: figures.fig3(make(("dense", "SAP-100", "ADV", "ADV+SAP-100"), figure="fig3")),
    "fig6": lambda: figures.fig6(make(("dense's gradient", "1 MC pass", "10 MC passes"), figure="fig6")),
    "accuracy_against": lambda: figures.accuracy_against(budget(), "gradients", "gradients per image", "SAP-100"),
    "ladder_budget": lambda: figures.ladder_budget(rungs()),
    "training_curve": lambda: figures.training_curve(CARD),
    "inclusion_law": lambda: figures.inclusion_law(P, torch.tensor([1, 0.9, 0.7, 0.3, 0.0]), 5, 100),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_axis_of_a_plot_is_labelled(name: str) -> None:
    drawn = DRAWINGS[name]()
    assert isinstance(drawn, Figure)
    assert drawn.axes
    for axes in drawn.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.has_data()


def test_the_ladder_has_a_panel_per_defence_and_its_attacks_from_above() -> None:
    drawn = figures.ladder(rungs())
    assert [axes.get_title() for axes in drawn.axes] == ["SAP-100", "Bernoulli-SAP-200"]
    for axes in drawn.axes:
        assert axes.get_xlabel() == "accuracy (%)"
    assert [tick.get_text() for tick in drawn.axes[0].get_yticklabels()] == ["FGSM", "PGD"]
    bars = [c for c in drawn.axes[0].containers if isinstance(c, ErrorbarContainer)]
    found = {bar.get_label(): [float(x) for x in bar[0].get_xdata()] for bar in bars}
    assert found == {"λ = 1": pytest.approx([80, 70]), "λ = 4": pytest.approx([50, 40])}
    more = pd.concat([rungs(), make(("Square",), (1,), "ladder").assign(panel="dense")])
    more.attrs = rungs().attrs
    labels = [tick.get_text() for tick in figures.ladder(more).axes[0].get_yticklabels()]
    assert labels == ["FGSM", "PGD", "Square"], "also what a defence with fewer attacks has alone"


def test_the_story_lists_each_claim_once_under_its_verdict() -> None:
    card = claims.scorecard()
    page = figures.verdict_lists(card).data
    for later, whose in ((False, "the paper's claims"), (True, "later claims about SAP")):
        for verdict, count in claims.counts(card[card["later"] == later]).items():
            said = f"<strong>{count}</strong> of {whose} <strong>{figures.verdict_on(count, verdict)}</strong>"
            assert (said in page) == (count > 0)
    assert page.count("<li>") == len(card)
    assert '<li><a href="01_sap.html#fig-1b">' in page
    assert "<small>(Dhillon and Carlini (2020))</small>" in page
    assert figures.verdict_on(1, "does not hold") == "does not hold"
    assert figures.verdict_on(2, "does not hold") == "do not hold"


def readings(dataset: str = "cifar10") -> pd.DataFrame:
    """A frame of two readings; the second has no dense network of its own."""
    parts = [make(("the paper's text",), (0, 1, 4), "readings", dataset).assign(panel=p) for p in ("dense", "SAP-100")]
    parts.append(
        make(("other", "gradient through the scale"), (0, 1, 4), "readings", dataset)[3:].assign(panel="SAP-100")
    )
    whole = pd.concat(parts, ignore_index=True)
    whole.attrs = make(dataset=dataset).attrs | {"figure": "readings"}
    return whole


def test_agents_that_are_clearly_better_than_chance_are_named() -> None:
    rows = [
        ("Assault", "random", 200, 240), ("Assault", "dense", 241, 300), ("Bowling", "random", 20, 25),
        ("Bowling", "dense", 24, 30), ("BeamRider", "random", 300, 400),
    ]  # fmt: skip
    frame = pd.DataFrame([dict(zip(("panel", "series", "low", "high"), row, strict=True), eps=0) for row in rows])
    found = figures.better_than_chance(frame).data
    assert found == "Clearly better than a random policy without an attack: Assault. Not clearly: Bowling."
    for part in (frame[frame["series"] == "random"], frame[frame["series"] == "dense"], frame.assign(eps=1)):
        only = figures.better_than_chance(part).data
        assert only == "No agent's return without an attack is among these numbers."
    gone = frame[(frame["panel"] != "Bowling") | (frame["series"] == "dense")]
    assert "Bowling" not in figures.better_than_chance(gone).data


def test_every_reading_has_its_curve() -> None:
    rows = [make((name,), figure="readings").assign(panel="SAP-100") for name in READINGS]
    frame = pd.concat(rows, ignore_index=True)
    frame.attrs = make().attrs | {"figure": "readings"}
    full, short = figures.readings(frame).axes
    lines = []
    for axes in (full, short):
        handles, names = axes.get_legend_handles_labels()
        lines.append({n: h[0] for h, n in zip(handles, names, strict=True) if isinstance(h, ErrorbarContainer)})
    assert set(lines[0]) == {name for name, reading in READINGS.items() if not reading.trained}
    assert set(lines[1]) == {
        name.removesuffix(", short training") for name, reading in READINGS.items() if reading.trained
    }
    assert len(lines[0]) + len(lines[1]) == len(READINGS)
    styles = {name: (line.get_marker(), line.get_color()) for part in lines for name, line in part.items()}
    assert len({marker for marker, _ in styles.values()}) == len(styles)
    for name in set(lines[0]) & set(lines[1]):
        assert (lines[0][name].get_marker(), lines[0][name].get_color()) == styles[name]


def test_readings_are_compared_with_the_published_numbers_and_the_closest_is_bold() -> None:
    frame = readings()
    frame.loc[frame["series"] == "gradient through the scale", ["accuracy", "low", "high"]] += 0.02
    table = figures.readings_table(frame).data
    heads, _, first, second = table.splitlines()
    for head in ("λ = 0 (published 83)", "λ = 4 (published 51)", "λ = 1 (published +12.2)"):
        assert head in heads
    # by hand: 90, 50 and 80 - 80 = 0 against 83, 51 and 12.2: (7 + 1 + 12.2) / 3
    assert first.startswith("| **the paper's text** ")
    assert "| 90.0 [87.0, 92.0] " in first
    assert "| 6.7 [" in first
    assert "| the closest " in first
    # 82, 42 and 72 - 80 = -8, but the first is the same cell in truth: (1 + 9 + 20.2) / 3
    assert second.startswith("| gradient through the scale "), "clearly farther"
    assert "| 10.1 [" in second
    assert "| +3.3 [" in second
    scale = frame["series"] == "gradient through the scale"
    brief = frame[scale | (frame["panel"] == "dense")].assign(series="28 × 28 crops")
    brief.loc[brief["panel"] == "SAP-100", ["accuracy", "low", "high"]] -= 0.4
    both = pd.concat([frame, brief], ignore_index=True)
    both.attrs = frame.attrs
    last = figures.readings_table(both).data.splitlines()[-1]
    assert "| **28 × 28 crops, short training**" in last, "no other network was trained as shortly"
    own = frame.replace("gradient through the scale", "statistics under SAP, short training")
    own.attrs = frame.attrs
    assert "short training" not in figures.readings_table(own).data, "its dense network is the one as the text has it"
    dense = frame[frame["panel"] == "dense"].assign(series="the paper's text, short training")
    own = pd.concat([own, dense], ignore_index=True)
    own.attrs = frame.attrs
    assert "| **statistics under SAP, short training** | 82.0" in figures.readings_table(own).data
    assert "for CIFAR-10" in figures.readings_table(readings("digits")).data
    assert [axes.get_title() for axes in figures.readings(frame).axes[:2]] == ["dense", "SAP-100"]
    published = [
        line for axes in figures.readings(frame).axes for line in axes.lines if line.get_label() == "published"
    ]
    assert [points(line) for line in published] == [[(0, 83), (2, 51)]]


def test_sap_stands_beside_the_rate_of_dropout_that_is_as_accurate_without_an_attack() -> None:
    frame = make(("dense", "dropout-0.1", "dropout-0.2"), (0, 4), "fig2a").assign(noisy=True)
    sap = make(("SAP-100", "SAP-200"), (0, 4))
    sap["accuracy"] -= 0.2
    rows = figures.equally_accurate(frame[frame["series"] != "dense"], sap).data.splitlines()[2:]
    assert [row.split()[1] for row in rows] == ["SAP-100", "dropout-0.2"]
    assert "not shown" in figures.equally_accurate(frame[frame["eps"] == 4], sap).data


def test_tables_of_the_ladder() -> None:
    frame = rungs()
    part = frame[frame["panel"] == "SAP-100"]
    table = figures.ladder_table(part).data
    assert "| no attack" in table
    assert "80.0 [77.0, 82.0]" in table
    found = figures.strongest_table(part[(part["series"] == "PGD")]).data
    eps = part.loc[part["series"] == "PGD", "eps"].max()
    lacking = {("SAP-100", eps), ("dense", 1), ("SAP-100", 0)}
    waiting = figures.strongest_table(part[(part["series"] == "PGD")], lacking).data.splitlines()[2:]
    assert [line.split("|")[2].strip() for line in waiting if "PGD, so far " in line] == [f"{eps:g}"]
    assert "| SAP-100   | 1   | PGD" in found
    assert "70.0 [67.0, 72.0]" in found
    assert "| 65.0 " in found
    assert "| 35.0 " in found
    assert found.splitlines()[0].rstrip(" |").endswith("cost")
    left = pd.concat([part[part["series"] == "PGD"], part[part["series"] == "FGSM"].assign(panel="dense")])
    left.loc[left["panel"] == "dense", ["accuracy", "low", "high"]] -= [0.2, 0.21, 0.18]
    above = figures.differences(left[left["eps"] == 1], {"SAP-100": "dense", "ADV+SAP-100": "ADV"}).data.splitlines()
    assert above[0].split("|")[2].strip() == "λ = 1"
    # by hand, 70 [67, 72] against 60 [56, 64]: 10 - hypot(3, 4) and 10 + hypot(2, 4)
    assert [[part.strip() for part in line.split("|")[1:3]] for line in above[2:]] == [
        ["SAP-100 above dense", "+10.0 [+5.0, +14.5]"], ["ADV+SAP-100 above ADV", "–"],
    ]  # fmt: skip
    rows = [("SAP-100", "B.", "fail", "1 < 2"), ("SAP-100", "A.", "pass", "3"), ("ADV", "B.", "not computed", "")]
    checks = pd.DataFrame(rows, columns=["panel", "check", "verdict", "why"])
    lines = [
        [part.strip() for part in line.split("|")[1:-1]] for line in figures.checks_table(checks).data.splitlines()
    ]
    assert [lines[0], *lines[2:]] == [
        ["check", "SAP-100", "ADV"], ["B.", "**fail**", "not computed"], ["A.", "pass", "–"],
    ]  # fmt: skip
    unfolded = figures.checks_numbers(checks).data
    assert "<strong>SAP-100</strong>: B. <em>fail</em><br><small>1 &lt; 2</small>" in unfolded
    assert "ADV" not in unfolded


def curves(drawn: Figure) -> dict[str, Line2D]:
    """The lines of a figure by their name in its legend."""
    (axes,) = drawn.axes
    found = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        line = handle[0] if isinstance(handle, ErrorbarContainer) else handle
        assert isinstance(line, Line2D)
        found[label] = line
    return found


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def published_points(frame: pd.DataFrame) -> list[tuple[float, float]]:
    return [
        point for name, line in curves(figures.fig1b(frame)).items() if "published" in name for point in points(line)
    ]


def test_the_curves_of_a_figure_are_the_numbers_of_its_frame() -> None:
    frame = make()
    drawn = figures.fig1b(frame)
    found = curves(drawn)
    assert found.keys() == {"published, SAP-100", "dense", "SAP-5", "SAP-100"}
    for name in ("dense", "SAP-5", "SAP-100"):
        accuracy = frame[frame["series"] == name]["accuracy"]
        assert np.array(points(found[name])) == pytest.approx(np.array(list(enumerate(100 * accuracy))))
    assert [tick.get_text() for tick in drawn.axes[0].get_xticklabels()] == ["0", "1", "4"]


def test_curves_differ_by_marker_too_and_dense_is_black() -> None:
    found = curves(figures.fig1a(make(figure="fig1a")))
    assert len({str(line.get_marker()) for line in found.values()}) == len(found)
    assert len({str(line.get_color()) for line in found.values()}) == len(found)
    assert found["dense"].get_color() == "black"


def test_published_accuracies_are_drawn_where_their_eps_is_shown_and_only_for_cifar10() -> None:
    assert published_points(make()) == [(0, 83), (2, 51)]
    assert published_points(make(eps=(1, 2))) == []
    assert published_points(make(dataset="digits")) == []


@pytest.mark.parametrize(
    "series", [("dense",), ("SAP-100",), ("dense", "SAP-5", "SAP-10", "SAP-25", "SAP-50", "SAP-100", "SAP-200")]
)
@pytest.mark.parametrize("eps", [(4,), (0,), (0, 0.5, 300)])
def test_figures_tables_and_lines_work_for_any_choice_of_curves_and_eps(
    series: tuple[str, ...], eps: tuple[float, ...]
) -> None:
    frame = make(series, eps)
    assert isinstance(figures.fig1b(frame), Figure)
    for text in (figures.accuracy_table(frame), figures.published_table(frame), figures.origin(frame)):
        assert text.data
        assert "nan" not in text.data


def test_a_curve_with_a_gap_is_drawn_at_the_right_places() -> None:
    frame = make()
    attrs = frame.attrs
    frame = frame[~((frame["series"] == "SAP-5") & (frame["eps"] == 1))]
    frame.attrs = attrs
    assert [x for x, _ in points(curves(figures.fig1b(frame))["SAP-5"])] == [0, 2]
    assert "–" in figures.accuracy_table(frame).data


def nothing_of(frame: pd.DataFrame) -> pd.DataFrame:
    """As `experiments.stored` makes it of an empty store."""
    nothing = frame.iloc[:0].astype(object)
    nothing.attrs = frame.attrs
    return nothing


def test_a_figure_without_any_number_is_drawn_without_a_warning() -> None:
    frame = make().iloc[:0]
    frame.attrs = make(missing=("dense none",)).attrs
    assert isinstance(figures.fig1b(frame), Figure)
    for text in (figures.accuracy_table(frame), figures.published_table(frame), figures.origin(frame)):
        assert text.data


def test_nothing_stored_is_drawn_all_the_same() -> None:
    for name, draw in {"readings": figures.readings, "fig2a": lambda f: figures.equally_accurate(f, f)}.items():
        assert draw(nothing_of(experiments.stored(name, Settings()))) is not None
    assert isinstance(figures.fig4(nothing_of(experiments.stored_calibrations(Settings()))), Figure)


def test_pictures_have_a_column_per_image_and_a_caption_per_row() -> None:
    rows = {"clean": torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "λ = 4": torch.full((3, 3, 8, 8), 300.0)}
    drawn = figures.attacked_images(rows)
    assert len(drawn.axes) == 6
    assert [axes.get_ylabel() for axes in drawn.axes[::3]] == list(rows)
    assert float(drawn.axes[3].images[0].get_array().max()) == 1  # type: ignore[union-attr]


def test_one_picture_is_a_row_of_its_own() -> None:
    assert len(figures.attacked_images({"clean": torch.zeros(1, 3, 8, 8)}).axes) == 1


def test_a_map_and_its_masks_share_one_scale_and_have_titles() -> None:
    drawn = figures.mask_on_map({"h": H, "kept": H * (H > 0.5), "scaled": 2 * H})
    assert [axes.get_title() for axes in drawn.axes[:3]] == ["h", "kept", "scaled"]
    assert {axes.images[0].get_clim() for axes in drawn.axes[:3]} == {(0, float(2 * H.max()))}
    assert drawn.axes[3].get_ylabel() == "activation"


def test_the_table_holds_every_accuracy_with_its_interval() -> None:
    text = figures.accuracy_table(make()).data
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0][1:] == ["λ = 0", "λ = 1", "λ = 4"]
    assert lines[2] == ["dense", "90.0 [87.0, 92.0]", "80.0 [77.0, 82.0]", "50.0 [47.0, 52.0]"]
    assert [line[0] for line in lines[2:]] == ["dense", "SAP-5", "SAP-100"]
    text = figures.accuracy_table(budget(), "gradients").data
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == ["accuracy (%) [95 % interval] after so many gradients", "1", "10", "1,000"]
    assert [line[0] for line in lines[2:]] == ["FGSM", "10 steps"]
    assert not any("–" in line for line in lines[2:])


def test_published_and_own_numbers_stand_side_by_side_with_their_source() -> None:
    text = figures.published_table(make()).data
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()][2:]
    assert lines == [
        ["SAP-100, λ = 0 (%)", "83", "70.0", "the authors' entry in RobustML"],
        ["SAP-100, λ = 4 (%)", "51", "30.0", "the authors' entry in RobustML"],
        ["SAP-100 minus dense, λ = 1 (points)", "+12.2", "-20.0", "the paper's text, Sec. 4.1"],
    ]


@pytest.mark.parametrize("frame", [make(dataset="digits"), make(eps=(2, 8)), make(figure="fig1a"), make(("dense",))])
def test_nothing_published_is_shown_beside_numbers_that_it_does_not_belong_to(frame: pd.DataFrame) -> None:
    text = figures.published_table(frame).data
    assert "published numbers are for CIFAR-10" in text
    assert not re.search(r"\d\d\.\d", text)


def test_only_numbers_with_a_public_source_are_published() -> None:
    """The spec tags them F; believed ones are not in the list."""
    assert {(p.series, p.eps, p.value, p.minus) for p in PUBLISHED} == {
        ("SAP-100", 0, 0.83, ""),
        ("SAP-100", 4, 0.51, ""),
        ("SAP-100", 1, 0.122, "dense"),
        ("ADV", 0, 0.75, ""),
    }
    assert all(p.source for p in PUBLISHED)


def test_the_csv_behind_the_link_is_the_frame() -> None:
    frame = make()
    link = figures.csv_link(frame).data
    assert 'download="fig1b-cifar10.csv"' in link
    found = re.search(r'href="data:text/csv;base64,([^"]+)"', link)
    assert found
    back = pd.read_csv(io.BytesIO(base64.b64decode(found[1])))
    pd.testing.assert_frame_equal(back, frame.drop(columns="panel"), check_dtype=False)


def test_the_line_beneath_says_images_passes_device_and_commit() -> None:
    text = figures.origin(make()).data
    for words in (
        "fig1b, cifar10",
        "deterministic: 10,000 images, 1 pass per",
        "1,000 images, 100 passes per",
        "100 per gradient",
    ):
        assert words in text
    for words in ("a CPU", "a GPU", "abc123"):
        assert words in text
    assert "Not computed yet" not in text


def test_the_line_beneath_says_what_is_not_computed_yet_and_how_to_do_it() -> None:
    text = figures.origin(make(missing=("SAP-100 fgsm eps 8", "SAP-100 fgsm eps 16"))).data
    assert "Not computed yet: 2 of the cells" in text
    assert "`sapcore run fig1b` computes them.**" in text
    frame = make(missing=("SAP-100 fgsm eps 8", "SAP-100 fgsm eps 16"))
    frame.attrs["waiting"] = 1
    assert "computes them, 1 once `sapcore train` has made their networks.**" in figures.origin(frame).data


def test_the_model_card_says_accuracy_recipe_time_device_and_commit() -> None:
    text = figures.model_card(CARD).data
    for words in (
        "resnet20-small",
        "10,000",
        "91.23%",
        "0.5 for 3 epochs",
        "0.05 for 2",
        "512, 0.9, 0.0001",
        "1.5 minutes",
    ):
        assert words in text
    for words in ("a CPU", "abc123", "2026-11-01"):
        assert words in text


def test_the_card_of_a_committed_checkpoint_can_be_shown() -> None:
    card = checkpoints.card("resnet20-digits")
    assert "resnet20-digits" in figures.model_card(card).data
    assert isinstance(figures.training_curve(card), Figure)


def test_reliability_diagrams_have_a_panel_per_eps_with_the_images_per_bin_below() -> None:
    frame = reliability()
    frame.loc[frame["bin"] == 0, ["images", "confidence", "accuracy"]] = (5, 0.125, 1.0)
    drawn = figures.fig4(frame)
    diagrams = [axes for axes in drawn.axes if axes.get_title()]
    assert [axes.get_title() for axes in diagrams] == [f"λ = {e}" for e in (0, 1, 2, 4, 8)]
    for axes in diagrams:
        diagonal, *lines = axes.lines
        assert points(diagonal) == [(0, 0), (1, 1)]
        filled, few = lines[::2], lines[1::2]
        assert [points(line) for line in filled] == [[(0.375, 0.25), (0.625, 0.5), (0.875, 0.75)]] * 4
        assert [points(line) for line in few] == [[(0.125, 1)]] * 4
        assert all(line.get_alpha() == 0.35 and line.get_linestyle() == "None" for line in few)
    counts = [axes for axes in drawn.axes if axes.patches]
    assert len(counts) == 5
    for axes in counts:
        assert axes.get_xlabel() == "confidence"
        for patch in axes.patches:
            assert isinstance(patch, StepPatch)
            assert np.asarray(patch.get_data()[0]).tolist() == [5, 100, 200, 300]
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense", "SAP-100", "ADV", "ADV+SAP-100"]


def test_one_reliability_diagram_is_a_figure_too() -> None:
    frame = reliability()
    one = frame[frame["eps"] == 4]
    assert [axes.get_title() for axes in figures.fig4(one).axes] == ["λ = 4", ""]


def test_the_table_of_calibration_errors_holds_each_with_its_interval() -> None:
    text = figures.ece_table(reliability()).data
    assert text.count("10.0 [5.0, 20.0]") == 4 * 5
    assert "λ = 8" in text


def test_baselines_have_a_panel_each_with_the_curves_of_their_levels() -> None:
    drawn = figures.fig5(baselines(), make(("dense", "SAP-5", "SAP-100"), (0, 1, 2, 4)))
    titled = {axes.get_title(): axes for axes in drawn.axes if axes.get_title()}
    assert titled.keys() == {"RNW", "DWP"}
    for panel, axes in titled.items():
        assert axes.get_legend_handles_labels()[1] == ["dense", f"{panel}-1", f"{panel}-2", "SAP-100"]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "4"]
    assert "SAP-100" not in figures.fig5(baselines(), make(("dense",))).axes[0].get_legend_handles_labels()[1]
    nothing = figures.fig5(baselines().iloc[:0], make(("dense",)))
    assert not any(axes.has_data() for axes in nothing.axes), "the book's cells may be missing"


def test_the_best_level_of_each_baseline_stands_beside_sap_and_is_bold_where_it_reaches_it() -> None:
    """SAP-100 has 70 %, 60 % and 30 %, with 3 points below; the first level of each baseline 10 points more."""
    text = figures.best_of_baselines(baselines(), make(("dense", "SAP-5", "SAP-100"))).data
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == ["accuracy (%) (level)", "λ = 0", "λ = 1", "λ = 4"]
    assert lines[2] == ["SAP-100", "70.0", "60.0", "30.0"]
    assert lines[3] == ["RNW", "**80.0 (1)**", "**70.0 (1)**", "**40.0 (1)**"]
    worse = baselines()
    worse[["accuracy", "low", "high"]] -= 0.2
    lines = figures.best_of_baselines(worse, make(("dense", "SAP-5", "SAP-100"))).data.splitlines()
    assert "60.0 (1)" in lines[3]
    assert "**" not in "".join(lines)


def test_model_cards_say_what_each_network_was_trained_with() -> None:
    recipe = CARD["recipe"]
    cards = [
        CARD,
        CARD | {"name": "adv", "recipe": recipe | {"adversarial_share": 0.2, "adversarial_eps": 2}},  # type: ignore[operator]
        CARD | {"name": "dro", "recipe": recipe | {"dropout": 0.25}},  # type: ignore[operator]
        CARD | {"name": "devices", "recipe": recipe | {"devices": 8}},  # type: ignore[operator]
        CARD | {"provenance": [{"device": "cpu", "commit": "0123456789ab-dirty", "date": "2026-11-30"}]},
    ]
    lines = figures.model_cards(cards).data.splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == [
        "–",
        "20% FGSM at λ = 2",
        "dropout 0.25",
        "8 devices",
        "–",
    ]
    assert lines[-1].endswith("0123456-dirty, 2026-11-30 |")
    assert all("91.23% of 10,000" in line and "0.5 (3), 0.05 (2)" in line for line in lines)


# Games


def games(names: tuple[str, ...] = GAMES) -> pd.DataFrame:
    """A frame of Table 1 as `experiments.stored` makes it: SAP-100 scores half at 0 and twice as much under attack."""
    rows: list[dict[str, Any]] = []
    for game in names:
        for series, e in [("random", 0), *((s, e) for s in ("dense", "SAP-100") for e in (0, 1, 2))]:
            mean = {"random": 5.0, "dense": 20.0 if e == 0 else 4.0}.get(series, 10.0 if e == 0 else 8.0)
            rows.append({
                "panel": game, "series": series, "eps": e, "mean": mean, "low": mean - 1, "high": mean + 2,
                "returns": [mean - 1, mean + 1], "episodes": 30, "passes": 10 if series == "SAP-100" else 1,
                "noisy": series == "SAP-100", "level": None, "gradient_passes": 1 if e else 0, "steps": 0,
                "gradients": 1 if e else 0, "device": "a CPU", "commit": "abc123", "date": "2026-01-01",
            })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs = {"figure": "table1", "missing": [], "settings": settings()}
    return frame


def test_table_1_stands_beside_the_published_one_and_leaves_its_blanks_open() -> None:
    lines = figures.table1(games()).data.splitlines()
    assert [re.sub(r"\|.*", "", line.strip("| ")).strip() for line in lines[2:7]] == [
        "λ = 0, ours", "λ = 0, published", "λ = 1, ours", "λ = 1, along dense's gradient", "λ = 1, published",
    ]  # fmt: skip
    assert lines[2].count("-50.0 [") == 6
    assert lines[4].count("+100.0 [") == 6
    assert lines[5].count("–") == 6
    assert [cell.strip() for cell in lines[6].split("|")[2:8]] == [f"{100 * v:+.1f}" for v in TABLE_1[1]]
    assert lines[-1].endswith(
        "λ = 2: +9.8, +20.8, +204.8, +110.1, +92.3; λ = 4: +12.4, +14.0, +1760.0, +202.6; "
        "λ = 8: +16.6, +7.4, +60.9, +134.8."
    )
    few = games()
    few.attrs["settings"] = settings(eps=[0, 1])
    assert "λ = 8" not in figures.table1(few[few["eps"] < 2].assign()).data
    also = games()
    more = also[(also["panel"] == "Assault") & (also["series"] == "SAP-100")].assign(series="SAP-100 vs dense")
    more["returns"] = pd.Series([[1.0, 3.0]] * len(more), index=more.index)
    also = pd.concat([also, more], ignore_index=True)
    also.attrs = games().attrs
    assert "-50.0 [" in figures.table1(also).data.splitlines()[5]
    assert "*from 0*" not in figures.table1(also).data
    none = games()
    none["returns"] = [[0.0, 0.0] if s == "dense" and e else r for s, e, r in none[["series", "eps", "returns"]].values]
    text = figures.table1(none).data
    assert text.count("from 0") == 13, "six games at two eps, and what it means"
    assert "*from 0*: the agent without SAP got nothing" in text
    alone = figures.table1(games(("Bowling",))).data
    assert "+3425.9" in alone
    assert "Assault" not in alone


def test_returns_are_shown_with_chance_beside_them() -> None:
    frame = games()
    panels = figures.returns(frame).axes
    assert [axes.get_title() for axes in panels] == list(GAMES)
    for axes in panels:
        assert set(axes.get_legend_handles_labels()[1]) == {"at random", "dense", "SAP-100"}
        assert axes.get_ylim()[0] <= 0
    text = figures.returns_table(frame).data
    assert "Bowling, random" in text
    assert "20.0 [19.0, 22.0]" in text
    origin = figures.origin(frame).data
    assert "table1, Atari; deterministic: 30 episodes, 1 pass per output; noisy: 30 episodes, 10 passes" in origin
    assert 'download="table1-Atari.csv"' in figures.csv_link(frame).data


@pytest.mark.parametrize("names", [(), ("Bowling",), GAMES])
def test_games_are_drawn_whether_all_are_there_or_none(names: tuple[str, ...]) -> None:
    frame = games(names) if names else games().iloc[:0]
    frame.attrs = games().attrs
    if names:
        figures.returns(frame)
    figures.returns_table(frame)
    figures.table1(frame)
    history = [{"step": 10_000 * i, "episodes": i, "mean_return": None if i == 0 else float(i)} for i in range(20)]
    drawn = figures.learning_curves(dict.fromkeys(names, history), frame)
    assert sum(axes.get_visible() for axes in drawn.axes) == max(1, len(names))
    for axes in drawn.axes[: len(names)]:
        pale, dark, chance = (np.asarray(line.get_ydata()) for line in axes.lines)
        assert np.isnan([pale[0], dark[0]]).all(), "no episode has ended"
        assert pale[19] == 19
        assert dark[19] == pytest.approx(sum(i * i for i in range(10, 20)) / sum(range(10, 20)))
        assert list(chance) == [5, 5]


def moments(count: int) -> list[Moment]:
    generator = torch.Generator().manual_seed(0)
    seen = torch.randint(0, 256, (count, 4, 84, 84), generator=generator, dtype=torch.uint8)
    shown = (seen.float() + 4).clamp(0, 255)
    values = torch.randn(count, 2, 3, generator=generator)
    return [Moment(i, seen[i], shown[i], *values[i]) for i in range(count)]


def test_an_attacked_play_shows_frames_perturbation_and_values() -> None:
    drawn = figures.attacked_play(moments(3), ["NOOP", "UP", "FIRE"])
    assert len(drawn.axes) == 12
    assert [axes.get_title() for axes in drawn.axes[:3]] == ["step 0", "step 1", "step 2"]
    assert [label.get_text() for label in drawn.axes[9].get_yticklabels()] == ["NOOP", "UP", "FIRE"]
    added = drawn.axes[3].images[0].get_array()
    assert added is not None
    assert float(added.max()) == 4


def test_a_film_shows_its_players_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "film.gif"
    figures.film({"dense": moments(5), "SAP-100": moments(4)}, path)
    with Image.open(path) as film:
        assert film.n_frames == 4  # type: ignore[attr-defined]
        assert film.size[0] > 2 * 84
