"""Takes the engine's fault records to a file, beside the path of the faults themselves."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import numpy as np

from edm.errors import UsageError
from edm.trace import END, MAGIC, RECORD

if TYPE_CHECKING:
    from pathlib import Path

    from edm.interfaces import FaultSource

RECORDS: Final = 1 << 17
"""What fits between two looks: at 20 looks a second, 2.6 million faults a second."""
EVERY_S: Final = 0.05
TAKE: Final = 1 << 14


@runtime_checkable
class Traces(Protocol):
    """A fault source whose engine records faults."""

    def trace_start(self, records: int) -> None:
        """Record from now on."""

    def trace_take(self, most: int) -> tuple[bytes, int]:
        """Records, and how many faults went unrecorded."""
        ...


class Recorder:
    """Records from its making to `close`; raises `UsageError` where the file cannot be made or the source cannot."""

    def __init__(self, source: FaultSource, path: Path) -> None:
        if not isinstance(source, Traces):
            raise UsageError("trace: this fault source records no faults")
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise UsageError(f"trace: cannot write {path}: {error.strerror}") from error
        self._file.write(MAGIC)
        self._source: Traces = source
        source.trace_start(RECORDS)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._write, name="edm-trace", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        while not self._ending.wait(EVERY_S):
            self._take()
        unrecorded = self._take()
        last = np.zeros(1, RECORD)
        last["outcome"], last["page"] = END, unrecorded
        self._file.write(last.tobytes())
        self._file.close()

    def _take(self) -> int:
        while True:
            data, unrecorded = self._source.trace_take(TAKE)
            self._file.write(data)
            if len(data) < TAKE * RECORD.itemsize:
                return unrecorded

    def close(self) -> None:
        """Write what is left. Before the engine is stopped."""
        self._ending.set()
        self._thread.join()
