"""The iterative attack agrees with torchattacks, stays where it may, and depends on its arguments alone."""

from collections.abc import Callable

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from sapcore import attacks, checkpoints, data
from sapcore.attacks.gradient import ESTIMATORS, margin
from sapcore.errors import SapcoreError
from sapcore.evaluation import accuracy, predict
from sapcore.randomness import NoisyModel, stream
from tests.attacks.common import Linear, UnitRange, share_that_differs

Watch = Callable[[nn.Module], list[int]]
Images = tuple[Tensor, Tensor]


def bim(model: nn.Module, eps: float, step: float, steps: int) -> torchattacks.attack.Attack:
    return torchattacks.BIM(UnitRange(model), eps=eps / 255, alpha=step / 255, steps=steps)


def pgd(model: nn.Module, eps: float, step: float, steps: int) -> torchattacks.attack.Attack:
    return torchattacks.PGD(UnitRange(model), eps=eps / 255, alpha=step / 255, steps=steps, random_start=False)


@pytest.mark.parametrize("theirs", [bim, pgd])
@pytest.mark.parametrize(("eps", "step", "steps"), [(4, 1, 10), (2, 1, 3), (8, 2.5, 5), (0.5, 1, 2), (16, 1, 1)])
def test_on_a_deterministic_network_it_agrees_with_torchattacks_image_by_image(
    dense: nn.Module, digits: Images, theirs: Callable[..., Callable], eps: float, step: float, steps: int
) -> None:
    """Within 1e-3 of a pixel, but for 1 pixel in 200: rounding may turn a sign where the gradient is tiny."""
    x, y = digits[0][:6].float(), digits[1][:6]
    expected = theirs(dense, eps, step, steps)(x / 255, y) * 255
    for one, other in zip(attacks.iterative(dense, x, y, eps, step, steps), expected, strict=True):
        assert share_that_differs(one, other) <= 5e-3


def test_a_pixel_whose_gradient_is_exactly_zero_is_left_alone_as_in_torchattacks() -> None:
    model = Linear(blind_columns=16)
    x, y = torch.full((3, 3, 32, 32), 100.0), torch.tensor([0, 1, 2])
    ours = attacks.iterative(model, x, y, 4, step=1, steps=3)
    assert torch.equal(ours[..., :16], x[..., :16])
    assert share_that_differs(ours, pgd(model, 4, 1, 3)(x / 255, y) * 255) == 0


def test_one_step_of_the_size_of_the_ball_is_fgsm(dense: nn.Module, noisy: NoisyModel, digits: Images) -> None:
    x, y = digits[0][:4], digits[1][:4]
    for model in (dense, noisy):
        expected = attacks.fgsm(model, x, y, 4, passes=3, seed=1)
        assert torch.equal(attacks.iterative(model, x, y, 4, step=4, steps=1, passes=3, seed=1), expected)


@settings(max_examples=15)
@given(eps=st.floats(0, 300), step=st.floats(0.01, 100), steps=st.integers(1, 4))
def test_the_result_stays_in_the_ball_and_in_the_pixel_range(eps: float, step: float, steps: int) -> None:
    x, y = (t[:3] for t in data.load("digits", "test"))
    x_adv = attacks.iterative(checkpoints.load("resnet20-digits"), x, y, eps, step, steps)
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 255
    assert float((x_adv - x).abs().max()) <= min(eps, step * steps) * (1 + 1e-6) + 1e-4


def test_an_eps_of_zero_changes_nothing(dense: nn.Module, noisy: NoisyModel, digits: Images) -> None:
    x, y = digits[0][:3].float(), digits[1][:3]
    assert torch.equal(attacks.iterative(dense, x, y, 0, steps=2), x)
    assert torch.equal(attacks.iterative(noisy, x, y, 0, steps=2, passes=2), x)


def test_more_steps_make_a_larger_loss(dense: nn.Module, digits: Images) -> None:
    x, y = digits[0][:50], digits[1][:50]
    losses = [nn.functional.cross_entropy(dense(attacks.iterative(dense, x, y, 4, 1, n)), y) for n in (1, 4, 10)]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_result_depends_neither_on_batches_nor_on_chunks_of_passes(
    noisy: NoisyModel, digits: Images, batch_size: int, estimator: str
) -> None:
    """But for signs that rounding turns where the gradient all but vanishes: 1 pixel in 200."""
    x, y = digits[0][:6], digits[1][:6]
    arguments = {"eps": 4, "steps": 3, "passes": 4, "estimator": estimator}
    expected = attacks.iterative(noisy, x, y, batch_size=12, **arguments)  # type: ignore[arg-type]
    found = attacks.iterative(noisy, x, y, batch_size=batch_size, **arguments)  # type: ignore[arg-type]
    assert share_that_differs(found, expected) <= 5e-3


def test_the_result_follows_the_names_of_the_images_not_their_places(noisy: NoisyModel, digits: Images) -> None:
    x, y = digits[0][:6], digits[1][:6]
    whole = attacks.iterative(noisy, x, y, 4, steps=2, passes=3)
    order = torch.tensor([4, 0, 1])
    part = attacks.iterative(noisy, x[order], y[order], 4, steps=2, passes=3, ids=order)
    assert share_that_differs(part, whole[order]) <= 5e-3


def test_each_step_draws_passes_that_no_other_step_draws(noisy: NoisyModel, digits: Images) -> None:
    drawn: list[int] = []
    handle = noisy.register_forward_pre_hook(
        lambda _model, _x, names: drawn.extend(names["passes"].tolist()), with_kwargs=True
    )
    attacks.iterative(noisy, digits[0][:1], digits[1][:1], 4, steps=4, passes=3)
    handle.remove()
    assert drawn == list(range(12))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("images", "passes", "batch_size"), [(3, 7, 5), (7, 3, 4), (1, 20, 6)])
