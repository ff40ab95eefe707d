"""A run computes what is missing, stores each cell at once, and goes on after a failure."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sapcore import attacks, checkpoints, data, evaluation, results, runner
from sapcore.checkpoints import CheckpointError
from sapcore.data import DataMissingError
from sapcore.experiments import cells, settings
from sapcore.paths import CHECKPOINTS
from sapcore.randomness import stream
from sapcore.results import Cell
from tests.test_results import RESULT

CPU = torch.device("cpu")
WANTED = cells("fig1a", settings("digits", [0, 3], examples=3, passes=2))[:6]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells that were computed, in order; computing is free here."""
    done: list[Cell] = []

    def compute(cell: Cell, _: torch.device) -> dict[str, Any]:
        done.append(cell)
        return RESULT

    monkeypatch.setattr(runner, "compute", compute)
    return done


def run(wanted: list[Cell]) -> list[tuple[Cell, Exception]]:
    return runner.run(wanted, device="cpu", progress=False)


def test_a_run_computes_only_what_is_missing(store: Path, computed: list[Cell]) -> None:
    assert run(WANTED[:2]) == []
    assert computed == WANTED[:2]
    assert run(WANTED) == []
    assert computed == WANTED
    assert run(WANTED) == []
    assert len(computed) == len(WANTED)


def test_a_damaged_cell_is_computed_anew(store: Path, computed: list[Cell]) -> None:
    run(WANTED)
    WANTED[3].path.write_text("{")
    run(WANTED)
    assert computed[len(WANTED) :] == [WANTED[3]]
    assert results.state(WANTED[3]) == ("present", "")


def test_each_cell_is_stored_before_the_next_is_begun(
    store: Path, computed: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = runner.compute
    stored_before: list[int] = []

    def count(cell: Cell, device: torch.device) -> dict[str, Any]:
        stored_before.append(len(list(store.rglob("*.json"))))
        return compute(cell, device)

    monkeypatch.setattr(runner, "compute", count)
    run(WANTED)
    assert stored_before == list(range(len(WANTED)))


def test_a_run_that_is_stopped_keeps_its_cells_and_goes_on(
    store: Path, computed: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = runner.compute

    def stop_at_the_third(cell: Cell, device: torch.device) -> dict[str, Any]:
        if cell == WANTED[2]:
            raise KeyboardInterrupt
        return compute(cell, device)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "compute", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            run(WANTED)
    assert [results.state(cell)[0] for cell in WANTED] == ["present"] * 2 + ["missing"] * 4
    run(WANTED)
    assert computed == WANTED


def test_a_cell_that_fails_is_reported_and_stops_no_other(
    store: Path, computed: list[Cell], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compute = runner.compute
    error = RuntimeError("out of memory")

    def fail(cell: Cell, device: torch.device) -> dict[str, Any]:
        if cell == WANTED[1]:
            raise error
        return compute(cell, device)

    monkeypatch.setattr(runner, "compute", fail)
    assert run(WANTED) == [(WANTED[1], error)]
    assert [results.state(cell)[0] for cell in WANTED] == ["present", "missing"] + ["present"] * 4
    output = capsys.readouterr()
    assert f"{WANTED[1].label}: RuntimeError: out of memory" in output.out + output.err


def test_a_missing_data_set_stops_the_run_at_once(
    store: Path, computed: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise DataMissingError("no data")

    monkeypatch.setattr(data, "load", missing)
    with pytest.raises(DataMissingError):
        run(WANTED)
    assert computed == []


def test_a_damaged_checkpoint_stops_the_run_at_once(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    card = (CHECKPOINTS / "resnet20-digits.json").read_bytes()
    (folder / "resnet20-digits.json").write_bytes(card)
    (folder / "resnet20-digits.safetensors").write_bytes(b"half a file")
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", folder)
    runner.defended.cache_clear()
    with pytest.raises(CheckpointError, match="truncated or altered"):
        run(WANTED)


def test_nothing_to_do_needs_no_data(store: Path, computed: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    run(WANTED)
    monkeypatch.setattr(data, "load", None)
    assert run(WANTED) == []


def test_the_environment_names_the_store(tmp_path: Path, computed: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        monkeypatch.setenv("SAPCORE_RESULTS", str(folder))
        run(WANTED)
        assert len(list(folder.rglob("*.json"))) == len(WANTED)
    assert len(computed) == 2 * len(WANTED)


def test_a_stored_cell_tells_where_it_comes_from(store: Path, computed: list[Cell]) -> None:
    run(WANTED[:1])
    content = json.loads(WANTED[0].path.read_text())
    assert content["result"] == RESULT
    origin = content["provenance"]
    assert {"device", "threads", "versions", "commit", "date", "seconds"} == origin.keys()
    assert {"python", "sapcore", "torch", "numba"} == origin["versions"].keys()
    assert origin["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_progress_bar_goes_to_the_end(
    store: Path, computed: list[Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    runner.run(WANTED, device="cpu", progress=True)
    assert "100%" in capsys.readouterr().err


def cell_of(figure: str, label: str) -> Cell:
    listed = cells(figure, settings("digits", [0, 3], examples=5, passes=2, seed=4, steps=2))
    return next(cell for cell in listed if cell.label == label)


@pytest.mark.parametrize(
    ("figure", "label", "attack"),
    [
        ("fig1a", "SAP-100 none", lambda model, dense, x, y: x),
        ("fig1a", "SAP-100 noise eps 3", lambda model, dense, x, y: attacks.noise(x, 3, 4)),
        ("fig1b", "SAP-100 fgsm eps 3", lambda model, dense, x, y: attacks.fgsm(model, x, y, 3, 2, 4)),
        ("fig1b", "dense fgsm eps 3", lambda model, dense, x, y: attacks.fgsm(dense, x, y, 3)),
        ("fig1c", "SAP-100 iterative eps 3", lambda model, dense, x, y: attacks.iterative(model, x, y, 3, 1, 2, 1, 4)),
        (
            "fig1c",
            "SAP-100 iterative from dense eps 3",
            lambda model, dense, x, y: attacks.iterative(dense, x, y, 3, 1, 2),
        ),
    ],
)
def test_a_cell_is_the_accuracy_on_what_its_attack_makes_of_the_first_images(
    figure: str,
    label: str,
    attack: Callable[..., torch.Tensor],
    dense: nn.Module,
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    cell = cell_of(figure, label)
    model = runner.defended(cell.checkpoint, cell.checkpoint_sha256, cell.defence, CPU)
    x, y = digits[0][:5], digits[1][:5]
    attacked = attack(model, dense, x, y)
    found = runner.attacked(cell, x, y, CPU)
    assert float(((found - attacked).abs() > 1e-3).double().mean()) < 5e-3
    p = evaluation.predict(model, attacked, cell.passes, stream(4, "evaluation"))
    expected = evaluation.accuracy(p, y)
    result = runner.compute(cell, CPU)
    assert result["images"] == 5
    assert result["accuracy"] == expected.value
    assert (result["low"], result["high"], result["correct"]) == (expected.low, expected.high, expected.correct)


def test_fgsm_cells_of_one_curve_share_their_direction(monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    calls: list[int] = []
    direction = attacks.fgsm_direction

    def count(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return direction(*arguments, **options)

    monkeypatch.setattr(attacks, "fgsm_direction", count)
    runner._direction.cache_clear()
    curve = [
        c for c in cells("fig1b", settings("digits", [1, 2, 4], examples=3, passes=1)) if c.defence.label == "SAP-50"
    ]
    assert run(curve) == []
    assert len(curve) == 3
    assert len(calls) == 1
    runner._direction.cache_clear()
