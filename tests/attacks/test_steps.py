"""Senseless arguments of every attack stop with one sentence, and the projection is onto ball and pixel range."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sapcore import attacks
from sapcore.attacks import library
from sapcore.attacks.gradient import ESTIMATORS, LOSSES
from sapcore.attacks.steps import check_eps, project
from sapcore.errors import SapcoreError
from sapcore.models import ResNet20
from sapcore.randomness import NoisyModel
from sapcore.sap import with_sap

BOTH = pytest.mark.parametrize("attack", [attacks.fgsm, attacks.iterative])
ON_GRADIENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no passes": ({"passes": 0}, "passes is 0, but must be a whole number of 1 or more"),
    "negative passes": ({"passes": -1}, "passes is -1, but must be a whole number of 1 or more"),
    "half a pass": ({"passes": 1.5}, "passes is 1.5, but must be a whole number of 1 or more"),
    "passes true": ({"passes": True}, "passes is True, but must be a whole number of 1 or more"),
    "no batch": ({"batch_size": 0}, "batch_size is 0, but must be a whole number of 1 or more"),
    "negative batch": ({"batch_size": -5}, "batch_size is -5, but must be a whole number of 1 or more"),
    "estimator": (
        {"estimator": "bpda"},
        "estimator is 'bpda', but must be one of mean_of_gradients, gradient_of_mean, dense_backward",
    ),
    "precision": ({"precision": "half"}, "precision is 'half', but must be one of float32, bfloat16"),
    "seed": ({"seed": -1}, r"seed is -1, but must be a whole number from 0 to 2\*\*64 - 1"),
    "ids": ({"ids": torch.arange(2)}, r"ids has shape \(2,\), but must be \(3,\), one per example"),
}
ON_STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "no steps": ({"steps": 0}, "steps is 0, but must be a whole number of 1 or more"),
    "steps 1.5": ({"steps": 1.5}, "steps is 1.5, but must be a whole number of 1 or more"),
    "step 0": ({"step": 0}, "step is 0, but must be a positive number, in pixel units"),
    "step nan": ({"step": float("nan")}, "step is nan, but must be a positive number, in pixel units"),
    "step text": ({"step": "1/255"}, "step is '1/255', but must be a positive number, in pixel units"),
}


@pytest.fixture
def few(digits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return digits[0][:3].float(), digits[1][:3]


@pytest.mark.parametrize("eps", ["8/255", -1, -0.001, float("nan"), float("inf"), True, None, [4]])
def test_a_senseless_eps_is_refused_by_every_attack(noisy: NoisyModel, few: tuple[Tensor, Tensor], eps: Any) -> None:
    calls: list[Callable[[], Tensor]] = [
        lambda: attacks.noise(few[0], eps),
        lambda: attacks.fgsm(noisy, *few, eps),
        lambda: attacks.iterative(noisy, *few, eps),
    ]
    for call in calls:
        with pytest.raises(
            SapcoreError, match=r"eps is .*, but must be a number of 0 or more, in pixel units \(0-255\)"
        ):
            call()


@BOTH
@pytest.mark.parametrize("name", ON_GRADIENTS)
def test_senseless_arguments_are_refused(
    noisy: NoisyModel, few: tuple[Tensor, Tensor], attack: Callable[..., Tensor], name: str
) -> None:
    arguments, message = ON_GRADIENTS[name]
    with pytest.raises(SapcoreError, match=f"^{message}$"):
        attack(noisy, *few, 4, **({"passes": 1} | arguments))


@pytest.mark.parametrize("name", ON_STEPS)
def test_senseless_steps_are_refused(dense: nn.Module, few: tuple[Tensor, Tensor], name: str) -> None:
    arguments, message = ON_STEPS[name]
    with pytest.raises(SapcoreError, match=f"^{message}$"):
        attacks.iterative(dense, *few, 4, **arguments)


@BOTH
@pytest.mark.parametrize("noisy_too", [False, True])
def test_a_network_in_training_mode_is_refused(
    few: tuple[Tensor, Tensor], attack: Callable[..., Tensor], noisy_too: bool
) -> None:
    model = ResNet20().eval()
    model.norm.train()  # one BatchNorm is enough
    with pytest.raises(SapcoreError, match=r"the network is in training mode; call model.eval\(\) first"):
        attack(with_sap(model) if noisy_too else model, *few, 4)


class Auxiliary(nn.Module):
    """A branch before the first noise that the output does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.aside = nn.Linear(192, 20), nn.Linear(20, 10), nn.Linear(20, 5)
        self.relu, self.other = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1) / 255)
        aside = self.other(self.aside(h))
        return self.second(self.relu(h)) if not self.training else aside


