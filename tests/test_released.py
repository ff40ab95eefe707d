"""The released code's ways: what they do to images, to training and to the adversary's gradient."""

import colorsys
import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sapcore import attacks, checkpoints, data, evaluation, released, runner, with_sap
from sapcore.errors import SapcoreError
from sapcore.experiments import READINGS, points, readings, settings
from sapcore.randomness import stream, with_noisy_statistics
from sapcore.released import (
    BatchStatistics,
    ByDevice,
    Images,
    by_device,
    images_of,
    jittered,
    with_batch_statistics,
    wrapped,
)
from sapcore.results import Attack, Defence
from sapcore.training import RECIPES, Recipe, _Run, train

Batch = tuple[Tensor, Tensor]


def test_dark_pixels_wrap_round_to_bright_ones() -> None:
    images = torch.tensor([[[[0, 123, 124, 255]], [[0, 116, 117, 255]], [[0, 103, 104, 255]]]], dtype=torch.uint8)
    # by hand: 0 - 123.68 = -123.68, cut off to -123, and 256 more
    assert wrapped(images).tolist() == [[[[133, 0, 0, 131]], [[140, 0, 0, 138]], [[153, 0, 0, 151]]]]
    assert wrapped(images).dtype == torch.uint8


def test_a_crop_is_the_centre_and_no_way_leaves_images_as_they_are() -> None:
    images = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).to(torch.uint8)
    assert Images().of_test(images) is images
    assert torch.equal(Images(crop=28).of_test(images), images[..., 2:30, 2:30])
    assert torch.equal(Images(28, wrap=True).of_test(images), wrapped(images[..., 2:30, 2:30]))
    assert images_of({"crop": 28, "wrap": True}) == Images(28, True)
    assert images_of({"steps": 10}) == Images()


def test_jitter_adds_one_number_each_to_hue_lightness_and_saturation() -> None:
    """Against colorsys, for a colour far from all limits; OpenCV's 8 bits cost a few units."""
    image = torch.tensor([120, 90, 70], dtype=torch.uint8)[:, None, None].expand(64, 3, 4, 5)
    changed = jittered(image, torch.Generator().manual_seed(0))
    assert changed.shape == image.shape
    assert changed.dtype == torch.uint8
    hue, lightness, saturation = colorsys.rgb_to_hls(120 / 255, 90 / 255, 70 / 255)
    seen = []
    for one in changed:
        assert (one == one[:, :1, :1]).all(), "all pixels of an image change alike"
        h, light, s = colorsys.rgb_to_hls(*(float(c) / 255 for c in one[:, 0, 0]))
        seen.append((180 * (h - hue), 255 * (light - lightness), 255 * (s - saturation)))
    moved = torch.tensor(seen)
    assert (moved.mean(0).abs() < torch.tensor([9.0, 13, 13])).all(), "symmetric: within three standard errors of 0"
    assert (moved[:, 1].abs() <= 52).all()
    assert (moved[:, 2].abs() <= 54).all()
    assert (moved.std(0) > torch.tensor([5.0, 20, 20])).all()
    assert not torch.equal(changed[0], changed[1])
    assert torch.equal(changed, jittered(image, torch.Generator().manual_seed(0)))


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(SapcoreError, match=r"needs OpenCV: install it with `pip install -e '\.\[released\]'`"):
        jittered(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.Generator())


def test_batch_statistics_are_those_of_training_and_leave_the_network_alone(dense: nn.Module, digits: Batch) -> None:
    x = digits[0][:8].float()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    copied = with_batch_statistics(dense)
    assert sum(isinstance(m, BatchStatistics) for m in copied.modules()) == 20
    evaluation.check_network(copied)
    found = copied(x)
    checkpoint = checkpoints.load("resnet20-digits").train()
    torch.testing.assert_close(found, checkpoint(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, dense(x), atol=0.1)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    with pytest.raises(SapcoreError, match="no BatchNorm2d module"):
        with_batch_statistics(nn.Sequential(nn.ReLU()))


def test_an_adversary_on_batch_statistics_is_weaker(dense: nn.Module, digits: Batch) -> None:
    """The early look: against dense, FGSM along another network's gradient leaves much more."""
    x, y = digits
    own, other = (attacks.fgsm(model, x, y, 32) for model in (dense, with_batch_statistics(dense)))
    left = [evaluation.accuracy(evaluation.predict(dense, x_adv), y).value for x_adv in (own, other)]
    assert left[1] > left[0] + 0.05
    assert with_sap(with_batch_statistics(dense), 100)(x[:4].float()).isfinite().all()


@pytest.mark.parametrize(("images", "devices"), [(12, 4), (13, 4), (3, 8), (8, 1)])
def test_each_device_normalizes_its_own_images(images: int, devices: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(images, 3, 5, 5) * torch.rand(images, 1, 1, 1) + torch.randn(3, 1, 1)).requires_grad_()
    norm = nn.BatchNorm2d(3)
    nn.init.normal_(norm.weight)
    found = by_device(nn.Sequential(norm), devices)
    parts = x.tensor_split(min(devices, images))
    alone = [copy.deepcopy(norm) for _ in parts]
    expected = torch.cat([one(part) for one, part in zip(alone, parts, strict=True)])
    output = found(x)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(x)
    gradients = [torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] for y in (output, expected)]
    torch.testing.assert_close(*gradients)
    for name in ("running_mean", "running_var"):
        kept = torch.stack([getattr(one, name) for one in alone]).mean(0)
        torch.testing.assert_close(getattr(found.get_submodule("0"), name), kept)
    assert set(found.state_dict()) == {f"0.{name}" for name in norm.state_dict()}
    norm.load_state_dict({name[2:]: t for name, t in found.state_dict().items()})
    torch.testing.assert_close(found.eval()(x), norm.eval()(x), rtol=0, atol=0)


