"""How far a network's confidence is from its accuracy: the reliability diagram (Fig. 4) and its one-number summary."""

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from sapcore.errors import SapcoreError, check_count
from sapcore.evaluation import check_labels, check_outputs

BINS = 15
RESAMPLES = 999


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A reliability diagram: per bin of confidence how many images, their mean confidence, how many are right."""

    images: tuple[int, ...]
    confidence: tuple[float, ...]
    """The mean confidence in a bin; 0 in an empty one."""
    correct: tuple[int, ...]
    ece: float
    """Expected calibration error: the mean over images of |accuracy - confidence| of their bin (Naeini et al. 2015)."""
    low: float
    high: float
    """A 95 % bootstrap interval: the basic one, which takes off the error's upward bias, stretched to hold `ece`.

    It begins at 0 where a calibrated network would show as large an error by chance in more than 2.5 % of test sets
    (consistency resampling: Bröcker and Smith 2007).
    """


def calibration(probabilities: Tensor, labels: Tensor, bins: int = BINS, seed: int = 0) -> Calibration:
    """The reliability diagram of argmax predictions in `bins` bins of equal width.

    probabilities: (N, classes); labels: int64 (N,). A confidence on a border counts to the bin above.
    The bootstrap resamples images and draws from `seed`. Raises `SapcoreError` if there is no image.
    """
    if not len(labels):
        raise SapcoreError("there is no image to measure calibration on")
    check_count("bins", bins)
    labels = check_labels(labels, *check_outputs(probabilities))
    total = probabilities.double().sum(1)
    if float(probabilities.min()) < 0 or float((total - 1).abs().max()) > 0.01:
        raise SapcoreError("probabilities must be 0 or more and sum to 1 for each image; logits want a softmax first")
    confidence, predicted = (t.numpy() for t in probabilities.double().cpu().max(1))
    correct = predicted == labels.cpu().numpy()
    which = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    images, right = (np.bincount(which, weights, bins) for weights in (None, correct))
    mean = np.bincount(which, confidence, bins) / np.maximum(images, 1)
    gap = correct - confidence
    ece = float(_ece(gap[None], which[None], bins)[0])
    low, high = (ece, ece) if np.ptp(gap) == 0 else _interval(correct, confidence, which, bins, seed)
    return Calibration(
        images=tuple(images.astype(int).tolist()),
        confidence=tuple(mean.tolist()),
        correct=tuple(right.astype(int).tolist()),
        ece=ece,
        low=low,
        high=high,
    )


def _ece(gap: NDArray, which: NDArray, bins: int) -> NDArray:
    """The sum over bins of |sum of correct - confidence| / N, per row: (R, N) -> (R,)."""
    rows, n = which.shape
    place = which + bins * np.arange(rows)[:, None]
    per_bin = np.bincount(place.ravel(), gap.ravel(), rows * bins).reshape(rows, bins)
    return np.abs(per_bin).sum(1) / n


def _interval(correct: NDArray, confidence: NDArray, which: NDArray, bins: int, seed: int) -> tuple[float, float]:
    """Resamples images; their gaps must not all be the same."""
    gap, rng = correct - confidence, np.random.default_rng(seed)

    def statistic(chosen: NDArray, axis: int = -1) -> NDArray:
        rows = np.atleast_2d(chosen)
        return _ece(gap[rows], which[rows], bins).reshape(chosen.shape[:-1])

    found = stats.bootstrap(
        (np.arange(len(gap)),), statistic, n_resamples=RESAMPLES, batch=100, vectorized=True, axis=-1,
        rng=rng, method="basic",
    ).confidence_interval  # fmt: skip
    ece = float(_ece(gap[None], which[None], bins)[0])
    by_chance = [
        float(_ece((rng.random(len(gap)) < confidence)[None] - confidence, which[None], bins)[0])
        for _ in range(RESAMPLES)
    ]
    low = 0.0 if ece <= np.quantile(by_chance, 0.975) else max(0.0, float(found.low))
    return min(low, ece), min(max(float(found.high), ece), 1.0)
