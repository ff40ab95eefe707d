"""Weights come back as they were saved, or not at all; and no code is run from their file."""

import dataclasses
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from sapcore import checkpoints
from sapcore.checkpoints import CheckpointError
from sapcore.errors import SapcoreError
from sapcore.models import ResNet20, initialize
from sapcore.rl import double_dqn
from sapcore.rl.environments import Rules

NAME = "resnet20-small"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of checkpoints."""
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path)
    return tmp_path


@pytest.fixture
def saved(folder: Path) -> nn.Module:
    """A network whose weights lie under NAME."""
    model = ResNet20().eval()
    initialize(model, torch.Generator().manual_seed(1))
    checkpoints.save(model, NAME, {"test_accuracy": 0.5})
    return model


def test_weights_come_back_bit_for_bit_frozen_and_in_eval_mode(saved: nn.Module) -> None:
    loaded = checkpoints.load(NAME)
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded(torch.ones(2, 3, 32, 32)), saved(torch.ones(2, 3, 32, 32)))


def test_two_loads_are_two_networks(saved: nn.Module) -> None:
    one, other = checkpoints.load(NAME), checkpoints.load(NAME)
    nn.init.zeros_(one.head.weight)  # type: ignore[union-attr, arg-type]
    assert other.head.weight.any()  # type: ignore[union-attr, operator]


def test_the_card_holds_the_sha256_and_what_it_was_given(saved: nn.Module, folder: Path) -> None:
    import hashlib

    card = checkpoints.card(NAME)
    assert card["name"] == NAME
    assert card["test_accuracy"] == 0.5
    digest = hashlib.sha256((folder / f"{NAME}.safetensors").read_bytes()).hexdigest()
    assert card["sha256"] == checkpoints.sha256(NAME) == digest


def test_names_lists_the_checkpoints_at_hand(saved: nn.Module) -> None:
    assert checkpoints.names() == [NAME]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swap_for_other_weights(path: Path) -> None:
    path.write_bytes(safetensors.torch.save({"weight": torch.zeros(3)}))


@pytest.mark.parametrize("damage", [truncate, cut_in_half, empty, turn_a_bit, extend, swap_for_other_weights])
def test_a_damaged_file_is_refused_with_its_name_and_the_way_back(
    saved: nn.Module, folder: Path, damage: Callable[[Path], None]
) -> None:
    path = folder / f"{NAME}.safetensors"
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(NAME)
    message = str(caught.value)
    assert f"{path} is truncated or altered" in message
    assert "git checkout -- data/checkpoints" in message
    assert f"sapcore train {NAME}" in message
    assert "\n" not in message


def test_a_missing_file_is_refused_with_its_name_and_the_way_back(saved: nn.Module, folder: Path) -> None:
    path = folder / f"{NAME}.safetensors"
    path.unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(NAME)
    assert f"{path} is missing" in str(caught.value)
    assert f"sapcore train {NAME}" in str(caught.value)


def test_a_missing_card_is_refused_with_the_name_and_what_is_at_hand(saved: nn.Module, folder: Path) -> None:
    for call in (checkpoints.load, checkpoints.card, checkpoints.sha256):
        with pytest.raises(CheckpointError) as caught:
            call("resnet56")
        message = str(caught.value)
        assert "no checkpoint is named 'resnet56'" in message
        assert NAME in message
        assert "`sapcore train --help` names what can be trained" in message


@pytest.mark.parametrize("content", ["", "{", '{"name": "resnet20-small"}', "[]", "null", "\x00\x01"])
def test_a_damaged_card_is_refused_with_its_name_and_the_way_back(saved: nn.Module, folder: Path, content: str) -> None:
    (folder / f"{NAME}.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(NAME)
    assert f"{NAME}.json" in str(caught.value)
    assert f"sapcore train {NAME}" in str(caught.value)


def test_a_card_with_another_sha256_is_refused(saved: nn.Module, folder: Path) -> None:
    path = folder / f"{NAME}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="its sha256 is not the model card's"):
        checkpoints.load(NAME)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("ResNet56", "is of the architecture 'ResNet56', but must be ResNet20 or QNetwork"),
        ("QNetwork", "does not hold the weights of a QNetwork; restore it with `git checkout"),
    ],
)
def test_another_architecture_is_refused(saved: nn.Module, folder: Path, architecture: str, message: str) -> None:
    path = folder / f"{NAME}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architecture": architecture, "actions": 4}))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checkpoints.load(NAME)


def test_loading_unpickles_nothing(saved: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("code from a file might run")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    checkpoints.load(NAME)


def test_a_pickle_in_place_of_the_weights_is_not_run(saved: nn.Module, folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(tmp_path / "was here"),)  # type: ignore[return-value]

    (folder / f"{NAME}.safetensors").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError):
        checkpoints.load(NAME)
    assert not (tmp_path / "was here").exists()


def test_a_crash_while_saving_leaves_the_old_weights(
    saved: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(SapcoreError, match=r"cannot be written \(no space left on device\); make room, or make it"):
        checkpoints.save(ResNet20(), NAME, {})
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", folder)
    assert torch.equal(checkpoints.load(NAME).head.weight, saved.head.weight)  # type: ignore[union-attr, arg-type]
    assert sorted(path.name for path in folder.iterdir()) == [f"{NAME}.json", f"{NAME}.safetensors"]


def test_the_committed_network_for_digits_is_as_good_as_its_card_says(
    digits: tuple[Tensor, Tensor], dense: nn.Module
) -> None:
    card = checkpoints.card("resnet20-digits")
    with torch.no_grad():
        right = (dense(digits[0].float()).argmax(1) == digits[1]).double().mean()
    assert card["test_images"] == 500
    assert abs(float(right) - card["test_accuracy"]) <= 0.002
    assert card["test_accuracy"] > 0.98


@pytest.mark.parametrize("name", checkpoints.names())
def test_every_committed_checkpoint_is_whole_and_tells_its_recipe_device_time_and_commit(name: str) -> None:
    checkpoints.load(name)
    card = checkpoints.card(name)
    how_good = {"mean_return_at_the_end"} if card["architecture"] == "QNetwork" else {"test_accuracy", "test_images"}
    assert {"architecture", "recipe", "seconds", "provenance"} | how_good <= card.keys()
    for origin in card["provenance"]:
        assert {"device", "versions", "commit", "date"} <= origin.keys()


def test_a_recipe_is_the_same_where_a_field_of_its_rules_is_younger_than_the_card(saved: nn.Module) -> None:
    recipe = double_dqn.RECIPES["double-dqn-Assault"]
    of_then = json.loads(json.dumps(dataclasses.asdict(recipe)))
    del of_then["rules"]["clipped_rewards"]
    checkpoints.save(saved, NAME, {"recipe": of_then})
    assert checkpoints.is_by(NAME, recipe)
    assert not checkpoints.is_by(NAME, dataclasses.replace(recipe, rules=Rules(clipped_rewards=False)))
    assert not checkpoints.is_by(NAME, dataclasses.replace(recipe, rules=Rules(noops=0)))


@pytest.mark.parametrize("harm", ["no card", "a damaged card", "truncated weights"])
def test_what_is_damaged_counts_as_not_trained(saved: nn.Module, folder: Path, harm: str) -> None:
    recipe = double_dqn.RECIPES["double-dqn-Assault"]
    checkpoints.save(saved, NAME, {"recipe": dataclasses.asdict(recipe)})
    assert checkpoints.is_by(NAME, recipe)
    if harm == "no card":
        (folder / f"{NAME}.json").unlink()
    elif harm == "a damaged card":
        (folder / f"{NAME}.json").write_text("{")
    else:
        weights = folder / f"{NAME}.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
    assert not checkpoints.is_by(NAME, recipe)
