"""After the death of a DM-Handler or memory server: whether another may be started."""

from __future__ import annotations

import os
import select
import signal
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

WINDOW_S: Final = 60.0
REST_S: Final = 2.0
"""How long a holder's end may be known before the last word of who had it."""
TOGETHER_S: Final = 0.1
"""How long what was started together with the dead may take to end by itself: mpiexec does not."""
READY_S: Final = 60.0
MODULES: Final = {"dms": "edm.dms.process", "dm-handler": "edm.handler.process"}


def roles_of(command: Sequence[str]) -> list[str]:
    """The roles that a command of a launch plan starts."""
    return [role for role, module in MODULES.items() if module in command]


class Revival:
    """Counts deaths, and watches the holder.

    instances: the DM-Handler's numbers at the memory servers. started: what has been started again, by the number of
    its command. why_not: why `begin` said no.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._deaths: list[float] = []
        self._began: float | None = None
        self._bereaved_at: float | None = None
        self._holder_fd = -1
        self._segment = -1
        self._lost: dict[int, float] = {}
        self.instances: Sequence[int] = ()
        self.started: dict[int, subprocess.Popen[bytes]] = {}
        self.why_not = ""

    @property
    def under_way(self) -> bool:
        """Whether something has died and is not ready again."""
        return self._began is not None

    def held(self, holder: int, segment: int) -> None:
        """Note the process that keeps the programs' descriptors, and what a fault source goes on from (-1: nothing)."""
        self._close()
        try:
            self._holder_fd = os.pidfd_open(holder)
        except ProcessLookupError:
            self._holder_fd = -1
        self._segment = segment

    def possible(self, *, with_handler: bool) -> bool:
        """Whether another could go on. with_handler: a DM-Handler is among what died, or goes with it."""
        if with_handler and (self._segment < 0 or not self.instances):
            return False
        if with_handler and not self.holder_lives:
            self.why_not = "and its holder with it: nothing has the program's pages any more"
            return False
        return True

    def begin(self, *, with_handler: bool, asked: bool = False) -> bool:
        """Whether what died may be started again. asked: somebody wants it, however often there was a death."""
        if self._began is not None:
            return True
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < WINDOW_S]
        if not asked and len(self._deaths) >= self._most:
            self.why_not = f"{self._most} deaths within a minute (--restarts)" if self._most else ""
            return False
        if not self.possible(with_handler=with_handler):
            return False
        if not asked:
            self._deaths.append(now)
        self._began = now
        return True

    def stop(self) -> None:
        """What was begun has failed, and is not tried again by itself."""
        self._began = None
        self.started.clear()
        self._lost.clear()

    def again(self) -> bool:
        """What was started has ended before it was ready: whether to try once more."""
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < WINDOW_S]
        if len(self._deaths) >= self._most or not self.holder_lives:
            return False
        self._deaths.append(now)
        return True

    def bereaved(self) -> bool:
        """Whether the holder is gone, and that has been seen only just now."""
        if self._holder_fd < 0 or self.holder_lives:
            self._bereaved_at = None
            return False
        if self._bereaved_at is None:
            self._bereaved_at = time.monotonic()
        return time.monotonic() - self._bereaved_at < REST_S

    def lost(self, number: int) -> None:
        """Note that of a command which was started again somebody has died before it was ready."""
        self._lost[number] = time.monotonic()

    def overdue(self, number: int, process: subprocess.Popen[bytes]) -> bool:
        """Whether what was started together with the dead should have ended by now."""
        since = self._lost.get(number) if self.started.get(number) is process else self._began
        return since is not None and time.monotonic() - since > TOGETHER_S

    def restarted(self, number: int, process: subprocess.Popen[bytes]) -> None:
        """Note that a command was started again: the time it may take begins."""
        self.started[number] = process
        self._lost.pop(number, None)
        self._began = time.monotonic()

    def late(self) -> bool:
        """Whether it takes longer than anybody should wait for."""
        return self._began is not None and time.monotonic() - self._began > READY_S

    def done(self) -> bool:
        """All are ready; whether something had died."""
        was, self._began = self._began is not None, None
        self.started.clear()
        self._lost.clear()
        return was

    def end_holder(self) -> None:
        """End the holder: the programs have ended."""
        if self._holder_fd >= 0 and self.holder_lives:
            signal.pidfd_send_signal(self._holder_fd, signal.SIGKILL)
        self._close()

    @property
    def holder_lives(self) -> bool:
        """Whether the process that keeps the programs' descriptors is there."""
        return self._holder_fd >= 0 and not select.select([self._holder_fd], [], [], 0)[0]

    def _close(self) -> None:
        if self._holder_fd >= 0:
            os.close(self._holder_fd)
        self._holder_fd = -1
