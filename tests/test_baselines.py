"""Dropout and the six baselines: their laws, the kernel against its slow twin, and networks left as they were."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from sapcore import baselines, evaluation, noise_cpu, with_sap
from sapcore.baselines import (
    BASELINES,
    ActivationNoise,
    with_dropout,
    with_dwp,
    with_rna,
    with_rnw,
    with_rsa,
    with_rsw,
    with_swp,
)
from sapcore.errors import SapcoreError
from sapcore.randomness import Noise, NoisyModel, normal
from sapcore.sap.reference import scale

LEVELS = {"dropout": 0.25, "rnw": 0.02, "rsw": 0.3, "swp": 150.0, "rna": 0.3, "rsa": 0.5}
"""A level for each of the noisy ones."""
ON_ACTIVATIONS = ("dropout", "rna", "rsa")
ON_WEIGHTS = ("rnw", "rsw", "swp")


def noisy_map(h: Tensor, kind: str, level: float, rectify: bool = False, fast: bool = False) -> Tensor:
    """The noise on maps (N, ...), one name each."""
    run = noise_cpu.forward if fast else baselines.reference
    passes = torch.zeros(len(h), dtype=torch.int64)
    return run(h, kind, level, rectify, 3, torch.arange(len(h)), passes, 2)[0]


@given(
    kind=st.sampled_from(ON_ACTIVATIONS),
    shape=st.sampled_from([(2, 1), (1, 3), (3, 5), (2, 3, 5, 7), (1, 16, 32, 32), (2, 4097), (0, 3, 2, 2)]),
    level=st.floats(0, 0.9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rectify=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_kernel_and_reference_agree(
    kind: str, shape: tuple[int, ...], level: float, dtype: torch.dtype, rectify: bool, seed: int
) -> None:
    """Dropout drops the same units; all else differs by float32's rounding, or by one step of bfloat16."""
    h = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids, passes = torch.arange(len(h)) * 2**33 + 5, torch.full((len(h),), 7)
    arguments = h, kind, level, rectify, seed, ids, passes, 3
    for found, expected in zip(noise_cpu.forward(*arguments), baselines.reference(*arguments), strict=True):
        assert found is not None
        assert expected is not None
        assert found.dtype == dtype
        tolerance = 2e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        if kind == "dropout":
            assert torch.equal(found == 0, expected == 0)


def test_noise_on_weights_is_normal_noise_of_one_example() -> None:
    found = baselines._normal_like(torch.empty(100_003), 2**63 + 5, 9, 4)
    expected = normal(2**63 + 5, torch.tensor([0]), torch.tensor([9]), 4, 100_003, noise_cpu.GAUSSIAN)[0]
    assert float((found - expected).abs().max()) < 2e-6


@pytest.mark.parametrize("fast", [False, True])
def test_dropout_drops_each_unit_with_its_rate_and_scales_the_rest(fast: bool) -> None:
    """False alarm: 1e-6."""
    out = noisy_map(torch.full((50, 2001), 3.0), "dropout", 0.2, fast=fast)
    assert sorted({round(v, 4) for v in out.unique().tolist()}) == [0, 3.75]
    assert stats.binomtest(int((out == 0).sum()), out.numel(), 0.2).pvalue > 1e-6


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("kind", "mean", "std"), [("rna", 3.0, 0.4), ("rsa", 3.0, 1.2)])
def test_noise_on_activations_is_normal(kind: str, mean: float, std: float, fast: bool) -> None:
    """3 + N(0, 0.4^2), and 3 N(1, 0.4^2). False alarm: 1e-6."""
    out = noisy_map(torch.full((50, 2001), 3.0), kind, 0.4, fast=fast)
    assert stats.kstest(out.flatten().double().numpy(), "norm", args=(mean, std)).pvalue > 1e-6


@pytest.mark.parametrize("kind", ON_ACTIVATIONS)
def test_of_a_rectified_map_the_noise_is_that_of_its_relu(kind: str) -> None:
    h = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noisy_map(h, kind, 0.4, rectify=True), noisy_map(h.relu(), kind, 0.4))


