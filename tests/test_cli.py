"""The command line: each command explains itself, bad input is one sentence and exit code 2, and runs go on."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sapcore import checkpoints, claims, cli, experiments, paths, results, runner, training
from sapcore.cli import main
from sapcore.experiments import Settings, cells, settings, stored
from sapcore.rl import double_dqn

TINY = ("--dataset", "digits", "--eps", "0", "3", "--examples", "3", "--passes", "2")
COMMANDS = ("data", "train", "film", "run", "status", "verify", "claims")


def call(*arguments: str) -> int:
    """The exit code, also where argparse leaves by itself."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(str(stop.code))


def wanted(*figures: str) -> list[results.Cell]:
    s = settings("digits", [0, 3], 3, 2)
    return list(dict.fromkeys(cell for figure in figures for cell in cells(figure, s)))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: sapcore {command}" in text
    description = text.split("\n\n")[1]
    assert len(description) > 30
    assert description[0].isupper()


def test_the_command_itself_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    text = capsys.readouterr().out
    assert all(f"    {command} " in text for command in COMMANDS)


BOTH = (*training.RECIPES, *double_dqn.RECIPES)
SENSELESS: list[tuple[Sequence[str], str]] = [
    (["run", "fig9"], "no figure is named 'fig9'; there are "),
    (["status", "fig9"], "no figure is named 'fig9'; there are "),
    (["run", "--dataset", "imagenet"], "dataset is 'imagenet', but must be one of cifar10, digits"),
    (["run", *TINY, "--eps", "-1"], "eps is -1.0, but must be a number of 0 or more"),
    (["run", *TINY, "--eps", "nan"], "eps is nan, but must be a number of 0 or more"),
    (["run", *TINY, "--examples", "0"], "examples is 0, but must be a whole number from 1 to 500"),
    (["run", *TINY, "--passes", "0"], "passes is 0, but must be a whole number from 1 on"),
    (["run", *TINY, "--seed", "-1"], "seed is -1, but must be a whole number from 0 to"),
    (["run", *TINY, "--device", "tpu7"], "device is 'tpu7', but must be cpu, cuda or cuda:N"),
    (["run", *TINY, "--workers", "-1"], "workers is -1, but must be a whole number of 1 or more"),
    (["film", "Pong"], "game is 'Pong', but must be one of Assault, Asterix, "),
    (["film", "Bowling", "--steps", "3"], "a film of other eps, steps or seed is not the book's: say with --out where"),
    (["film", "Bowling", "--steps", "0"], "steps is 0, but must be a whole number of 1 or more"),
    (["film", "Bowling", "--out", "/dev/null/film.gif"], "/dev/null cannot be made (File exists); name another --out"),
    (["film", "Bowling", "--out", "film.mp4"], "a film is a GIF, but --out is film.mp4: its name must end in .gif"),
    (
        ["show", "fig1b", "fig3", "--game", "Bowling"],
        "--game and --episodes are of table1, but only fig1b, fig3 are asked",
    ),
    (
        ["run", "table1", "--examples", "5"],
        "--examples and --dataset are of figures on images, but only table1, on games",
    ),
    (
        ["show", "table1", "--dataset", "digits"],
        "--examples and --dataset are of figures on images, but only table1, on",
    ),
    (["show", "fig9", "--game", "Bowling"], "no figure is named 'fig9'; there are "),
    (["run", "table1", "--game", "Pong"], "game is 'Pong', but must be one of Assault, Asterix, "),
    (["train", "resnet56"], "no recipe is named 'resnet56'; there are resnet20-cifar10, "),
    (["train", "double-dqn-Pong"], f"no recipe is named 'double-dqn-Pong'; there are {', '.join(BOTH)}"),
    (["run", *TINY, "--device", "meta"], "device is 'meta', but must be cpu, cuda or cuda:N"),
    (["train", "resnet20-digits", "--device", "gpu"], "device is 'gpu', but must be cpu, cuda or cuda:N"),
]


