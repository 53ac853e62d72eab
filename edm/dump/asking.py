"""Asking a program's DM-Handler which pages hold anything, and to bring those that are not in the program.

The layout of the messages is in native/sidecar.h (`struct edm_ask`), the other end in native/asking.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from typing import Final

import attrs
import numpy as np

from edm._native import ffi, lib
from edm.errors import EdmError, NativeError

MAGIC: Final = 0x314C5443
HELLO: Final = struct.pack("=II", MAGIC, 3)
ASK: Final = struct.Struct("=IIiIQ")
ASK_PAGES: Final = 4096
ANSWER: Final = struct.Struct(f"=IiQ{ASK_PAGES // 8}s")
HELD, BRING = 1, 2
ANSWER_S: Final = 1.0
PATIENCE_S: Final = 60.0
"""A DM-Handler that has died is replaced within it, or never."""
REFUSALS: Final = 50
_HOPELESS: Final = {errno.ENOENT, errno.ECONNREFUSED, errno.EACCES, errno.EPERM}


@attrs.frozen
class Capture:
    """Who captured a process. staging: [start, end) in bytes of what is EDM's own in it."""

    handler_pid: int
    staging: tuple[int, int]
    path: str


def capture_of(pid: int) -> Capture | None:
    """None: it is not captured; raises `NativeError`."""
    out = ffi.new("struct edm_capture *")
    result = lib.edm_capture_of(pid, out)
    if result:
        if -result == errno.ENOENT:
            return None
        raise NativeError(-result, f"looking at process {pid}")
    path = os.fsdecode(ffi.string(out.sock))
    return Capture(out.handler_pid, (out.staging, out.staging + out.staging_bytes), path)


class Asker:
    """One conversation with the DM-Handler of process `pid`; raises `EdmError` where it does not answer."""

    def __init__(self, pid: int, capture: Capture) -> None:
        self._pid, self._path = pid, capture.path
        self._socket: socket.socket | None = None

    def held(self, first: int, count: int) -> tuple[np.ndarray, int]:
        """Which of up to ASK_PAGES pages hold anything; and the page before which none behind them does."""
        return self._ask(HELD, first, count)

    def bring(self, first: int, count: int) -> np.ndarray:
        """Have pages brought into the program; which of them were not there. Returns before they are."""
        return self._ask(BRING, first, count)[0]

    def close(self) -> None:
        """Hang up."""
        if self._socket:
            self._socket.close()
            self._socket = None

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.settimeout(ANSWER_S)
            self._socket.connect(self._path)
            self._socket.recv(8)  # its greeting, with a descriptor that is not for us
            self._socket.send(HELLO)
        return self._socket

    def _exchange(self, question: bytes) -> bytes:
        """Ask until there is an answer: behind a DM-Handler that dies another listens there."""
        end, refusals = time.monotonic() + PATIENCE_S, 0
        while True:
            try:
                line = self._connected()
                line.send(question)
                if answer := line.recv(ANSWER.size + 1):
                    return answer
                why, refusals = "it hangs up (it answers its own user, and root)", refusals + 1
            except OSError as error:
                why = error.strerror or str(error)
                if error.errno in _HOPELESS:
                    raise self._lost(why) from error
            self.close()
            if time.monotonic() > end or refusals == REFUSALS:
                raise self._lost(why)
            time.sleep(0.01)

    def _ask(self, what: int, first: int, count: int) -> tuple[np.ndarray, int]:
        answer = self._exchange(ASK.pack(MAGIC, what, self._pid, count, first))
        if len(answer) != ANSWER.size:
            raise self._lost("another version of EDM")
        magic, status, following, bits = ANSWER.unpack(answer)
        if magic != MAGIC or status:
            raise self._lost("it does not know the process" if magic == MAGIC else "another version of EDM")
        pages = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[:count].astype(bool)
        return pages, max(following, first + count)

    def _lost(self, why: str) -> EdmError:
        return EdmError(f"the DM-Handler of process {self._pid} does not answer at {self._path}: {why}")
