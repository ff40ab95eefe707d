"""The committed notebooks are whole and clean, their parameters are checked, and the guide's code runs as printed.

nbval does not compare a cell whose `execution_count` is null, so a stripped notebook would pass unseen: it is
refused here, as is whatever would differ on another machine or embarrass on a page.
"""

import ast
import base64
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from matplotlib import pyplot as plt

from sapcore import data, experiments
from sapcore.errors import SapcoreError
from sapcore.paths import ROOT

BOOK = ROOT / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
PARAMETERS = {"dataset", "eps", "examples", "passes", "seed"}
OF_GAMES = {"game", "eps", "episodes", "passes", "seed"}
Notebook = dict[str, Any]

LEFTOVERS = {
    "an absolute path": re.compile(r"(?<![\w.:/-])/(?:home|root|work|tmp|Users|mnt|opt|usr|var)/\w|\b[A-Z]:\\\\?\w"),
    "an object's address": re.compile(r"\b0x[0-9a-fA-F]{6,}"),
    "a progress bar": re.compile(r"\r|\d+%\||[█▏▎▍▌▋▊▉]|\d(?:it|pass|s)/(?:s|it|pass)\b"),
    "a traceback": re.compile(r"Traceback \(most recent call last\)"),
}
BASE64 = re.compile(r"base64,[A-Za-z0-9+/=]+")


def problems(notebook: Notebook) -> list[str]:
    """What is wrong with a committed notebook."""
    found = []
    if "papermill" in notebook["metadata"]:
        found.append("the notebook holds papermill's metadata")
    if "widgets" in notebook["metadata"]:
        found.append("the notebook holds the state of widgets")
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    marked = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    if len(marked) != 1:
        found.append(f"{len(marked)} cells are tagged `parameters`")
    for cell in marked:
        named = assigned(cell["source"])
        missing = min(PARAMETERS - named, OF_GAMES - named, key=len)
        found += [f"the cell of parameters does not name {name}" for name in sorted(missing)]
    counts = [cell["execution_count"] for cell in code if cell["source"].strip()]
    if None not in counts and counts != list(range(1, len(counts) + 1)):
        found.append(f"cells were run in another order: {counts}")
    shows_pictures = any(re.search(r"\b(attacked_images|mask_on_map|imshow)\(", cell["source"]) for cell in code)
    for number, cell in enumerate(notebook["cells"]):
        found += [f"cell {number}: {problem}" for problem in cell_problems(cell, shows_pictures)]
    return found


def cell_problems(cell: Notebook, shows_pictures: bool) -> Iterator[str]:
    """What is wrong with one cell; `shows_pictures` if a cell of its notebook draws images."""
    if "papermill" in cell["metadata"]:
        yield "papermill's metadata"
    if "injected-parameters" in cell["metadata"].get("tags", []):
        yield "parameters that papermill injected"
    if cell.get("attachments"):
        yield "an attached file"
    for name, pattern in LEFTOVERS.items():
        if pattern.search(BASE64.sub("", cell["source"])):
            yield f"{name} in its source"
    if cell["cell_type"] == "code":
        yield from code_problems(cell, shows_pictures)


def code_problems(cell: Notebook, shows_pictures: bool) -> Iterator[str]:
    source, outputs = cell["source"], cell["outputs"]
    if source.strip() and cell["execution_count"] is None:
        yield "was not run: nbval would not compare it"
    if source.rstrip().endswith(";"):
        yield "ends in `;`: nbval finds an output that is not there; end a plot with plt.show()"
    if shows_output(source) and not outputs:
        yield "has lost its output"
    if shows_pictures and re.search(r"\bdata\.load\((?![\"']digits[\"'])", source):
        yield "loads images other than digits in a chapter that shows images"
    for output in outputs:
        if output["output_type"] == "error":
            yield f"an error: {output['ename']}"
        if output.get("name") == "stderr":
            yield "output on stderr"
        texts = [
            output.get("text", ""),
            *(str(value) for kind, value in output.get("data", {}).items() if kind != "image/png"),
        ]
        for name, pattern in LEFTOVERS.items():
            if any(pattern.search(BASE64.sub("", text)) for text in texts):
                yield f"{name} in its output"
        kinds = output.get("data", {}).keys()
        if any("widget" in kind for kind in kinds):
            yield "a widget"
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        if any(kind.startswith("image/") for kind in kinds) and len(alt.split()) < 4:
            yield "a picture without alt text (mystnb.image.alt)"


