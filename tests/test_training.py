"""A training that is killed goes on to the same weights, bit for bit."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sapcore import attacks, checkpoints, data, training
from sapcore.baselines import ActivationNoise
from sapcore.errors import SapcoreError
from sapcore.models import ResNet20
from sapcore.paths import ROOT
from sapcore.randomness import NoisyModel
from sapcore.rl import double_dqn
from sapcore.training import RECIPES, Recipe, _Run, train

RECIPE = Recipe("digits", schedule=((3, 0.1), (1, 0.01)), batch_size=32, pad=2, seed=5)
SCRIPT = """
import sys
import time
from pathlib import Path
from sapcore import checkpoints, data
from tests.test_training import RECIPE, few_digits
from sapcore.training import _Run, train

augment = _Run._augment
_Run._augment = lambda run, *of: time.sleep(600) if run.epoch == 1 else augment(run, *of)
checkpoints.CHECKPOINTS = Path(sys.argv[1])
data.load = few_digits(data.load)
train("small", RECIPE, "cpu", Path(sys.argv[2]), progress=False)
"""


def few_digits(load: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`data.load` with a few images only."""
    return lambda dataset, split: tuple(t[:160] for t in load(dataset, split))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small data set, and folders for checkpoints and state under the returned one."""
    monkeypatch.setattr(data, "load", few_digits(data.load))
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "checkpoints" / "small.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights that RECIPE ends in."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", few_digits(data.load))
        patch.setattr(checkpoints, "CHECKPOINTS", folder / "checkpoints")
        train("small", RECIPE, "cpu", folder / "state", progress=False)
    return weights(folder)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, str(folder / "checkpoints"), str(folder / "state")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, env=os.environ | threads, cwd=Path(__file__).parent.parent)


def test_a_training_that_was_killed_goes_on_to_the_same_weights_bit_for_bit(
    few: Path, uninterrupted: dict[str, Tensor]
) -> None:
    """SIGKILL in the second epoch, then go on; against a training without interruption."""
    state = few / "state" / "small.safetensors"
    process = start(few)
    deadline = time.monotonic() + 120
    while not state.exists():
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (few / "checkpoints" / "small.safetensors").exists()
    assert _Run("small", RECIPE, torch.device("cpu"), few / "state").epoch == 1

    train("small", RECIPE, "cpu", few / "state", progress=False)
    assert not state.exists()
    assert_same(weights(few), uninterrupted)
    assert [row["epoch"] for row in checkpoints.card("small")["history"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_a_training_can_be_stopped_after_any_epoch(few: Path, uninterrupted: dict[str, Tensor], epoch: int) -> None:
    """Also after the last, before the checkpoint is written."""
    run = _Run("small", RECIPE, torch.device("cpu"), few / "state")
    for _ in range(epoch):
        run.train_one_epoch()
    train("small", RECIPE, "cpu", few / "state", progress=False)
    assert_same(weights(few), uninterrupted)


def test_half_an_epoch_leaves_no_trace(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run("small", RECIPE, torch.device("cpu"), few / "state")
    run.train_one_epoch()
    before = run.path.read_bytes()

    def stop(*_: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_augment", stop)
    with pytest.raises(KeyboardInterrupt):
        run.train_one_epoch()
    assert run.path.read_bytes() == before


@pytest.mark.usefixtures("untouched_generators")
def test_a_training_that_goes_on_leaves_the_global_generators_alone(few: Path) -> None:
    """Its epochs draw from their own; only torch's constructors draw from the global one, which is put back here."""
    state = torch.get_rng_state()
    run = _Run("small", RECIPE, torch.device("cpu"), few / "state")
    torch.set_rng_state(state)
    run.train_one_epoch()


def test_the_trained_network_is_committed_with_its_card(few: Path) -> None:
    recipe = dataclasses.replace(RECIPE, schedule=((2, 0.1),))
    model = train("small", recipe, "cpu", few / "state", progress=False)
    assert not model.training
    card = checkpoints.card("small")
    assert card["recipe"]["schedule"] == [[2, 0.1]]
    assert card["recipe"]["seed"] == 5
    assert card["test_images"] == 160
    right = (model(data.load("digits", "test")[0].float()).argmax(1) == data.load("digits", "test")[1]).double().mean()
    assert card["test_accuracy"] == pytest.approx(float(right))
    assert [row["lr"] for row in card["history"]] == [0.1, 0.1]
    assert card["history"][1]["loss"] < card["history"][0]["loss"]
    assert card["provenance"][0]["device"]
    loaded = checkpoints.load("small")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("change", [{"seed": 6}, {"batch_size": 64}, {"schedule": ((5, 0.1),)}, {"mirror": False}])
