"""`sap` on every kind of map, its gradient, and `with_sap` on networks."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sapcore import SAP, attacks, sap, with_sap
from sapcore.errors import SapcoreError
from sapcore.models import ResNet20
from sapcore.randomness import Noise, NoisyModel
from sapcore.sap.layer import _ThroughScale, scaled_by_mask
from sapcore.sap.reference import draws
from tests.sap.laws import percent_for

KINDS = [
    ("reference", torch.float64),
    ("reference", torch.float32),
    ("reference", torch.bfloat16),
    ("reference", torch.float16),
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
]
every_kind = pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=[f"{b}-{str(d)[6:]}" for b, d in KINDS])
SHAPES = [(3, 1), (3, 7), (3, 5, 7), (3, 3, 5, 7), (2, 3, 2, 3, 2), (0, 7), (0, 3, 5, 7), (3, 0), (1, 16, 32, 32)]
EPSILON = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def rectified(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).relu()


def factor(h: Tensor, mask: Tensor, percent: float) -> Tensor:
    """mask / (1 - (1 - p)^r) in float64."""
    flat = h.double().abs().flatten(1)
    total = flat.sum(1, keepdim=True)
    p = torch.where(total > 0, flat / total, 0.0)
    r = draws(percent, flat.shape[1])
    return torch.where(mask.flatten(1), -1 / torch.expm1(r * torch.log1p(-p)), 0.0).reshape(h.shape)


@every_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("percent", [1, 100, 1000])
def test_the_output_is_the_kept_units_over_their_inclusion_probability(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], percent: float
) -> None:
    h = rectified(shape).to(dtype)
    out, mask = sap(h, percent, return_mask=True, backend=backend)
    assert (out.shape, out.dtype, mask.shape, mask.dtype) == (h.shape, dtype, h.shape, torch.bool)
    assert not (mask & (h == 0)).any()
    expected = h.double() * factor(h, mask, percent)
    torch.testing.assert_close(out.double(), expected, rtol=EPSILON[dtype], atol=0)


@every_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_map_of_zeros_stays_zero(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    out, mask = sap(torch.zeros(shape, dtype=dtype), return_mask=True, backend=backend)
    assert not mask.any()
    assert torch.equal(out, torch.zeros(shape, dtype=dtype))


@every_kind
def test_a_map_of_zeros_among_others_stays_zero_and_does_not_disturb_them(backend: str, dtype: torch.dtype) -> None:
    h = rectified((3, 50)).to(dtype)
    h[1] = 0
    out = sap(h, backend=backend)
    assert not out[1].any()
    for row in (0, 2):
        assert torch.equal(out[row], sap(h[row : row + 1], ids=torch.tensor([row]), backend=backend)[0])


@every_kind
@pytest.mark.parametrize("value", [1.0, -3.0, 1e-4, 1e4])
@pytest.mark.parametrize("r", [1, 2, 64, 640])
def test_a_single_unit_that_is_not_zero_is_kept_as_it_is(
    backend: str, dtype: torch.dtype, value: float, r: int
) -> None:
    h = torch.zeros(4, 64, dtype=dtype)
    h[:, 13] = value
    assert torch.equal(sap(h, percent_for(r, 64), backend=backend), h)


@every_kind
def test_no_draws_leave_nothing(backend: str, dtype: torch.dtype) -> None:
    out, mask = sap(rectified((3, 99)).to(dtype), 1, return_mask=True, backend=backend)
    assert not out.any()
    assert not mask.any()


@every_kind
def test_the_sign_of_a_unit_decides_nothing(backend: str, dtype: torch.dtype) -> None:
    h = rectified((2, 300)).to(dtype)
    assert torch.equal(sap(-h, backend=backend), -sap(h, backend=backend))


# bfloat16 holds the same powers of ten as float32; units below 1e-38 are subnormal, with fewer digits.
MAGNITUDES = [1e30, 1e20, 1e10, 1e-10, 1e-20, 1e-25, 1e-28, 1e-30, 1e-35, 1e-37, 1e-39]


@pytest.mark.parametrize(("backend", "dtype"), [k for k in KINDS if k[1] != torch.float16], ids=str)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_the_size_of_the_units_decides_nothing(backend: str, dtype: torch.dtype, magnitude: float) -> None:
    """From 1e30 down to subnormal numbers: no nan, as many kept units as the law says, each with its scale."""
    h = (rectified((4, 500)).clamp(max=4) * magnitude).to(dtype)
    out, mask = sap(h, return_mask=True, backend=backend)
    assert out.isfinite().all()
    assert not (mask & (h == 0)).any()
    expected = h.double() * factor(h, mask, 100)
    smallest = float(torch.finfo(dtype).smallest_normal) * float(torch.finfo(dtype).eps)
    torch.testing.assert_close(out.double(), expected, rtol=EPSILON[dtype], atol=2 * smallest)
    like = sap(rectified((4, 500)).clamp(max=4).to(dtype), return_mask=True, backend=backend)[1]
    assert abs(int(mask.sum()) - int(like.sum())) < 60  # about 170 of 500 are kept; rounding moves a few draws


@pytest.mark.parametrize(("backend", "dtype"), [k for k in KINDS if k[1] != torch.float16], ids=str)
def test_units_of_very_different_sizes_are_finite_and_right(backend: str, dtype: torch.dtype) -> None:
    h = (10.0 ** torch.linspace(-30, 30, 601, dtype=torch.float64)).to(dtype).expand(20, -1)
    out, mask = sap(h, 1000, return_mask=True, backend=backend)
    torch.testing.assert_close(out.double(), h.double() * factor(h, mask, 1000), rtol=2 * EPSILON[dtype], atol=0)
    assert mask[:, -1].all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("value", [1e-39, 1e-42, 1.5e-45])
def test_a_single_subnormal_unit_is_kept_as_it_is(backend: str, value: float) -> None:
    h = torch.tensor([[0.0, value, 0.0]])
    assert torch.equal(sap(h, backend=backend), h)


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5, 7), (2, 16, 8, 8)])
def test_nan_and_inf_are_refused(backend: str, dtype: torch.dtype, value: float, shape: tuple[int, ...]) -> None:
    for place in (0, -1):
        h = torch.ones(shape, dtype=dtype)
        h[1].view(-1)[place] = value
        with pytest.raises(SapcoreError, match="the activation map holds nan or inf, but SAP needs finite activations"):
            sap(h, backend=backend)


@pytest.mark.parametrize("layer", [-1, 2**16, 0.5, True])
def test_a_layer_without_a_number_of_its_own_is_refused(layer: object) -> None:
    """One below 0 would draw the same numbers in every attempt, for ever."""
    with pytest.raises(SapcoreError, match=r"^layer is .*, but must be a whole number from 0 to 65535$"):
        sap(torch.ones(1, 3), layer=layer)  # type: ignore[call-overload]


def test_a_map_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(SapcoreError, match=r"^h is a ndarray, but must be a torch.Tensor; torch.as_tensor makes one$"):
        sap(torch.ones(1, 3).numpy())  # type: ignore[call-overload]


def test_more_draws_than_can_be_counted_are_refused() -> None:
    for percent in (1e30, 1e308):
        with pytest.raises(
            SapcoreError, match=r"^percent is .*, which asks for \w+ draws, but 1073741824 is the most$"
        ):
            sap(torch.ones(1, 5000), percent)


@pytest.mark.parametrize("percent", [0, -5, float("nan"), float("inf"), "100", None, True])
def test_a_senseless_percentage_is_refused(percent: object) -> None:
    for refuse in (
        lambda: sap(torch.ones(1, 5), percent),  # type: ignore[call-overload]
        lambda: with_sap(nn.Sequential(nn.ReLU()), percent),  # type: ignore[arg-type]
        lambda: SAP(percent, Noise()),  # type: ignore[arg-type]
    ):
        with pytest.raises(SapcoreError, match=r"percent is .*, but must be a positive number"):
            refuse()


@pytest.mark.parametrize(
    "h", [torch.ones(2, 3).int(), torch.ones(2, 3, dtype=torch.bool), torch.ones(3), torch.tensor(1.0)]
)
def test_a_map_that_is_not_float_or_has_no_units_is_refused(h: Tensor) -> None:
    with pytest.raises(SapcoreError, match=r"but must be float with shape \(N, ...\)"):
        sap(h)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()])
def test_ids_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SapcoreError, match=r"ids has shape .*, but must be \(3,\), one per example"):
        sap(torch.ones(3, 5), ids=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1)])
def test_passes_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SapcoreError, match="passes has shape"):
        sap(torch.ones(3, 5), passes=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, of weight_norm
def test_networks_that_cannot_be_copied_or_seen_into_are_refused() -> None:
    def small() -> nn.Sequential:
        return nn.Sequential(nn.Linear(5, 5), nn.ReLU())

    computed = small()
    nn.utils.weight_norm(computed[0])
    computed(torch.ones(1, 5))
    with pytest.raises(SapcoreError, match=r"^the network cannot be copied, because one of its tensors is computed "):
        with_sap(computed)
    compiled = torch.compile(small(), backend="eager")
    with pytest.raises(SapcoreError, match=r"^the network is a compiled one; give the network that was compiled, its "):
        with_sap(compiled)  # type: ignore[arg-type]
    with pytest.raises(SapcoreError, match=r"^backend is 'tpu', but must be one of auto, reference, cpu, gpu$"):
        with_sap(small(), backend="tpu")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(SapcoreError, match="backend is 'tpu', but must be one of auto, reference, cpu"):
        sap(torch.ones(1, 5), backend="tpu")


@every_kind
def test_ids_and_passes_count_from_zero_by_default(backend: str, dtype: torch.dtype) -> None:
    h = rectified((3, 80)).to(dtype)
    named = sap(h, ids=torch.arange(3), passes=torch.zeros(3, dtype=torch.int64), backend=backend)
    assert torch.equal(sap(h, backend=backend), named)


@given(
    order=st.permutations(range(6)), count=st.integers(1, 6), size=st.integers(1, 200), seed=st.integers(0, 2**64 - 1)
)
def test_a_mask_follows_from_the_map_and_its_names_alone(order: list[int], count: int, size: int, seed: int) -> None:
    h = rectified((6, size)).float()
    ids, passes = torch.tensor([5, 5, 7, 8, 9, 2**31]), torch.tensor([0, 1, 0, 3, 2**31, 1])
    chosen = order[:count]
    for backend in ("reference", "cpu"):
        whole = sap(h, seed=seed, ids=ids, passes=passes, layer=2, return_mask=True, backend=backend)
        part = sap(
            h[chosen], seed=seed, ids=ids[chosen], passes=passes[chosen], layer=2, return_mask=True, backend=backend
        )
        assert torch.equal(part[0], whole[0][chosen])
        assert torch.equal(part[1], whole[1][chosen])


@every_kind
def test_the_memory_layout_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    h = rectified((2, 6, 5, 4)).to(dtype)
    layouts = [h.contiguous(), h.contiguous(memory_format=torch.channels_last), h.repeat(1, 1, 1, 2)[..., :4]]
    outputs = [sap(x, return_mask=True, backend=backend) for x in layouts]
    for out, mask in outputs:
        assert torch.equal(out, outputs[0][0])
        assert torch.equal(mask, outputs[0][1])
        assert out.is_contiguous(memory_format=torch.channels_last)


@every_kind
def test_sap_does_not_change_its_input(backend: str, dtype: torch.dtype) -> None:
    h = rectified((2, 6, 5, 4)).to(dtype).contiguous(memory_format=torch.channels_last)
    before = h.clone()
    sap(h, backend=backend)
    assert torch.equal(h, before)


# Gradient


@every_kind
@pytest.mark.parametrize("shape", [(3, 200), (2, 4, 6, 5)])
def test_the_gradient_takes_mask_and_scale_as_constants(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    h = rectified(shape).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    out, mask = sap(h, return_mask=True, backend=backend)
    (found,) = torch.autograd.grad(out, h, grad, retain_graph=True)
    (unit,) = torch.autograd.grad(out, h, torch.ones_like(h))
    assert torch.equal(found, grad * unit)
    torch.testing.assert_close(unit.double(), factor(h.detach(), mask, 100), rtol=EPSILON[dtype], atol=0)
    assert not mask.requires_grad


@every_kind
def test_the_output_is_the_same_with_and_without_a_gradient(backend: str, dtype: torch.dtype) -> None:
    h = rectified((3, 200)).to(dtype)
    assert torch.equal(sap(h, backend=backend), sap(h.clone().requires_grad_(), backend=backend))


@every_kind
def test_the_gradient_of_a_map_of_zeros_is_zero(backend: str, dtype: torch.dtype) -> None:
    h = torch.zeros(2, 9, dtype=dtype, requires_grad=True)
    sap(h, backend=backend).sum().backward()
    assert h.grad is not None
    assert not h.grad.any()


@every_kind
def test_there_is_no_gradient_graph_under_no_grad(backend: str, dtype: torch.dtype) -> None:
    h = rectified((3, 20)).to(dtype).requires_grad_()
    with torch.no_grad():
        out = sap(h, backend=backend)
    assert not out.requires_grad
    assert out.grad_fn is None


# with_sap


def layers(model: nn.Module) -> Iterator[SAP]:
    return (module for module in model.modules() if isinstance(module, SAP))


def test_resnet20_gets_sap_after_each_of_its_19_relus_and_nowhere_else() -> None:
    model = ResNet20().eval()
    relus = [name for name, m in model.named_modules() if isinstance(m, nn.ReLU)]
    noisy = with_sap(model, 100)
    places = [name for name, m in noisy.model.named_modules() if isinstance(m, SAP)]
    assert places == relus
    assert len(places) == 19
    assert all(layer.rectify for layer in layers(noisy))
    assert not any(isinstance(m, nn.ReLU) for m in noisy.modules())


@every_kind
def test_relu_and_sap_in_one_step_are_relu_then_sap(backend: str, dtype: torch.dtype) -> None:
    """Bit for bit, output and gradient."""
    h = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    h[0] = -h[0].abs()  # nothing is left of this map
    relu = nn.ReLU()
    relu.register_forward_hook(lambda *_: None)
    fused, apart = (
        with_sap(nn.Sequential(nn.ReLU()), 60, backend=backend),
        with_sap(nn.Sequential(relu), 60, backend=backend),
    )
    assert [type(m) for m in apart.model.get_submodule("0").children()] == [
        nn.ReLU,
        SAP,
    ]  # whoever watches the ReLU keeps it
    results = []
    for model in (fused, apart):
        leaf = h.clone().requires_grad_()
        out = model(leaf, seed=3)
        results.append((out, *torch.autograd.grad((out.double() ** 2).sum(), leaf)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[0][0][0].any()


@every_kind
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_relu_and_sap_in_one_step_refuse_nan_and_inf(backend: str, dtype: torch.dtype, bad: float) -> None:
    for size in (40, 400):
        h = torch.ones(3, size, dtype=dtype)
        h[1, 17] = bad
        with pytest.raises(SapcoreError, match="the activation map holds nan or inf"):
            with_sap(nn.Sequential(nn.ReLU()), 100, backend=backend)(h)


def test_each_layer_of_resnet20_prunes_its_own_map(digits: tuple[Tensor, Tensor], noisy: NoisyModel) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [m.register_forward_hook(lambda _m, x, y: seen.append((x[0], y))) for m in layers(noisy)]
    with torch.no_grad():
        noisy(digits[0][:2].float(), seed=3, passes=4)
    for handle in handles:
        handle.remove()
    assert [tuple(h.shape[1:]) for h, _ in seen] == 7 * [(16, 32, 32)] + 6 * [(32, 16, 16)] + 6 * [(64, 8, 8)]
    for place, (h, out) in enumerate(seen):
        assert torch.equal(out, sap(h.relu(), 100, seed=3, passes=4, layer=place))
        assert 0.2 < float((out != 0).sum() / (h > 0).sum()) < 0.95


def test_the_original_network_is_untouched(digits: tuple[Tensor, Tensor]) -> None:
    model = ResNet20().eval()
    x = digits[0][:2].float()
    modules, state, before = list(model.modules()), copy.deepcopy(model.state_dict()), model(x)
    noisy = with_sap(model, 100)
    noisy(x)
    assert list(model.modules()) == modules
    assert not list(layers(model))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.zero_()
    assert torch.equal(model(x), before)


class Twice(nn.Module):
    """One ReLU module, called twice on the same map."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.relu(x), self.relu(x)])


