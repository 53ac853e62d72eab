"""The trace's threads, and the engine that serves their faults."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from edm.engine import Engine
from edm.errors import EdmError
from edm.plugins.source_replay.program import ReplayProgram
from edm.plugins.source_replay.trace import READ, load

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edm.config.settings import HandlerSettings
    from edm.plugins.source_replay import ReplayOptions
    from edm.plugins.source_replay.trace import Operations

log = logging.getLogger(__name__)

CHUNK: Final = 65_536
"""Operations between two looks at whether the run goes on."""


class ReplaySource(Engine):
    """A `FaultSource` that plays a trace once, from `start` on, and checks every read."""

    def __init__(self, settings: HandlerSettings, options: ReplayOptions) -> None:
        super().__init__(settings)
        self._trace = load(options)
        self._parts = self._trace.split(options.threads)
        self._program: ReplayProgram | None = None
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._playing = 0
        self._done = 0
        self._failure: EdmError | None = None
        self._stopped = False

    def prepare(self, environment: dict[str, str]) -> dict[str, str]:
        """The environment as it is: a program started beside the trace is not captured."""
        return dict(environment)

    def start(self, instance: int) -> None:
        """Start the program's threads."""
        self._program = ReplayProgram(self, instance, self._trace.pages)
        self._threads = [
            threading.Thread(target=self._play, args=(part,), name=f"edm-replay-{number}", daemon=True)
            for number, part in enumerate(self._parts)
        ]
        self._playing = len(self._threads)
        for thread in self._threads:
            thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the trace has been played, or cut short; False if it goes on after `timeout_s`."""
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def played(self) -> int:
        """Operations carried out so far."""
        return self._done

    def error(self) -> str:
        """A read that found other bytes than it must, else the engine's first internal error; "" if none."""
        return str(self._failure) if self._failure else super().error()

    def stop(self) -> None:
        """End all waiting calls, the trace's too."""
        self._stopped = True
        super().stop()

    def close(self) -> None:
        """Free everything; raises the first failure of the trace, an `EdmError`. A second call does nothing."""
        if self._closed:
            return
        self.stop()
        for thread in self._threads:
            thread.join()
        if self._program:
            self._program.close()
        super().close()
        if self._done < len(self._trace.operations) and self._threads and not self._failure:
            log.warning("the trace was cut short after %d of %d operations", self._done, len(self._trace.operations))
        if self._failure:
            raise self._failure

    def _play(self, part: NDArray[np.intp]) -> None:
        """One thread of the program; the last one to end ends the program."""
        try:
            for start in range(0, len(part), CHUNK):
                if self._stopped or not self._play_chunk(part[start : start + CHUNK]):
                    break
        except EdmError as error:
            self._fail(error)
        with self._lock:
            self._playing -= 1
            last = self._playing == 0
        if last and self._program:
            self._program.close()

    def _play_chunk(self, chunk: NDArray[np.intp]) -> bool:
        """Play some of the operations; False when the engine was stopped before the last one."""
        assert self._program is not None
        operations = self._trace.operations[chunk]
        done = self._program.run(operations)
        self._check(operations[:done], self._trace.expected[chunk[:done]])
        with self._lock:
            self._done += done
        return done == len(chunk)

    def _check(self, operations: Operations, expected: NDArray[np.uint64]) -> None:
        wrong = np.flatnonzero((operations["kind"] == READ) & (operations["value"] != expected))
        for index in wrong[:1]:
            page, found, due = int(operations["page"][index]), int(operations["value"][index]), int(expected[index])
            raise EdmError(f"replay: page {page} holds {found:#x}, not {due:#x}: a write was lost")

    def _fail(self, error: EdmError) -> None:
        with self._lock:
            self._failure = self._failure or error
