"""The estimators of the gradient are what their names say."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sapcore import with_sap
from sapcore.attacks.gradient import estimator, gradient_of_mean, margin, mean_of_gradients
from sapcore.errors import SapcoreError
from sapcore.models import ResNet20
from sapcore.randomness import NoisyModel

PASSES = range(3, 9)
SEED = 11
Images = tuple[Tensor, Tensor]


@pytest.fixture
def few(digits: Images) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and names."""
    return digits[0][:4].float(), digits[1][:4], torch.tensor([3, 1, 4, 15])


def estimate(name: str, model: nn.Module, few: tuple[Tensor, Tensor, Tensor], batch_size: int = 64) -> Tensor:
    return estimator(name)(model, *few, SEED, PASSES, batch_size, "float32")


def close(found: Tensor, expected: Tensor) -> None:
    """Within 1e-3 of each image's largest component: logits are float32, and added up in another order."""
    largest = expected.flatten(1).abs().max(1).values
    assert ((found - expected).flatten(1).abs().max(1).values <= 1e-3 * largest).all()


@pytest.mark.parametrize("batch_size", [1, 4, 9, 64])
def test_mean_of_gradients_is_the_mean_over_single_passes(
    noisy: NoisyModel, few: tuple[Tensor, Tensor, Tensor], batch_size: int
) -> None:
    x, y, ids = few
    total = torch.zeros(x.shape, dtype=torch.float64)
    for number in PASSES:
        leaf = x.clone().requires_grad_()
        loss = F.cross_entropy(noisy(leaf, seed=SEED, ids=ids, passes=number).double(), y, reduction="sum")
        total += torch.autograd.grad(loss, leaf)[0]
    close(estimate("mean_of_gradients", noisy, few, batch_size), total / len(PASSES))


@pytest.mark.parametrize("batch_size", [1, 4, 9, 64])
def test_gradient_of_mean_is_the_gradient_of_minus_log_mean_softmax(
    noisy: NoisyModel, few: tuple[Tensor, Tensor, Tensor], batch_size: int
) -> None:
    x, y, ids = few
    leaf = x.clone().requires_grad_()
    logits = torch.stack([noisy(leaf, seed=SEED, ids=ids, passes=number).double() for number in PASSES])
    loss = F.nll_loss(logits.softmax(-1).mean(0).log(), y, reduction="sum")
    close(estimate("gradient_of_mean", noisy, few, batch_size), torch.autograd.grad(loss, leaf)[0])


def test_the_two_estimators_differ_on_a_noisy_network(noisy: NoisyModel, few: tuple[Tensor, Tensor, Tensor]) -> None:
    one, other = (estimate(name, noisy, few) for name in ("mean_of_gradients", "gradient_of_mean"))
    assert float((one.sign() != other.sign()).double().mean()) > 1e-3


def test_the_two_estimators_agree_on_one_pass(noisy: NoisyModel, few: tuple[Tensor, Tensor, Tensor]) -> None:
    """Where one pass alone counts, the mean loss is the loss of the mean."""
    one, other = (e(noisy, *few, SEED, range(5, 6), 64, "float32") for e in (mean_of_gradients, gradient_of_mean))
    close(one, other)


@pytest.mark.parametrize("name", ["mean_of_gradients", "gradient_of_mean"])
def test_on_a_deterministic_network_both_are_the_gradient(
    dense: nn.Module, few: tuple[Tensor, Tensor, Tensor], name: str
) -> None:
    x, y, _ = few
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(dense(leaf).double(), y, reduction="sum"), leaf)[0]
    close(estimator(name)(dense, *few, SEED, range(1), 64, "float32"), expected)


