"""Programs of the run that are not captured: found, and warned of, since nothing keeps them within the budget.

A captured program may start others, and those the dynamic linker loads no library into cannot be captured. A child made
past the C library is served with what its parent had, but has nobody who could move its own pages out.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edm.errors import UsageError
from edm.launch.checks import check_capturable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

LOOK_EVERY_S: Final = 1.0
AFTER_S: Final = 4.0
"""So long a process is not told of: between its exec and its hand-over it is no stray."""
OURS: Final = "edm: "
CONTROL: Final = "/memfd:edm-ctl"
"""What a program that EDM's library has brought in has among its mappings. A fork does not copy it."""

_UNCAPTURED: Final = "process {pid} is not captured, its memory is all local: {why}"
_SERVED: Final = (
    "process {pid} is served, but none of its memory leaves: {file} made it by a system call of its own, or has "
    "restricted its system calls (seccomp)"
)


class Strays:
    """Looks at a program and all below it now and then. Each program's file is warned of once."""

    def __init__(self, pid: int, *, every_s: float = LOOK_EVERY_S, after_s: float = AFTER_S) -> None:
        self._pid = pid
        self._every_s, self._after_s = every_s, after_s
        self._looked = time.monotonic()
        self._since: dict[tuple[int, str], float] = {}
        self._told: set[str] = set()
        self._whole: set[tuple[int, str]] = set()

    def look(self, captured: Collection[int], told: float) -> list[str]:
        """Warnings for what is due, mostly none; captured: what the DM-Handler knew at the monotonic time `told`.

        On a machine that is busy that may be long ago: a process that came later may well be captured by now.
        """
        now = time.monotonic()
        if now - self._looked < self._every_s:
            return []
        self._looked = now
        there = [(pid, file) for pid in _below(self._pid) if (file := _file(pid))]
        self._whole &= set(there)
        self._since = {key: self._since.get(key, now) for key in there if not self._is_whole(key, captured)}
        texts = []
        for (pid, file), since in self._since.items():
            if told - since >= self._after_s:
                text = _SERVED if pid in captured else _UNCAPTURED
                if (text + file) not in self._told:
                    self._told.add(text + file)
                    texts.append(text.format(pid=pid, file=file, why="" if pid in captured else _why(file)))
        return texts

    def _is_whole(self, key: tuple[int, str], captured: Collection[int]) -> bool:
        if key[0] in captured and key not in self._whole and _has_control(key[0]):
            self._whole.add(key)
        return key[0] in captured and key in self._whole


def _has_control(pid: int) -> bool:
    """Whether the DM-Handler can have its pages moved out; a process that may not be looked at is not doubted."""
    try:
        return CONTROL in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return True


def _below(pid: int) -> Iterator[int]:
    """The process and all its descendants, without EDM's own. Source: proc_pid_task(5), children."""
    try:
        if Path(f"/proc/{pid}/comm").read_text().startswith(OURS):
            return
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:  # it has ended
        return
    yield pid
    for child in children:
        yield from _below(child)


def _file(pid: int) -> str:
    """The program's file, "" if it has ended or may not be looked at."""
    try:
        return str(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return ""


def _why(file: str) -> str:
    try:
        check_capturable(Path(file))
    except UsageError as error:
        return str(error).partition(" (--uncaptured")[0]
    except OSError:
        pass  # removed since
    return f"{file} was started without EDM's environment, or by a system call of its own"
