"""What a DM-Handler leaves to the one that takes over, in a file of the run's directory.

Place on the path: written by the DM-Handler whenever it changes, read by the next one at its start, and by `edm adopt`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

from edm.errors import EdmError
from edm.types import Inheritance

FILE: Final = "inheritance.json"


def leave(run_dir: Path, inheritance: Inheritance) -> None:
    """Note it; a reader has the last one or this one."""
    holder, handler = inheritance.holder, os.getpid()
    document = {
        "holder": holder,
        "holder_started": started_at(holder),
        "segment": inheritance.segment,
        "instances": inheritance.instances,
        "handler": handler,
        "handler_started": started_at(handler),
    }
    fresh = run_dir / f"{FILE}.new"
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(document, file)
    fresh.replace(run_dir / FILE)


def inherited(run_dir: Path) -> Inheritance | None:
    """What a DM-Handler has left that died; None at the start of a run."""
    left = _read(run_dir)
    if left is None:
        return None
    return Inheritance(int(left["holder"]), int(left["segment"]), tuple(map(int, left["instances"])))


def alive(run_dir: Path, who: str) -> int:
    """The pid of the "handler" or "holder" of that file, 0 if there is no such process any more."""
    left = _read(run_dir)
    if left is None or not (pid := int(left[who])) or started_at(pid) != left[f"{who}_started"]:
        return 0
    return pid


def started_at(pid: int) -> int:
    """When a process started, which tells it from a later one of the same number; 0 if it has ended.

    Source: proc_pid_stat(5), field 22.
    """
    fields = _stat(pid)
    return int(fields[19]) if fields and not _over(fields) else 0


def ending(pid: int) -> bool:
    """Whether a process is dying: its first thread has ended, and others of it have its files open and locked still."""
    fields = _stat(pid)
    return bool(fields) and fields[0] in "ZX" and not _over(fields)


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _over(fields: list[str]) -> bool:
    """Source: proc_pid_stat(5), fields 3 and 20."""
    return fields[0] in "ZX" and int(fields[17]) <= 1


def _read(run_dir: Path) -> dict[str, Any] | None:
    try:
        left: dict[str, Any] = json.loads((run_dir / FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise EdmError(f"cannot read {run_dir / FILE}: {error}") from error
    return left
