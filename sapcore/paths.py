"""Where things lie: taken from the package, never from the working folder (three tools, three working folders)."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "data" / "checkpoints"
STATE = ROOT / ".state"  # half-finished trainings; ignored by git


def data_root() -> Path:
    """The folder that holds `cifar-10-batches-py`: $SAPCORE_DATA if set, else `data/`."""
    value = os.environ.get("SAPCORE_DATA")
    return Path(value).expanduser().resolve() if value else ROOT / "data"


def results_root() -> Path:
    """The folder of the store: $SAPCORE_RESULTS if set, else `data/results`."""
    value = os.environ.get("SAPCORE_RESULTS")
    return Path(value).expanduser().resolve() if value else ROOT / "data" / "results"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or none of it: readers and a killed writer never leave half a file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
