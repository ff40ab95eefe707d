"""Reliability bins and the expected calibration error, against torchmetrics and against cases with known answers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from sapcore.calibration import BINS, calibration
from sapcore.errors import SapcoreError
from sapcore.evaluation import accuracy


def predictions(n: int, skill: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Softmax outputs of a network whose labels follow its own confidence, raised to the power `skill`."""
    generator = torch.Generator().manual_seed(seed)
    p = (3 * torch.randn(n, 10, generator=generator, dtype=torch.float64)).softmax(1)
    labels = torch.multinomial(p**skill, 1, generator=generator)[:, 0]
    return p, labels


@pytest.mark.parametrize("bins", [5, 15, 20])
@pytest.mark.parametrize("skill", [0.3, 1.0, 3.0])
def test_the_error_is_torchmetrics(bins: int, skill: float) -> None:
    p, labels = predictions(3000, skill)
    expected = MulticlassCalibrationError(10, n_bins=bins, norm="l1")(p, labels)
    assert calibration(p, labels, bins).ece == pytest.approx(float(expected), abs=1e-6)


def test_bins_hold_every_image_once() -> None:
    p, labels = predictions(2000, 1.0)
    found = calibration(p, labels)
    assert len(found.images) == len(found.confidence) == len(found.correct) == BINS
    assert sum(found.images) == 2000
    assert sum(found.correct) == int((p.argmax(1) == labels).sum())
    assert np.dot(found.images, found.confidence) == pytest.approx(float(p.max(1).values.sum()))
    for i, (images, confidence, correct) in enumerate(zip(found.images, found.confidence, found.correct, strict=True)):
        assert 0 <= correct <= images
        assert images == 0 or i / BINS <= confidence <= (i + 1) / BINS


def test_a_network_that_is_always_sure_and_half_right_is_off_by_a_half() -> None:
    p = torch.eye(2).repeat(50, 1)
    labels = torch.zeros(100, dtype=torch.int64)
    found = calibration(p, labels)
    assert found.ece == 0.5
    assert found.images[-1] == 100
    assert found.low < 0.5 < found.high


def test_one_image_and_images_that_are_all_alike_have_an_interval_of_no_width() -> None:
    for n in (1, 40):
        found = calibration(torch.tensor([[0.25, 0.75]]).expand(n, -1), torch.ones(n, dtype=torch.int64))
        assert (found.ece, found.low, found.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(("skill", "bins"), [(3.0, 5), (1.0, 15), (0.3, 15)])
def test_the_interval_holds_the_error_of_the_population_as_often_as_it_says(skill: float, bins: int) -> None:
    """Networks off by a known amount, one of them by nothing; 95 % of 100 intervals. False alarm: 3e-4 (15 misses)."""
    p, labels = predictions(400_000, skill, seed=99)
    true = float(MulticlassCalibrationError(10, n_bins=bins, norm="l1")(p, labels)) if skill != 1 else 0.0
    hits = 0
    for seed in range(100):
        found = calibration(*predictions(500, skill, seed), bins=bins, seed=seed)
        assert 0 <= found.low <= found.ece <= found.high <= 1
        hits += found.low <= true <= found.high
    assert hits >= 85


def test_without_an_image_there_is_one_sentence() -> None:
    with pytest.raises(SapcoreError, match="there is no image"):
        calibration(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (
            torch.tensor([[3.0, -1.0], [0.2, 0.8]]),
            "probabilities must be 0 or more and sum to 1 for each image; logits",
        ),
        (torch.tensor([[0.9, 0.9], [0.2, 0.8]]), "probabilities must be 0 or more and sum to 1 for each image; "),
        (torch.tensor([[math.nan, 0.5], [0.2, 0.8]]), "probabilities hold nan or inf, but must be finite numbers"),
        (torch.tensor([0.5, 0.5]), r"probabilities are of shape \(2,\), but must be \(N, classes\)"),
        ([[0.5, 0.5], [0.2, 0.8]], "probabilities is a list, but must be a torch.Tensor"),
    ],
)
def test_what_is_no_probability_is_refused(outputs: Any, message: str) -> None:
    labels = torch.tensor([0, 1])
    with pytest.raises(SapcoreError, match=message):
        calibration(outputs, labels)
    if "sum to 1" not in message:  # logits have an accuracy
        with pytest.raises(SapcoreError, match=message):
            accuracy(outputs, labels)


def test_the_same_seed_gives_the_same_interval() -> None:
    p, labels = predictions(300, 1.0)
    assert calibration(p, labels, seed=3) == calibration(p, labels, seed=3)
    assert calibration(p, labels, seed=3).high != calibration(p, labels, seed=4).high


@pytest.mark.parametrize("bins", [0, -1, 1.5, True])
def test_senseless_bins_are_refused(bins: int) -> None:
    with pytest.raises(SapcoreError, match=r"bins is .*, but must be a whole number of 1 or more"):
        calibration(*predictions(3, 1.0), bins=bins)