class Two(nn.Module):
    """Two ReLU modules on the same map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.first(x), self.second(x)])


@pytest.mark.parametrize("model", [Twice(), Two()], ids=["one module twice", "two modules"])
def test_each_call_of_a_relu_draws_a_mask_of_its_own(model: nn.Module) -> None:
    x = torch.rand(3, 200, generator=torch.Generator().manual_seed(0))
    first, second = with_sap(model, 100)(x, seed=7)
    assert not torch.equal(first != 0, second != 0)
    assert torch.equal(first, sap(x, 100, seed=7, layer=0))
    assert torch.equal(second, sap(x, 100, seed=7, layer=1))


def test_a_relu_that_is_known_by_two_names_is_followed_by_sap_under_both() -> None:
    relu = nn.ReLU()
    noisy = with_sap(nn.Sequential(nn.Linear(9, 50), relu, nn.Linear(50, 50), relu, nn.Linear(50, 50), relu), 100)
    noisy(torch.ones(2, 9))
    assert noisy.noise.layer == 3


class Functional(nn.Module):
    """A network whose activation is no module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


@pytest.mark.parametrize("model", [Functional(), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Identity()])
def test_a_network_without_relu_modules_is_refused(model: nn.Module) -> None:
    with pytest.raises(
        SapcoreError, match="the network has no ReLU module to put noise after; make its activations modules of that"
    ):
        with_sap(model)