def test_no_forward_pass_sees_more_rows_than_the_batch_size(
    noisy: NoisyModel, digits: Images, watch: Watch, images: int, passes: int, batch_size: int, estimator: str
) -> None:
    rows = watch(noisy)
    x, y = digits[0][:images], digits[1][:images]
    attacks.iterative(noisy, x, y, 4, steps=2, passes=passes, estimator=estimator, batch_size=batch_size)
    assert max(rows) <= batch_size
    assert sum(rows) == 2 * images * passes * (2 if estimator == "gradient_of_mean" else 1)


def test_a_deterministic_network_is_run_once_per_step(dense: nn.Module, digits: Images, watch: Watch) -> None:
    rows = watch(dense)
    attacks.iterative(dense, digits[0][:5], digits[1][:5], 4, steps=3, passes=100)
    assert rows == [5, 5, 5]


def test_uint8_and_float_pixels_give_the_same(noisy: NoisyModel, digits: Images) -> None:
    x, y = digits[0][:4], digits[1][:4]
    found = attacks.iterative(noisy, x, y, 4, steps=2, passes=2)
    assert found.dtype == torch.float32
    assert torch.equal(found, attacks.iterative(noisy, x.float(), y, 4, steps=2, passes=2))


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_stopping_at_success_is_no_weaker_and_goes_on_where_the_network_is_right(
    dense: nn.Module, digits: Images, watch: Watch, steps: int
) -> None:
    """Images that the network still gets right were attacked with all steps, as without the option."""
    x, y = digits[0][:100], digits[1][:100]
    plain = attacks.iterative(dense, x, y, 24, step=8, steps=steps)
    rows = watch(dense)
    found = attacks.iterative(dense, x, y, 24, step=8, steps=steps, stop_at_success=True)
    with_option = sum(rows)
    right, right_plain = dense(found).argmax(1) == y, dense(plain).argmax(1) == y
    assert int(right.sum()) <= int(right_plain.sum())
    for one, other in zip(found[right], plain[right], strict=True):
        assert share_that_differs(one, other) <= 5e-3
    assert float((found - x).abs().max()) <= 24
    if steps == 9:
        assert int(right.sum()) < 50
        assert with_option < 100 * steps


def test_stopping_at_success_is_for_deterministic_networks(noisy: NoisyModel, digits: Images) -> None:
    with pytest.raises(SapcoreError, match="stop_at_success is for deterministic networks"):
        attacks.iterative(noisy, digits[0][:2], digits[1][:2], 4, stop_at_success=True)


# PGD: random starts and restarts


def test_a_random_start_is_anywhere_in_the_ball(dense: nn.Module, digits: Images) -> None:
    x, y = digits[0][:8].float(), digits[1][:8]
    first, other = (attacks.iterative(dense, x, y, 4, 1e-9, 1, seed=seed, random_start=True) for seed in (0, 1))
    inside = (x >= 4) & (x <= 251)
    change = (first - x)[inside] / 4
    assert float(change.abs().max()) <= 1
    assert stats.kstest(change[::7].double().numpy(), "uniform", (-1, 2)).pvalue > 1e-6
    assert not torch.equal(first, other)
    alone = attacks.iterative(dense, x[5:6], y[5:6], 4, 1e-9, 1, random_start=True, ids=torch.tensor([5]))
    assert torch.equal(alone[0], first[5])


def test_more_restarts_are_no_weaker(dense: nn.Module, noisy: NoisyModel, digits: Images) -> None:
    x, y = digits[0][:24].float(), digits[1][:24]
    arguments = {"eps": 24, "step": 6, "steps": 3, "passes": 2, "seed": 3, "random_start": True}
    for model in (dense, noisy):
        tried = [attacks.iterative(model, x, y, restarts=count, **arguments) for count in (1, 4)]  # type: ignore[arg-type]
        p = [predict(model, x_adv, 2, stream(3, "choice"), torch.arange(24)).clamp(min=1e-30).log() for x_adv in tried]
        one, four = (margin(scores, y) for scores in p)
        assert (four >= one).all()
        assert (four > one).any()
        assert float((tried[1] - x).abs().max()) <= 24


def test_on_a_noisy_network_restarts_draw_passes_of_their_own(noisy: NoisyModel, digits: Images) -> None:
    x, y = digits[0][:6].float(), digits[1][:6]
    one, three = (attacks.iterative(noisy, x, y, 8, 4, 2, passes=1, restarts=count) for count in (1, 3))
    same = (one == three).flatten(1).all(1)
    assert not same.all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"restarts": 0}, "restarts is 0, but must be a whole number of 1 or more"),
        ({"restarts": 2}, "restarts of a deterministic network are all the same without random_start"),
        ({"loss": "hinge"}, "loss is 'hinge', but must be one of cross_entropy, margin"),
    ],
)
def test_senseless_restarts_and_losses_are_one_sentence(
    dense: nn.Module, digits: Images, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(SapcoreError, match=f"^{message}$"):
        attacks.iterative(dense, digits[0][:2], digits[1][:2], 4, **arguments)  # type: ignore[arg-type]


def test_the_margin_breaks_a_network_as_well_as_the_cross_entropy(dense: nn.Module, digits: Images) -> None:
    x, y = digits[0][:50].float(), digits[1][:50]
    right = [
        accuracy(predict(dense, attacks.iterative(dense, x, y, 32, 4, 10, loss=loss)), y).value
        for loss in ("cross_entropy", "margin")
    ]
    assert max(right) < 0.6
