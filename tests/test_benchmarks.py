"""Each benchmark runs, prints one table and appends one row; here with so little work that its numbers mean nothing."""

import argparse
import importlib
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from sapcore import checkpoints, experiments, figures, results, training
from sapcore.errors import SapcoreError
from sapcore.paths import ROOT
from sapcore.rl import double_dqn

TINY = {
    "sampling": ["--rounds", "1", "--passes", "4"],
    "network": ["--rounds", "1", "--examples", "4"],
    "attacks": ["--rounds", "1", "--examples", "4", "--steps", "2"],
    "eot": ["--rounds", "1", "--examples", "2", "--steps", "1", "--passes", "2"],
    "training": ["--rounds", "1", "--examples", "64"],
    "double_dqn": ["--rounds", "1", "--steps", "16", "--most", "10000"],
    "scaling": ["--points", "1"],
    "bfloat16": ["--rounds", "1", "--examples", "4"],
}
RATIOS = {
    "sampling": "times_faster",
    "network": "share_of_dense_throughput",
    "attacks": "times_faster",
    "eot": "times_faster",
    "training": "times_faster",
    "double_dqn": "times_faster",
    "scaling": "lines",
    "bfloat16": "times_faster",
}


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_prints_a_table_and_appends_a_row(name: str, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--device", "cpu"]
    script += [] if name == "double_dqn" else ["--dataset", "digits"]
    done = subprocess.run([*script, "--rows", str(tmp_path), *TINY[name]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / f"{name}.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["benchmark"] == name
    assert {"device", "threads", "versions", "commit", "date"} <= row["provenance"].keys()
    assert all(entry["p50"] > 0 for entry in row["table"])
    assert done.stdout.startswith("|")
    assert RATIOS[name] in done.stdout
    assert str(row[RATIOS[name]]) in done.stdout


def test_a_benchmark_says_which_data_set_it_lacks(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "sampling.py"), "--dataset", "imagenet"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'imagenet'" in done.stderr


def test_one_row_per_device_is_read_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    common = importlib.import_module("common")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    with pytest.raises(SapcoreError, match=r"no row of cifar10; `python benchmarks/sampling.py --dataset cifar10`"):
        results.benchmarks("sampling")
    folder = tmp_path / "data" / "benchmarks"
    folder.mkdir(parents=True)
    measured = [("cifar10", "a"), ("cifar10", "b"), ("cifar10", "a"), ("digits", "a")]
    rows = [{"number": i, "dataset": d, "provenance": {"device": device}} for i, (d, device) in enumerate(measured)]
    (folder / "sampling.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["number"] for row in results.benchmarks("sampling")] == [2, 1]
    rows += [{"number": i, "dataset": "cifar10", "provenance": {"device": "a", "instructions": "AVX2"}} for i in (4, 5)]
    (folder / "sampling.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["number"] for row in results.benchmarks("sampling")] == [2, 1, 5], "one name, other instructions"
    assert [row["number"] for row in results.benchmarks("sampling", "digits")] == [3]
    with (folder / "sampling.jsonl").open("a") as file:
        file.write(json.dumps(rows[-1])[:20])  # a benchmark was killed while it wrote
    assert [row["number"] for row in results.benchmarks("sampling")] == [2, 1, 5]
    common.report("sampling", argparse.Namespace(dataset="digits", rows=folder, device=torch.device("cpu")), [{"a": 1}])
    assert [row.get("number") for row in results.benchmarks("sampling", "digits")] == [3, None], "in a line of its own"


def test_the_figures_of_a_benchmark_can_be_drawn() -> None:
    frame = pd.DataFrame(
        [
            {"label": "ours", "p20": 1.0, "p50": 2.0, "p80": 3.0},
            {"label": "once", "p20": None, "p50": 20.0, "p80": None},
            {"label": "published", "p50": 30.0, "line": True},
        ]
    ).assign(device="one", line=lambda f: f["line"].eq(True))
    (axes,) = figures.speeds(frame, "seconds").axes
    assert axes.get_title() == ""
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [2, 20]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["ours", "once"]
    points = [{"grows": what, "number": n, "p20": n / 20, "p50": n / 10, "p80": n / 5, "peak MiB": 300}
              for what in ("images", "passes", "map side") for n in (1, 10, 100)]  # fmt: skip
    row = {"table": points, "provenance": {"device": "one"}}
    drawn = figures.scaling_lines(figures.benchmark_table([row])).axes
    upper = drawn[:3]
    assert all((axes.get_yscale(), axes.get_ylim()[0]) == ("linear", 0) for axes in drawn[3:])
    assert [np.asarray(axes.lines[0].get_xdata()).tolist() for axes in upper] == [
        [1, 10, 100],
        [1, 10, 100],
        [1, 100, 10_000],
    ]


def test_the_faster_way_is_named_first() -> None:
    times = {"p20": 0.4, "p50": 0.5, "p80": 0.8}
    assert figures.times_as_fast(times, "so", "by them") == "By them it is **2.0 times** as fast as so (1.2 to 2.5)"
    inverse = {"p20": 1.25, "p50": 2.0, "p80": 2.5}
    assert figures.times_as_fast(inverse, "by us", "so") == "By us it is **2.0 times** as fast as so (1.2 to 2.5)"


def test_each_device_has_its_own_panel_or_line() -> None:
    rows = [{"label": "ours", "p50": 2.0, "line": False}, {"label": "plain copy", "p50": 0.5, "line": True}]
    both = [{"table": rows, "provenance": {"device": device}} for device in ("a CPU", "a GPU")]
    panels = figures.speeds(figures.benchmark_table(both).assign(p20=np.nan, p80=np.nan), "seconds").axes
    assert [axes.get_title() for axes in panels] == ["a CPU", "a GPU"]
    assert [axes.get_legend_handles_labels()[1] for axes in panels] == [["plain copy"]] * 2
    points = [{"grows": what, "number": 1, "p20": 1, "p50": 1, "p80": 1, "peak MiB": 1} for what in figures.GROWING]
    both = [{"table": points, "provenance": {"device": device}} for device in ("a CPU", "a GPU")]
    drawn = figures.scaling_lines(figures.benchmark_table(both))
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["a CPU", "a GPU"]


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("accelerator")


def test_the_accelerators_steps_are_the_tests_the_benchmarks_what_is_untrained_and_the_cells(accelerator: Any) -> None:
    first, *others, cells, trainings, last = accelerator.steps()
    assert [list(first), list(cells), list(last)] == [["tests"], ["cells-of-trained"], ["cells"]]
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert {name for group in others for name in group} == scripts - {"accelerator", "common"}
    trained = set(checkpoints.names())
    everything = {*training.RECIPES, *double_dqn.RECIPES}
    assert {name.removeprefix("train-") for name in trainings} == everything - trained
    names = cells["cells-of-trained"][6:]
    assert "fig1b" in names
    assert set(names) <= set(experiments.FIGURES)
    needed = {cell.checkpoint for name in names for cell in experiments.cells(name)}
    assert needed - {""} <= trained, "the random policy has no checkpoint"


def test_the_accelerator_hands_the_data_set_on(accelerator: Any) -> None:
    for group in accelerator.steps("digits"):
        for name, command in group.items():
            asked = (name in accelerator.BENCHMARKS and name != "double_dqn") or name.startswith("cells")
            assert ("digits" in command) == asked


def test_the_accelerator_packs_what_is_new_or_changed_and_no_half_written_file(
    accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    monkeypatch.setattr(accelerator, "ROOT", root)
    for name in ("data/results/old.json", "data/results/changed.json", ".state/double-dqn-Bowling/replay"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("before")
    out.mkdir()
    (out / "before.json").write_text(json.dumps(accelerator.digests()))
    (root / "data/results/changed.json").write_text("and after")
    for name in ("data/results/new.json", "data/results/.half.json.7.tmp", ".state/a.lock", ".state/a.safetensors"):
        (root / name).write_text("after")
    accelerator.pack(out)
    with tarfile.open(out / "results.tar") as tar:
        assert sorted(tar.getnames()) == [".state/a.safetensors", "data/results/changed.json", "data/results/new.json"]


def test_the_accelerator_runs_a_group_side_by_side_and_stops_at_the_deadline(accelerator: Any, tmp_path: Path) -> None:
    commands = {
        "done": [sys.executable, "-c", "print('hello')"],
        "failed": [sys.executable, "-c", "raise SystemExit(3)"],
        "late": [sys.executable, "-c", "import time; time.sleep(600)"],
    }
    started = time.monotonic()
    assert accelerator.run(commands, tmp_path, started + 10) == {"done": 0, "failed": 3, "late": None}
    assert time.monotonic() < started + 300
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert "hello" in lines
    assert [line.split(":")[0] for line in lines if ": -c" in line] == [*commands]


def test_the_accelerator_measures_nothing_by_kernels_that_fail_their_tests(
    accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[str] = []

    def run(commands: dict[str, list[str]], out: Path, deadline: float) -> dict[str, int]:
        begun.extend(commands)
        return dict.fromkeys(commands, 1)

    monkeypatch.setattr(accelerator, "run", run)
    monkeypatch.setattr(sys, "argv", ["accelerator.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        accelerator.main()
    assert begun == ["tests"]
    assert "nothing is measured by kernels that fail their tests" in capsys.readouterr().out
