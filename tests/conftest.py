"""What several tests share: the embedded data, its network, a store of one's own, and watchers."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported

from sapcore import checkpoints, data, with_sap
from sapcore.randomness import NoisyModel

mpl.use("Agg")
# Examples are the same in every run, so that a test passes everywhere or nowhere.
hypothesis.settings.register_profile("sapcore", derandomize=True, deadline=None, database=None, max_examples=40)
hypothesis.settings.load_profile("sapcore")


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """The test images of `digits` and their labels."""
    return data.load("digits", "test")


@pytest.fixture(scope="session")
def dense() -> nn.Module:
    """The committed network for `digits`; frozen and in eval mode, so tests may share it."""
    return checkpoints.load("resnet20-digits")


@pytest.fixture(scope="session")
def noisy(dense: nn.Module) -> NoisyModel:
    """SAP-100 of `dense`."""
    return with_sap(dense, 100)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of results."""
    folder = tmp_path / "results"
    monkeypatch.setenv("SAPCORE_RESULTS", str(folder))
    return folder


@pytest.fixture
def untouched_generators() -> Iterator[None]:
    """Fails the test if it moves the global generators of torch, numpy or the standard library."""

    def states() -> tuple[bytes, str, object]:
        return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002

    before = states()
    yield
    assert states() == before, "a global random generator was used or seeded"


@pytest.fixture
def watch() -> Iterator[Callable[[nn.Module], list[int]]]:
    """`watch(model)` returns a list that grows by the number of rows of each forward call."""
    handles = []

    def start(model: nn.Module) -> list[int]:
        rows: list[int] = []
        handles.append(model.register_forward_pre_hook(lambda _module, arguments: rows.append(len(arguments[0]))))
        return rows

    yield start
    for handle in handles:
        handle.remove()
