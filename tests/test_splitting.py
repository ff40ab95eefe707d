"""What noisy passes have in common is computed once, and nothing else changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sapcore import SAP, bfloat16, evaluation, with_sap
from sapcore.attacks.gradient import gradient_of_mean, mean_of_gradients
from sapcore.errors import SapcoreError
from sapcore.randomness import NoisyModel
from sapcore.splitting import split

Images = tuple[Tensor, Tensor]
Watch = Callable[[nn.Module], list[int]]


def is_sap(module: nn.Module) -> bool:
    return isinstance(module, SAP)


@pytest.mark.parametrize("precision", bfloat16.PRECISIONS)
def test_a_network_goes_on_from_its_beginning_to_the_same_logits(
    noisy: NoisyModel, digits: Images, precision: str
) -> None:
    x, names = digits[0][:4].float(), {"seed": 3, "ids": torch.tensor([5, 1, 2, 9]), "passes": 7}
    with torch.no_grad(), bfloat16.autocast(precision, x.device):
        begun = noisy.begin(x)
        assert begun.model is not noisy.model
        assert torch.equal(noisy(begun, **names), noisy(x, **names))


def test_passes_side_by_side_keep_their_layout_in_memory(noisy: NoisyModel, digits: Images) -> None:
    """Another one would be copied by each layer that wants channels last."""
    begun = noisy.begin(digits[0][:2].float().contiguous(memory_format=torch.channels_last))
    (part,) = begun.repeated(3).parts
    assert torch.equal(part, begun.parts[0].repeat(3, 1, 1, 1))
    assert part.is_contiguous(memory_format=torch.channels_last)


def test_the_part_before_the_first_noisy_layer_runs_once_per_image(
    dense: nn.Module, digits: Images, watch: Watch
) -> None:
    noisy = with_sap(dense, 100)
    before, after = watch(noisy.get_submodule("model.conv_input")), watch(noisy.get_submodule("model.head"))
    evaluation.predict(noisy, digits[0][:6], passes=5, batch_size=4)
    assert before == [4, 2]
    assert sum(after) == 6 * 5


@pytest.mark.parametrize("estimate", [mean_of_gradients, gradient_of_mean])
def test_the_gradient_is_that_of_the_undivided_network(
    dense: nn.Module, digits: Images, estimate: Callable[..., Tensor]
) -> None:
    x, y = digits[0][:3].float(), digits[1][:3]
    divided, undivided = with_sap(dense, 100), with_sap(dense, 100)
    undivided.model.register_forward_hook(lambda *_: None)
    found, expected = (estimate(m, x, y, torch.arange(3), 0, range(4), 6, "float32") for m in (divided, undivided))
    assert divided.begin(x).model is not divided.model
    assert undivided.begin(x).model is undivided.model
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * float(expected.abs().max()))


class Forked(nn.Module):
    """Goes on from the input, from what came of it, and from a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)
        self.shift = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.relu(h) + h.tanh() + x + self.shift)


def test_several_tensors_may_be_handed_on() -> None:
    model = with_sap(Forked().eval())
    halves = split(model.model, is_sap, lambda traced: True)
    assert halves is not None
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    parts = halves[0](x)
    assert len(parts) == 3
    with torch.no_grad():
        assert torch.equal(model(model.begin(x), seed=1), model(x, seed=1))


class Branching(nn.Module):
    """Looks at its input to decide what to do, which torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x) if x.sum() > 0 else -x


class Counting(nn.Module):
    """Hands on something that is no tensor of one row per example."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x).reshape(x.shape[0], -1)


@pytest.mark.parametrize("kind", [Branching, Counting])
def test_a_network_that_cannot_be_split_runs_whole(kind: Callable[[], nn.Module]) -> None:
    model = with_sap(kind().eval(), 50)
    x = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    assert model.begin(x).parts[0] is x
    assert torch.equal(model(model.begin(x)), model(x))
    gradient = mean_of_gradients(model, x, torch.tensor([0, 1, 2]), torch.arange(3), 0, range(2), 6, "float32")
    assert gradient.any()