@pytest.mark.parametrize("name", ["mean_of_gradients", "gradient_of_mean"])
def test_the_gradient_is_right_where_the_network_is_all_but_certain(
    dense: nn.Module, digits: Images, name: str
) -> None:
    """Softmax minus one, in float32, is off by half or zero there: the attack would look weaker than it is."""
    x, y = digits[0].float(), digits[1]
    with torch.no_grad():
        p = dense(x).double().softmax(1).gather(1, y[:, None])[:, 0]
    certain = p.argsort(descending=True)[:4]
    assert float(1 - p[certain].min()) < 2e-7
    leaf = x[certain].requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(dense(leaf).double(), y[certain], reduction="sum"), leaf)[0]
    found = estimator(name)(dense, x[certain], y[certain], certain, SEED, range(1), 64, "float32")
    close(found, expected)
    assert float((found.sign() != expected.sign()).double().mean()) < 1e-3


def test_gradient_of_mean_survives_a_true_class_without_probability() -> None:
    class Hopeless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.sum(1), 0 * x.sum(1) + 1e4], dim=1)

    x, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    found = gradient_of_mean(Hopeless(), x, y, torch.arange(2), 0, range(1), 64, "float32")
    assert found.isfinite().all()


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(
        SapcoreError, match="estimator is 'mean', but must be one of mean_of_gradients, gradient_of_mean"
    ):
        estimator("mean")


def test_the_margin_is_the_lead_of_the_best_wrong_class() -> None:
    scores = torch.tensor([[[1.0, 5.0, 2.0], [4.0, 0.0, 3.5]]])
    assert margin(scores, torch.tensor([[1, 2]])).tolist() == [[-3.0, 0.5]]


@pytest.mark.parametrize("batch_size", [1, 64])
def test_both_estimators_take_the_margin(
    noisy: NoisyModel, few: tuple[Tensor, Tensor, Tensor], batch_size: int
) -> None:
    x, y, ids = few
    leaf = x.clone().requires_grad_()
    logits = torch.stack([noisy(leaf, seed=SEED, ids=ids, passes=number).double() for number in PASSES])
    wanted = {
        "mean_of_gradients": margin(logits, y.expand(len(PASSES), -1)).sum() / len(PASSES),
        "gradient_of_mean": margin(logits.softmax(-1).mean(0).log(), y).sum(),
    }
    for name, loss in wanted.items():
        found = estimator(name)(noisy, x, y, ids, SEED, PASSES, batch_size, "float32", "margin")
        close(found, torch.autograd.grad(loss, leaf, retain_graph=True)[0])


def test_dense_backward_goes_from_the_noisy_logits_through_the_network_without_sap(
    noisy: NoisyModel, dense: nn.Module, few: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, ids = few
    logits = torch.stack([noisy(x, seed=SEED, ids=ids, passes=number).double() for number in PASSES])
    by_logits = (logits.softmax(-1) - F.one_hot(y, 10)).mean(0)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((dense(leaf).double() * by_logits).sum(), leaf)
    close(estimate("dense_backward", noisy, few), expected)


def test_dense_backward_of_the_margin_is_the_margins(
    noisy: NoisyModel, dense: nn.Module, few: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, ids = few
    logits = torch.stack([noisy(x, seed=SEED, ids=ids, passes=number).double() for number in PASSES])
    scores = logits.detach().flatten(0, 1).requires_grad_()
    (by_logits,) = torch.autograd.grad(margin(scores, y.repeat(len(PASSES))).sum() / len(PASSES), scores)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad((dense(leaf).double() * by_logits.reshape(logits.shape).sum(0)).sum(), leaf)
    close(estimator("dense_backward")(noisy, x, y, ids, SEED, PASSES, 64, "float32", "margin"), expected)


def test_dense_backward_needs_the_network_without_noise(dense: nn.Module, few: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(SapcoreError, match=r"^dense_backward needs a network that with_sap or with_bernoulli_sap made"):
        estimate("dense_backward", dense, few)


def test_dense_backward_refuses_a_network_that_is_being_trained(few: tuple[Tensor, Tensor, Tensor]) -> None:
    network = ResNet20()
    noisy = with_sap(network, 100).eval()
    before = network.norm.running_mean.clone()  # type: ignore[union-attr]
    with pytest.raises(SapcoreError, match="training mode"):
        estimate("dense_backward", noisy, few)
    assert torch.equal(before, network.norm.running_mean)  # type: ignore[arg-type]
