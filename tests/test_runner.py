"""A run computes what is missing, stores each cell at once, and goes on after a failure."""

import dataclasses
import errno
import inspect
import io
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numba
import pytest
import torch
from torch import nn
from tqdm import tqdm

from sapcore import attacks, checkpoints, data, evaluation, provenance, results, runner
from sapcore.attacks import library
from sapcore.checkpoints import CheckpointError
from sapcore.data import DataMissingError
from sapcore.errors import SapcoreError
from sapcore.experiments import Point, cells, points, settings
from sapcore.models import QNetwork, initialize
from sapcore.paths import CHECKPOINTS
from sapcore.randomness import stream
from sapcore.results import Attack, Cell, Defence
from sapcore.rl import playing
from sapcore.rl.environments import Rules, make
from sapcore.sap import SAP, with_sap
from sapcore.sap.bernoulli import BernoulliSAP
from tests.test_results import ORIGIN, RESULT

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


def test_the_bar_moves_within_a_cell(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar(tqdm):
        moves: ClassVar[list[int]] = []

        def update(self, n: float = 1) -> bool | None:
            self.moves.append(int(n))
            return super().update(n)

    monkeypatch.setattr(runner, "tqdm", Bar)
    noisy = [cell for cell in cells("fig1b", settings("digits", 8, 6, 300)) if cell.defence.label == "SAP-100"]
    assert runner.run(noisy, device="cpu") == []
    assert sum(Bar.moves) == sum(map(runner._work, noisy))
    assert sum(move > 0 for move in Bar.moves) > 2 * len(noisy)
    assert max(Bar.moves) <= evaluation.BATCH_SIZE


def test_the_bar_of_a_game_counts_every_pass_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for the label, the gradient and the action, in episodes as long as the stored ones."""
    monkeypatch.setenv("SAPCORE_RESULTS", str(tmp_path))
    given = points("table1", settings(game="Bowling", eps=2))
    work = {p.series: runner._work(p.cell) for p in given}
    assert work == {"random": 30_000, "dense": 30_000 * 3, "SAP-100": 15_000 * 160, "SAP-100 vs dense": 15_000 * 32}
    folder = given[0].cell.path.parent
    folder.mkdir(parents=True)
    for i, result in enumerate(({"steps": 40, "returns": [1.0, 2.0]}, {"steps": 110, "returns": [3.0]})):
        (folder / f"{i}.json").write_text(json.dumps({"result": result}))
    (folder / "half.json").write_text("{")
    assert runner._work(next(p.cell for p in given if p.series == "dense")) == 30 * 50 * 3


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
    assert {"device", "threads", "instructions", "versions", "commit", "date", "seconds"} == origin.keys()
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


RUNGS = [
    point for point in points("ladder", settings("digits", 7.905, examples=2, passes=10))
    if point.panel in ("SAP-100", "Bernoulli-SAP-200") and point.cell.attack.source
]  # fmt: skip


@pytest.mark.parametrize("point", RUNGS, ids=lambda point: f"{point.panel}, {point.series}")
def test_an_attack_is_run_as_its_cell_says(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every argument that the function has, on the network that the cell names."""
    cell = dataclasses.replace(point.cell, precision="bfloat16", seed=4)
    attack, asked = cell.attack, dict[str, Any]()
    assert attack.source is not None

    def spy(where: Any, name: str) -> None:
        signature = inspect.signature(getattr(where, name))

        def called(*given: Any, **named: Any) -> torch.Tensor:
            bound = signature.bind(*given, **named)
            bound.apply_defaults()
            asked.update(bound.arguments, called=name)
            return torch.zeros_like(bound.arguments["x"], dtype=torch.float32)

        monkeypatch.setattr(where, name, called)

    for where, name in (
        (attacks, "iterative"), (attacks, "fgsm_direction"), (library, "autoattack"), (library, "square"),
        (library, "autoattack_standard"),
    ):  # fmt: skip
        spy(where, name)
    monkeypatch.setattr(runner, "defended", lambda checkpoint, sha256, defence, *_: (checkpoint, sha256, defence))
    runner._direction.cache_clear()
    runner.attacked(cell, *runner.seen("digits", cell.checkpoint, 2), CPU)
    runner._direction.cache_clear()
    assert asked["called"] == {"fgsm": "fgsm_direction"}.get(attack.kind, attack.kind)
    wanted = {
        "eps": attack.eps, "step": attack.step, "steps": attack.steps, "queries": attack.steps,
        "passes": attack.passes, "estimator": attack.estimator, "loss": attack.loss, "seed": 4,
        "random_start": attack.random_start, "restarts": attack.restarts, "precision": "bfloat16",
    }  # fmt: skip
    assert {name: asked[name] for name in wanted if name in asked}.items() <= wanted.items()
    assert {"seed", "precision"} < asked.keys()
    assert "passes" in asked or attack.passes == 1
    assert asked["model"] == (cell.checkpoint, cell.checkpoint_sha256, attack.source)


@pytest.mark.parametrize(
    ("defence", "described"),
    [
        (Defence("sap", 5, "identity"), {"kind": "sap", "percent": 5}),
        (Defence("sap", 200, "scale"), {"kind": "sap", "percent": 200}),
        (Defence("bernoulli-sap", 200, "identity"), {"kind": "bernoulli-sap", "percent": 200}),
        (Defence("dropout", 0.1), {"kind": "dropout", "level": 0.1}),
        (Defence("rna", 0.3), {"kind": "rna", "level": 0.3}),
        (Defence("rsa", 0.5), {"kind": "rsa", "level": 0.5}),
        (Defence("rnw", 0.02), {"kind": "rnw", "std": 0.02}),
        (Defence("rsw", 0.3), {"kind": "rsw", "std": 0.3}),
        (Defence("swp", 150), {"kind": "swp", "percent": 150}),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_a_defence_is_the_one_that_its_cell_names(defence: Defence, described: dict[str, object]) -> None:
    model = runner.defended("resnet20-digits", checkpoints.sha256("resnet20-digits"), defence, CPU)
    assert model.description == described
    backward = {module.backward_kind for module in model.modules() if isinstance(module, SAP | BernoulliSAP)}
    assert backward == ({defence.backward} if "sap" in defence.kind else set())


def test_single_passes_are_summed_up_as_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images, of whose two passes none, one, both, both and one are right."""
    found = torch.eye(10)[:5].double(), torch.tensor([0, 1, 2, 2, 1])
    monkeypatch.setattr(evaluation, "predict_and_count", lambda *_, **__: found)
    result = runner.compute(cell_of("fig1a", "SAP-100 none"), CPU)
    assert (result["single_pass"], result["every_pass"]) == pytest.approx((0.6, 0.4))


def test_a_cell_without_what_a_figure_also_needs_is_stale_and_computed_anew(store: Path, computed: list[Cell]) -> None:
    cell = WANTED[0]
    results.write(cell, {name: value for name, value in RESULT.items() if name != "calibration"}, ORIGIN)
    assert results.state(cell, ("calibration",)) == ("stale", "it was computed without its calibration")
    assert run([cell]) == []
    assert computed == []
    runner.run([cell], "cpu", progress=False, also=("calibration",))
    assert computed == [cell]


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


def test_two_runs_at_once_share_the_work_and_leave_whole_cells(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other run has stored in the meantime is not computed again."""
    done: list[Cell] = []

    def compute(cell: Cell, _: torch.device) -> dict[str, Any]:
        done.append(cell)
        if cell == WANTED[0]:
            for other in WANTED[2:4]:
                results.write(other, RESULT, ORIGIN)
        return RESULT

    monkeypatch.setattr(runner, "compute", compute)
    assert run(WANTED) == []
    assert done == [cell for cell in WANTED if cell not in WANTED[2:4]]
    assert {results.state(cell)[0] for cell in WANTED} == {"present"}


def test_two_processes_that_run_at_once_end_with_the_cells_of_one(store: Path) -> None:
    command = [sys.executable, "-m", "sapcore.cli", "run", "fig1a", "--dataset", "digits", "--eps", "0", "3"]
    command += ["--examples", "3", "--passes", "2", "--device", "cpu"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    wanted = cells("fig1a", settings("digits", [0, 3], examples=3, passes=2))
    assert {results.state(cell)[0] for cell in wanted} == {"present"}
    assert sorted(path.name for path in store.rglob("*") if path.is_file()) == sorted(c.path.name for c in wanted)


def test_a_full_disk_stops_the_run_with_one_sentence_and_harms_no_cell(
    store: Path, computed: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full in the middle of the third cell's file."""
    write = Path.open

    class Full(io.BytesIO):
        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_until_full(self: Path, mode: str = "r", **rest: Any) -> Any:
        full = WANTED[2].path.name in self.name and "w" in mode
        if full:
            write(self, mode, **rest).close()
            return Full()
        return write(self, mode, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_until_full)
        with pytest.raises(SapcoreError) as caught:
            run(WANTED)
    assert str(caught.value) == (
        f"{WANTED[2].path} cannot be written (No space left on device); what is finished is stored; "
        "make room, or name another folder in SAPCORE_RESULTS, and start again"
    )
    assert sorted(path.name for path in store.rglob("*") if path.is_file()) == sorted(c.path.name for c in WANTED[:2])
    run(WANTED)
    assert {results.state(cell)[0] for cell in WANTED} == {"present"}


def test_a_store_that_cannot_be_written_is_found_out_before_the_first_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").write_text("a file, not a folder")
    monkeypatch.setenv("SAPCORE_RESULTS", str(tmp_path / "store"))
    monkeypatch.setattr(runner, "compute", lambda *_: pytest.fail("a cell was computed"))
    with pytest.raises(SapcoreError, match=r"store/digits cannot be written \(Not a directory\); make it writable"):
        run(WANTED)


def test_a_killed_run_loses_at_most_the_cell_it_was_at(store: Path) -> None:
    """SIGKILL once two cells are on disk; every file there is whole, and the next run goes on."""
    script = "import sys; from sapcore import runner; from tests.test_runner import WANTED, slowly; slowly(); "
    script += "runner.run(WANTED, device='cpu', progress=False)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 120
    while len(list(store.rglob("*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [results.state(cell)[0] for cell in WANTED] == ["present"] * 2 + ["missing"] * (len(WANTED) - 2)
    assert run(WANTED) == []
    assert {results.state(cell)[0] for cell in WANTED} == {"present"}


def slowly() -> None:
    """Let the first two cells cost nothing, and the third never end; for a process that is to be killed."""
    begun = itertools.count()

    def compute(*_: object) -> dict[str, Any]:
        time.sleep(600 if next(begun) == 2 else 0)
        return RESULT

    setattr(runner, "compute", compute)  # noqa: B010


def test_a_checkpoint_that_changed_under_a_cell_makes_it_stale_and_is_never_used_for_it(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights are replaced between the listing and the run: the cell fails; listed anew, the old one is stale."""
    (cell,) = cells("sec2", settings("digits", [0], examples=3))
    results.write(cell, RESULT, ORIGIN)
    network = checkpoints.load("resnet20-digits")
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path)
    next(network.parameters()).add_(1)
    checkpoints.save(network, "resnet20-digits", {})
    runner.defended.cache_clear()
    old = dataclasses.replace(cell, seed=1)
    ((failed, error),) = run([old])
    assert failed == old
    assert isinstance(error, CheckpointError)
    assert "is another one than the cell's" in str(error)
    (new,) = cells("sec2", settings("digits", [0], examples=3))
    assert results.state(new) == ("stale", "the checkpoint changed since it was computed")


def test_a_cell_of_another_version_is_refused() -> None:
    with pytest.raises(SapcoreError, match=r"the cell is of version 99, but this code computes version"):
        runner.compute(dataclasses.replace(WANTED[0], version=99), CPU)


def test_every_kind_of_defence_can_be_computed(store: Path) -> None:
    for kind, level in (
        ("dropout", 0.1),
        ("rnw", 0.02),
        ("rsw", 0.1),
        ("dwp", 50),
        ("swp", 100),
        ("rna", 0.1),
        ("rsa", 0.1),
    ):
        defence = Defence(kind, level)
        attack = Attack("fgsm", 3, defence, "mean_of_gradients", 2 if defence.noisy else 1)
        cell = dataclasses.replace(WANTED[0], defence=defence, attack=attack, passes=2 if defence.noisy else 1)
        assert run([cell]) == []
        stored = results.read(cell)
        assert stored is not None
        assert sum(stored["result"]["calibration"]["images"]) == 3


class Store:
    """What `verify` reads, without a computation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[str, Any] = dict(RESULT)
        monkeypatch.setattr(runner, "compute", lambda cell, device: self.found)
        here = provenance.collect(CPU)
        for cell in WANTED:
            results.write(cell, RESULT, here)


def test_verify_compares_exactly_on_the_same_device_and_versions(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Store(monkeypatch)
    assert [check.same for check in runner.verify(WANTED, device="cpu")] == [True] * len(WANTED)
    there.found["correct"] += 1
    checks = list(runner.verify(WANTED, device="cpu"))
    assert not any(check.same for check in checks)
    assert "the same device and versions; not the same: correct" in checks[0].reason


def test_verify_compares_the_calibration_too(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, cell = Store(monkeypatch), WANTED[0]
    results.write(cell, RESULT | {"calibration": {"ece": 0.25, "images": [1, 2]}}, provenance.collect(CPU))
    for ece, same in ((0.25, True), (0.26, False)):
        there.found = RESULT | {"calibration": {"ece": ece, "images": (1, 2)}}
        (check,) = runner.verify([cell], device="cpu")
        assert check.same is same
        assert same or check.reason.endswith("not the same: calibration)")


def test_verify_compares_within_the_interval_elsewhere(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Store(monkeypatch)
    results.write(WANTED[0], RESULT, ORIGIN)
    low, high = RESULT["low"], RESULT["high"]
    for accuracy, same in ((low - 0.01, False), (low, True), (high, True), (high + 0.01, False)):
        there.found = RESULT | {"accuracy": accuracy, "correct": -1}
        (check,) = runner.verify(WANTED[:1], device="cpu")
        assert check.same is same
        assert "computed on a computer" in check.reason


@pytest.mark.parametrize(
    "change",
    [
        {"device": "a computer"},
        {"threads": numba.config.NUMBA_NUM_THREADS + 1},
        {"versions": {"torch": "0"}},
        {"instructions": "AVX-9"},
    ],
)
def test_verify_compares_exactly_only_if_device_threads_and_versions_are_the_same(
    change: dict[str, Any], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Store(monkeypatch)
    results.write(WANTED[0], RESULT, provenance.collect(CPU) | change)
    there.found = RESULT | {"correct": -1}
    (check,) = runner.verify(WANTED[:1], device="cpu")
    assert check.same
    assert "95 % interval" in check.reason


def test_verify_of_a_cell_that_does_not_name_its_instructions_takes_either(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, origin = Store(monkeypatch), provenance.collect(CPU)
    results.write(WANTED[0], RESULT, {name: value for name, value in origin.items() if name != "instructions"})
    for found, how in ((RESULT, "the same device and versions"), (RESULT | {"correct": -1}, "95 % interval")):
        there.found = found
        (check,) = runner.verify(WANTED[:1], device="cpu")
        assert check.same
        assert how in check.reason


@pytest.mark.parametrize(
    ("low", "high", "same"), [(1.0, 3.9, False), (1.0, 4.1, True), (5.9, 9.0, True), (6.1, 9.0, False)]
)
def test_verify_of_a_game_elsewhere_wants_intervals_that_overlap(
    low: float, high: float, same: bool, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell("Bowling", "", "", Defence("random"), Attack(), 2, 1, 0, "float32", Rules())
    played = {"mean": 5.0, "low": 4.0, "high": 6.0, "returns": [4.0, 6.0], "steps": 9}
    results.write(cell, played, ORIGIN)
    found = played | {"low": low, "high": high, "mean": (low + high) / 2}
    monkeypatch.setattr(runner, "compute", lambda cell, device: found)
    (check,) = runner.verify([cell], device="cpu")
    assert check.same is same


def test_a_games_cell_is_played_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def spy(*given: Any, **named: Any) -> playing.Episodes:
        bound = signature.bind(*given, **named)
        asked.update(bound.arguments)
        return playing.Episodes([1.0, 2.0], 9)

    signature = inspect.signature(playing.play)
    monkeypatch.setattr(playing, "play", spy)
    monkeypatch.setattr(runner, "defended", lambda name, sha256, defence, device: defence)
    sap, rules = Defence("sap", 100), Rules(noops=3)
    attack = Attack("fgsm", 4, Defence(), "gradient_of_mean", 7)
    runner.compute(Cell("Bowling", "agent", "ab" * 32, sap, attack, 2, 5, 11, "bfloat16", rules), CPU)
    assert asked == {
        "agent": sap, "game": "Bowling", "episodes": 2, "eps": 4, "passes": 5, "source": Defence(),
        "gradient_passes": 7, "seed": 11, "rules": rules, "estimator": "gradient_of_mean", "precision": "bfloat16",
    }  # fmt: skip


def test_verify_takes_as_many_threads_as_the_stored_cell_had(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def note(cell: Cell, device: torch.device) -> dict[str, Any]:
        taken.append(torch.get_num_threads())
        return RESULT

    monkeypatch.setattr(runner, "compute", note)
    before, most = torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS
    for count, origin in ((1, {"threads": 1}), (before, {"threads": most + 1}), (before, {})):
        results.write(WANTED[0], RESULT, {**ORIGIN, **origin})
        list(runner.verify(WANTED[:1], device="cpu"))
        assert taken.pop() == count
        assert torch.get_num_threads() == before


def test_verify_draws_its_sample_by_the_seed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(monkeypatch)
    drawn = {seed: [check.cell for check in runner.verify(WANTED, 3, seed, "cpu")] for seed in range(20)}
    assert {len(set(sample)) for sample in drawn.values()} == {3}
    assert len({tuple(sample) for sample in drawn.values()}) > 5
    assert [check.cell for check in runner.verify(WANTED, 3, 7, "cpu")] == drawn[7]
    assert len(list(runner.verify(WANTED, 100, 0, "cpu"))) == len(WANTED)
    for senseless in (0, -1, True, 1.5):
        with pytest.raises(SapcoreError, match=r"sample is .*, but must be a whole number of 1 or more"):
            list(runner.verify(WANTED, senseless))  # type: ignore[arg-type]


def test_a_stored_cell_is_verified_by_computing_it(store: Path) -> None:
    run(WANTED[:3])
    assert all(check.same for check in runner.verify(WANTED[:3], device="cpu"))


def test_a_game_is_a_cell_like_any_other(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Played, stored, read, and verified bit for bit."""
    pytest.importorskip("ale_py", reason="Atari is an extra: pip install -e '.[rl]'")
    agent = QNetwork(6).requires_grad_(False)
    initialize(agent, torch.Generator().manual_seed(0))
    monkeypatch.setattr(runner, "defended", lambda name, sha, defence, device: with_sap(agent.eval(), 100))
    monkeypatch.setattr(checkpoints, "load", lambda name: agent)
    short = Rules(frames_per_episode=160)
    monkeypatch.setattr("sapcore.rl.playing.make", lambda game, count, rules: make(game, count, short))
    noisy = Defence("sap", 100)
    attack = Attack("fgsm", 4, noisy, "mean_of_gradients", 2)
    cells = [
        Cell("Bowling", "agent", "ab" * 32, noisy, attack, 2, 2, 0, "float32"),
        Cell("Bowling", "", "", Defence("random"), Attack(), 2, 1, 0, "float32"),
    ]
    assert run(cells) == []
    for cell in cells:
        stored = results.read(cell)
        assert stored is not None
        assert len(stored["result"]["returns"]) == 2
        assert stored["result"]["steps"] <= 2 * 40
    assert all(check.same for check in runner.verify(cells, device="cpu"))
    played = runner.compute(cells[0], CPU)
    monkeypatch.setattr(runner, "compute", lambda cell, device: played | {"returns": [0.0, 1.0]})
    (check,) = runner.verify(cells[:1], device="cpu")
    assert not check.same
    assert "mean return" in check.reason


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_images_that_share_their_statistics_are_as_many_on_every_device(device: str) -> None:
    assert runner._batch_size(torch.device(device), 500) == 500
    assert runner._batch_size(torch.device(device)) > 0


def test_an_attack_on_a_game_has_no_direction_that_cells_could_share() -> None:
    """Each observation has its own, also where the cells go to a cluster."""
    noisy = Defence("sap", 100)
    cell = Cell(
        "Bowling", "agent", "ab" * 32, noisy, Attack("fgsm", 4, noisy, "mean_of_gradients", 2), 2, 2, 0, "float32"
    )
    assert runner._direction_of(cell) is None


def test_games_elsewhere_agree_if_their_intervals_overlap(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("Bowling", "", "", Defence("random"), Attack(), 2, 1, 0, "float32")
    stored = {"mean": 5.0, "low": 4.0, "high": 6.0, "returns": [4.0, 6.0], "steps": 9}
    results.write(cell, stored, ORIGIN)
    for low, high, same in ((5.9, 8.0, True), (6.1, 8.0, False), (None, None, False)):
        found = stored | {"mean": 7.0, "low": low, "high": high}
        monkeypatch.setattr(runner, "compute", lambda cell, device, found=found: found)
        (check,) = runner.verify([cell], device="cpu")
        assert check.same is same