def test_a_state_that_another_recipe_left_is_refused(few: Path, change: dict[str, object]) -> None:
    _Run("small", RECIPE, torch.device("cpu"), few / "state").train_one_epoch()
    before = (few / "state" / "small.safetensors").read_bytes()
    with pytest.raises(SapcoreError, match=r"by another recipe \(\w+\); move .*small.safetensors away or"):
        train("small", dataclasses.replace(RECIPE, **change), "cpu", few / "state", progress=False)  # type: ignore[arg-type]
    assert (few / "state" / "small.safetensors").read_bytes() == before


def test_a_state_from_before_a_recipe_had_a_field_is_gone_on_with(few: Path) -> None:
    run = _Run("small", RECIPE, torch.device("cpu"), few / "state")
    run.train_one_epoch()
    tensors, state = checkpoints.read_state(run.path, RECIPE)
    del state["recipe"]["dropout"]
    run.path.write_bytes(safetensors.torch.save(tensors, {"state": json.dumps(state)}))
    assert _Run("small", RECIPE, torch.device("cpu"), few / "state").epoch == 1
    with pytest.raises(SapcoreError, match=r"by another recipe \(dropout\); move "):
        _Run("small", dataclasses.replace(RECIPE, dropout=0.1), torch.device("cpu"), few / "state")


def test_a_damaged_state_is_refused_by_name(few: Path) -> None:
    _Run("small", RECIPE, torch.device("cpu"), few / "state").train_one_epoch()
    path = few / "state" / "small.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SapcoreError, match=r"small\.safetensors"):
        train("small", RECIPE, "cpu", few / "state", progress=False)


def test_an_unknown_name_is_refused() -> None:
    names = "resnet20-cifar10, .*resnet20-digits-dropout-0.25"
    with pytest.raises(SapcoreError, match=f"^no recipe is named 'resnet56'; there are {names}$"):
        train("resnet56")


def test_the_recipe_for_cifar10_is_the_papers() -> None:
    recipe = RECIPES["resnet20-cifar10"]
    rates = [recipe.learning_rate(epoch) for epoch in range(recipe.epochs)]
    assert rates == 100 * [0.5] + 30 * [0.05] + 20 * [0.005]
    assert (recipe.batch_size, recipe.momentum, recipe.weight_decay) == (512, 0.9, 1e-4)
    assert (recipe.pad, recipe.mirror) == (4, True)


