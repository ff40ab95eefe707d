"""torchattacks' attacks stay in the ball, are a function of their arguments, and break what can be broken."""

import sys

import pytest
import torch
from torch import Tensor, nn

from sapcore.attacks import library
from sapcore.errors import SapcoreError
from sapcore.evaluation import accuracy, predict
from sapcore.randomness import NoisyModel

Images = tuple[Tensor, Tensor]


@pytest.mark.filterwarnings("ignore")  # of theirs
@pytest.mark.usefixtures("untouched_generators")
def test_square_stays_in_the_ball_and_is_a_function_of_its_arguments(noisy: NoisyModel, digits: Images) -> None:
    x, y = digits[0][:6].float(), digits[1][:6]
    first, again, other = (library.square(noisy, x, y, 64, 60, 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float((first - x).abs().max()) <= 64
    assert float(first.min()) >= 0
    assert float(first.max()) <= 255


@pytest.mark.filterwarnings("ignore")
def test_square_breaks_a_network_without_a_gradient(dense: nn.Module, digits: Images) -> None:
    x, y = digits[0][:30].float(), digits[1][:30]
    assert accuracy(predict(dense, library.square(dense, x, y, 64, 200)), y).value < 0.7


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("untouched_generators")
def test_autoattack_for_randomized_defences_breaks_sap(noisy: NoisyModel, digits: Images) -> None:
    x, y = digits[0][:4].float(), digits[1][:4]
    found = library.autoattack(noisy, x, y, 48)
    assert float((found - x).abs().max()) <= 48
    assert accuracy(predict(noisy, found, passes=20), y).value <= 0.5


def test_without_torchattacks_the_extra_is_named(
    dense: nn.Module, digits: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(
        SapcoreError, match=r"Square needs torchattacks: install it with `pip install 'sapcore\[attacks\]'`"
    ):
        library.square(dense, digits[0][:1].float(), digits[1][:1], 4)
