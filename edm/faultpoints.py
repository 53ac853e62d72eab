"""Fault points: named places where a test kills, delays, stops, fails or damages something of a process of EDM's.

The C core's are in native/points.h; those of the memory server are named here, since it has some of them in C and in
Python, whichever carries a request out. `EDM_INTERNAL_POINT` names a file with
one line, "ROLE POINT ACTION TIMES"; the process of that role acts once, when it has passed the point so many times, and
removes the file. With the action "hold" it then waits until the file is there again. Off unless armed.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Final, NamedTuple

from edm._native import ffi, lib
from edm.errors import StoreError, UsageError

VARIABLE: Final = "EDM_INTERNAL_POINT"
ACTIONS: Final = {
    "kill": lib.EDM_POINT_KILL,
    "delay": lib.EDM_POINT_DELAY,
    "fail": lib.EDM_POINT_FAIL,
    "hold": lib.EDM_POINT_HOLD,
    "corrupt": lib.EDM_POINT_CORRUPT,
}
DELAY_S: Final = 0.2
HOLD_S: Final = 30.0


class Point(NamedTuple):
    """A point: its name, what has just come or is about to, what fails there, and what is damaged ("": nothing)."""

    name: str
    what: str
    fails: str = ""
    damaged: str = ""

    @property
    def actions(self) -> list[str]:
        """What can be done there."""
        return [
            action for action in ACTIONS if (action != "fail" or self.fails) and (action != "corrupt" or self.damaged)
        ]


_STORE: Final = "the store says that it cannot"
_CHANGES: Final = (
    Point("change_begun", "a fork, remap, removal or end is to change the SPT", _STORE),
    Point("change_made", "it has, and that is not noted", _STORE),
    Point("change_committed", "the change lasts", _STORE),
)


class _Armed:
    """The point of this process that acts, if one does."""

    name = ""
    action = ""
    times = 0
    flag = Path()


def points() -> list[Point]:
    """All points in the order of their numbers, those of the C core first."""
    found: list[Point] = []
    while (text := lib.edm_point_text(len(found) + 1)) != ffi.NULL:
        words = (text.name, text.what, text.fails, text.damaged)
        found.append(Point(*("" if word == ffi.NULL else ffi.string(word).decode() for word in words)))
    return [*found, *_CHANGES]


def arm(role: str) -> None:
    """Arm the point that the environment names, if it is one of this role's.

    Raises `UsageError` where there is no such point, or that cannot be done there.
    """
    flag = Path(os.environ.get(VARIABLE, ""))
    if VARIABLE not in os.environ or not flag.is_file():
        return
    words = flag.read_text().split()
    if not words or words[0] != role:
        return
    _whose, name, action, times = words
    point = next((point for point in points() if point.name == name), None)
    if point is None or action not in point.actions:
        raise UsageError(f"{VARIABLE}: there is no fault point '{name}', or it cannot {action}")
    if point not in _CHANGES and lib.edm_point_arm(name.encode(), ACTIONS[action], int(times), str(flag).encode()) < 0:
        raise UsageError(f"{VARIABLE}: the name of the file is too long: {flag}")
    _Armed.name, _Armed.action, _Armed.times, _Armed.flag = name, action, int(times), flag


def reached(name: str) -> bool:
    """This process is at a point; whether the caller is to damage something. Raises `StoreError` to fail."""
    if _Armed.name != name:
        return False
    _Armed.times -= 1
    if _Armed.times >= 0:
        return False
    _Armed.name = ""
    if not _Armed.flag.exists() or not _Armed.flag.read_text():
        return False  # the same point of the C core has acted; empty: a test has put the file back since
    _Armed.flag.unlink()
    if _Armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif _Armed.action == "delay":
        time.sleep(DELAY_S)
    elif _Armed.action == "hold":
        end = time.monotonic() + HOLD_S
        while not _Armed.flag.exists() and time.monotonic() < end:
            time.sleep(0.005)
    elif _Armed.action == "fail":
        raise StoreError(f"failed at the fault point {name}")
    return _Armed.action == "corrupt"
