"""What is told of a run that does not go on as it should, found in the engine's counters now and then.

Place on the path: the DM-Handler looks with each report. A memory server in another process that does not answer is the
workers' to tell of (edm.handler.workers): they have a deadline for each request; a call into this process has none.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from edm.errors import TransportTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SAY_AFTER_S: Final = 5.0


class Stall:
    """A memory server in this process whose store holds on to a call.

    ends: past `patience_s`, end the run.
    """

    def __init__(self, warn: Callable[[str], None], *, patience_s: float, ends: bool) -> None:
        self._warn = warn
        self._patience_s = patience_s
        self._ends = ends
        self._seen: tuple[int, ...] = ()
        self._since = time.monotonic()
        self._told = False

    def look(self, counters: Mapping[str, int]) -> None:
        """Compare with the last look; raises `TransportTimeout` where the run is to end."""
        now = time.monotonic()
        seen = tuple(counters[name] for name in ("fetches", "stale", "writes", "write_failures"))
        if seen != self._seen or not (counters["asked"] or counters["staged"]):
            if self._told:
                self._warn(f"the page store answers again, after {now - self._since:.1f} s")
            self._seen, self._since, self._told = seen, now, False
            return
        waited_s = now - self._since
        if not self._told and waited_s >= SAY_AFTER_S:
            self._told = True
            self._warn(f"the page store has not answered for {waited_s:.0f} s; waiting")
        if self._ends and waited_s >= self._patience_s:
            raise TransportTimeout(f"the page store did not answer within {self._patience_s:g} s")


class Bare:
    """Programs whose sidecar was killed: their pages stay."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._told = 0

    def look(self, counters: Mapping[str, int]) -> None:
        """Compare with the last look."""
        bare, told = counters["bare"], self._told
        self._told = bare
        if bare > told:
            self._warn(
                f"the sidecar of {bare} process(es) has died: nothing of them is evicted any more, "
                "and their memory stays here, above the budget"
            )
