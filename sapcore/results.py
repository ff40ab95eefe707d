"""The store: one JSON file per cell under `data/results/`, keyed by its whole spec, with its provenance."""

import contextlib
import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sapcore.errors import SapcoreError
from sapcore.paths import ROOT, results_root, write_atomically
from sapcore.provenance import machine
from sapcore.rl.environments import GAMES, Rules

VERSION = 1
"""Counted up when a change of the code changes what a spec means; cells of another version are stale."""


def _whole_as_int(spec: Any, *names: str) -> None:
    """4.0 and 4 are the same number, and must have the same key."""
    for name in names:
        value = getattr(spec, name)
        if value is not None and value == int(value):
            object.__setattr__(spec, name, int(value))


@dataclasses.dataclass(frozen=True)
class Defence:
    """What is done to the pretrained network."""

    kind: str = "dense"
    """`dense` (nothing), `sap`, `bernoulli-sap`, one of `baselines.BASELINES`, or `random`: an agent at random."""
    level: float | None = None
    """k of SAP, SWP and DWP in percent; the rate of dropout; the standard deviation of RNW, RSW, RNA and RSA."""
    backward: str = "constant"
    """What an adversary's gradient sees of SAP: see `sap.layer.SAP`."""
    batch_statistics: int = 0
    """Images to a batch whose own statistics BatchNorm uses, as if the network were in training; or 0."""
    noisy_statistics: int = 0
    """Training images from whose noisy passes BatchNorm's running statistics are taken; 0: those of training."""

    def __post_init__(self) -> None:
        _whole_as_int(self, "level")

    @property
    def label(self) -> str:
        """Such as `dense`, `SAP-100`, `dropout-0.1` or `RNW-0.02`."""
        kind = {"dropout": "dropout", "bernoulli-sap": "Bernoulli-SAP"}.get(self.kind, self.kind.upper())
        name = self.kind if self.kind in ("dense", "random") else f"{kind}-{self.level:g}"
        special = [] if self.backward == "constant" else [self.backward]
        special += ["batch statistics"] if self.batch_statistics else []
        special += ["noisy statistics"] if self.noisy_statistics else []
        return f"{name} ({', '.join(special)})" if special else name

    @property
    def noisy(self) -> bool:
        return self.kind not in ("dense", "dwp", "random")


@dataclasses.dataclass(frozen=True)
class Attack:
    """What is done to the images."""

    kind: str = "none"
    """`none`, `noise`, `fgsm`, `iterative`, `autoattack` (its rand version), `autoattack_standard` or `square`."""
    eps: float = 0
    """Perturbation in pixel units (0-255)."""
    source: Defence | None = None
    """The network whose gradient is followed."""
    estimator: str = ""
    passes: int = 0
    """Monte Carlo passes per gradient or, of Square, per query; 1 on the dense network."""
    step: float = 0
    steps: int = 0
    """Of Square: queries; of AutoAttack: of its parts that have steps."""
    loss: str = "cross_entropy"
    batch_statistics: int = 0
    """Images to a batch whose own statistics the source's BatchNorm uses, as the released code's adversary does; or 0.
    """
    random_start: bool = False
    restarts: int = 1

    def __post_init__(self) -> None:
        _whole_as_int(self, "eps", "step")

    @property
    def gradients(self) -> int:
        """Passes of one image whose gradient is taken or, of Square, whose output is asked for: at most so many.

        Passes that only choose among the points of an attack are not counted. Of ten classes, as all here have.
        """
        apgd, fab, square = self.steps + 1, self.steps, 50 * self.steps + 1
        runs = {
            "autoattack": 2 * apgd, "autoattack_standard": 10 * apgd + 9 * fab + square, "square": self.steps + 1,
        }.get(self.kind, max(1, self.steps))  # fmt: skip
        return self.passes * runs * self.restarts

    @property
    def label(self) -> str:
        """Such as `fgsm` or `pgd margin`: the kind, and what is unusual about it."""
        parts = ["pgd" if self.random_start else self.kind]
        parts += [] if self.estimator in ("", "mean_of_gradients") else [self.estimator]
        parts += [] if self.loss == "cross_entropy" else [self.loss]
        parts += ["batch-statistics"] if self.batch_statistics else []
        return " ".join(parts)


