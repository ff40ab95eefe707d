"""Both data sets are what they should be, and a missing one says so and names the way out."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

from sapcore import cli, data, experiments
from sapcore.data import DataMissingError
from sapcore.errors import SapcoreError
from sapcore.paths import ROOT, data_root, results_root

needs_cifar10 = pytest.mark.skipif(
    not (data_root() / "cifar-10-batches-py").is_dir(), reason=f"CIFAR-10 is not under {data_root()}; set SAPCORE_DATA"
)


def test_digits_are_small_colour_images_in_0_255() -> None:
    for split, count in (("train", 1297), ("test", 500)):
        images, labels = data.load("digits", split)
        assert (images.shape, images.dtype) == ((count, 3, 32, 32), torch.uint8)
        assert (labels.shape, labels.dtype) == ((count,), torch.int64)
        assert (int(images.min()), int(images.max())) == (0, 255)
        assert labels.unique().tolist() == list(range(10))
        assert torch.equal(images[:, 0], images[:, 1])
        assert torch.equal(images[:, 0], images[:, 2])


def test_digits_are_split_into_disjoint_parts_that_make_up_the_whole() -> None:
    """Scikit-learn's images differ from one another; so each must turn up once, in one of the parts."""
    whole = {image.tobytes() for image in load_digits().images}
    assert len(whole) == 1797
    shrunk = [data.load("digits", split)[0] for split in data.SPLITS]
    rows = [{image.numpy().tobytes() for image in images} for images in shrunk]
    assert not rows[0] & rows[1]
    assert len(rows[0]) + len(rows[1]) == 1797


def test_each_digit_has_its_share_of_the_test_images() -> None:
    counts = data.load("digits", "test")[1].bincount()
    assert 48 <= int(counts.min()) <= int(counts.max()) <= 52


def test_digits_are_split_as_they_were_when_the_results_were_stored() -> None:
    assert data.load("digits", "train")[1][:10].tolist() == [2, 1, 2, 5, 1, 5, 9, 3, 0, 5]
    assert data.load("digits", "test")[1][:10].tolist() == [4, 8, 8, 3, 9, 0, 6, 3, 9, 8]


@pytest.mark.parametrize("dataset", ["imagenet", "CIFAR10", "", None, 10])
def test_an_unknown_data_set_is_refused(dataset: Any) -> None:
    with pytest.raises(SapcoreError, match=f"^dataset is {dataset!r}, but must be one of cifar10, digits$"):
        data.load(dataset)


def test_what_is_loaded_can_be_changed_without_changing_what_is_loaded_next() -> None:
    images, labels = data.load("digits", "test")
    images[:], labels[:] = 0, 9
    again = data.load("digits", "test")
    assert again[0].any()
    assert len(again[1].unique()) == 10


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(SapcoreError, match=r"^split is 'validation', but must be one of train, test$"):
        data.load("digits", "validation")


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine without CIFAR-10 and without a network."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("SAPCORE_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", refuse)
    data._cifar10.cache_clear()
    yield tmp_path / "data"
    data._cifar10.cache_clear()


@pytest.mark.parametrize("split", data.SPLITS)
def test_cifar10_that_is_neither_here_nor_to_be_had_names_the_ways_out(nowhere: Path, split: str) -> None:
    with pytest.raises(DataMissingError) as caught:
        data.load("cifar10", split)
    message = str(caught.value)
    assert str(nowhere) in message
    for way in ("-p dataset digits", "--dataset digits", "SAPCORE_DATA", "sapcore data"):
        assert way in message
    assert "\n" not in message


def test_a_chapter_that_needs_cifar10_stops_with_that_sentence(
    nowhere: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sapcore.checkpoints.sha256", lambda name: "0" * 64)
    with pytest.raises(DataMissingError, match="-p dataset digits"):
        experiments.table("fig1c", experiments.settings("cifar10", eps=3))
    assert not store.exists()


def test_the_command_that_downloads_fails_with_one_sentence(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("sapcore: CIFAR-10 is not under ")
    assert output.err.count("\n") == 1


def test_damaged_files_of_cifar10_are_not_read(nowhere: Path) -> None:
    batches = nowhere / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (batches / name).write_bytes(b"not what the checksum says")
    with pytest.raises(DataMissingError):
        data.load("cifar10")


@needs_cifar10
@pytest.mark.cifar10
@pytest.mark.parametrize(("split", "count"), [("train", 50_000), ("test", 10_000)])
def test_cifar10_is_the_real_one(split: str, count: int) -> None:
    """Torchvision checks the files' checksums on loading."""
    images, labels = data.load("cifar10", split)
    assert (images.shape, images.dtype) == ((count, 3, 32, 32), torch.uint8)
    assert (labels.shape, labels.dtype) == ((count,), torch.int64)
    assert labels.bincount().tolist() == [count // 10] * 10
    assert (int(images.min()), int(images.max())) == (0, 255)
    assert images.is_contiguous()


@needs_cifar10
@pytest.mark.cifar10
def test_the_first_test_images_are_a_cat_two_ships_and_an_airplane() -> None:
    _, labels = data.load("cifar10", "test")
    assert labels[:4].tolist() == [3, 8, 8, 0]  # cat, ship, ship, airplane


def test_folders_come_from_the_package_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, folder, default in (
        ("SAPCORE_DATA", data_root, ROOT / "data"),
        ("SAPCORE_RESULTS", results_root, ROOT / "data" / "results"),
    ):
        monkeypatch.delenv(variable, raising=False)
        assert folder() == default
        monkeypatch.setenv(variable, "")
        assert folder() == default
        monkeypatch.setenv(variable, "elsewhere")
        assert folder() == tmp_path / "elsewhere"
        monkeypatch.setenv(variable, "~/elsewhere")
        assert folder() == Path(os.path.expanduser("~/elsewhere")).resolve()  # noqa: PTH111