class Linear(nn.Module):
    """Of five inputs, with what its forwards below need."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.gate, self.last = nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3)
        self.weight = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)))
        self.inplace = nn.ReLU(inplace=True)
        self.mean: Tensor
        self.register_buffer("mean", torch.ones(5))
        self.scale = 2.0


class ByParameters(Linear):
    """Computes of its parameters alone what has as many rows as the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.relu(self.first(x)), nn.functional.normalize(self.weight))


class InPlace(Linear):
    """Changes in place what comes before the first noisy layer."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h.mul_(self.gate(self.relu(h)).sigmoid()))


class SeenInPlace(Linear):
    """Lets others see what a ReLU in place does."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.inplace(h) + h)


class AsksForATensor(Linear):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 3 if isinstance(x, Tensor) else x
        return self.last(self.relu(self.first(x)))


class Activated(nn.Linear):
    """A layer that torch.fx takes for a single step, with a noisy one inside."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(super().forward(x))


class WithActivated(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.activated = Activated()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.gate(self.activated(x))))


class Shifted(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.first((x - self.mean) / self.scale)))


@pytest.mark.parametrize("kind", [ByParameters, InPlace, SeenInPlace, AsksForATensor, WithActivated, Shifted])
def test_passes_that_begin_together_are_those_of_the_whole_network(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    noisy, x = with_sap(kind().eval(), 60), torch.randn(6, 5)
    with torch.no_grad():
        whole = [noisy(x.clone(), seed=3, passes=number) for number in range(8)]
        assert not all(torch.equal(whole[0], other) for other in whole)
        noisy(x.clone(), seed=77)
        begun = noisy.begin(x.clone())
        for number in (*range(8), 0):
            assert torch.equal(noisy(begun, seed=3, passes=number), whole[number])
        ids, numbers = torch.arange(6).repeat(8), torch.arange(8).repeat_interleave(6)
        torch.testing.assert_close(noisy(begun.repeated(8), seed=3, ids=ids, passes=numbers), torch.cat(whole))
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    whole_gradient = torch.zeros_like(x)
    for number in range(2):
        leaf = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(noisy(leaf, 3, passes=number), y, reduction="sum")
        whole_gradient += torch.autograd.grad(loss, leaf)[0]
    found = mean_of_gradients(noisy, x, y, torch.arange(6), 3, range(2), 6, "float32")
    torch.testing.assert_close(2 * found.to(x.dtype), whole_gradient)


def test_a_relu_in_place_whose_effect_others_see_stays() -> None:
    torch.manual_seed(0)
    model, x = SeenInPlace().eval(), torch.randn(6, 5)
    with torch.no_grad():
        torch.testing.assert_close(with_sap(model, 1e6)(x), model(x), rtol=1e-4, atol=1e-4)


class OfPlainAttributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.factors, self.linear, self.relu = torch.ones(5), [2.0, 3.0], nn.Linear(5, 5), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.relu(self.linear((x - self.mean) * self.factors[0]) * self.factors[1])
        return found


@pytest.mark.parametrize("changed", ["mean", "factors"])
def test_plain_tensors_and_lists_that_change_later_are_seen(changed: str) -> None:
    torch.manual_seed(0)
    model, x = OfPlainAttributes().eval(), torch.randn(6, 5)
    noisy = with_sap(model, 60)
    inside: Any = noisy.model
    with torch.no_grad():
        before = noisy(noisy.begin(x))
        if changed == "mean":
            inside.mean = torch.zeros(5)
        else:
            inside.factors[0] = 7.0
        assert torch.equal(noisy(noisy.begin(x)), noisy(x))
        assert not torch.equal(noisy(x), before)


def test_a_copy_is_split_anew() -> None:
    noisy, x = with_sap(OfPlainAttributes().eval(), 60), torch.randn(6, 5)
    noisy.begin(x)
    assert noisy._halves is not None
    assert copy.deepcopy(noisy)._halves is None


@pytest.mark.parametrize("changed", ["scale", "mean", "moved"])
def test_attributes_and_buffers_that_change_later_are_seen(changed: str) -> None:
    torch.manual_seed(0)
    noisy, x = with_sap(Shifted().eval(), 60), torch.randn(6, 5)
    with torch.no_grad():
        before = noisy(noisy.begin(x))
        model = noisy.model
        if changed == "scale":
            model.scale = 5.0  # type: ignore[assignment]
        elif changed == "mean":
            model.mean = torch.zeros(5)
        else:
            model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
        assert torch.equal(noisy(noisy.begin(x)), noisy(x))
        assert not torch.equal(noisy(x), before)


def test_relus_in_place_are_fused_where_nobody_sees_them() -> None:
    model = normalized().eval()
    model[1], model[4] = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
    noisy, plain = with_sap(model, 60), with_sap(normalized().eval(), 60)
    plain.model.load_state_dict(noisy.model.state_dict(), strict=False)
    model[0] = nn.Conv2d(3, 3, 1)
    fused = with_sap(model, 60)
    assert "NormalizedSAP" in steps(fused, IMAGES)
    with torch.no_grad():
        assert torch.equal(fused(fused.begin(IMAGES), seed=4), fused(IMAGES.clone(), seed=4))
        assert torch.equal(noisy(noisy.begin(IMAGES.clone()), seed=4), plain(IMAGES, seed=4))


def test_the_fast_path_of_a_transformer_does_not_go_round_its_noise() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU(), batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(32, 3)).eval()
    noisy, x = with_sap(model, 10, after=nn.GELU), torch.randn(2, 4, 8)
    with torch.no_grad():
        quick = noisy(x)
    torch.testing.assert_close(quick, noisy(x))
    assert not torch.equal(quick, noisy(x, passes=1))
    with torch.no_grad():
        assert not torch.allclose(quick, model(x), atol=1e-3)


class Elsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu, self.linear = nn.ReLU(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_a_network_that_does_not_reach_its_noise_is_refused() -> None:
    with pytest.raises(SapcoreError, match=r"^the network's forward reaches none of its noisy layers"):
        with_sap(Elsewhere().eval())(torch.randn(2, 5))


def test_a_network_changed_later_is_split_anew(dense: nn.Module, digits: Images) -> None:
    noisy, x = with_sap(dense, 100), digits[0][:2].float()
    before = noisy(noisy.begin(x))
    noisy.get_submodule("model").norm_input = nn.Identity()
    assert torch.equal(noisy(noisy.begin(x)), noisy(x))
    assert not torch.equal(noisy(x), before)


def normalized(channels: int = 16, **options: bool) -> nn.Sequential:
    """A convolution, then BatchNorm with statistics of its own, then ReLU."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(channels, **options)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if tensor is not None:
                tensor.copy_(torch.rand(channels, generator=generator) + 0.1)
    return nn.Sequential(nn.Identity(), nn.ReLU(), nn.Conv2d(3, channels, 3), norm, nn.ReLU(), nn.Flatten())