RESULT_FIELDS = {"accuracy", "low", "high", "correct", "images"}
GAME_FIELDS = {"mean", "low", "high", "returns", "steps"}
PROVENANCE_FIELDS = {"device", "commit", "date"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of the book: the accuracy of a defended network, or the mean return of a defended agent, under an
    attack. Its spec is its key."""

    dataset: str
    """Or the game that is played."""
    checkpoint: str
    checkpoint_sha256: str
    defence: Defence
    attack: Attack
    examples: int
    """The first so many test images, or episodes."""
    passes: int
    """Passes per output; 1 on the dense network."""
    seed: int
    precision: str
    rules: Rules | None = None
    """By which a game is played."""
    version: int = VERSION

    @property
    def spec(self) -> dict[str, Any]:
        """The cell as plain JSON values; fields that are younger than the first cells are left out at their default."""
        return _without_defaults(dataclasses.asdict(self))

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def plays(self) -> bool:
        """Whether it is about an agent and a game."""
        return self.dataset in GAMES

    @property
    def computable(self) -> bool:
        """Whether the agent or network that it is about is there."""
        return bool(self.checkpoint_sha256) or self.defence.kind == "random"

    @property
    def fields(self) -> set[str]:
        """What its result holds at least."""
        return GAME_FIELDS if self.plays else RESULT_FIELDS

    @property
    def defended(self) -> str:
        """The network and its defence, such as `dense`, `SAP-100`, `ADV` or `ADV+SAP-100`."""
        if self.plays:
            return self.defence.label
        trained = self.checkpoint.removeprefix(f"resnet20-{self.dataset}").strip("-")
        if not trained:
            return self.defence.label
        name = trained.upper() if trained == "adv" else f"trained-{trained.removeprefix('reading-')}"
        return name if self.defence.label == "dense" else f"{name}+{self.defence.label}"

    @property
    def label(self) -> str:
        """A readable name, such as `SAP-100 fgsm eps 4`; not unique."""
        attack, source = self.attack, self.attack.source
        versus = f" from {source.label}" if source and source != self.defence else ""
        name = f"{self.defended} {attack.label}{versus}" + (f" eps {attack.eps:g}" if attack.eps else "")
        return f"{self.dataset} {name}" if self.plays else name

    @property
    def path(self) -> Path:
        """Where the cell lies: `cifar10/sap-100-fgsm-eps-4-<key>.json`."""
        slug = re.sub(r"[^a-z0-9.+]+", "-", self.label.lower()).strip("-")
        return results_root() / self.dataset.lower() / f"{slug}-{self.key}.json"


LATER = {
    "backward": "constant",
    "loss": "cross_entropy",
    "random_start": False,
    "restarts": 1,
    "batch_statistics": 0,
    "noisy_statistics": 0,
    "rules": None,
    "clipped_rewards": True,
    "life_ends_return": True,
}


def _without_defaults(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_defaults(value) if isinstance(value, dict) else value
        for name, value in spec.items()
        if name not in LATER or value != LATER[name]
    }


def write(cell: Cell, result: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Store a cell, whole or not at all. Raises `SapcoreError` if the store cannot be written."""
    content = {"spec": cell.spec, "result": result, "provenance": provenance}
    try:
        write_atomically(cell.path, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise SapcoreError(
            f"{cell.path} cannot be written ({error.strerror or error}); what is finished is stored; "
            "make room, or name another folder in SAPCORE_RESULTS, and start again"
        ) from None


def check_writable(cells: Iterable[Cell]) -> None:
    """Raise `SapcoreError` if these cells could not be stored: before hours are spent on them, not after."""
    for folder in {cell.path.parent for cell in cells}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise SapcoreError(
                f"{folder} cannot be written ({error.strerror or error}); "
                "make it writable, or name another folder in SAPCORE_RESULTS"
            ) from None


def read(cell: Cell, also: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """The stored `{"spec", "result", "provenance"}` of a cell.

    None if it is missing, if its file is damaged, or if its result lacks a field that is named in `also`.
    """
    try:
        content = json.loads(cell.path.read_text())
    except (OSError, ValueError):
        return None
    whole = (
        isinstance(content, dict)
        and content.get("spec") == cell.spec
        and all(isinstance(content.get(part), dict) for part in ("result", "provenance"))
        and content["result"].keys() >= cell.fields | set(also)
        and content["provenance"].keys() >= PROVENANCE_FIELDS
    )
    return content if whole else None


def state(cell: Cell, also: tuple[str, ...] = ()) -> tuple[str, str]:
    """`("present", "")`, `("stale", why)`, `("damaged", why)` or `("missing", "")`."""
    if read(cell, also) is not None:
        return "present", ""
    if read(cell) is not None:
        return "stale", f"it was computed without its {' and '.join(also)}"
    if cell.path.exists():
        return "damaged", f"{cell.path.name} is not a whole result file; the next run writes it anew"
    if not cell.computable:
        return "missing", ""
    for path in cell.path.parent.glob(f"{cell.path.name.rsplit('-', 1)[0]}-*.json"):
        try:
            other = json.loads(path.read_text())["spec"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not isinstance(other, dict):
            continue
        changed = [name for name, value in cell.spec.items() if other.get(name) != value]
        if changed and set(changed) <= {"checkpoint_sha256", "version"}:
            return "stale", " and ".join({"checkpoint_sha256": "the checkpoint", "version": "the code's version"}[c]
                                         for c in changed) + " changed since it was computed"  # fmt: skip
    return "missing", ""


def benchmarks(name: str, dataset: str = "cifar10") -> list[dict[str, Any]]:
    """The newest row of a benchmark on this data set for each device, as `benchmarks/NAME.py` appended it.

    Processors of one name with other instructions are other devices; the oldest rows do not say which they had.
    """
    path = ROOT / "data" / "benchmarks" / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # half a line, where a benchmark was cut off
            rows.append(json.loads(line))
    rows = [row for row in rows if row["dataset"] == dataset]
    if not rows:
        raise SapcoreError(
            f"data/benchmarks/{path.name} has no row of {dataset}; "
            f"`python benchmarks/{name}.py --dataset {dataset}` measures one"
        )
    return list({machine(row["provenance"]): row for row in rows}.values())
