"""Accuracy is of the mean softmax over fresh passes, and its interval is Wilson's."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sapcore import attacks, checkpoints, data, evaluation, runner
from sapcore.baselines import with_rsw
from sapcore.errors import SapcoreError
from sapcore.evaluation import accuracy, predict
from sapcore.experiments import cells, settings
from sapcore.randomness import Begun, NoisyModel
from sapcore.sap import with_sap
from tests.test_data import needs_cifar10

Watch = Callable[[nn.Module], list[int]]
Images = tuple[Tensor, Tensor]


def scored(correct: int, images: int) -> evaluation.Accuracy:
    probabilities = torch.zeros(images, 2)
    probabilities[:correct, 1] = 1
    probabilities[correct:, 0] = 1
    return accuracy(probabilities, torch.ones(images, dtype=torch.int64))


@pytest.mark.parametrize(
    ("correct", "images", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_the_one_that_newcombe_tabulates(correct: int, images: int, low: float, high: float) -> None:
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", Table I, method 3."""
    found = scored(correct, images)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(images=st.integers(1, 2000), share=st.floats(0, 1))
def test_the_interval_is_wilsons_formula(images: int, share: float) -> None:
    correct = round(share * images)
    found, z, p = scored(correct, images), 1.959963984540054, correct / images
    centre = (p + z * z / (2 * images)) / (1 + z * z / images)
    half = z * math.sqrt(p * (1 - p) / images + z * z / (4 * images**2)) / (1 + z * z / images)
    assert found.low == pytest.approx(centre - half, abs=1e-12)
    assert found.high == pytest.approx(centre + half, abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert (found.correct, found.images) == (correct, images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[1], [2], [0]]), "labels are int64 (3, 1), but must be whole numbers in a tensor (3,), one per"),
        (torch.tensor([0.0, 1.0, 2.0]), "labels are float32 (3,), but must be whole numbers"),
        ([0, 1, 2], "labels are list, but must be whole numbers"),
        (torch.tensor([0, 1]), "there are 3 images but 2 labels"),
        (torch.tensor([0, 1, 9]), "labels go from 0 to 9, but must be from 0 to 3"),
        (torch.tensor([-100, 1, 2]), "labels go from -100 to 2, but must be from 0 to 3"),
    ],
)
def test_labels_that_are_not_one_class_per_image_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(SapcoreError, match="^" + re.escape(message)):
        accuracy(torch.eye(4)[:3], labels)


def test_labels_of_any_whole_type_will_do() -> None:
    for dtype in (torch.int32, torch.uint8, torch.int64):
        assert accuracy(torch.eye(3), torch.arange(3).to(dtype)).correct == 3
    with pytest.raises(SapcoreError, match=r"^there is no image to measure accuracy on$"):
        accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def rectified() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Identity(), with_sap(rectified())).eval(), "a noisy network is inside a Sequential"),
        (lambda: nn.DataParallel(with_sap(rectified())).eval(), "a noisy network is inside a DataParallel"),
        (lambda: rectified().double(), "the network's weights are float64, but must be float32; precision='bfloat16'"),
        (lambda: nn.Sequential(rectified(), nn.Linear(3, 1)).eval(), "the network's output has shape (2, 1), but must"),
    ],
)
def test_a_network_whose_numbers_would_mean_something_else_is_refused(
    model: Callable[[], nn.Module], message: str
) -> None:
    x, y = torch.rand(2, 3, 2, 2) * 255, torch.tensor([0, 1])
    with pytest.raises(SapcoreError, match="^" + re.escape(message)):
        predict(model(), x, 2)
    with pytest.raises(SapcoreError, match="^" + re.escape(message)):
        attacks.fgsm(model(), x, y, 4, passes=2)


