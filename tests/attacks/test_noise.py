"""Random noise has the size eps, signs like coins, and depends on seed, names and places of pixels alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from sapcore import attacks, data
from sapcore.errors import SapcoreError

GREY = torch.full((4, 3, 32, 32), 128.0)


@pytest.mark.parametrize("eps", [1, 4, 64, 127, 0.5])
def test_each_pixel_moves_by_eps_up_or_down(eps: float) -> None:
    assert torch.equal((attacks.noise(GREY, eps) - GREY).abs(), torch.full_like(GREY, eps))


def test_pixels_are_clipped_after_the_noise(digits: tuple[Tensor, Tensor]) -> None:
    x = digits[0][:4]
    moved = attacks.noise(x, 64, seed=3)
    sign = (attacks.noise(GREY, 1, seed=3) - GREY).sign()
    assert torch.equal(moved, (x + 64 * sign).clamp(0, 255))


@given(eps=st.floats(0, 1000), seed=st.integers(0, 2**64 - 1))
def test_the_result_stays_in_the_ball_and_in_the_pixel_range(eps: float, seed: int) -> None:
    x = data.load("digits", "test")[0][:2]
    moved = attacks.noise(x, eps, seed)
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 255
    assert float((moved - x).abs().max()) <= eps * (1 + 1e-6) + 1e-4


def test_an_eps_of_zero_changes_nothing(digits: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(attacks.noise(digits[0][:4], 0), digits[0][:4].float())


def test_up_and_down_are_equally_likely_and_neighbours_independent() -> None:
    """False alarm: 1e-6 each."""
    up = attacks.noise(torch.full((100, 3, 32, 32), 128.0), 1) > 128
    assert stats.binomtest(int(up.sum()), up.numel()).pvalue > 1e-6
    same_as_right = up[..., 1:] == up[..., :-1]
    assert stats.binomtest(int(same_as_right.sum()), same_as_right.numel()).pvalue > 1e-6
    same_as_next_image = up[1:] == up[:-1]
    assert stats.binomtest(int(same_as_next_image.sum()), same_as_next_image.numel()).pvalue > 1e-6


def test_the_signs_follow_the_names_not_the_places_or_the_batch() -> None:
    whole = attacks.noise(GREY, 4, seed=5, ids=torch.tensor([9, 2, 7, 2]))
    assert torch.equal(whole[1], whole[3])
    part = attacks.noise(GREY[:2], 4, seed=5, ids=torch.tensor([7, 9]))
    assert torch.equal(part, whole[[2, 0]])


def test_names_count_from_zero_by_default() -> None:
    assert torch.equal(attacks.noise(GREY, 4), attacks.noise(GREY, 4, ids=torch.arange(4)))


def test_the_signs_do_not_depend_on_eps_or_on_the_image(digits: tuple[Tensor, Tensor]) -> None:
    sign = (attacks.noise(GREY, 4) - GREY).sign()
    assert torch.equal((attacks.noise(GREY, 16) - GREY).sign(), sign)
    inside = (digits[0][:4] >= 4) & (digits[0][:4] <= 251)
    assert torch.equal((attacks.noise(digits[0][:4], 4) - digits[0][:4]).sign()[inside], sign[inside])


@pytest.mark.parametrize("changed", [{"seed": 1}, {"ids": torch.arange(4, 8)}])
def test_other_seeds_and_names_give_other_signs(changed: dict[str, object]) -> None:
    differs = attacks.noise(GREY, 4, **changed) != attacks.noise(GREY, 4)  # type: ignore[arg-type]
    assert 0.45 < float(differs.double().mean()) < 0.55


def test_uint8_and_float_pixels_give_the_same(digits: tuple[Tensor, Tensor]) -> None:
    found = attacks.noise(digits[0][:4], 4)
    assert found.dtype == torch.float32
    assert torch.equal(found, attacks.noise(digits[0][:4].float(), 4))


def test_float64_pixels_are_taken_as_float32(digits: tuple[Tensor, Tensor]) -> None:
    found = attacks.noise(digits[0][:4].double(), 4)
    assert found.dtype == torch.float32


def test_no_images_give_no_images(digits: tuple[Tensor, Tensor]) -> None:
    assert attacks.noise(digits[0][:0], 4).shape == (0, 3, 32, 32)


def test_ids_of_another_length_are_refused() -> None:
    with pytest.raises(SapcoreError, match="ids"):
        attacks.noise(GREY, 4, ids=torch.arange(3))
