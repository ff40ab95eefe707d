"""A cell's key is its whole spec; its file is there whole or not at all; what is wrong with one is said."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sapcore import results
from sapcore.paths import results_root, write_atomically
from sapcore.results import Attack, Cell, Defence
from sapcore.rl.environments import Rules

SAP = Defence("sap", 100)
CELL = Cell(
    dataset="digits",
    checkpoint="resnet20-digits",
    checkpoint_sha256="ab" * 32,
    defence=SAP,
    attack=Attack("iterative", 4, Defence(), "mean_of_gradients", 10, 1, 10),
    examples=100,
    passes=10,
    seed=0,
    precision="float32",
)
RESULT = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "correct": 50, "images": 100}
ORIGIN = {"device": "a computer", "commit": "abc", "date": "2026-11-01"}


def variants(thing: Any) -> dict[str, Any]:
    """Copies of a frozen dataclass with one field changed each, at any depth; by the field's dotted name."""
    found = {}
    for field in dataclasses.fields(thing):
        value = getattr(thing, field.name)
        if dataclasses.is_dataclass(value):
            for name, changed in variants(value).items():
                found[f"{field.name}.{name}"] = dataclasses.replace(thing, **{field.name: changed})
        else:
            other = {str: "other", bool: True, int: -7, float: -7.5, type(None): 33}[type(value)]
            found[field.name] = dataclasses.replace(thing, **{field.name: other})
    return found


VARIANTS = variants(CELL)


def test_the_list_of_variants_is_complete() -> None:
    assert len(VARIANTS) == 9 + 5 + 10 + 5
    assert {"version", "attack.source.level", "attack.step", "defence.kind", "precision"} <= VARIANTS.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_key_changes_with_every_field_of_the_spec(name: str) -> None:
    assert VARIANTS[name].key != CELL.key
    assert len({cell.key for cell in VARIANTS.values()}) == len(VARIANTS)


def test_equal_cells_have_equal_keys() -> None:
    """Also where one says 4 and the other 4.0."""
    attack = dataclasses.replace(CELL.attack, eps=4.0, step=1.0)
    same = dataclasses.replace(CELL, attack=attack, defence=Defence("sap", 100.0))
    assert same == CELL
    assert same.key == CELL.key
    assert same.path == CELL.path


def test_the_key_stays_as_it_is_in_the_committed_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAPCORE_RESULTS", raising=False)
    paths = list(results_root().rglob("*.json"))
    assert {"cifar10", "digits", "bowling"} <= {path.parent.name for path in paths}
    for path in paths:
        spec = json.loads(path.read_text())["spec"]
        source, rules = spec["attack"]["source"], spec.get("rules")
        attack = Attack(**{**spec["attack"], "source": source and Defence(**source)})
        defence = Defence(**spec["defence"])
        cell = Cell(**{**spec, "attack": attack, "defence": defence, "rules": rules and Rules(**rules)})
        assert cell.path == path


@pytest.mark.parametrize(
    ("cell", "label"),
    [
        (CELL, "SAP-100 iterative from dense eps 4"),
        (dataclasses.replace(CELL, attack=Attack("fgsm", 0.5, SAP)), "SAP-100 fgsm eps 0.5"),
        (dataclasses.replace(CELL, attack=Attack()), "SAP-100 none"),
        (dataclasses.replace(CELL, defence=Defence(), attack=Attack("noise", 64)), "dense noise eps 64"),
        (dataclasses.replace(CELL, defence=Defence("sap", 2.5), attack=Attack()), "SAP-2.5 none"),
    ],
)
def test_a_label_says_defence_attack_and_size(cell: Cell, label: str) -> None:
    assert cell.label == label
    assert cell.path.name == f"{label.lower().replace(' ', '-')}-{cell.key}.json"


def test_a_label_says_what_is_unusual_about_a_defence() -> None:
    on_batch = dataclasses.replace(CELL, defence=Defence(batch_statistics=500), attack=Attack())
    assert on_batch.label == "dense (batch statistics) none"
    assert on_batch.path.name == f"dense-batch-statistics-none-{on_batch.key}.json"
    assert Defence("sap", 100, "scale", 500).label == "SAP-100 (scale, batch statistics)"
    assert Defence("sap", 100, noisy_statistics=5000).label == "SAP-100 (noisy statistics)"


def test_a_cell_comes_back_as_it_was_written(store: Path) -> None:
    results.write(CELL, RESULT, ORIGIN)
    assert results.read(CELL) == {"spec": CELL.spec, "result": RESULT, "provenance": ORIGIN}
    assert results.state(CELL) == ("present", "")
    assert [path.name for path in (store / "digits").iterdir()] == [CELL.path.name]


def test_the_store_is_where_the_environment_says(store: Path) -> None:
    results.write(CELL, RESULT, ORIGIN)
    assert CELL.path.is_file()
    assert CELL.path.is_relative_to(store)