def steps(noisy: NoisyModel, x: Tensor) -> list[str]:
    return [type(module).__name__ for module in noisy.begin(x).model.modules()]


IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("precision", bfloat16.PRECISIONS)
@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (16, {}),
        (64, {}),
        (24, {}),
        (1024, {}),
        (16, {"affine": False}),
        (16, {"track_running_stats": False}),
        (1, {}),
        (3, {}),
        (5, {}),
        (17, {}),
    ],
)
def test_batch_norm_relu_and_sap_in_one_step_are_one_after_the_other(
    precision: str, channels: int, options: dict[str, bool]
) -> None:
    """Bit for bit; where the kernel cannot do it, and on the reference, by running them one after the other."""
    model = normalized(channels, **options).eval()
    images = IMAGES[:, :, :, :9]  # 10 x 7 places, so that a word's units begin with any channel
    for backend in ("auto", "reference"):
        noisy = with_sap(model, 60, backend=backend)
        assert "NormalizedSAP" in steps(noisy, images)
        with torch.no_grad(), bfloat16.autocast(precision, images.device):
            x = images.contiguous(memory_format=torch.channels_last)
            assert torch.equal(noisy(noisy.begin(x), seed=4), noisy(x, seed=4))


@pytest.mark.parametrize("backward", ["constant", "scale", "identity"])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_gradient_through_batch_norm_relu_and_sap_is_that_of_one_after_the_other(
    backward: str, in_place: bool
) -> None:
    """Also the adversary's that goes through the scale or round SAP, and where the ReLUs work in place."""
    model, y = normalized().eval(), torch.arange(4)
    torch.manual_seed(0)
    model[0], model[1], model[4] = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=in_place), nn.ReLU(inplace=in_place)
    noisy, whole = (with_sap(model, 60, backward=backward) for _ in range(2))
    whole.model.register_forward_hook(lambda *_: None)
    found, expected = (mean_of_gradients(m, IMAGES, y, y, 0, range(3), 12, "float32") for m in (noisy, whole))
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("precision", bfloat16.PRECISIONS)
def test_nan_after_batch_norm_is_refused_in_one_step_too(precision: str) -> None:
    noisy = with_sap(nn.Sequential(nn.Identity(), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()).eval())
    x = IMAGES.clone()
    assert "NormalizedSAP" in steps(noisy, x)
    noisy.get_buffer("model.2.running_mean")[1] = torch.nan
    with torch.no_grad(), bfloat16.autocast(precision, x.device), pytest.raises(SapcoreError, match="holds nan or inf"):
        noisy(noisy.begin(x))


