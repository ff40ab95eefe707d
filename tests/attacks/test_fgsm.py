"""FGSM agrees with torchattacks, stays where it may, and depends on its arguments alone."""

from collections.abc import Callable

import pytest
import torch
import torchattacks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sapcore import attacks, checkpoints, data, with_sap
from sapcore.attacks.fgsm import fgsm_direction
from sapcore.attacks.gradient import ESTIMATORS
from sapcore.randomness import NoisyModel
from tests.attacks.common import Linear, UnitRange, share_that_differs

Watch = Callable[[nn.Module], list[int]]
Images = tuple[Tensor, Tensor]


@pytest.mark.parametrize("eps", [0.5, 1, 4, 16, 300])
def test_on_a_deterministic_network_it_agrees_with_torchattacks_image_by_image(
    dense: nn.Module, digits: Images, eps: float
) -> None:
    """Within 1e-3 of a pixel, but for 1 pixel in 1,000: rounding may turn a sign where the gradient is tiny."""
    x, y = digits[0][:12].float(), digits[1][:12]
    theirs = torchattacks.FGSM(UnitRange(dense), eps=eps / 255)(x / 255, y) * 255
    ours = attacks.fgsm(dense, x, y, eps)
    for one, other in zip(ours, theirs, strict=True):
        assert share_that_differs(one, other) <= 1e-3


def test_a_pixel_whose_gradient_is_exactly_zero_is_left_alone_as_in_torchattacks() -> None:
    """The sign of zero is zero: neither attack moves a pixel that the loss does not depend on."""
    model = Linear(blind_columns=16)
    x = torch.full((3, 3, 32, 32), 100.0)
    y = torch.tensor([0, 1, 2])
    ours = attacks.fgsm(model, x, y, 4)
    assert torch.equal(ours[..., :16], x[..., :16])
    assert torch.equal((ours[..., 16:] - x[..., 16:]).abs(), torch.full((3, 3, 32, 16), 4.0))
    theirs = torchattacks.FGSM(UnitRange(model), eps=4 / 255)(x / 255, y) * 255
    assert share_that_differs(ours, theirs) == 0


@given(eps=st.one_of(st.floats(0, 300), st.integers(0, 300)))
def test_the_result_stays_in_the_ball_and_in_the_pixel_range(eps: float) -> None:
    x, y = (t[:4] for t in data.load("digits", "test"))
    x_adv = attacks.fgsm(checkpoints.load("resnet20-digits"), x, y, eps)
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 255
    assert float((x_adv - x).abs().max()) <= eps * (1 + 1e-6) + 1e-4  # float32 rounds a pixel to 1.5e-5


@pytest.mark.parametrize("eps", [0, 0.0, -0.0])
def test_an_eps_of_zero_changes_nothing(dense: nn.Module, noisy: NoisyModel, digits: Images, eps: float) -> None:
    x, y = digits[0][:3].float(), digits[1][:3]
    assert torch.equal(attacks.fgsm(dense, x, y, eps), x)
    assert torch.equal(attacks.fgsm(noisy, x, y, eps, passes=2), x)


def test_the_loss_grows(dense: nn.Module, digits: Images) -> None:
    x, y = digits[0][:100], digits[1][:100]
    loss = nn.CrossEntropyLoss()
    assert loss(dense(attacks.fgsm(dense, x, y, 16)), y) > 50 * loss(dense(x.float()), y)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 100])
def test_the_result_depends_neither_on_batches_nor_on_chunks_of_passes(
    noisy: NoisyModel, digits: Images, batch_size: int, estimator: str
) -> None:
    """But for signs that rounding turns where the gradient all but vanishes: 1 pixel in 1,000."""
    x, y = digits[0][:6], digits[1][:6]
    expected = attacks.fgsm(noisy, x, y, 4, passes=5, estimator=estimator, batch_size=30)
    found = attacks.fgsm(noisy, x, y, 4, passes=5, estimator=estimator, batch_size=batch_size)
    assert share_that_differs(found, expected) <= 1e-3


def test_the_result_follows_the_names_of_the_images_not_their_places(noisy: NoisyModel, digits: Images) -> None:
    x, y = digits[0][:6], digits[1][:6]
    whole = attacks.fgsm(noisy, x, y, 4, passes=4)
    order = torch.tensor([5, 2, 3])
    part = attacks.fgsm(noisy, x[order], y[order], 4, passes=4, ids=order)
    assert share_that_differs(part, whole[order]) <= 1e-3