def test_a_network_trained_on_devices_is_used_as_any(few: Path) -> None:
    recipe = dataclasses.replace(RECIPE, devices=4)
    model = train("on four", recipe, "cpu", few / "state", progress=False)
    assert not any(isinstance(module, ByDevice) for module in model.modules())
    other = train("on one", RECIPE, "cpu", few / "state", progress=False)
    x = data.load("digits", "test")[0][:8].float()
    assert not torch.allclose(model(x), other(x), atol=1e-3)


RECIPE = Recipe("digits", schedule=((1, 0.1),), batch_size=32, pad=2, mirror=False)


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    whole = {split: tuple(t[:96] for t in data.load("digits", split)) for split in ("train", "test")}
    monkeypatch.setattr(data, "load", lambda dataset, split="test": whole[split])
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("way", [{"crop": 28}, {"wrap": True}, {"jitter": True}, {"jitter": True, "wrap": True}])
def test_a_network_sees_images_in_its_own_way_in_training_and_in_test(way: dict[str, object], few: Path) -> None:
    recipe = dataclasses.replace(RECIPE, **way)  # type: ignore[arg-type]
    run = _Run("small", recipe, torch.device("cpu"), few / "state")
    batch = run._augment(torch.arange(5), torch.Generator().manual_seed(0))
    side = recipe.crop or 32
    assert batch.shape == (5, 3, side, side)
    plain = _Run("plain", dataclasses.replace(recipe, wrap=False, jitter=False), torch.device("cpu"), few / "state")
    after = torch.Generator().manual_seed(0)
    expected = plain._augment(torch.arange(5), after).to(torch.uint8)
    expected = jittered(expected, after) if recipe.jitter else expected
    assert torch.equal(batch, (wrapped(expected) if recipe.wrap else expected).float())
    assert torch.equal(batch, expected.float()) != recipe.wrap
    model = train("small", recipe, "cpu", few / "state", progress=False)
    images, labels = runner.seen("digits", "small", 96)
    assert images.shape[-1] == side
    right = (model(images.float()).argmax(1) == labels).double().mean()
    assert checkpoints.card("small")["test_accuracy"] == pytest.approx(float(right))


def test_readings_differ_in_one_thing_each_and_the_last_in_all_but_the_devices() -> None:
    recipes = {name.rsplit("-", 1)[1]: r for name, r in RECIPES.items() if name.startswith("resnet20-cifar10-reading")}
    assert list(recipes) == ["paper", "crop", "wrap", "jitter", "devices", "released"]
    paper = dataclasses.asdict(recipes["paper"])
    changed = {
        name: {k: v for k, v in dataclasses.asdict(recipe).items() if v != paper[k]} for name, recipe in recipes.items()
    }
    assert changed == {
        "paper": {}, "crop": {"crop": 28}, "wrap": {"wrap": True}, "jitter": {"jitter": True},
        "devices": {"devices": 8}, "released": {"crop": 28, "wrap": True, "jitter": True},
    }  # fmt: skip
    book = dataclasses.asdict(RECIPES["resnet20-cifar10"])
    assert {k for k, v in book.items() if v != paper[k]} == {"schedule", "note"}
    assert RECIPES["resnet20-digits-reading-paper"] != RECIPES["resnet20-digits"]


