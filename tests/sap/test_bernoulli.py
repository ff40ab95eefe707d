"""Bernoulli SAP: its law, its gradients, and that it is another defence than the paper's."""

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from sapcore import evaluation, noise_cpu, with_sap
from sapcore.errors import SapcoreError
from sapcore.randomness import Noise, NoisyModel, words
from sapcore.sap.bernoulli import BernoulliSAP, with_bernoulli_sap


def map_of(passes: int, h: Tensor, percent: float = 200, seed: int = 0) -> Tensor:
    """The same map (a,) in many passes, (passes, a)."""
    noise = Noise()
    noise.seed, noise.ids, noise.passes = seed, torch.zeros(passes, dtype=torch.int64), torch.arange(passes)
    return BernoulliSAP(percent, noise)(h.expand(passes, -1))


@pytest.mark.parametrize("shape", [(2, 1), (3, 7), (2, 5, 7, 3), (3, 16, 32, 32), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", ["constant", "scale", "identity"])
def test_the_kernel_keeps_the_units_of_plain_torch(shape: tuple[int, ...], dtype: torch.dtype, backward: str) -> None:
    """A coin may fall otherwise where u and q differ by a rounding: of 150,000 units fewer than 5."""
    h, grad = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    noise = Noise()
    noise.seed, noise.ids, noise.passes = 2**63 + 1, torch.arange(len(h)) * 2**33, torch.full((len(h),), 7)
    fast, slow = h.clone().requires_grad_(), h.double().requires_grad_()
    layer = BernoulliSAP(200, noise, backward)
    out = layer(fast)
    noise.layer = 0
    expected = layer(slow)
    same = (out != 0) == (expected != 0)
    assert int((~same).sum()) < 5
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double()[same], expected[same], rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(out, fast, grad)
    (by_torch,) = torch.autograd.grad(expected, slow, grad.double())
    torch.testing.assert_close(gradient.double()[same], by_torch[same], rtol=5 * tolerance, atol=5 * tolerance)
    if backward == "identity":
        assert torch.equal(gradient, grad)


def test_each_unit_is_kept_by_a_coin_of_its_own() -> None:
    """Shares of 5,000 passes against 1 - exp(-r p), and the variance of the number kept; false alarm 1e-6 a unit."""
    h = torch.tensor([4.0, -2.0, 1.0, 0.5, -0.25, 0.0, 3.0, 1.5])
    passes, r = 5000, 2 * len(h)
    kept = map_of(passes, h) != 0
    q = 1 - torch.exp(-r * h.abs() / h.abs().sum()).double()
    for count, probability in zip(kept.sum(0).tolist(), q.tolist(), strict=True):
        assert stats.binomtest(count, passes, min(probability, 1)).pvalue > 1e-6
    coins = float((q * (1 - q)).sum())
    found = float(kept.sum(1).double().var())
    assert found == pytest.approx(coins, rel=0.15), "three standard errors are about 6 %"


def test_the_mean_is_the_map() -> None:
    h = torch.tensor([4.0, -2.0, 1.0, 0.5, -0.25, 3.0])
    found = map_of(20_000, h)
    error = found.std(0) / 20_000**0.5
    assert ((found.mean(0) - h).abs() <= 5 * error + 1e-6).all()


def test_a_map_of_zeros_stays_zero() -> None:
    assert not map_of(3, torch.zeros(5)).any()


def chain(backward: str) -> NoisyModel:
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 3)).double()
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return with_bernoulli_sap(network.eval().requires_grad_(False), backward=backward)


def test_gradients_are_of_three_kinds_and_outputs_the_same() -> None:
    x = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    outputs = {kind: chain(kind)(x, seed=3, passes=1) for kind in ("constant", "scale", "identity")}
    gradients = [torch.autograd.grad(out.sum(), x)[0] for out in outputs.values()]
    torch.testing.assert_close(outputs["scale"], outputs["constant"])
    torch.testing.assert_close(outputs["identity"], outputs["constant"])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(gradients[i], gradients[j])


def test_the_gradient_through_the_scale_is_the_derivative_given_the_coins() -> None:
    noisy = chain("scale")
    x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    network = noisy.plain[0]
    assert isinstance(network, nn.Sequential)
    conv, _, flat, last = network
    u = (words(3, torch.arange(2), torch.zeros(2, dtype=torch.int64), 0, 5 * 16, noise_cpu.COINS) + 0.5) * 2.0**-32
    q_of = lambda h: 1 - torch.exp(-2 * 80 * h.abs() / h.abs().sum((1, 2, 3), keepdim=True))  # noqa: E731
    units = conv(x).movedim(1, -1)
    coins = (u.reshape(units.shape) <= q_of(conv(x)).movedim(1, -1)).movedim(-1, 1)

    def given_the_coins(x: Tensor) -> Tensor:
        h = conv(x)
        return last(flat(torch.where(coins, h / q_of(h), 0.0).relu())).sum()

    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(noisy(leaf, seed=3).sum(), leaf)
    for place in ((0, 0, 1, 1), (1, 1, 4, 2), (0, 1, 5, 5)):
        step = torch.zeros_like(x)
        step[place] = 1e-6
        slope = (given_the_coins(x + step) - given_the_coins(x - step)) / 2e-6
        assert float(found[place]) == pytest.approx(float(slope), rel=1e-3, abs=1e-4)


def test_it_comes_after_every_convolution_and_nowhere_else(dense: nn.Module) -> None:
    noisy = with_bernoulli_sap(dense)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in dense.modules())
    assert sum(isinstance(m, BernoulliSAP) for m in noisy.modules()) == convolutions == 22
    assert not any(isinstance(m, BernoulliSAP) for m in dense.modules())
    assert noisy.description == {"kind": "bernoulli-sap", "percent": 200}


def test_it_keeps_most_of_a_networks_answers_and_differs_from_sap(
    dense: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    x, y = (t[:60] for t in digits)
    ours = evaluation.predict(with_bernoulli_sap(dense, 2000), x, passes=5)
    assert float((ours.argmax(1) == y).double().mean()) > 0.8
    theirs = evaluation.predict(with_sap(dense, 2000), x, passes=5)
    assert not torch.allclose(ours, theirs)


@pytest.mark.parametrize("percent", [0, -1, float("nan"), True, "all"])
def test_senseless_percents_are_refused(dense: nn.Module, percent: float) -> None:
    with pytest.raises(SapcoreError, match="must be a positive number"):
        with_bernoulli_sap(dense, percent)


def test_a_layer_on_its_own_and_an_unknown_backward_are_refused(dense: nn.Module) -> None:
    with pytest.raises(SapcoreError, match="needs its network's random numbers"):
        BernoulliSAP(200, Noise())(torch.ones(1, 5))
    with pytest.raises(SapcoreError, match="backward is 'wrong', but must be one of"):
        with_bernoulli_sap(dense, backward="wrong")
    with pytest.raises(SapcoreError, match="no Conv2d module"):
        with_bernoulli_sap(nn.Sequential(nn.ReLU()))
