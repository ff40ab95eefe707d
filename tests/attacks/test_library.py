"""torchattacks' attacks stay in the ball, are a function of their arguments, and break what can be broken."""

import sys
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from sapcore import checkpoints
from sapcore.attacks import gradient, library
from sapcore.errors import SapcoreError
from sapcore.evaluation import accuracy, predict
from sapcore.randomness import NoisyModel, stream
from sapcore.results import Attack
from sapcore.sap import with_sap

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
    found = library.autoattack(noisy, x, y, 48, steps=20, passes=5)
    assert float((found - x).abs().max()) <= 48
    assert float(found.min()) >= 0
    assert float(found.max()) <= 255
    assert accuracy(predict(noisy, found, passes=20), y).value <= 0.5


@pytest.mark.filterwarnings("ignore")
def test_every_gradient_is_of_a_pass_of_its_own_and_the_choice_of_others(noisy: NoisyModel, digits: Images) -> None:
    seeds: dict[bool, list[int]] = {True: [], False: []}
    handle = noisy.register_forward_pre_hook(
        lambda _model, _x, names: seeds[torch.is_grad_enabled()].append(names["seed"]), with_kwargs=True
    )
    library.autoattack(noisy, digits[0][:2].float(), digits[1][:2], 8, steps=3, passes=4)
    handle.remove()
    assert len(seeds[True]) == len(set(seeds[True])) == Attack("autoattack", 8, passes=4, steps=3).gradients
    assert set(seeds[False]) == {stream(0, "choice")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("untouched_generators")
def test_autoattacks_standard_version_leaves_no_more_than_the_other(dense: nn.Module, digits: Images) -> None:
    x, y = digits[0][:12].float(), digits[1][:12]
    left = int((predict(dense, library.autoattack(dense, x, y, 12, 2, 1)).argmax(1) == y).sum())
    found, again, other = (library.autoattack_standard(dense, x, y, 12, 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    assert float((found - x).abs().max()) <= 12
    assert float(found.min()) >= 0
    assert float(found.max()) <= 255
    right = predict(dense, found).argmax(1) == y
    assert 0 < int(right.sum()) <= left
    assert torch.equal(found[right], x[right]), "what nothing broke comes back clean"
    assert not dense.training, "torchattacks changes the mode"


@pytest.mark.filterwarnings("ignore")
def test_autoattacks_standard_version_asks_as_often_as_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an image that it cannot break, whose gradient is one all the same."""
    linear = nn.Linear(3 * 8 * 8, 10)
    sure = nn.Sequential(nn.Flatten(), linear).eval()
    with torch.no_grad():
        linear.weight.mul_(1e-6)
        linear.bias[4] = 50
    asked = {"gradients": 0, "queries": 0}
    linear.register_full_backward_hook(lambda *_: asked.update(gradients=asked["gradients"] + 1))
    attack = torchattacks.Square.attack_single_run

    def square(*given: Any) -> Any:
        handle = linear.register_forward_hook(lambda *_: asked.update(queries=asked["queries"] + 1))
        found = attack(*given)
        handle.remove()
        return found

    monkeypatch.setattr(torchattacks.Square, "attack_single_run", square)
    library.autoattack_standard(sure, torch.full((1, 3, 8, 8), 100.0), torch.tensor([4]), 8, steps=4)
    assert asked == {"gradients": 10 * 5 + 9 * 4, "queries": 201}
    assert sum(asked.values()) == Attack("autoattack_standard", 8, passes=1, steps=4).gradients


ALL = pytest.mark.parametrize("attack", [library.autoattack, library.autoattack_standard, library.square])


def small(classes: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 20), nn.ReLU(), nn.Linear(20, classes)).eval()


@pytest.mark.filterwarnings("ignore")
@ALL
def test_a_network_is_left_as_it_was(attack: Any, digits: Images) -> None:
    model, x, y = small(), digits[0][:5, :, ::4, ::4].float(), digits[1][:5]
    attack(model, x, y, 4, 2)
    assert [p.grad for p in model.parameters()] == 4 * [None]
    assert all(p.requires_grad for p in model.parameters())
    model.train()
    with pytest.raises(SapcoreError, match=r"^the network is in training mode; call model.eval\(\) first"):
        attack(model, x, y, 4, 2)
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore")
@ALL
def test_answers_that_are_no_logits_are_refused(attack: Any, digits: Images) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.flatten(1)[:, :10], x

    x, y = digits[0][:3, :, ::4, ::4].float(), digits[1][:3]
    with pytest.raises(SapcoreError, match=r"^the network's output has type tuple, but must be logits"):
        attack(Pair().eval(), x, y, 4, 2)
    broken = small()
    with torch.no_grad():
        list(broken.parameters())[-1][0] = torch.nan
    with pytest.raises(SapcoreError, match=r"^the network's output is nan or inf for \d of \d images$"):
        attack(broken, x, y, 4, 2)


@pytest.mark.filterwarnings("ignore")
def test_of_many_classes_the_nine_likeliest_are_aimed_at() -> None:
    def gradients(classes: int) -> int:
        model, calls = small(classes), [0]
        with torch.no_grad():
            list(model.parameters())[-1][4] = 1e6
        model[3].register_full_backward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        library.autoattack_standard(model, torch.full((1, 3, 8, 8), 100.0), torch.tensor([4]), 2, 2)
        return calls[0]

    assert gradients(10) == gradients(15) == 10 * 3 + 9 * 2


def test_autoattacks_standard_version_is_for_no_noise(noisy: NoisyModel, digits: Images) -> None:
    with pytest.raises(SapcoreError, match=r"^AutoAttack's standard version is for a network without noise; take "):
        library.autoattack_standard(noisy, digits[0][:2].float(), digits[1][:2], 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("attack", "least"), [(library.autoattack, 3), (library.autoattack_standard, 4)])
def test_autoattack_wants_enough_classes(attack: Any, least: int) -> None:
    few = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, least - 1)).eval()
    x, y = torch.full((2, 3, 8, 8), 100.0), torch.tensor([0, 1])
    with pytest.raises(SapcoreError, match=f"the network has {least - 1} classes, but must have {least} or more"):
        attack(few, x, y, 4, 2)


@pytest.mark.filterwarnings("ignore")
def test_an_image_that_a_single_pass_gets_wrong_is_attacked_all_the_same(digits: Images) -> None:
    """torchattacks gives it back clean, and with fresh passes it may be right again."""
    wild = with_sap(checkpoints.load("resnet20-digits"), 5)
    x, y = digits[0][:12].float(), digits[1][:12]
    for found in (library.autoattack(wild, x, y, 16, 2, 2), library.square(wild, x, y, 16, 5)):
        assert float((found - x).abs().amax((1, 2, 3)).min()) > 0


@pytest.mark.filterwarnings("ignore")
def test_autoattack_keeps_the_best_of_its_points(
    dense: nn.Module, digits: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network without noise an image is lost as soon as one of them is wrong."""
    x, y = digits[0][:30].float(), digits[1][:30]
    tried: list[Tensor] = []
    choose = gradient.furthest_wrong

    def note(model: nn.Module, tries: list[Tensor], *more: Any) -> Tensor:
        tried.extend(tries)
        return choose(model, tries, *more)

    monkeypatch.setattr(library, "furthest_wrong", note)
    found = library.autoattack(dense, x, y, 12, 10)
    right = torch.stack([predict(dense, t).argmax(1) == y for t in tried])
    assert len(right) == 4
    assert torch.equal(predict(dense, found).argmax(1) == y, right.all(0))
    assert 0 < int(right.all(0).sum()) < len(x)


def test_without_torchattacks_the_extra_is_named(
    dense: nn.Module, digits: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(
        SapcoreError, match=r"Square needs torchattacks: install it with `pip install -e '\.\[attacks\]'`"
    ):
        library.square(dense, digits[0][:1].float(), digits[1][:1], 4)