def test_sap_can_follow_other_activations() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.GELU(), nn.ReLU())
    assert len(list(layers(with_sap(model, after=(nn.Tanh, nn.GELU))))) == 2


def test_a_relu_that_works_in_place_is_followed_by_sap_all_the_same() -> None:
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    noisy = with_sap(nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)), 100)
    assert torch.equal(noisy(x.clone()), sap(x.relu(), 100))


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_inherited_by_every_module(training: bool) -> None:
    assert {module.training for module in with_sap(ResNet20().train(training)).modules()} == {training}


def test_frozen_weights_stay_frozen(noisy: NoisyModel) -> None:
    assert not any(parameter.requires_grad for parameter in noisy.parameters())


def test_the_noise_does_not_look_at_the_training_flag() -> None:
    noisy, x = with_sap(nn.Sequential(nn.Linear(5, 100), nn.ReLU())), torch.ones(1, 5)
    assert torch.equal(noisy.eval()(x), noisy.train()(x))
    assert (noisy(x) == 0).any()


def test_the_same_arguments_give_the_same_output(digits: tuple[Tensor, Tensor], noisy: NoisyModel) -> None:
    x = digits[0][:3].float()
    names = {"seed": 2**63, "ids": torch.tensor([4, 10, 2]), "passes": torch.tensor([0, 5, 1])}
    first = noisy(x, **names)
    noisy(x)
    assert torch.equal(noisy(x, **names), first)
    for other in ({"seed": 1}, {"ids": torch.tensor([1, 0, 3])}, {"passes": 2}):
        assert (noisy(x, **(names | other)) != first).any(1).all()