class Broken(nn.Module):
    """Right of the first image; of the second nothing comes out that is a number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[1.0, 2.0], [torch.inf, torch.nan]])[: len(x)]


def test_outputs_that_are_no_numbers_are_refused() -> None:
    """argmax would take the first class."""
    assert predict(Broken().eval(), torch.zeros(1, 3)).argmax(1).tolist() == [1]
    with pytest.raises(SapcoreError, match=r"^the network's output is nan or inf for 1 of the first 2 images$"):
        predict(Broken().eval(), torch.zeros(2, 3))


def test_images_that_are_no_tensor_and_labels_of_no_class_are_refused() -> None:
    x = torch.zeros(2, 3, 2, 2)
    with pytest.raises(SapcoreError, match=r"^x is a ndarray, but must be a torch.Tensor; torch.as_tensor makes one$"):
        predict(rectified(), x.numpy())  # type: ignore[arg-type]
    with pytest.raises(SapcoreError, match=r"^pixels lie in \[0, 300\], but must lie in \[0, 255\]$"):
        predict(rectified(), torch.tensor([0.0, 300.0]).expand(2, 3, 2, 2))
    with pytest.warns(
        UserWarning, match=r"pixels lie in \[0.5, 0.5\], where 255 is white; give 255 \* x if 1 is"
    ) as told:
        predict(rectified(), torch.full((2, 3, 2, 2), 0.5))
    assert told[0].filename == __file__
    calls: tuple[Callable[[Any], object], ...] = (
        lambda f: predict(f, x), lambda f: attacks.fgsm(f, x, torch.tensor([0, 1]), 4), with_sap,
    )  # fmt: skip
    for call in calls:
        with pytest.raises(SapcoreError, match=r"^the network is a function, but must be a torch.nn.Module$"):
            call(lambda x: x)
    with pytest.raises(SapcoreError, match=r"^labels go from 1 to 3, but must be from 0 to 2$"):
        evaluation.predict_and_count(rectified(), x, torch.tensor([1, 3]))


def test_noise_goes_in_once() -> None:
    with pytest.raises(SapcoreError, match=r"^the network is noisy already, and only one kind of noise goes into"):
        with_rsw(with_sap(rectified()), 0.1)
    with pytest.raises(SapcoreError, match=r"^the network is noisy already, and only one kind of noise goes into"):
        with_sap(with_sap(rectified()))


@pytest.mark.parametrize(("name", "value"), [("ids", torch.tensor([0.1, 0.2])), ("passes", 0.5)])
def test_names_that_are_no_whole_numbers_are_refused(name: str, value: Any) -> None:
    with pytest.raises(SapcoreError, match=f"^{name} are float32, but must be whole numbers, as int64$"):
        with_sap(rectified())(torch.rand(2, 3, 2, 2), **{name: value})


def test_the_interval_of_a_difference_is_newcombes_hybrid() -> None:
    """His example (1998, table II, method 10): 56 of 70 against 48 of 80."""
    pair = []
    for correct, images in ((56, 70), (48, 80)):
        right = torch.arange(images) < correct
        found = evaluation.accuracy(torch.eye(2)[right.long()], torch.ones(images, dtype=torch.long))
        pair.append((found.value, found.low, found.high))
    assert evaluation.difference(*pair) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_accuracy_counts_where_the_largest_probability_is_the_labels() -> None:
    probabilities = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.35, 0.25], [0.1, 0.1, 0.8]])
    assert accuracy(probabilities, torch.tensor([1, 2, 2])).correct == 2


@pytest.mark.parametrize("batch_size", [1, 4, 7, 500])
def test_predict_is_the_mean_softmax_over_the_passes(noisy: NoisyModel, digits: Images, batch_size: int) -> None:
    x, ids = digits[0][:6], torch.tensor([4, 1, 7, 9, 2, 0])
    with torch.no_grad():
        each = [noisy(x.float(), seed=5, ids=ids, passes=number).double().softmax(1) for number in range(4)]
    found = predict(noisy, x, passes=4, seed=5, ids=ids, batch_size=batch_size)
    assert found.dtype == torch.float64
    assert torch.allclose(found.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(found, torch.stack(each).mean(0), rtol=0, atol=1e-5)


def test_the_mean_is_of_probabilities_not_of_votes_or_logits() -> None:
    class Moody(NoisyModel):
        def forward(
            self, x: Tensor | Begun, seed: int = 0, ids: Tensor | None = None, passes: Tensor | int = 0
        ) -> Tensor:
            sure = torch.as_tensor(passes)[:, None] == 0
            return torch.where(sure, torch.tensor([[9.0, 0.0]]), torch.tensor([[-0.1, 0.1]]))

    with torch.no_grad():
        found = predict(Moody(nn.Identity(), noisy_state(), {}).eval(), torch.zeros(1, 3), passes=3)
    assert found.argmax(1).tolist() == [0]  # two of three votes are for the other class


def noisy_state() -> Any:
    from sapcore.randomness import Noise

    return Noise()


def test_a_deterministic_network_is_run_once_whatever_the_passes(
    dense: nn.Module, digits: Images, watch: Watch
) -> None:
    rows = watch(dense)
    found = predict(dense, digits[0][:5], passes=100)
    assert rows == [5]
    torch.testing.assert_close(found, dense(digits[0][:5].float()).double().softmax(1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("images", "passes", "batch_size"), [(3, 7, 5), (7, 3, 4), (1, 20, 6), (5, 5, 64)])
def test_no_forward_pass_sees_more_rows_than_the_batch_size(
    noisy: NoisyModel, digits: Images, watch: Watch, images: int, passes: int, batch_size: int
) -> None:
    rows = watch(noisy)
    predict(noisy, digits[0][:images], passes=passes, batch_size=batch_size)
    assert max(rows) <= batch_size
    assert sum(rows) == images * passes


def test_predictions_follow_the_names_of_the_images_not_their_places(noisy: NoisyModel, digits: Images) -> None:
    order = torch.tensor([5, 2, 3])
    whole = predict(noisy, digits[0][:6], passes=3)
    torch.testing.assert_close(predict(noisy, digits[0][order], passes=3, ids=order), whole[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changed", [{"seed": 2}, {"passes": 4}, {"ids": torch.arange(6) + 6}])
def test_predictions_of_a_noisy_network_depend_on_seed_names_and_number_of_passes(
    noisy: NoisyModel, digits: Images, changed: dict[str, Any]
) -> None:
    expected = predict(noisy, digits[0][:6], passes=3)
    assert ((predict(noisy, digits[0][:6], **({"passes": 3} | changed)) - expected).abs() > 0).any(1).all()


def seeds_of_passes(model: NoisyModel, use: Callable[[], object]) -> set[tuple[int, int, int]]:
    """The (seed, id, pass) of every noisy forward pass that `use` makes."""
    seen: set[tuple[int, int, int]] = set()

    def note(_model: nn.Module, _x: object, names: dict[str, Any]) -> None:
        seen.update(
            (names["seed"], *pair) for pair in zip(names["ids"].tolist(), names["passes"].tolist(), strict=True)
        )

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    use()
    handle.remove()
    return seen


@pytest.mark.parametrize("seed", [0, 1])
def test_the_passes_of_evaluation_are_not_those_of_the_attack(noisy: NoisyModel, digits: Images, seed: int) -> None:
    x, y = digits[0][:3], digits[1][:3]
    attacked = seeds_of_passes(noisy, lambda: attacks.fgsm(noisy, x, y, 4, passes=5, seed=seed))
    attacked |= seeds_of_passes(noisy, lambda: attacks.iterative(noisy, x, y, 4, steps=2, passes=5, seed=seed))
    evaluated = seeds_of_passes(noisy, lambda: predict(noisy, x, passes=5, seed=seed))
    assert (len(attacked), len(evaluated)) == (30, 15)
    assert not attacked & evaluated


def test_a_cell_is_evaluated_on_passes_that_its_attack_has_not_seen(
    monkeypatch: pytest.MonkeyPatch, dense: nn.Module
) -> None:
    model = with_sap(dense, 100)
    monkeypatch.setattr(runner, "defended", lambda *_: model)
    runner._direction.cache_clear()
    seeds: dict[bool, set[int]] = {True: set(), False: set()}
    model.register_forward_pre_hook(
        lambda _model, _x, names: seeds[torch.is_grad_enabled()].add(names["seed"]), with_kwargs=True
    )
    (cell,) = cells("fig1b", settings("digits", eps=4, examples=2, passes=2))[-1:]
    runner.compute(cell, torch.device("cpu"))
    runner._direction.cache_clear()
    assert len(seeds[True]) == len(seeds[False]) == 1
    assert not seeds[True] & seeds[False]


@pytest.mark.parametrize("passes", [0, -1, 1.5, "3", True, None])
def test_senseless_passes_are_refused(noisy: NoisyModel, dense: nn.Module, digits: Images, passes: Any) -> None:
    for model in (noisy, dense):
        with pytest.raises(SapcoreError, match=r"passes is .*, but must be a whole number of 1 or more"):
            predict(model, digits[0][:1], passes=passes)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_a_senseless_batch_size_is_refused(noisy: NoisyModel, digits: Images, batch_size: Any) -> None:
    with pytest.raises(SapcoreError, match=r"batch_size is .*, but must be a whole number of 1 or more"):
        predict(noisy, digits[0][:1], passes=1, batch_size=batch_size)


class Counted(nn.Module):
    """A layer of 1,000 units, whose images and units are kept for the gradient; it notes the rows of each call."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(pixels, 1000), nn.Linear(1000, 10)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        found: Tensor = self.last(self.first(x.flatten(1)).relu())
        return found