def test_the_cells_of_the_readings() -> None:
    found = points("readings", settings("digits", eps=[0, 4]))
    assert {p.panel for p in found} == {"dense", "SAP-100"}
    assert [p.series for p in found if p.panel == "SAP-100" and p.cell.attack.eps] == list(READINGS)
    by_name = {(p.panel, p.series): p.cell for p in found if p.cell.attack.eps}
    not_of_dense = [name for name in READINGS if name.startswith(("gradient", "statistics under"))]
    assert not {("dense", name) for name in not_of_dense} & by_name.keys()
    for (panel, name), cell in by_name.items():
        batch = 500 if "batch statistics" in name or name.startswith("all of ") else 0
        assert cell.attack.batch_statistics == batch
        assert cell.defence.batch_statistics == (500 if "both" in name else 0)
        assert cell.attack.source is not None
        assert not cell.attack.source.batch_statistics
        assert cell.attack.source.backward == ("scale" if name == "gradient through the scale" else "constant")
        images = 1000 if name.startswith("statistics under SAP") else 0
        assert cell.defence.noisy_statistics == cell.attack.source.noisy_statistics == images
        plain = dataclasses.replace(cell.defence, batch_statistics=0, noisy_statistics=0)
        assert plain.label == panel, "the defence itself is always the paper's"
        full = ("the paper's text", "adversary on batch statistics", "both on batch statistics", *not_of_dense)
        short = name not in full or name.endswith("short training")
        assert ("reading" in cell.checkpoint) == short
    assert {p.cell.attack for p in found if not p.cell.attack.eps} == {Attack()}
    assert len(readings(settings("digits"))) == 27 * 8


@pytest.mark.parametrize("n", [20, 70])
def test_a_batch_is_of_one_pass(dense: nn.Module, digits: Batch, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are run together where images keep to themselves, but the statistics are those of the images of one."""
    sizes: list[int] = []
    forward = BatchStatistics.forward

    def counted(self: BatchStatistics, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(BatchStatistics, "forward", counted)
    noisy = with_sap(with_batch_statistics(dense), 100)
    attacks.fgsm(noisy, digits[0][:n], digits[1][:n], 4, passes=3, batch_size=50)
    assert set(sizes) == ({20} if n == 20 else {50, 20})


def test_fgsm_on_batch_statistics_is_the_cells_attack() -> None:
    """By the runner as by hand, and so other than without."""
    cells = {
        p.series: p.cell
        for p in points("readings", settings("digits", eps=8, examples=20))
        if p.panel == "dense" and p.cell.computable
    }
    images, labels = runner.seen("digits", "resnet20-digits", 20)
    found = runner.attacked(cells["adversary on batch statistics"], images, labels, torch.device("cpu"))
    network = released.with_batch_statistics(checkpoints.load("resnet20-digits"))
    assert torch.equal(found, attacks.fgsm(network, images, labels, 8))
    plain = runner.attacked(cells["the paper's text"], images, labels, torch.device("cpu"))
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("panel", ["dense", "SAP-100"])
def test_a_network_on_batch_statistics_is_measured_in_such_batches(panel: str) -> None:
    """By the runner as by hand: 20 images and then 10, one pass at a time."""
    cell = next(
        p.cell
        for p in points("readings", settings("digits", eps=8, examples=30, passes=3))
        if p.panel == panel and p.series == "both on batch statistics"
    )
    cell = dataclasses.replace(
        cell,
        defence=dataclasses.replace(cell.defence, batch_statistics=20),
        attack=dataclasses.replace(cell.attack, batch_statistics=20),
    )
    images, labels = runner.seen("digits", "resnet20-digits", 30)
    network = released.with_batch_statistics(checkpoints.load("resnet20-digits"))
    network = with_sap(network, 100) if panel == "SAP-100" else network
    x = attacks.fgsm(network, images, labels, 8, passes=3, batch_size=20)
    expected = evaluation.predict(network, x, 3, stream(cell.seed, "evaluation"), batch_size=20)
    found = runner.compute(cell, torch.device("cpu"))
    right = int((expected.argmax(1) == labels).sum())
    assert found["correct"] == right
    other = runner.compute(
        dataclasses.replace(cell, defence=dataclasses.replace(cell.defence, batch_statistics=0)), torch.device("cpu")
    )
    assert other["calibration"] != found["calibration"]


def test_a_network_with_noisy_statistics_is_attacked_and_measured_as_such() -> None:
    """By the runner as by hand: the statistics of the first training images, the adversary's too."""
    cell = next(
        p.cell
        for p in points("readings", settings("digits", eps=8, examples=30, passes=3))
        if p.series == "statistics under SAP"
    )
    images, labels = runner.seen("digits", "resnet20-digits", 30)
    noisy = with_sap(checkpoints.load("resnet20-digits"), 100)
    own = with_noisy_statistics(noisy, data.load("digits", "train")[0][:1000])
    x = attacks.fgsm(own, images, labels, 8, passes=3)
    assert torch.equal(runner.attacked(cell, images, labels, torch.device("cpu")), x)
    expected = evaluation.predict(own, x, 3, stream(cell.seed, "evaluation"))
    found = runner.compute(cell, torch.device("cpu"))
    assert found["correct"] == int((expected.argmax(1) == labels).sum())
    assert not torch.equal(expected, evaluation.predict(noisy, x, 3, stream(cell.seed, "evaluation")))
    dense = dataclasses.replace(cell, defence=Defence(noisy_statistics=1000), passes=1)
    with pytest.raises(SapcoreError, match="the network is a ResNet20, but must be a noisy one"):
        runner.compute(dense, torch.device("cpu"))