def test_the_recipe_for_adversarial_training_is_the_papers() -> None:
    recipe = RECIPES["resnet20-cifar10-adv"]
    rates = [recipe.learning_rate(epoch) for epoch in range(recipe.epochs)]
    assert rates == [0.5 / 2 ** (epoch // 10) for epoch in range(100)]
    assert (recipe.adversarial_share, recipe.adversarial_eps) == (0.2, 2)
    assert dataclasses.replace(
        recipe, schedule=RECIPES["resnet20-cifar10"].schedule, adversarial_share=0, adversarial_eps=0
    ) == RECIPES["resnet20-cifar10"]  # fmt: skip


def test_two_trainings_of_one_network_do_not_run_at_once(few: Path) -> None:
    with (
        checkpoints.alone("small", few / "state"),
        pytest.raises(SapcoreError, match=r"^small is being trained by another process, with its state in "),
    ):
        train("small", RECIPE, "cpu", few / "state", progress=False)


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_last_epoch(few: Path) -> None:
    wild = dataclasses.replace(RECIPE, schedule=((1, 0.1), (2, 1e30)))
    with pytest.raises(SapcoreError, match=r"small: the loss of epoch [23] is not finite; nothing of it is kept"):
        train("small", wild, "cpu", few / "state", progress=False)
    assert not (few / "checkpoints").exists()
    assert (few / "state" / "small.safetensors").exists()


def test_the_recipe_for_dropout_has_the_papers_shape() -> None:
    """250 epochs, 0.5 and a tenth of it after 100, 150, 190 and 220, at a quarter of their length, rounded."""
    for rate in (0, 0.05, 0.1, 0.25):
        recipe = RECIPES[f"resnet20-cifar10-dropout-{rate}"]
        assert recipe.dropout == rate
        assert recipe.epochs >= 60
        assert recipe.note == "a quarter of the 250 epochs that the paper is recalled to have (unverified)"
        assert [r for _, r in recipe.schedule] == pytest.approx([0.5, 0.05, 0.005, 0.0005, 0.00005])
        ends = torch.tensor([epochs for epochs, _ in recipe.schedule]).cumsum(0)
        assert float((ends - torch.tensor([100, 150, 190, 220, 250]) / 4).abs().max()) <= 0.5


DROPOUT = dataclasses.replace(RECIPE, dropout=0.25)


def test_training_with_dropout_draws_each_image_and_epoch_its_own_mask(
    few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _Run("small", DROPOUT, torch.device("cpu"), few / "state")
    asked: list[tuple[list[int], int]] = []
    forward = NoisyModel.forward

    def note(self: NoisyModel, x: Tensor, seed: int, ids: Tensor, passes: int) -> Tensor:
        assert self.training
        assert [m.level for m in self.modules() if isinstance(m, ActivationNoise)] == 19 * [0.25]
        asked.append((ids.tolist(), passes))
        return forward(self, x, seed, ids, passes)

    monkeypatch.setattr(NoisyModel, "forward", note)
    for epoch in range(2):
        asked.clear()
        run.train_one_epoch()
        assert sorted(i for ids, _ in asked for i in ids) == list(range(160))
        assert {number for _, number in asked} == {epoch}


def test_a_network_trained_with_dropout_is_committed_without_it_and_goes_on_bit_for_bit(few: Path) -> None:
    model = train("small", DROPOUT, "cpu", few / "whole", progress=False)
    assert isinstance(model, ResNet20)
    whole = weights(few)
    for _ in range(2):
        _Run("small", DROPOUT, torch.device("cpu"), few / "state").train_one_epoch()
    train("small", DROPOUT, "cpu", few / "state", progress=False)
    assert_same(weights(few), whole)
    images, labels = data.load("digits", "test")
    right = (checkpoints.load("small")(images.float()).argmax(1) == labels).double().mean()
    assert checkpoints.card("small")["test_accuracy"] == pytest.approx(float(right))


ADV = dataclasses.replace(RECIPE, adversarial_share=0.2, adversarial_eps=2)


def test_a_fifth_of_each_batch_is_perturbed_on_the_network_of_the_epoch_before(
    few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it by FGSM in eval mode, on weights that do not change within the epoch."""
    run = _Run("small", ADV, torch.device("cpu"), few / "state")
    asked: list[tuple[int, dict[str, Tensor]]] = []
    made: list[Tensor] = []
    seen: list[Tensor] = []
    attack, augment = attacks.fgsm, training._Run._augment

    def note_attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, **rest: Any) -> Tensor:
        assert (eps, model.training) == (2, False)
        asked.append((len(x), {k: v.clone() for k, v in model.state_dict().items()}))
        made.append(attack(model, x, y, eps, **rest))
        return made[-1]

    def note_batch(self: _Run, chosen: Tensor, generator: torch.Generator) -> Tensor:
        x = augment(self, chosen, generator)
        seen.append(x)
        seen.append(x.clone())
        return x

    monkeypatch.setattr(attacks, "fgsm", note_attack)
    monkeypatch.setattr(training._Run, "_augment", note_batch)
    run.train_one_epoch()
    assert not asked, "there is no epoch before the first"
    for _ in range(2):
        before = {k: v.clone() for k, v in run.model.state_dict().items()}
        for noted in (asked, made, seen):
            noted.clear()
        run.train_one_epoch()
        assert [n for n, _ in asked] == 5 * [6]  # round(0.2 * 32) of each of 160 / 32 batches
        for _, weights_then in asked:
            assert_same(weights_then, before)
        for x_adv, given, clean in zip(made, seen[::2], seen[1::2], strict=True):
            assert torch.equal(given, torch.cat([x_adv, clean[6:]]))
            assert float((x_adv - clean[:6]).abs().max()) == 2


def test_adversarial_training_goes_on_to_the_same_weights(few: Path) -> None:
    train("small", ADV, "cpu", few / "whole", progress=False)
    whole = weights(few)
    for _ in range(2):
        _Run("small", ADV, torch.device("cpu"), few / "state").train_one_epoch()
    train("small", ADV, "cpu", few / "state", progress=False)
    assert_same(weights(few), whole)


def test_the_readmes_commands_train_everything() -> None:
    readme = (ROOT / "README.md").read_text()
    asked = re.findall(r"^sapcore train ([\w-]+) ", readme, re.M)
    for names, trained in re.findall(r"^for \w+ in ([^;]+); do sapcore train ([\w$-]+); done$", readme, re.M):
        asked += [re.sub(r"\$\w+", name, trained) for name in names.split()]
    whole = {*RECIPES, *double_dqn.RECIPES}
    assert sorted(asked) == sorted(name for name in whole if not name.startswith("resnet20-digits"))


def test_the_schedule_ends() -> None:
    assert RECIPE.epochs == 4
    with pytest.raises(IndexError):
        RECIPE.learning_rate(4)


def test_weight_decay_is_on_weights_and_scales_and_not_on_biases_and_shifts(few: Path) -> None:
    run = _Run("small", RECIPE, torch.device("cpu"), few / "state")
    decayed, free = run.optimizer.param_groups
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    assert {names[p].rsplit(".", 1)[1] for p in decayed["params"]} == {"weight"}
    assert {names[p].rsplit(".", 1)[1] for p in free["params"]} == {"bias"}
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0)
    assert set(names.values()) - {names[p] for g in (decayed, free) for p in g["params"]} == {"norm_input.weight"}


def test_augmentation_crops_from_the_padded_image_and_mirrors_half_of_them(few: Path) -> None:
    run = _Run("small", RECIPE, torch.device("cpu"), few / "state")
    images = data.load("digits", "train")[0]
    chosen = torch.zeros(400, dtype=torch.int64)
    crops = run._augment(chosen, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[:1].float(), (2,) * 4, value=127)[0]
    possible = {}
    for top in range(5):
        for left in range(5):
            crop = padded[:, top : top + 32, left : left + 32]
            possible[crop.numpy().tobytes()] = (top, left, False)
            possible[crop.flip(2).contiguous().numpy().tobytes()] = (top, left, True)
    found = [possible[crop.contiguous().numpy().tobytes()] for crop in crops]
    assert len(set(found)) == 50
    assert 150 < sum(mirrored for _, _, mirrored in found) < 250  # false alarm: 6e-7


def test_every_epoch_sees_every_image_once_in_another_order(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Run("small", RECIPE, torch.device("cpu"), few / "state")
    orders: list[list[int]] = []
    augment = training._Run._augment

    def note(self: _Run, chosen: Tensor, generator: torch.Generator) -> Tensor:
        orders[-1].extend(chosen.tolist())
        return augment(self, chosen, generator)

    monkeypatch.setattr(training._Run, "_augment", note)
    for _ in range(2):
        orders.append([])
        run.train_one_epoch()
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(160))
    assert orders[0] != orders[1]


def test_whole_batches_of_a_long_training_go_through_the_compiled_network(
    few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced by torch.compile, and run as it is: the same weights, bit for bit."""
    recipe = dataclasses.replace(RECIPE, batch_size=48)
    plain = _Run("small", recipe, torch.device("cpu"), few)
    assert plain.compiled is None
    plain.train_one_epoch()
    traced: list[object] = []

    def backend(graph: Any, inputs: object) -> Any:
        traced.append(graph)
        return graph

    monkeypatch.setattr(training, "COMPILED", 1)
    monkeypatch.setattr(training, "is_fast", lambda device_type: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    run = _Run("small", recipe, torch.device("cpu"), few / "other")
    run.train_one_epoch()
    assert traced
    assert len(run.labels) % recipe.batch_size, "the last batch is a smaller one"
    theirs = run.model.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in plain.model.state_dict().items())


def test_without_a_compiler_a_long_training_goes_on_and_says_so(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: object) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(training, "COMPILED", 1)
    monkeypatch.setattr(training, "is_fast", lambda device_type: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    run = _Run("small", RECIPE, torch.device("cpu"), few)
    with pytest.warns(UserWarning, match="small is trained without torch.compile"):
        run.train_one_epoch()
    assert run.compiled is None
    assert run.epoch == 1