class InPlace(nn.Module):
    """Normalizes the pixels where they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.ReLU(), nn.Linear(10, 10))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x.sub_(100).div_(60))
        return found


@BOTH
@pytest.mark.parametrize("kind", [Auxiliary, InPlace])
@pytest.mark.parametrize("noisy_too", [False, True])
def test_networks_with_a_branch_aside_and_those_that_change_their_input_are_attacked(
    attack: Callable[..., Tensor], kind: type[nn.Module], noisy_too: bool
) -> None:
    torch.manual_seed(0)
    x, y = (torch.rand(6, 3, 8, 8) * 255).contiguous(memory_format=torch.channels_last), torch.arange(6)
    before, model = x.clone(), kind().eval()
    model = with_sap(model) if noisy_too else model
    found = (
        [attack(model, x, y, 4, passes=2, batch_size=rows) for rows in (6, 60)]
        if noisy_too
        else 2 * [attack(model, x, y, 4)]
    )
    assert torch.equal(x, before)
    assert torch.equal(*found)
    assert not torch.equal(found[0], x)


@BOTH
def test_an_output_without_a_gradient_is_refused(few: tuple[Tensor, Tensor], attack: Callable[..., Tensor]) -> None:
    class Votes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(x.flatten(1)[:, :10].argmax(1), 10).float()

    with pytest.raises(SapcoreError, match=r"^the network's output has no gradient, by its own forward, and this "):
        attack(Votes().eval(), *few, 4)


def test_inference_mode_is_named(dense: nn.Module, few: tuple[Tensor, Tensor]) -> None:
    with (
        torch.inference_mode(),
        pytest.raises(SapcoreError, match=r"^the network's output has no gradient, in torch.inference_mode\(\), and"),
    ):
        attacks.fgsm(dense, *few, 4)


@BOTH
@pytest.mark.parametrize("number", [2, 4, 0])
def test_images_and_labels_of_different_number_are_refused(
    dense: nn.Module,
    few: tuple[Tensor, Tensor],
    digits: tuple[Tensor, Tensor],
    attack: Callable[..., Tensor],
    number: int,
) -> None:
    with pytest.raises(SapcoreError, match=f"^there are 3 images but {number} labels$"):
        attack(dense, few[0], digits[1][:number], 4)


@BOTH
@pytest.mark.parametrize("value", [-1.0, 255.5, 1000.0, float("nan")])
def test_pixels_out_of_range_are_refused(
    dense: nn.Module, few: tuple[Tensor, Tensor], attack: Callable[..., Tensor], value: float
) -> None:
    x = few[0].clone()
    x[1, 2, 3, 4] = value
    with pytest.raises(SapcoreError, match=r"pixels lie in \[.*\], but must lie in \[0, 255\]"):
        attack(dense, x, few[1], 4)


def test_noise_refuses_pixels_out_of_range_too() -> None:
    with pytest.raises(SapcoreError, match=r"pixels lie in \[.*\], but must lie in \[0, 255\]"):
        attacks.noise(torch.full((1, 3, 4, 4), 300.0), 4)


def test_pixels_in_0_to_1_are_warned_of(dense: nn.Module, few: tuple[Tensor, Tensor]) -> None:
    """eps would be hundreds of times what was meant."""
    message = r"^pixels lie in \[0, 1\], where 255 is white; give 255 \* x if 1 is$"
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: attacks.noise(x, 4),
        lambda x: attacks.fgsm(dense, x, few[1], 4),
        lambda x: attacks.iterative(dense, x, few[1], 4, steps=1),
    ]
    for attack in calls:
        with pytest.warns(UserWarning, match=message) as warned:
            attack(few[0] / few[0].max())
        assert warned[0].filename == __file__, "it points at the call"
        attack((few[0] > 100).float())  # black and all but black


@pytest.mark.filterwarnings("ignore")  # of torchattacks
@pytest.mark.parametrize(
    "attack",
    [attacks.fgsm, attacks.iterative, library.autoattack, library.autoattack_standard, library.square],
    ids=lambda a: a.__name__,
)
def test_images_that_are_no_tensor_and_labels_of_no_class_are_refused(
    dense: nn.Module, few: tuple[Tensor, Tensor], attack: Callable[..., Tensor]
) -> None:
    x, y = few
    with pytest.raises(SapcoreError, match=r"^x is a ndarray, but must be a torch.Tensor; torch.as_tensor makes one$"):
        attack(dense, x.numpy(), y, 4)
    with pytest.raises(SapcoreError, match=r"^labels go from 3 to 10, but must be from 0 to 9$"):
        attack(dense, x, torch.tensor([3, 5, 10]), 4)


@pytest.mark.parametrize("estimator", [*ESTIMATORS])
@pytest.mark.parametrize("loss", [*LOSSES])
def test_every_estimator_refuses_labels_of_no_class(
    noisy: NoisyModel, few: tuple[Tensor, Tensor], estimator: str, loss: str
) -> None:
    with pytest.raises(SapcoreError, match=r"^labels go from 0 to 10, but must be from 0 to 9$"):
        attacks.fgsm(noisy, few[0], torch.tensor([0, 5, 10]), 4, passes=2, estimator=estimator, loss=loss)


@BOTH
def test_a_gradient_that_is_nan_is_refused(few: tuple[Tensor, Tensor], attack: Callable[..., Tensor]) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1)[:, :2] - 300).sqrt()

    with pytest.raises(SapcoreError, match=r"^the network's gradient is nan, so that it shows no direction$"):
        attack(Root().eval(), few[0], torch.zeros(3).long(), 4)


pixels = st.floats(0, 255, width=32)


@given(
    x=st.lists(pixels, min_size=3, max_size=3),
    moved=st.lists(st.floats(-1000, 1000, width=32), min_size=3, max_size=3),
    eps=st.floats(0, 300),
)
def test_projection_is_onto_the_ball_and_the_range_and_idempotent(
    x: list[float], moved: list[float], eps: float
) -> None:
    centre, there = torch.tensor(x), torch.tensor(moved)
    found = project(there, centre, eps)
    assert ((found >= 0) & (found <= 255)).all()
    assert ((found - centre).abs() <= eps * (1 + 1e-6) + 1e-4).all()
    assert torch.equal(project(found, centre, eps), found)
    inside = ((there - centre).abs() < eps - 1e-4) & (there >= 0) & (there <= 255)
    assert torch.equal(found[inside], there[inside])


@pytest.mark.parametrize("eps", [np.int64(4), np.float32(4)])
def test_eps_may_be_numpys(eps: float) -> None:
    found = check_eps(eps)
    assert found == 4
    assert type(found) is float
