"""A replayed program: the calls of native/replay.c as an object.

Place on the path: in the app's stead [1-4, 15]. Any thread may call; a call blocks, without the GIL, while the engine
serves its fault.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import numpy as np

from edm._native import ffi, lib
from edm.errors import NativeError
from edm.plugins.source_replay.trace import REMAP, REMOVE, UNMAP

if TYPE_CHECKING:
    from edm.engine import Engine
    from edm.plugins.source_replay.trace import Operations


class ReplayProgram:
    """A program of `pages` pages whose faults `engine` serves; to be closed before or after the engine."""

    def __init__(self, engine: Engine, instance: int, pages: int) -> None:
        handle = lib.edm_replay_open(engine.native, instance, pages)
        if not handle:
            raise NativeError(ffi.errno, "edm_replay_open")
        self._handle: Any = handle

    def read(self, page: int) -> int:
        """What was written to the page last; 0 if nothing was."""
        value = ffi.new("uint64_t *")
        _raise(lib.edm_replay_touch(self._handle, page, 0, 0, value), f"read of page {page}")
        return int(value[0])

    def write(self, page: int, value: int) -> None:
        """Write a 64-bit number to the page."""
        _raise(lib.edm_replay_touch(self._handle, page, 1, value, ffi.NULL), f"write to page {page}")

    def remove(self, page: int, count: int) -> None:
        """madvise(MADV_DONTNEED): the pages read 0 after it."""
        _raise(lib.edm_replay_event(self._handle, REMOVE, page, count, 0), "remove")

    def unmap(self, page: int, count: int) -> None:
        """Munmap and a fresh mmap: the pages read 0 after it."""
        _raise(lib.edm_replay_event(self._handle, UNMAP, page, count, 0), "unmap")

    def remap(self, page: int, count: int, target: int) -> None:
        """Mremap to `target`, which must not overlap, and a fresh mmap at `page`."""
        _raise(lib.edm_replay_event(self._handle, REMAP, page, count, target), "remap")

    def fork(self) -> ReplayProgram:
        """The child, a program with the same pages; the caller closes both."""
        out = ffi.new("struct edm_replay **")
        _raise(lib.edm_replay_fork(self._handle, out), "fork")
        child = object.__new__(ReplayProgram)
        child._handle = out[0]
        return child

    def run(self, operations: Operations) -> int:
        """Carry out operations in order; returns how many were done before the engine was stopped.

        Reads leave what they found in `operations["value"]`. Raises `NativeError` for any other failure.
        """
        error = ffi.new("int *")
        operations = np.require(operations, requirements=["C", "W"])
        done: int = lib.edm_replay_run(
            self._handle, ffi.from_buffer("struct edm_replay_op[]", operations), len(operations), error
        )
        if error[0] not in {0, errno.ESHUTDOWN, errno.ESRCH}:
            raise NativeError(error[0], f"operation {done} of the trace")
        return done

    def present(self) -> int:
        """Pages that are in memory now."""
        return int(lib.edm_replay_present(self._handle))

    def pin(self, page: int, count: int, *, pinned: bool = True) -> None:
        """Keep the pages from moving out, or no longer."""
        _raise(lib.edm_replay_pin(self._handle, page, count, pinned), "pin")

    def close(self) -> None:
        """End the program; no other thread may be in a call. A second call does nothing."""
        if self._handle:
            handle, self._handle = self._handle, None
            lib.edm_replay_close(handle)


def _raise(result: int, call: str) -> None:
    if result:
        raise NativeError(-result, call)
