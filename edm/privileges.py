"""What a process of EDM may do beyond its user: given up at its start, but for what its work takes.

Place on the path: first thing in the DM-Handler's and the DMS's processes, before any thread: each has its own.
Source: capabilities(7), capset(2).
"""

from __future__ import annotations

import ctypes
import enum
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edm.errors import NativeError

if TYPE_CHECKING:
    from collections.abc import Iterable

PR_SET_NO_NEW_PRIVS: Final = 38
_VERSION_3: Final = 0x20080522
_WORDS: Final = 2


class Capability(enum.IntEnum):
    """Those that EDM, or a transport, may have a use for. Source: linux/capability.h."""

    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    KILL = 5
    NET_BIND_SERVICE = 10
    IPC_LOCK = 14
    SYS_PTRACE = 19
    SYS_ADMIN = 21
    SYS_NICE = 23


HANDLER: Final = (
    Capability.SYS_PTRACE,  # events of forks; the memory and descriptors of programs of other users
    Capability.DAC_READ_SEARCH,  # … and their files below /proc
    Capability.KILL,  # a program of another user's that cannot go on right is ended
    Capability.SYS_NICE,  # the threads follow the program's CPU, and its sidecar theirs
)
FRAMES: Final = Capability.SYS_ADMIN
"""The kernel shows frame numbers to no one else."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def keep_only(wanted: Iterable[Capability], *, writes_to: Iterable[Path] = ()) -> None:
    """Give up all capabilities of this thread, and of those it starts, but `wanted`; and gain none by any exec.

    writes_to: directories that must still be written to. Where that takes root's power over all files, it is kept.
    """
    may = permitted()
    kept = {one for one in wanted if one in may}
    _set(effective=kept, permitted=may)
    if Capability.DAC_OVERRIDE in may and not all(_may_write(path) for path in writes_to):
        kept.add(Capability.DAC_OVERRIDE)
    _set(effective=kept, permitted=kept)
    if _libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise NativeError(ctypes.get_errno(), "giving up privileges")


def permitted() -> set[int]:
    """The capabilities that this thread has, by number."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            mask = int(line.split()[1], 16)
            return {number for number in range(64) if mask >> number & 1}
    raise NativeError(0, "reading /proc/thread-self/status")


def _may_write(path: Path) -> bool:
    return os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True)


def _set(effective: Iterable[int], permitted: Iterable[int]) -> None:
    data = (_Data * _WORDS)()
    for number in effective:
        data[number // 32].effective |= 1 << number % 32
    for number in permitted:
        data[number // 32].permitted |= 1 << number % 32
    if _libc().capset(ctypes.byref(_Header(_VERSION_3, 0)), ctypes.byref(data)):
        raise NativeError(ctypes.get_errno(), "giving up privileges")


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