@pytest.mark.parametrize(("arguments", "message"), SENSELESS, ids=[" ".join(a) for a, _ in SENSELESS])
def test_bad_input_gives_exit_code_2_and_one_sentence(
    store: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], message: str
) -> None:
    assert call(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"sapcore: {message}")
    assert output.err.count("\n") == 1
    assert not store.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--eps", "8/255"], "argument --eps: invalid float value: '8/255'"),
        (["run", "--examples", "many"], "argument --examples: invalid int value: 'many'"),
        (["train"], "the following arguments are required: name"),
        ([], "the following arguments are required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["run", "--speed", "9"], "unrecognized arguments: --speed"),
    ],
)
def test_input_that_cannot_be_read_gives_exit_code_2_and_says_which(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_run_fills_an_empty_store_and_status_then_says_present(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("status", "fig1c", *TINY) == 1
    assert capsys.readouterr().out.splitlines() == [
        "figure            wanted  present  stale  damaged  missing",
        "fig1c                  5        0      0        0        5",
    ]
    assert call("run", "fig1c", *TINY) == 0
    output = capsys.readouterr()
    table = [line.split() for line in output.out.splitlines()]
    assert ["fig1c"] in table
    assert {"dense vs dense", "SAP-100 vs SAP-100", "SAP-100 vs dense"} <= {" ".join(row[:3]) for row in table}
    assert "100%" in output.err
    assert call("show", "fig1c", *TINY) == 0
    shown = capsys.readouterr()
    assert shown.out == output.out
    assert shown.err == ""
    row = stored("fig1c", settings("digits", [0, 3], examples=3, passes=2)).iloc[0]
    text = f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    assert f"dense vs dense {text}" in " ".join(shown.out.split())
    assert call("status", "fig1c", *TINY) == 0
    assert "fig1c                  5        5      0        0        0" in capsys.readouterr().out
    assert {results.state(cell) for cell in wanted("fig1c")} == {("present", "")}


@pytest.mark.usefixtures("store")
def test_show_says_what_is_not_in_the_store_and_computes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "compute", None)
    assert call("show", "fig1c", *TINY) == 0
    assert capsys.readouterr().out == "\nfig1c (not in the store: 5 of 5 cells)\n"


def test_of_figure_4_the_calibration_errors_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", "fig4") == 0
    row = experiments.stored_calibrations(Settings()).iloc[0]
    text = f"{100 * row['ece']:.1f} [{100 * row['ece_low']:.1f}, {100 * row['ece_high']:.1f}]"
    assert f"dense {text}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("figure", experiments.FIGURES)
def test_every_figure_is_shown_with_a_row_per_curve(figure: str, capsys: pytest.CaptureFixture[str]) -> None:
    frame = stored(figure, Settings())
    assert call("show", figure) == 0
    shown = capsys.readouterr().out
    for name in frame["series"].unique():
        assert name in shown
    assert shown.count("[") == len(frame.drop_duplicates(["panel", "series", "eps", "steps", "gradients"]))


@pytest.mark.usefixtures("store")
def test_a_second_run_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("run", "fig1c", *TINY) == 0
    monkeypatch.setattr(runner, "compute", None)
    assert call("run", "fig1c", *TINY) == 0


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing a cell costs nothing."""
    result: dict[str, Any] = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "correct": 5, "images": 10}
    bins = {"images": [10], "confidence": [0.6], "correct": [5], "ece": 0.1, "low": 0.0, "high": 0.2}
    result |= {"calibration": bins, "mean": 0.5, "returns": [0.5], "steps": 9}
    monkeypatch.setattr(runner, "compute", lambda cell, device: result)


@pytest.mark.usefixtures("free")
def test_status_tells_stale_damaged_and_missing_apart(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third, *rest = wanted("fig1c")
    results.write(dataclasses.replace(first, version=0), {}, {})
    second.path.parent.mkdir(parents=True, exist_ok=True)
    second.path.write_text("{")
    results.write(third, runner.compute(third, None), {"device": "", "commit": "", "date": ""})  # type: ignore[arg-type]
    assert call("status", "fig1c", *TINY) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["fig1c", "5", "1", "1", "1", str(len(rest))]
    assert lines[2] == f"  {first.label}: stale, the code's version changed since it was computed"
    assert lines[3].startswith(f"  {second.label}: damaged, {second.path.name} is not a whole result file")
    assert call("run", "fig1c", *TINY) == 0
    assert call("status", "fig1c", *TINY) == 0


@pytest.mark.usefixtures("store", "free")
def test_status_as_json_lists_every_cell_with_its_spec(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("status", "--json", *TINY) == 1
    before = json.loads(capsys.readouterr().out)
    assert before.keys() == experiments.FIGURES.keys()
    call("run", "fig1a", *TINY)
    capsys.readouterr()
    assert call("status", "fig1a", "--json", *TINY) == 0
    after = json.loads(capsys.readouterr().out)
    assert after.keys() == {"fig1a"}
    for found, cell in zip(after["fig1a"], wanted("fig1a"), strict=True):
        assert found["state"] == "present"
        assert (found["key"], found["cell"]) == (cell.key, cell.label)
        assert found["spec"] == json.loads(json.dumps(cell.spec))
    assert {row["state"] for row in before["fig1a"]} == {"missing"}


@pytest.mark.usefixtures("store", "free")
def test_all_figures_are_run_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    networks = [name for name in checkpoints.names() if not name.startswith("double-dqn-")]
    monkeypatch.setattr(checkpoints, "names", lambda: networks)  # without agents, so that this is quick
    assert call("run", *TINY) == 1
    assert "double-dqn-Bowling is left out: `sapcore train double-dqn-Bowling`" in capsys.readouterr().err
    assert call("status", *TINY) == 1
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(experiments.FIGURES)


@pytest.mark.usefixtures("store")
def test_a_cell_that_fails_gives_exit_code_1_and_the_others_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = wanted("fig1c")[1]

    def compute(cell: results.Cell, _: object) -> dict[str, Any]:
        if cell == broken:
            raise RuntimeError("out of memory")
        return {"accuracy": 0.5, "low": 0.4, "high": 0.6, "correct": 5, "images": 10}

    monkeypatch.setattr(runner, "compute", compute)
    assert call("run", "fig1c", *TINY) == 1
    output = capsys.readouterr()
    assert f"{broken.label}: RuntimeError: out of memory" in output.out + output.err
    assert [results.state(cell)[0] for cell in wanted("fig1c")].count("missing") == 1


@pytest.mark.usefixtures("store")
def test_verify_computes_stored_cells_again_and_tells_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("verify", "fig1c", *TINY) == 2
    assert "nothing of this is in the store yet; `sapcore run` computes it" in capsys.readouterr().err
    call("run", "fig1c", *TINY)
    capsys.readouterr()
    assert call("verify", "fig1c", *TINY) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["same"] * len(wanted("fig1c"))
    drawn = set()
    for number in range(8):
        assert call("verify", "fig1c", *TINY, "--sample", "1", "--draw", str(number)) == 0
        (line,) = capsys.readouterr().out.splitlines()
        drawn.add(line)
    assert len(drawn) > 1
    computed = runner.compute
    monkeypatch.setattr(runner, "compute", lambda cell, on: {**computed(cell, on), "correct": -1})
    assert call("verify", "fig1c", *TINY) == 1
    assert capsys.readouterr().out.count("DIFFERENT") == len(wanted("fig1c"))


@pytest.mark.usefixtures("store")
def test_stopping_a_run_gives_exit_code_130_and_says_that_it_can_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "compute", stop)
    assert call("run", "fig1c", *TINY) == 130
    error = capsys.readouterr().err
    assert "sapcore: stopped; what is finished is stored, and the same command goes on from there" in error
    assert "Traceback" not in error


def test_train_trains_and_says_how_good(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, str | None]] = []
    monkeypatch.setattr(training, "train", lambda name, device: asked.append((name, device)))
    assert call("train", "resnet20-digits", "--device", "cpu", "--again") == 0
    assert asked == [("resnet20-digits", "cpu")]
    accuracy = checkpoints.card("resnet20-digits")["test_accuracy"]
    assert capsys.readouterr().out == f"resnet20-digits: {accuracy:.2%} of the test images are right\n"


def test_train_leaves_what_is_trained_unless_its_recipe_has_changed_or_a_training_has_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(training, "train", lambda name, device: asked.append(name))
    monkeypatch.setattr(cli, "STATE", tmp_path)
    assert call("train", "resnet20-digits") == 0
    assert capsys.readouterr().out == "resnet20-digits is trained by this recipe already; --again trains it anew\n"
    noted = dataclasses.replace(training.RECIPES["resnet20-digits"], note="another word about it")
    monkeypatch.setitem(training.RECIPES, "resnet20-digits", noted)
    assert call("train", "resnet20-digits") == 0
    assert asked == []
    (tmp_path / "resnet20-digits.safetensors").touch()
    assert call("train", "resnet20-digits") == 0
    (tmp_path / "resnet20-digits.safetensors").unlink()
    monkeypatch.setitem(training.RECIPES, "resnet20-digits", dataclasses.replace(noted, momentum=0.8))
    assert call("train", "resnet20-digits") == 0
    assert asked == 2 * ["resnet20-digits"]


def test_what_is_left_of_a_finished_training_of_an_agent_does_not_start_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(double_dqn, "train", lambda name, device: asked.append(name))
    monkeypatch.setattr(cli, "STATE", tmp_path)
    (tmp_path / "double-dqn-Assault").mkdir()
    (tmp_path / "double-dqn-Assault" / "frames.npy").touch()
    assert call("train", "double-dqn-Assault") == 0
    assert capsys.readouterr().out == "double-dqn-Assault is trained by this recipe already; --again trains it anew\n"
    assert asked == []
    (tmp_path / "double-dqn-Assault" / "state.safetensors").touch()
    assert call("train", "double-dqn-Assault") == 0
    assert asked == ["double-dqn-Assault"]


def test_the_installed_command_ends_with_exit_code_2_and_no_traceback() -> None:
    command = Path(sys.executable).with_name("sapcore")
    done = subprocess.run([command, "status", "fig9"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("sapcore: no figure is named 'fig9'")
    assert done.stderr.count("\n") == 1


def test_a_film_of_ones_own_goes_where_it_is_told(tmp_path: Path) -> None:
    pytest.importorskip("ale_py", reason="Atari is an extra: pip install -e '.[rl]'")
    path = tmp_path / "film.gif"
    assert cli.main(["film", "Assault", "--steps", "2", "--out", str(path)]) == 0
    with Image.open(path) as film:
        assert getattr(film, "n_frames", 1) == 2


def test_a_reader_who_has_seen_enough_ends_the_output_quietly() -> None:
    command = f"{sys.executable} -m sapcore.cli status --json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_claims_are_printed_with_their_numbers_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("claims") == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 * len(claims.CLAIMS)
    counted = {verdict: int(count) for verdict, count in (part.split(": ") for part in last.split(", "))}
    assert list(counted) == list(claims.VERDICTS)
    assert sum(counted.values()) == len(claims.CLAIMS)
    assert call("claims", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found] == [claim.name for claim in claims.CLAIMS]
    assert all(row["verdict"] in claims.VERDICTS and row["why"] and row["rule"] for row in found)
    decided = [row for row in found if row["verdict"] != claims.OPEN]
    assert all(any((paths.results_root() / cell).exists() for cell in row["cells"]) for row in decided)