@pytest.mark.parametrize("kind", ON_ACTIVATIONS)
@pytest.mark.parametrize("rectify", [False, True])
def test_the_gradient_is_the_derivative_of_the_noisy_map(kind: str, rectify: bool) -> None:
    """Against differences: the noise has the same numbers at h and beside it."""
    layer = baselines.ActivationNoise(kind, 0.4, Noise(), "reference", rectify)
    layer.noise.ids, layer.noise.passes = torch.arange(2), torch.zeros(2, dtype=torch.int64)

    def run(h: Tensor) -> Tensor:
        layer.noise.layer = 0
        out: Tensor = layer(h)
        return out

    h = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(run, (h.requires_grad_(),))


@pytest.mark.parametrize("name", LEVELS)
def test_predictions_do_not_depend_on_the_batch_size(
    name: str, dense: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    noisy = BASELINES[name](dense, LEVELS[name])
    x = digits[0][:23]
    found = [evaluation.predict(noisy, x, passes=3, batch_size=n) for n in (1, 7, 500)]
    for other in found[1:]:
        assert float((other - found[0]).abs().max()) < 1e-4


@pytest.mark.parametrize("name", LEVELS)
def test_noise_depends_on_seed_and_pass_and_on_nothing_else(
    name: str, dense: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    noisy = BASELINES[name](dense, LEVELS[name])
    assert isinstance(noisy, NoisyModel)
    x = digits[0][:4].float()
    first = noisy(x, seed=1, passes=2)
    noisy(x, seed=5, passes=7)
    assert torch.equal(noisy(x, seed=1, passes=2), first)
    assert not torch.equal(noisy(x, seed=1, passes=3), first)
    assert not torch.equal(noisy(x, seed=2, passes=2), first)


@pytest.mark.parametrize("name", ON_ACTIVATIONS)
def test_every_image_has_noise_of_its_own_on_its_activations(name: str, dense: nn.Module) -> None:
    noisy = BASELINES[name](dense, LEVELS[name])
    out = noisy(torch.full((2, 3, 32, 32), 100.0))
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_the_images_of_a_pass_share_its_weights(name: str, dense: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """Passes that are mixed within one batch give what each gives alone."""
    noisy = BASELINES[name](dense, LEVELS[name])
    x = digits[0][:6].float()
    same = noisy(x[:1].expand(3, -1, -1, -1))
    torch.testing.assert_close(same, same[:1].expand(3, -1), atol=1e-5, rtol=1e-5)
    numbers = torch.tensor([4, 0, 4, 9, 0, 4])
    mixed = noisy(x, passes=numbers)
    for number in (0, 4, 9):
        alone = noisy(x, passes=number)
        torch.testing.assert_close(mixed[numbers == number], alone[numbers == number], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LEVELS)
def test_without_noise_the_network_is_as_before(name: str, dense: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """SWP with so many draws that hardly a weight is left out."""
    noisy = BASELINES[name](dense, 1e6 if name == "swp" else 0)
    x = digits[0][:8].float()
    torch.testing.assert_close(noisy(x), dense(x), atol=0.05 if name == "swp" else 1e-4, rtol=1e-4)


class Breaks(nn.Module):
    """Raises in its forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_weight_noise_leaves_the_network_as_it_found_it_also_after_an_error(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 5), Breaks()).eval()
    noisy = BASELINES[name](model, LEVELS[name])
    before = {k: v.clone() for k, v in noisy.state_dict().items()}
    objects = [id(p) for p in noisy.parameters()]
    with pytest.raises(RuntimeError, match="broken"):
        noisy(torch.rand(2, 3, 32, 32))
    assert [id(p) for p in noisy.parameters()] == objects
    assert all(torch.equal(v, before[k]) for k, v in noisy.state_dict().items())
    assert all(torch.equal(v, before[f"model.{k}"]) for k, v in model.state_dict().items())


def weights(noisy: nn.Module, passes: range) -> dict[str, Tensor]:
    """The weights of several passes, (passes, ...) each."""
    assert isinstance(noisy, baselines._NoisyWeights)
    with torch.no_grad():
        drawn = [noisy.weights(0, number) for number in passes]
    return {name: torch.stack([w[name] for w in drawn]) for name in drawn[0]}


def test_noise_on_weights_is_on_convolutions_and_linear_layers(dense: nn.Module) -> None:
    names = weights(with_rnw(dense, 0.1), range(1))
    assert len(names) == 1 + 18 + 3 + 1  # the first convolution, two a unit, the shortcuts, the head
    assert all(name.endswith("weight") for name in names)
    assert not any("norm" in name for name in names)


def test_additive_and_multiplicative_noise_on_weights_are_normal(dense: nn.Module) -> None:
    """False alarm: 2e-6."""
    original = dict(dense.named_parameters())
    for make, of_weight in ((with_rnw, False), (with_rsw, True)):
        z = []
        for name, drawn in weights(make(dense, 0.25), range(20)).items():
            w = original[name].detach()
            noise = (drawn - w) / (w if of_weight else 1)
            z.append(noise[:, w.abs() > 1e-3].flatten() / 0.25)
        values = torch.cat(z)
        assert stats.kstest(values[::7].double().numpy(), "norm").pvalue > 1e-6
        assert abs(float(values.mean())) < 5 / math.sqrt(len(values))


def test_a_weight_that_two_layers_share_is_changed_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    network = Tied().eval()
    noisy = baselines.with_rnw(network, 0.5)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    (weight,) = noisy.weights(4, 2).values()  # type: ignore[operator]
    torch.testing.assert_close(noisy(x, seed=4, passes=2), x @ weight.T @ weight.T)
    pruned = baselines.with_dwp(network, 50)
    assert int((pruned.second.weight == 0).sum()) == 32  # type: ignore[union-attr]


def test_weight_layers_have_noise_of_their_own(dense: nn.Module) -> None:
    zero = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False))
    for parameter in zero.parameters():
        nn.init.zeros_(parameter)
    first, second = weights(with_rnw(zero, 1.0), range(1)).values()
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.1


def test_stochastic_weight_pruning_is_saps_rule_on_a_tensor_of_weights() -> None:
    """Each kept weight is divided by its probability to be kept, so that the mean is the weight. False alarm: 6e-5."""
    linear = nn.Linear(20, 10)
    passes = 4000
    drawn = weights(with_swp(linear, 50), range(passes))["weight"].flatten(1)
    w = linear.weight.detach().flatten()
    factor = scale(w.abs().double() / w.abs().double().sum(), 100)
    kept = drawn != 0
    torch.testing.assert_close(drawn[kept], (w * factor).float().expand_as(drawn)[kept], atol=1e-6, rtol=1e-5)
    share = kept.double().mean(0)
    expected = 1 / factor
    deviation = (share - expected) / (expected * (1 - expected) / passes).sqrt()
    assert float(deviation.abs().max()) < 5  # of 200 weights


@pytest.mark.parametrize("percent", [0, 10, 33.3, 100])
def test_deterministic_weight_pruning_keeps_the_largest(percent: float, dense: nn.Module) -> None:
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    pruned = with_dwp(dense, percent)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    names = {name for name, _ in baselines._weights(dense)}
    for name, value in pruned.state_dict().items():
        if name not in names:
            assert torch.equal(value, before[name])
            continue
        kept = value != 0
        assert int(kept.sum()) == round(percent / 100 * value.numel())
        assert torch.equal(value[kept], before[name][kept])
        if kept.any() and not kept.all():
            assert float(before[name][kept].abs().min()) >= float(before[name][~kept].abs().max())


def test_of_equal_weights_the_first_stay() -> None:
    linear = nn.Linear(4, 1)
    nn.init.ones_(linear.weight)
    assert with_dwp(linear, 50).state_dict()["weight"].tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("name", LEVELS)
def test_the_pretrained_network_is_untouched(name: str, dense: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    BASELINES[name](dense, LEVELS[name])(digits[0][:2].float())
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert not any(isinstance(m, baselines.ActivationNoise) for m in dense.modules())


def test_a_relu_with_a_hook_keeps_its_place() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), relu).eval()
    seen: list[Tensor] = []
    relu.register_forward_hook(lambda _m, _i, out: seen.append(out))
    out = with_dropout(model, 0.5)(torch.randn(3, 4))
    assert len(seen) == 1
    assert torch.equal(out[out != 0], 2 * seen[0][out != 0])


@pytest.mark.parametrize(
    ("make", "level", "message"),
    [
        (with_dropout, 1, "rate is 1, but must be a number from 0 to below 1"),
        (with_dropout, -0.1, "rate is -0.1, but"),
        (with_dropout, "0.1", "rate is '0.1', but"),
        (with_rna, -1, "std is -1, but must be a number of 0 or more"),
        (with_rsa, math.nan, "std is nan, but"),
        (with_rnw, math.inf, "std is inf, but"),
        (with_rsw, True, "std is True, but"),
        (with_dwp, 101, "percent is 101, but must be a number from 0 to 100"),
        (with_swp, 0, "percent is 0, but must be a positive number"),
    ],
)
def test_senseless_levels_are_refused(make: Any, level: object, message: str, dense: nn.Module) -> None:
    with pytest.raises(SapcoreError, match=f"^{message}"):
        make(dense, level)


def test_networks_without_the_parts_that_are_noisy_are_refused() -> None:
    with pytest.raises(SapcoreError, match="has no ReLU module"):
        with_rna(nn.Linear(2, 2), 1)
    with pytest.raises(SapcoreError, match="has no convolution and no linear layer"):
        with_rnw(nn.ReLU(), 1)


@pytest.mark.parametrize("make", [with_dropout, with_rna, with_rsa])
def test_noise_on_activations_can_follow_other_activations(make: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.GELU(), nn.ReLU()).eval()
    noisy = make(model, 0.5, after=(nn.Tanh, nn.GELU))
    assert sum(isinstance(module, ActivationNoise) for module in noisy.modules()) == 2
    with pytest.raises(SapcoreError, match=r"^after is .*, but must be a type of module or a tuple of such"):
        make(model, 0.5, after=[nn.Tanh])


@pytest.mark.parametrize("name", ["rnw", "rsw", "swp"])
def test_noisy_weights_serve_one_thread_at_a_time(name: str) -> None:
    noisy, x, passes = BASELINES[name](nn.Sequential(nn.Linear(4, 50)).eval(), 1), torch.ones(3, 4), range(8)
    expected = [noisy(x, passes=number) for number in passes]
    noisy.get_submodule("model.0").register_forward_pre_hook(lambda *_: time.sleep(0.01))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: noisy(x, passes=number), passes))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["rnw", "rsw", "swp", "dwp"])
def test_weights_that_are_computed_at_each_call_are_refused(name: str) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    with pytest.raises(SapcoreError, match=r"^the weights of 0 are computed anew at each call \(parametrized\); call"):
        BASELINES[name](nn.Sequential(layer).eval(), 0.1)


def test_dropout_and_sap_draw_from_streams_of_their_own() -> None:
    """With the same names the words differ, because their purpose is part of the counter."""
    assert {noise_cpu.DROPOUT, noise_cpu.GAUSSIAN}.isdisjoint({0, 1, 2})
    model = nn.Sequential(nn.Flatten(), nn.ReLU()).eval()
    ones = torch.ones(1, 20000)
    sap, dropout = (noisy(ones)[0] == 0 for noisy in (with_sap(model, 100), with_dropout(model, math.exp(-1))))
    both = float((sap & dropout).double().mean())
    assert abs(both - math.exp(-2)) < 5 * math.sqrt(math.exp(-2) / 20000)
