"""ResNet-20 is the paper's: 19 ReLU maps of the right sizes, pixels in, normalization inside."""

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from sapcore.models import PreActivationUnit, ResNet20, initialize


def test_resnet20_has_19_relu_maps_of_the_papers_sizes_and_in_the_right_order() -> None:
    model = ResNet20().eval()
    shapes: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _m, _x, y: shapes.append(tuple(y.shape[1:])))
    model(torch.zeros(1, 3, 32, 32))
    assert shapes == 7 * [(16, 32, 32)] + 6 * [(32, 16, 16)] + 6 * [(64, 8, 8)]
    sizes = [c * h * w for c, h, w in shapes]
    assert sizes == 7 * [16384] + 6 * [8192] + 6 * [4096]


def test_resnet20_has_as_many_parameters_as_its_layers_say() -> None:
    norm_input = 2 * 3
    conv_input = 3 * 16 * 9
    units = 0
    channels = 16
    for width in (16, 32, 64):
        for place in range(3):
            norms = 2 * channels + 2 * width
            convolutions = channels * width * 9 + width * width * 9
            shortcut = channels * width if place == 0 else 0
            units += norms + convolutions + shortcut
            channels = width
    norm, head = 2 * 64, 64 * 10 + 10
    expected = norm_input + conv_input + units + norm + head
    assert sum(p.numel() for p in ResNet20().parameters()) == expected == 272_544


def test_it_takes_pixels_and_normalizes_them_inside() -> None:
    model = ResNet20().eval()
    first = next(model.children())
    assert isinstance(first, nn.BatchNorm2d)
    assert first.running_mean is not None
    assert first.running_var is not None
    first.running_mean.fill_(120.0)
    first.running_var.fill_(64.0**2)
    seen: list[Tensor] = []
    model.conv_input.register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    model(torch.full((1, 3, 32, 32), 184.0))
    torch.testing.assert_close(seen[0], torch.ones(1, 3, 32, 32))


def test_only_the_input_scale_is_fixed_at_one() -> None:
    model = ResNet20()
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert fixed == ["norm_input.weight"]
    assert model.norm_input.weight.tolist() == [1, 1, 1]


def test_every_batch_norm_has_the_papers_constants() -> None:
    norms = [module for module in ResNet20().modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 1 + 2 * 9 + 1
    assert {(norm.eps, norm.momentum) for norm in norms} == {(2e-5, 0.1)}


def test_convolutions_have_no_bias_and_lie_channels_last() -> None:
    for module in ResNet20().modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            assert module.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("classes", [10, 3])
def test_logits_have_one_column_per_class(classes: int) -> None:
    assert ResNet20(classes).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


def test_a_unit_adds_its_input_or_its_projection() -> None:
    """With the second convolution at zero, a unit is its shortcut."""
    for place, unit in enumerate(ResNet20().eval().units):
        assert isinstance(unit, PreActivationUnit)
        nn.init.zeros_(unit.conv2.weight)
        x = torch.randn(1, unit.conv1.in_channels, 8, 8, generator=torch.Generator().manual_seed(place))
        assert (unit.shortcut is not None) == (place % 3 == 0)
        expected = x if unit.shortcut is None else unit.shortcut(unit.relu1(unit.norm1(x)))
        assert torch.equal(unit(x), expected)


def test_initial_weights_are_normal_with_variance_two_over_fan_in() -> None:
    """Kolmogorov and Smirnov on all convolutions together; false alarm 1e-6."""
    model = ResNet20()
    initialize(model, torch.Generator().manual_seed(0))
    scaled = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            weights = module.weight.detach().flatten() / (2 / fan_in) ** 0.5
            assert abs(float(weights.var()) - 1) < 5 * (2 / len(weights)) ** 0.5
            scaled.append(weights)
    assert stats.kstest(torch.cat(scaled).double().numpy(), stats.norm.cdf).pvalue > 1e-6
    assert not model.head.bias.any()


@pytest.mark.usefixtures("untouched_generators")
def test_initial_weights_follow_from_their_generator_alone() -> None:
    state = torch.get_rng_state()
    models = [ResNet20() for _ in range(2)]  # torch's own layers draw from the global generator on construction
    torch.set_rng_state(state)
    for model in models:
        initialize(model, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