def test_a_network_that_mixes_examples_is_refused() -> None:
    noisy = with_sap(nn.Sequential(nn.Unflatten(0, (2, 2)), nn.ReLU()))
    with pytest.raises(SapcoreError, match="the map holds 2 examples, but the network was given 4"):
        noisy(torch.ones(4, 5))


def test_the_description_names_the_defence() -> None:
    noisy = with_sap(nn.Sequential(nn.ReLU()), 25)
    assert noisy.description == {"kind": "sap", "percent": 25}
    assert "SAP(percent=25, rectify=True)" in repr(noisy)


def test_a_layer_on_its_own_says_that_it_needs_its_networks_random_numbers() -> None:
    with pytest.raises(SapcoreError, match="a SAP layer needs its network's random numbers"):
        SAP(100, Noise())(torch.ones(1, 5))


def test_a_network_in_bfloat16_and_one_with_the_reference_work_too(
    digits: tuple[Tensor, Tensor], dense: nn.Module
) -> None:
    x = digits[0][:2].float()
    fast, slow = with_sap(dense, 100), with_sap(dense, 100, backend="reference")
    torch.testing.assert_close(fast(x), slow(x), rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(x).isfinite().all()


# What an adversary's gradient sees


def chain(backward: str, percent: float = 60, backend: str = "auto") -> NoisyModel:
    """A linear layer, a ReLU, SAP, a linear layer, in float64 where the reference is asked for."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    network = network.double() if backend == "reference" else network
    return with_sap(network.eval().requires_grad_(False), percent, backend=backend, backward=backward)


@pytest.mark.parametrize("backward", ["scale", "identity"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_outputs_do_not_depend_on_what_the_gradient_sees(backward: str, backend: str) -> None:
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    x = (x.double() if backend == "reference" else x).requires_grad_()
    plain, other = (chain(kind, backend=backend)(x, seed=3, passes=2) for kind in ("constant", backward))
    torch.testing.assert_close(other, plain)
    one, another = (torch.autograd.grad(out.sum(), x)[0] for out in (plain, other))
    assert not torch.allclose(one, another)


def test_the_gradient_through_the_scale_is_the_derivative_given_the_mask() -> None:
    """Compared with finite differences of the formula, the mask held fixed."""
    noisy = chain("scale", backend="reference")
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, last = (module for module in noisy.modules() if isinstance(module, nn.Linear))
    h = first(x).relu()
    _, mask = sap(h, 60, seed=3, passes=2, return_mask=True, backend="reference")
    r = int(0.6 * 20)

    def given_the_mask(x: Tensor) -> Tensor:
        h = first(x).relu()
        p = h / h.sum(1, keepdim=True)
        kept = torch.where(mask, 1 - (1 - p) ** r, 1.0)
        return last(torch.where(mask, h / kept, 0.0)).sum()

    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(noisy(leaf, seed=3, passes=2).sum(), leaf)
    for i, j in ((0, 0), (1, 5), (2, 11), (3, 7)):
        step = torch.zeros_like(x)
        step[i, j] = 1e-6
        slope = (given_the_mask(x + step) - given_the_mask(x - step)) / 2e-6
        assert float(found[i, j]) == pytest.approx(float(slope), rel=1e-5, abs=1e-7)


@given(
    shape=st.sampled_from([(2, 3), (3, 16), (1, 4097), (2, 5, 7, 3), (3, 16, 32, 32)]),
    percent=st.sampled_from([5, 60, 100, 400]),
    rectify=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    power=st.integers(-30, 30),
)
def test_the_kernels_gradient_through_the_scale_is_autograds(
    shape: tuple[int, ...], percent: float, rectify: bool, dtype: torch.dtype, power: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    h, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    h = (h * 2.0**power).requires_grad_()
    ids, passes = torch.arange(len(h)), torch.zeros(len(h), dtype=torch.int64)
    r = draws(percent, h[0].numel())
    out = _ThroughScale.apply(h, r, 3, ids, passes, 1, rectify)
    (found,) = torch.autograd.grad(out, h, grad)
    wide = h.detach().double().requires_grad_()
    mapped = wide.relu() if rectify else wide
    _, mask = sap(mapped.detach().float(), percent, 3, ids, passes, 1, return_mask=True)
    (expected,) = torch.autograd.grad(scaled_by_mask(mapped, mask, percent), wide, grad.double())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_identity_gradient_is_that_of_the_network_without_sap_at_the_noisy_outputs() -> None:
    noisy = chain("identity")
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((noisy(x, seed=3) * weight).sum(), x)
    first, last = (module for module in noisy.modules() if isinstance(module, nn.Linear))
    (expected,) = torch.autograd.grad((last(first(x).relu()) * weight).sum(), x)
    torch.testing.assert_close(found, expected)


def test_a_map_with_one_active_unit_or_none_has_a_finite_gradient_through_the_scale() -> None:
    network = with_sap(nn.Sequential(nn.ReLU()).eval(), 100, backward="scale")
    x = torch.tensor([[5.0, -1.0, -1.0], [-1.0, -1.0, -1.0], [1.0, 2.0, 3.0]], requires_grad=True)
    (found,) = torch.autograd.grad(network(x).sum(), x)
    assert torch.isfinite(found).all()
    assert float(found[1].abs().sum()) == 0


def test_an_unknown_backward_names_what_there_is(dense: nn.Module) -> None:
    with pytest.raises(SapcoreError, match=r"^backward is .wrong., but must be one of constant, scale, identity$"):
        with_sap(dense, 100, backward="wrong")


def test_every_backward_goes_through_the_whole_network(dense: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    x, y = (t[:4] for t in digits)
    directions = {
        kind: attacks.fgsm_direction(with_sap(dense, 100, backward=kind), x, y, passes=3)
        for kind in ("constant", "scale", "identity")
    }
    for kind in ("scale", "identity"):
        share = float((directions[kind] == directions["constant"]).float().mean())
        assert 0.5 < share < 0.98, f"{kind} is much like the plain gradient, and not the same"