def test_a_file_is_readable_json_that_ends_in_a_newline(store: Path) -> None:
    results.write(CELL, RESULT, ORIGIN)
    text = CELL.path.read_text()
    assert text.endswith("}\n")
    assert json.loads(text)["spec"]["attack"]["source"] == {"kind": "dense", "level": None}


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
def test_a_crash_while_writing_leaves_the_old_file_and_no_other(
    store: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    results.write(CELL, RESULT, ORIGIN)
    with monkeypatch.context() as patch:
        patch.setattr(where, crash)
        with pytest.raises(KeyboardInterrupt):
            results.write(CELL, {"accuracy": 0.9}, ORIGIN)
    found = results.read(CELL)
    assert found is not None
    assert found["result"] == RESULT
    assert [path.name for path in (store / "digits").iterdir()] == [CELL.path.name]


def test_writing_makes_its_folder_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"long content", b"short"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_cell_that_was_never_written_is_missing(store: Path) -> None:
    assert results.read(CELL) is None
    assert results.state(CELL) == ("missing", "")


def damaged(content: bytes) -> Callable[[bytes], bytes]:
    return lambda whole: content


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": damaged(b""),
    "half": lambda whole: whole[: len(whole) // 2],
    "one byte short of its brace": lambda whole: whole[:-2],
    "null": damaged(b"null"),
    "list": damaged(b"[]"),
    "text": damaged(b'"spec"'),
    "no spec": damaged(b'{"result": {}, "provenance": {}}'),
    "another spec": lambda whole: whole.replace(b'"examples": 100', b'"examples": 99'),
    "no result": lambda whole: whole.replace(b'"result"', b'"results"'),
    "an empty result": lambda whole: json.dumps({**json.loads(whole), "result": {}}).encode(),
    "a result that is a number": lambda whole: json.dumps({**json.loads(whole), "result": 5}).encode(),
    "a result of names alone": lambda whole: json.dumps({**json.loads(whole), "result": sorted(RESULT)}).encode(),
    "no provenance": lambda whole: whole.replace(b'"provenance"', b'"origin"'),
    "binary": damaged(bytes(range(256))),
    "a conflict": lambda whole: b"<<<<<<< HEAD\n" + whole,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_read_as_none_and_called_damaged(store: Path, name: str) -> None:
    results.write(CELL, RESULT, ORIGIN)
    CELL.path.write_bytes(DAMAGES[name](CELL.path.read_bytes()))
    assert results.read(CELL) is None
    state, why = results.state(CELL)
    assert state == "damaged"
    assert CELL.path.name in why
    results.write(CELL, RESULT, ORIGIN)
    assert results.state(CELL) == ("present", "")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"checkpoint_sha256": "cd" * 32}, "the checkpoint changed since it was computed"),
        ({"version": 0}, "the code's version changed since it was computed"),
        (
            {"checkpoint_sha256": "cd" * 32, "version": 0},
            "the checkpoint and the code's version changed since it was computed",
        ),
    ],
)
def test_a_cell_of_another_checkpoint_or_version_is_stale_with_the_reason(
    store: Path, change: dict[str, Any], why: str
) -> None:
    results.write(dataclasses.replace(CELL, **change), RESULT, ORIGIN)
    assert results.read(CELL) is None
    assert results.state(CELL) == ("stale", why)


def test_a_cell_of_an_untrained_network_is_missing_whatever_is_stored_of_another(store: Path) -> None:
    results.write(CELL, RESULT, ORIGIN)
    assert results.state(dataclasses.replace(CELL, checkpoint_sha256="")) == ("missing", "")


@pytest.mark.parametrize("change", [{"examples": 99}, {"passes": 9}, {"seed": 1}, {"precision": "bfloat16"}])
def test_a_cell_of_another_size_or_seed_makes_none_stale(store: Path, change: dict[str, Any]) -> None:
    results.write(dataclasses.replace(CELL, **change), RESULT, ORIGIN)
    assert results.state(CELL) == ("missing", "")
    results.write(dataclasses.replace(CELL, version=0, **change), RESULT, ORIGIN)
    assert results.state(CELL) == ("missing", "")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"spec": []}', '{"spec": null}', '{"spec": "x"}', "\xff"])
def test_damaged_neighbours_do_not_hide_that_a_cell_is_stale(store: Path, content: str) -> None:
    old = dataclasses.replace(CELL, version=0)
    results.write(old, RESULT, ORIGIN)
    slug = CELL.path.name.rsplit("-", 1)[0]
    for key in ("0" * 16, "f" * 16):
        (CELL.path.parent / f"{slug}-{key}.json").write_text(content, encoding="latin-1")
    assert results.state(CELL)[0] == "stale"


def test_a_younger_field_changes_the_key_only_where_it_is_not_at_its_default(store: Path) -> None:
    noisy = Defence("sap", 100)
    attack = Attack("iterative", 4, noisy, "mean_of_gradients", 10, 1, 10)
    cell = dataclasses.replace(CELL, defence=noisy, attack=attack)
    assert not set(results.LATER) & {*cell.spec["attack"], *cell.spec["defence"], *cell.spec["attack"]["source"]}
    others = [
        dataclasses.replace(cell, attack=dataclasses.replace(attack, **change))
        for change in ({"loss": "margin"}, {"random_start": True}, {"restarts": 3},
                       {"source": Defence("sap", 100, "identity")})
    ]  # fmt: skip
    assert len({c.key for c in (cell, *others)}) == 5
    assert others[-1].label == "SAP-100 iterative from SAP-100 (identity) eps 4"
    assert others[-1].path.name.startswith("sap-100-iterative-from-sap-100-identity-eps-4-")
    for other in others:
        results.write(other, RESULT, ORIGIN)
        assert results.state(other) == ("present", "")
    assert results.state(cell) == ("missing", "")
