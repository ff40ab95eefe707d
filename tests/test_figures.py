"""Every figure has axes that say what they show, and beneath it numbers, origin and a CSV that agree with it."""

import base64
import io
import re
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sapcore import checkpoints, figures
from sapcore.experiments import settings
from sapcore.published import PUBLISHED


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
                    "images": 1000 if noisy else 10_000,
                    "passes": 100 if noisy else 1,
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


def test_a_figure_without_any_number_is_drawn_without_a_warning() -> None:
    frame = make().iloc[:0]
    frame.attrs = make(missing=("dense none",)).attrs
    assert isinstance(figures.fig1b(frame), Figure)
    for text in (figures.accuracy_table(frame), figures.published_table(frame), figures.origin(frame)):
        assert text.data


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


def test_published_and_own_numbers_stand_side_by_side_with_their_source() -> None:
    text = figures.published_table(make()).data
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()][2:]
    assert lines == [
        ["SAP-100, λ = 0 (%)", "83.0", "70.0", "the authors' entry in RobustML"],
        ["SAP-100, λ = 4 (%)", "51.0", "30.0", "the authors' entry in RobustML"],
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
    assert "`sapcore run fig1b`" in text


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