def in_place(mean: Tensor) -> None:
    with torch.no_grad():
        mean.add_(0.2)


def behind_autograd(mean: Tensor) -> None:
    mean.data.add_(0.2)


def by_another_tensor(mean: Tensor) -> None:
    mean.data = mean + 0.2


@pytest.mark.parametrize("change", [in_place, behind_autograd, by_another_tensor])
def test_statistics_that_change_are_seen(change: Callable[[Tensor], None]) -> None:
    model = normalized().eval()
    noisy = with_sap(model, 100)
    before = noisy(noisy.begin(IMAGES))
    change(noisy.get_buffer("model.3.running_mean"))
    assert torch.equal(noisy(noisy.begin(IMAGES)), noisy(IMAGES))
    assert not torch.equal(noisy(IMAGES), before)


@torch.inference_mode()
def test_a_network_made_in_inference_mode_goes_on_from_its_beginning() -> None:
    noisy = with_sap(normalized().eval(), 100)
    assert "NormalizedSAP" in steps(noisy, IMAGES)
    assert torch.equal(noisy(noisy.begin(IMAGES)), noisy(IMAGES))


def test_a_batch_norm_that_is_watched_or_used_twice_keeps_its_place() -> None:
    model = normalized().eval()
    model[3].register_forward_hook(lambda *_: None)
    assert "NormalizedSAP" not in steps(with_sap(model), IMAGES)

    class UsedTwice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv, self.norm, self.relu = nn.ReLU(), nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.conv(self.first(x)))
            return (self.relu(h) + h).flatten(1)

    noisy = with_sap(UsedTwice().eval())
    assert "NormalizedSAP" not in steps(noisy, IMAGES)
    assert torch.equal(noisy(noisy.begin(IMAGES)), noisy(IMAGES))


def test_a_network_that_mixes_examples_is_refused_in_one_step_too() -> None:
    halving = nn.Sequential(nn.ReLU(), nn.Unflatten(0, (2, 2)), nn.Flatten(1, 2), nn.BatchNorm2d(6), nn.ReLU()).eval()
    noisy = with_sap(halving)
    assert "NormalizedSAP" in steps(noisy, IMAGES)
    with pytest.raises(SapcoreError, match="the map holds 2 examples, but the network was given 4"):
        noisy(noisy.begin(IMAGES))


def test_a_hook_that_comes_after_the_first_prediction_is_called() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
                          nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).eval()  # fmt: skip
    noisy = with_sap(model)
    x = 255 * torch.rand(2, 1, 8, 8)
    before = evaluation.predict(noisy, x, passes=2)
    called: list[str] = []
    for module in noisy.modules():
        if isinstance(module, nn.BatchNorm2d | SAP):
            module.register_forward_hook(lambda m, _x, _y: called.append(type(m).__name__))
    after = evaluation.predict(noisy, x, passes=2)
    assert called.count("BatchNorm2d") == 2
    assert called.count("SAP") == 2
    torch.testing.assert_close(after, before)


def test_a_hook_of_a_container_sees_tensors() -> None:
    block = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    noisy = with_sap(nn.Sequential(block, nn.Flatten(), nn.LazyLinear(3)).eval())
    x = 255 * torch.rand(2, 1, 8, 8)
    before = evaluation.predict(noisy, x)
    seen: list[object] = []
    noisy.model[0].register_forward_hook(lambda _m, _x, y: seen.append(type(y)))  # type: ignore[index]
    torch.testing.assert_close(evaluation.predict(noisy, x), before)
    assert set(seen) == {Tensor}