@pytest.mark.parametrize("changed", [{"seed": 1}, {"ids": torch.arange(10, 16)}, {"passes": 5}])
def test_on_a_noisy_network_it_depends_on_seed_names_and_number_of_passes(
    noisy: NoisyModel, digits: Images, changed: dict[str, object]
) -> None:
    x, y = digits[0][:6], digits[1][:6]
    arguments = {"passes": 4} | changed
    assert share_that_differs(attacks.fgsm(noisy, x, y, 4, **arguments), attacks.fgsm(noisy, x, y, 4, passes=4)) > 0.01  # type: ignore[arg-type]


def test_on_a_deterministic_network_it_depends_neither_on_seed_nor_names_nor_passes(
    dense: nn.Module, digits: Images
) -> None:
    x, y = digits[0][:6], digits[1][:6]
    expected = attacks.fgsm(dense, x, y, 4)
    assert torch.equal(attacks.fgsm(dense, x, y, 4, passes=3, seed=8, ids=torch.arange(6) + 9), expected)


@pytest.mark.parametrize(("images", "passes", "batch_size"), [(3, 7, 5), (7, 3, 4), (1, 20, 6), (4, 4, 64)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_forward_pass_sees_more_rows_than_the_batch_size(
    noisy: NoisyModel, digits: Images, watch: Watch, images: int, passes: int, batch_size: int, estimator: str
) -> None:
    rows = watch(noisy)
    attacks.fgsm(noisy, digits[0][:images], digits[1][:images], 4, passes, estimator=estimator, batch_size=batch_size)
    assert max(rows) <= batch_size
    assert sum(rows) == images * passes * (2 if estimator == "gradient_of_mean" else 1)


def test_a_deterministic_network_is_run_once_whatever_the_passes(
    dense: nn.Module, digits: Images, watch: Watch
) -> None:
    rows = watch(dense)
    attacks.fgsm(dense, digits[0][:5], digits[1][:5], 4, passes=100)
    assert rows == [5]


def test_uint8_and_float_pixels_give_the_same(noisy: NoisyModel, digits: Images) -> None:
    x, y = digits[0][:4], digits[1][:4]
    assert x.dtype == torch.uint8
    found = attacks.fgsm(noisy, x, y, 4, passes=2)
    assert found.dtype == torch.float32
    assert torch.equal(found, attacks.fgsm(noisy, x.float(), y, 4, passes=2))


def test_float64_pixels_are_taken_as_float32(dense: nn.Module, digits: Images) -> None:
    x, y = digits[0][:4], digits[1][:4]
    found = attacks.fgsm(dense, x.double(), y, 4)
    assert found.dtype == torch.float32
    assert torch.equal(found, attacks.fgsm(dense, x, y, 4))


def test_the_arguments_are_left_as_they_were(dense: nn.Module, digits: Images) -> None:
    x, y = digits[0][:4].float(), digits[1][:4].clone()
    before = x.clone()
    found = attacks.fgsm(dense, x, y, 4)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_no_images_give_no_images(dense: nn.Module, digits: Images) -> None:
    found = attacks.fgsm(dense, digits[0][:0], digits[1][:0], 4)
    assert (found.shape, found.dtype) == ((0, 3, 32, 32), torch.float32)


def test_the_direction_does_not_depend_on_eps(noisy: NoisyModel, digits: Images) -> None:
    x, y = digits[0][:4], digits[1][:4]
    direction = fgsm_direction(noisy, x, y, passes=3, seed=2)
    assert set(direction.unique().tolist()) <= {-1.0, 0.0, 1.0}
    for eps in (1, 7.5):
        expected = (x + eps * direction).clamp(0, 255)
        assert torch.equal(attacks.fgsm(noisy, x, y, eps, passes=3, seed=2), expected)


def test_it_works_where_gradients_are_switched_off(dense: nn.Module, digits: Images) -> None:
    x, y = digits[0][:2], digits[1][:2]
    with torch.no_grad():
        found = attacks.fgsm(dense, x, y, 4)
    assert torch.equal(found, attacks.fgsm(dense, x, y, 4))


def test_bfloat16_arithmetic_gives_nearly_the_same(dense: nn.Module, digits: Images) -> None:
    x, y = digits[0][:8], digits[1][:8]
    found = attacks.fgsm(dense, x, y, 4, precision="bfloat16")
    assert found.dtype == torch.float32
    assert 0 < share_that_differs(found, attacks.fgsm(dense, x, y, 4)) < 0.2


def test_other_levels_of_sap_are_attacked_too(dense: nn.Module, digits: Images) -> None:
    x, y = digits[0][:3], digits[1][:3]
    for percent in (1, 1000):
        assert attacks.fgsm(with_sap(dense, percent), x, y, 4, passes=2).isfinite().all()
