"""Trained weights: safetensors (no code runs on loading), each with a JSON model card that holds its sha256."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from sapcore.errors import SapcoreError
from sapcore.models import QNetwork, ResNet20
from sapcore.paths import CHECKPOINTS, write_atomically


class CheckpointError(SapcoreError):
    """A checkpoint is missing, altered or truncated."""


def names() -> list[str]:
    """The checkpoints at hand."""
    return sorted(path.stem for path in CHECKPOINTS.glob("*.safetensors"))


def save(model: nn.Module, name: str, card: dict[str, Any]) -> Path:
    """Write `NAME.safetensors` and, after it, its card `NAME.json` with the file's sha256.

    Raises `SapcoreError` if they cannot be written.
    """
    content = safetensors.torch.save({k: v.contiguous() for k, v in model.state_dict().items()})
    path = CHECKPOINTS / f"{name}.safetensors"
    full_card = {"name": name, "sha256": hashlib.sha256(content).hexdigest(), **card}
    with writing(path):
        write_atomically(path, content)
        write_atomically(path.with_suffix(".json"), (json.dumps(full_card, indent=2) + "\n").encode())
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises `SapcoreError` where a training's file cannot be written."""
    try:
        yield
    except OSError as error:
        raise SapcoreError(
            f"{path} cannot be written ({error.strerror or error}); make room, or make it writable, and start again: "
            "the training goes on from the last state that was saved"
        ) from None


def card(name: str) -> dict[str, Any]:
    """The model card: recipe, accuracy on the whole test set, device, time, commit, sha256."""
    path = CHECKPOINTS / f"{name}.json"
    if not path.exists():
        at_hand = ", ".join(names()) or "none"
        raise CheckpointError(
            f"no checkpoint is named {name!r}; at hand: {at_hand}; `sapcore train --help` names what can be trained"
        )
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict) or "sha256" not in content:
        raise CheckpointError(f"{path} is damaged; {_way_back(name)}")
    return content


def load(name: str) -> nn.Module:
    """Load a network: eval mode, frozen, pixels 0-255 in, logits or, of an agent, the actions' values out.

    Raises `CheckpointError` if the file is not there or its sha256 is not the model card's.
    """
    about = card(name)
    path = CHECKPOINTS / f"{name}.safetensors"
    if not path.exists():
        raise CheckpointError(f"{path} is missing; {_way_back(name)}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise CheckpointError(f"{path} is truncated or altered: its sha256 is not the model card's; {_way_back(name)}")
    kind = about.get("architecture", "ResNet20")
    if kind not in ("QNetwork", "ResNet20"):
        raise CheckpointError(f"{path} is of the architecture {kind!r}, but must be ResNet20 or QNetwork")
    model = QNetwork(about["actions"]) if kind == "QNetwork" else ResNet20()
    try:
        model.load_state_dict(safetensors.torch.load(content))
    except (RuntimeError, safetensors.SafetensorError):
        raise CheckpointError(f"{path} does not hold the weights of a {kind}; {_way_back(name)}") from None
    return model.eval().requires_grad_(False)


def sha256(name: str) -> str:
    """The checkpoint's sha256 as its card says: it is part of the key of every cell computed from it."""
    return str(card(name)["sha256"])


def write_state(path: Path, tensors: dict[str, Tensor], recipe: Any, state: dict[str, Any]) -> None:
    """Write a half-finished training, whole or not at all."""
    described = {"state": json.dumps({**state, "recipe": dataclasses.asdict(recipe)})}
    write_atomically(path, safetensors.torch.save(tensors, described))


def read_state(path: Path, recipe: Any, folder: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote, if it was by this recipe; fields that are younger than it stand at their default.

    Raises `SapcoreError` if it was by another one or is damaged, and says to move `folder`, or `path`, away.
    """
    content, away = path.read_bytes(), folder or path
    try:
        tensors = safetensors.torch.load(content)
        header_length = int.from_bytes(content[:8], "little")
        state = json.loads(json.loads(content[8 : 8 + header_length])["__metadata__"]["state"])
        unlike = _unlike(recipe, state["recipe"])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        raise SapcoreError(f"{path} is damaged; remove {away} to train from the start") from None
    if unlike:
        raise SapcoreError(
            f"{path} is a training by another recipe ({', '.join(unlike)}); move {away} away or restore the recipe"
        )
    return tensors, state


@contextlib.contextmanager
def alone(name: str, folder: Path) -> Iterator[None]:
    """Hold what a training leaves in `folder`; raises `SapcoreError` while another process holds it, or if it cannot be
    written."""
    lock = FileLock(folder / f"{name}.lock", timeout=0)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise SapcoreError(f"{name} is being trained by another process, with its state in {folder}") from None
    try:
        yield
    finally:
        lock.release()


def is_by(name: str, recipe: Any) -> bool:
    """Whether the checkpoint is at hand, whole, and was trained by this recipe."""
    try:
        load(name)
    except CheckpointError:
        return False
    return not _unlike(recipe, card(name).get("recipe", {}))


def _unlike(recipe: Any, found: dict[str, Any]) -> list[str]:
    """The fields, but for notes, in which a stored recipe differs; those younger than it stand at their default."""
    defaults = {f.name: f.default for f in dataclasses.fields(recipe) if f.default is not dataclasses.MISSING}
    before = json.loads(json.dumps({**defaults, **found}, default=dataclasses.asdict))
    asked = json.loads(json.dumps(dataclasses.asdict(recipe)))

    def differs(name: str) -> bool:
        inner = getattr(recipe, name, None)
        if dataclasses.is_dataclass(inner):
            return bool(_unlike(inner, before.get(name) or {}))
        return bool(asked.get(name) != before.get(name))

    return [name for name in {**asked, **before} if name != "note" and differs(name)]


def _way_back(name: str) -> str:
    return f"restore it with `git checkout -- data/checkpoints` or train it again with `sapcore train {name}`"