@pytest.mark.parametrize(("memory", "rows"), [(10.5, 10), (1.5, 1), (0.5, 1), (10_000, evaluation.BATCH_SIZE)])
def test_no_more_rows_at_once_than_fit_the_memory(
    digits: Images, monkeypatch: pytest.MonkeyPatch, memory: float, rows: int
) -> None:
    x, y = digits[0].repeat(3, 1, 1, 1), digits[1].repeat(3)
    pixels = x[0].numel()
    model = Counted(pixels).eval()
    monkeypatch.setattr(evaluation, "MEMORY", int(memory * 4 * (pixels + 1000)))
    found = predict(model, x)
    assert sorted(model.rows[:2]) == [2, 4]  # which measured
    assert max(model.rows[2:]) == min(rows, len(x))
    assert torch.equal(found, predict(model, x, batch_size=rows))
    model.rows = []
    attacks.fgsm(model, x, y, 4)
    assert max(model.rows) == min(rows, len(x))
    assert sum(model.rows) == len(x)  # it measured before


def test_the_passes_of_a_noisy_network_share_the_memory(
    noisy: NoisyModel, digits: Images, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = digits[0][:3], digits[1][:3]
    of_a_row = evaluation.row_bytes(noisy, x, "float32")
    monkeypatch.setattr(evaluation, "MEMORY", 7 * of_a_row)
    assert evaluation.rows_at_once(noisy, x, None, "float32") == 7
    expected = attacks.fgsm(noisy, x, y, 4, passes=5)
    rows = watch(noisy)
    assert torch.equal(attacks.fgsm(noisy, x, y, 4, passes=5, batch_size=7), expected)
    assert max(rows) == 6  # two passes over three images


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.div_(255).flatten(1)[:, :10]


class ThenRectified(nn.Module):
    """Changes its input in place, and is of a kind that noise can be put into."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.relu(x.sub_(100).div_(60).flatten(1))
        return found[:, :10]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_changes_its_input_in_place_gets_its_own(channels: int) -> None:
    torch.manual_seed(0)
    x = (255 * torch.rand(5, channels, 8, 8)).contiguous(memory_format=torch.channels_last)
    before, noisy = x.clone(), with_sap(ThenRectified().eval())
    found = [predict(noisy, x, passes=4, batch_size=rows) for rows in (5, 7, 20)]
    predict(ThenRectified().eval(), x)
    assert torch.equal(x, before)
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


class InNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy()).flatten(1)[:, :10]


@pytest.mark.parametrize("model", [InPlace(), InNumpy()])
def test_what_has_no_gradient_is_predicted_all_the_same(model: nn.Module, digits: Images) -> None:
    found = predict(model.eval(), digits[0][:5])
    assert torch.equal(found, predict(model, digits[0][:5], batch_size=2))
    assert evaluation.rows_at_once(model, digits[0], None, "float32") == evaluation.BATCH_SIZE


def test_bfloat16_takes_less_memory(noisy: NoisyModel, digits: Images) -> None:
    of = {name: evaluation.row_bytes(noisy, digits[0], name) for name in ("float32", "bfloat16")}
    assert 0.4 * of["float32"] < of["bfloat16"] < 0.8 * of["float32"]


def test_measuring_memory_calls_no_hook_and_draws_no_random_number(dense: nn.Module, digits: Images) -> None:
    state = torch.get_rng_state()
    evaluation.rows_at_once(nn.Sequential(dense, nn.Dropout(0.5)), digits[0], None, "float32")
    assert torch.equal(torch.get_rng_state(), state)
    with_hook = nn.Sequential(dense)
    calls: list[int] = []
    with_hook.register_forward_hook(lambda *_: calls.append(1))
    assert evaluation.rows_at_once(with_hook, digits[0], None, "float32") == evaluation.BATCH_SIZE
    assert not calls


def test_a_network_in_training_mode_is_refused(digits: Images) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    with pytest.raises(SapcoreError, match="the network is in training mode"):
        predict(model, digits[0][:1])


def test_an_unknown_precision_is_refused(dense: nn.Module, digits: Images) -> None:
    with pytest.raises(SapcoreError, match="precision is 'fp8', but must be one of float32, bfloat16"):
        predict(dense, digits[0][:1], precision="fp8")


def test_ids_of_another_length_are_refused(noisy: NoisyModel, dense: nn.Module, digits: Images) -> None:
    for ids in (torch.arange(2), torch.arange(4)):
        for model in (noisy, dense):
            with pytest.raises(SapcoreError, match="ids has shape"):
                predict(model, digits[0][:3], passes=1, ids=ids)


def test_bfloat16_arithmetic_gives_nearly_the_same(noisy: NoisyModel, digits: Images) -> None:
    found = predict(noisy, digits[0][:20], passes=2, precision="bfloat16")
    expected = predict(noisy, digits[0][:20], passes=2)
    assert (found.argmax(1) == expected.argmax(1)).double().mean() >= 0.9
    assert found.dtype == torch.float64


def test_predict_makes_no_gradient_graph(noisy: NoisyModel, digits: Images) -> None:
    assert not predict(noisy, digits[0][:1].float().requires_grad_(), passes=1).requires_grad


@pytest.mark.parametrize(
    ("dataset", "eps"),
    [("digits", 8), ("digits", 32), pytest.param("cifar10", 0, marks=needs_cifar10),
     pytest.param("cifar10", 2, marks=needs_cifar10)],
)  # fmt: skip
@pytest.mark.parametrize("source", ["SAP-100", "dense"])
def test_bfloat16_changes_no_accuracy_by_more_than_its_interval(dataset: str, eps: float, source: str) -> None:
    """Attack and evaluation both, in either precision, on SAP-100."""
    (x, y), model = (t[:200] for t in data.load(dataset, "test")), checkpoints.load(f"resnet20-{dataset}")
    noisy = with_sap(model, 100)
    adversary = noisy if source == "SAP-100" else model
    exact, fast = (
        accuracy(predict(noisy, attacks.fgsm(adversary, x, y, eps, passes=5, precision=p), passes=10, precision=p), y)
        for p in ("float32", "bfloat16")
    )
    assert exact.low <= fast.value <= exact.high


def test_single_passes_are_counted_beside_their_mean(noisy: NoisyModel, dense: nn.Module, digits: Images) -> None:
    x, y = digits[0][:30], digits[1][:30]
    p, right = evaluation.predict_and_count(noisy, x, y, passes=5, seed=3, batch_size=16)
    assert torch.equal(p, evaluation.predict(noisy, x, passes=5, seed=3, batch_size=16))
    alone = [noisy(x.float(), seed=3, passes=number).argmax(1) == y for number in range(5)]
    assert torch.equal(right, torch.stack(alone).sum(0))
    _, once = evaluation.predict_and_count(dense, x, y, passes=5)
    assert torch.equal(once, (dense(x.float()).argmax(1) == y).long())


def test_no_images_are_one_sentence(noisy: NoisyModel, digits: Images) -> None:
    with pytest.raises(SapcoreError, match="x holds no images, but at least one is needed"):
        predict(noisy, digits[0][:0])
