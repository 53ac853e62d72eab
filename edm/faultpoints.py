"""Fault points: named places where a test kills, delays, fails or stops one of EDM's processes. Off unless armed.

The C core's are in native/points.h; those of the memory server are named here, since it has some of them in C and in
Python, whichever carries a request out. `EDM_INTERNAL_POINT` names a file with
one line, "ROLE POINT ACTION TIMES"; the process of that role acts once, when it has passed the point so many times, and
removes the file. With the action "hold" it then waits until the file is there again.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Final

from edm._native import ffi, lib
from edm.errors import StoreError, UsageError

VARIABLE: Final = "EDM_INTERNAL_POINT"
ACTIONS: Final = {
    "kill": lib.EDM_POINT_KILL,
    "delay": lib.EDM_POINT_DELAY,
    "fail": lib.EDM_POINT_FAIL,
    "hold": lib.EDM_POINT_HOLD,
}
SERVER_POINTS: Final = (
    "pages_asked",
    "pages_put",
    "pages_recorded",
    "pages_synced",
    "pages_committed",
    "change_begun",
    "change_made",
    "change_committed",
)
DELAY_S: Final = 0.2
HOLD_S: Final = 30.0


class _Armed:
    """The point of this process that acts, if one does."""

    name = ""
    action = ""
    times = 0
    flag = Path()


def native_points() -> list[str]:
    """The names of the DM-Handler's points in the C core, in the order of their numbers."""
    names: list[str] = []
    while (name := lib.edm_point_name(len(names) + 1)) != ffi.NULL:
        names.append(ffi.string(name).decode())
    return [name for name in names if name not in SERVER_POINTS]


def arm(role: str) -> None:
    """Arm the point that the environment names, if it is one of this role's; raises `UsageError` for no such point."""
    flag = Path(os.environ.get(VARIABLE, ""))
    if VARIABLE not in os.environ or not flag.is_file():
        return
    words = flag.read_text().split()
    if not words or words[0] != role:
        return
    _whose, name, action, times = words
    known = lib.edm_point_arm(name.encode(), ACTIONS[action], int(times), str(flag).encode()) > 0
    if name in SERVER_POINTS:
        _Armed.name, _Armed.action, _Armed.times, _Armed.flag = name, action, int(times), flag
    elif not known:
        raise UsageError(f"{VARIABLE}: there is no fault point '{name}'")


def reached(name: str) -> None:
    """This process is at a point; raises `StoreError` where it is to fail there."""
    if _Armed.name != name:
        return
    _Armed.times -= 1
    if _Armed.times >= 0:
        return
    _Armed.name = ""
    if not _Armed.flag.exists():
        return  # the same point of the C core has acted
    _Armed.flag.unlink()
    if _Armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif _Armed.action == "delay":
        time.sleep(DELAY_S)
    elif _Armed.action == "hold":
        end = time.monotonic() + HOLD_S
        while not _Armed.flag.exists() and time.monotonic() < end:
            time.sleep(0.005)
    else:
        raise StoreError(f"failed at the fault point {name}")