def assigned(source: str) -> set[str]:
    """The names that a cell's top level assigns."""
    targets = [node.targets for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {target.id for group in targets for target in group if isinstance(target, ast.Name)}


def shows_output(source: str) -> bool:
    """Whether a cell's last line is something that a notebook shows: a plot, `display`, `print` or a value."""
    body = ast.parse(source).body
    return bool(body) and isinstance(body[-1], ast.Expr)


def read(path: Path) -> Notebook:
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_whole_and_clean(path: Path) -> None:
    assert problems(read(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_valid_and_ends_in_a_newline(path: Path) -> None:
    nbformat.validate(read(path))
    assert path.read_text().endswith("}\n")


def test_every_chapter_of_the_table_of_contents_is_there() -> None:
    names = re.findall(r"(?:file|root): (\S+)", (BOOK / "_toc.yml").read_text())
    missing = [name for name in names if not any((BOOK / f"{name}{end}").exists() for end in (".md", ".ipynb"))]
    assert missing == []
    assert {path.stem for path in NOTEBOOKS} <= set(names)


# The checker itself: a notebook without fault, and one change that each fault makes.

PICTURE = {
    "output_type": "display_data",
    "metadata": {},
    "data": {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 7x4>"},
}


def sound() -> Notebook:
    """A notebook without fault."""
    code = nbformat.v4.new_code_cell
    cells = [
        nbformat.v4.new_markdown_cell("# A chapter at /work, in 0-255 and 12/tmp/files"),
        code("dataset, = 'digits',\n" + "\n".join(f"{name} = None" for name in sorted(PARAMETERS))),
        code("import matplotlib.pyplot as plt\nimages, _ = data.load('digits', 'test')"),
        code("figures.attacked_images(images)\nplt.show()"),
        code("figures.csv_link(frame)"),
    ]
    for number, cell in enumerate(cells[1:], start=1):
        cell["execution_count"] = number
    cells[1]["metadata"]["tags"] = ["parameters"]
    cells[3]["outputs"] = [nbformat.from_dict(PICTURE)]
    cells[3]["metadata"]["mystnb"] = {"image": {"alt": "Four rows of eight handwritten digits."}}
    payload = base64.b64encode(b"\xff\xd7/tmp/ 0xdeadbeef").decode() + "/tmp/home/0xdeadbeef"
    html = f'<a href="data:text/csv;base64,{payload}">CSV</a>'
    cells[4]["outputs"] = [nbformat.v4.new_output("execute_result", {"text/html": html}, execution_count=4)]
    return nbformat.v4.new_notebook(cells=cells)


def test_a_notebook_without_fault_passes() -> None:
    assert problems(sound()) == []


def change(cell: int, **fields: Any) -> Callable[[Notebook], None]:
    return lambda notebook: notebook["cells"][cell].update(fields)


def tag(cell: int, *path: str, value: Any) -> Callable[[Notebook], None]:
    def apply(notebook: Notebook) -> None:
        place = notebook["cells"][cell]["metadata"]
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value

    return apply


def text(kind: str, content: str) -> Callable[[Notebook], None]:
    output = {"output_type": "display_data", "metadata": {}, "data": {kind: content}}
    return change(4, outputs=[nbformat.from_dict(output)])


def stream(name: str, content: str) -> Callable[[Notebook], None]:
    return change(4, outputs=[nbformat.v4.new_output("stream", name=name, text=content)])


def stripped(notebook: Notebook) -> None:
    for cell in notebook["cells"][1:]:
        cell.update(execution_count=None, outputs=[])


FAULTS: dict[str, tuple[Callable[[Notebook], None], str]] = {
    "stripped": (stripped, "was not run"),
    "one cell not run": (change(2, execution_count=None), "was not run"),
    "outputs cleared": (change(3, outputs=[]), "has lost its output"),
    "run out of order": (change(2, execution_count=7), "in another order"),
    "error": (
        change(4, outputs=[nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=["no"])]),
        "an error: ValueError",
    ),
    "traceback as text": (stream("stdout", "Traceback (most recent call last):\n  File"), "a traceback"),
    "stderr": (stream("stderr", "UserWarning: careful"), "output on stderr"),
    "papermill": (lambda n: n["metadata"].update(papermill={"duration": 3}), "papermill's metadata"),
    "papermill in a cell": (tag(2, "papermill", value={"status": "completed"}), "papermill's metadata"),
    "injected parameters": (tag(2, "tags", value=["injected-parameters"]), "papermill injected"),
    "home": (stream("stdout", "read from /home/me/data"), "an absolute path in its output"),
    "root": (text("text/plain", "PosixPath('/root/x')"), "an absolute path in its output"),
    "mnt": (text("text/html", "<a href='/mnt/x/data'>"), "an absolute path in its output"),
    "tmp": (text("text/markdown", "`/tmp/x`"), "an absolute path in its output"),
    "windows": (stream("stdout", r"C:\Users\me"), "an absolute path in its output"),
    "path in code": (change(2, source="open('/home/me/data')"), "an absolute path in its source"),
    "path in prose": (change(0, source="see /tmp/notes"), "an absolute path in its source"),
    "address": (text("text/plain", "<function f at 0x7f12ab34cd56>"), "an object's address in its output"),
    "tqdm": (stream("stdout", "50%|#####     | 5/10 [00:01<00:01,  4.9it/s]"), "a progress bar"),
    "carriage return": (stream("stdout", "1 of 10\r2 of 10"), "a progress bar"),
    "blocks": (stream("stdout", "████████"), "a progress bar"),
    "widget": (text("application/vnd.jupyter.widget-view+json", "{}"), "a widget"),
    "no parameters": (tag(1, "tags", value=[]), "0 cells are tagged `parameters`"),
    "two of them": (tag(2, "tags", value=["parameters"]), "2 cells are tagged `parameters`"),
    "a parameter is missing": (change(1, source="dataset = eps = examples = passes = 1"), "does not name seed"),
    "no alt text": (tag(3, "mystnb", value={}), "a picture without alt text"),
    "empty alt text": (tag(3, "mystnb", "image", "alt", value=" "), "a picture without alt text"),
    "semicolon": (change(3, source="figures.fig1b(frame);"), "ends in `;`"),
    "other images": (change(2, source="images, _ = data.load(dataset, 'test')"), "images other than digits"),
    "cifar10 images": (change(2, source="images, _ = data.load('cifar10')"), "images other than digits"),
    "attachment": (change(0, attachments={"cat.png": {"image/png": "iVBORw0KGgo="}}), "an attached file"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_notebook_with_a_fault_is_refused(name: str) -> None:
    apply, message = FAULTS[name]
    notebook = sound()
    apply(notebook)
    assert any(message in problem for problem in problems(notebook)), problems(notebook)


# Parameters


def cells_of_parameters(path: Path) -> tuple[str, str]:
    """The sources of the cell of parameters and of the one after it, which checks them."""
    code = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    return code[0]["source"], code[1]["source"]


SENSELESS = [
    ("eps = -1", "eps is -1, but must be a number of 0 or more, in pixel units (0-255), such as 4"),
    ('eps = "8/255"', "eps is '8/255', but must be a number of 0 or more, in pixel units (0-255), such as 4"),
    ('dataset = "imagenet"', "dataset is 'imagenet', but must be one of cifar10, digits"),
    ("examples = 0", "examples is 0, but must be a whole number from 1 to "),
    ("passes = 0", "passes is 0, but must be a whole number from 1 on"),
    ("seed = -1", "seed is -1, but must be a whole number from 0 to 2**64 - 1"),
    ("steps = 0", "steps is 0, but must be a whole number from 1 on"),
    ("step = 0", "step is 0, but must be a positive number, in pixel units"),
]


SENSELESS_OF_GAMES = [
    ('game = "Pong"', "game is 'Pong', but must be one of Assault, Asterix, BankHeist, BattleZone, BeamRider, Bowling"),
    ("episodes = 0", "episodes is 0, but must be a whole number from 1 on"),
]


def senseless() -> Iterator[tuple[Path, str, str]]:
    """Each chapter with each senseless value of a parameter that it has."""
    for path in NOTEBOOKS:
        named = assigned(cells_of_parameters(path)[0])
        yield from ((path, *pair) for pair in SENSELESS + SENSELESS_OF_GAMES if pair[0].split()[0] in named)


@pytest.mark.parametrize(
    ("path", "injected", "message"), list(senseless()), ids=lambda value: str(getattr(value, "stem", value))
)
def test_a_chapter_stops_at_a_senseless_parameter_with_one_sentence(path: Path, injected: str, message: str) -> None:
    parameters, check = cells_of_parameters(path)
    with pytest.raises(SapcoreError) as caught:
        exec(f"{parameters}\n{injected}\n{check}", {})
    assert str(caught.value).startswith(message)
    assert len(caught.value._render_traceback_()) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("injected", "eps"), [("eps = 4", (4,)), ("eps = [8, 0.5]", (0.5, 8)), ("", None)])
def test_a_chapter_takes_one_eps_or_a_list_or_none(path: Path, injected: str, eps: tuple[float, ...] | None) -> None:
    parameters, check = cells_of_parameters(path)
    names: dict[str, Any] = {}
    exec(f"{parameters}\n{injected}\n{check}", names)
    assert isinstance(names["settings"], experiments.Settings)
    assert names["settings"].eps == eps
    assert names["settings"].dataset in data.DATASETS


def test_papermill_stops_at_a_senseless_parameter_with_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(tmp_path)]
    done = subprocess.run(
        [*command, BOOK / "04_iterative.ipynb", out, "-p", "eps", "8/255"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    sentence = "SapcoreError: eps is '8/255', but must be a number of 0 or more, in pixel units (0-255), such as 4"
    assert sentence in done.stderr
    errors = [o for c in read(out)["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert [error["traceback"] for error in errors] == [[sentence]]


@pytest.mark.parametrize("more", [{"eps": "2"}, {"eps": "3", "episodes": "1", "passes": "1"}], ids=["stored", "played"])
def test_papermill_shows_one_game(tmp_path: Path, more: dict[str, str]) -> None:
    pytest.importorskip("ale_py", reason="Atari is an extra: pip install -e '.[rl]'")
    out = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(tmp_path)]
    chosen = [word for pair in ({"game": "Asterix"} | more).items() for word in ("-p", *pair)]
    done = subprocess.run(
        [*command, BOOK / "06_reinforcement_learning.ipynb", out, *chosen], capture_output=True, text=True, check=False,
        env=os.environ | ({"SAPCORE_RESULTS": str(tmp_path)} if "episodes" in more else {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The verdicts are those of the book, whatever the parameters.
    cells = [c for c in read(out)["cells"] if c["id"] != "06-verdicts-table"]
    shown = "".join(str(o.get("data", "")) for c in cells for o in c.get("outputs", []))
    assert f"| λ = {more['eps']}, ours " in shown
    assert "Asterix" in shown
    assert "Bowling" not in shown


# The guide


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)


GUIDE = python_blocks(BOOK / "guide.md")


def test_the_guide_protects_and_attacks_a_network_in_ten_lines() -> None:
    lines = [line for line in GUIDE[0].splitlines() if line.strip()]
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 100
    assert "with_sap" in GUIDE[0]
    assert "attacks." in GUIDE[0]


def test_the_guides_code_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each block after the ones before it, from a folder in which there is nothing."""
    assert len(GUIDE) >= 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in GUIDE:
            exec(block, names)
    plt.close("all")
    assert capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_metadata_of_the_notebooks_say_nothing_of_the_machine_that_ran_them() -> None:
    """Metadata names the kernel and nothing of the machine that ran it."""
    for path in NOTEBOOKS:
        metadata = json.loads(path.read_text())["metadata"]
        assert metadata.keys() <= {"kernelspec", "language_info"}, path.name
        assert metadata["kernelspec"]["name"] == "python3", path.name
