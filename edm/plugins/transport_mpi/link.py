"""A DM-Handler's channel to one memory server's rank [5, 11].

MPI has no wait with a deadline, and a blocking receive burns a core: requests are tested, in a spin at first and with
sleeps between after that.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from edm.errors import PeerLost, ProtocolError, TransportTimeout
from edm.wire import Frame

if TYPE_CHECKING:
    from edm.plugins.transport_mpi import MpiOptions
    from edm.plugins.transport_mpi.world import World

BURST: Final = 20
"""Tests between two looks at the clock."""
KEEP_CPU_S: Final = 30e-6
"""Of a spin, how long not to offer the CPU: the usual answer is there by then. After that, it may be waiting for it."""
MAX_UNSENT: Final = 2
"""Messages a server has not taken before the link says that it is lost."""


def spin_s(options: MpiOptions) -> float:
    """How long to spin: with one CPU the other side needs this very one, and spinning only keeps it from it."""
    return options.spin_us / 1e6 if len(os.sched_getaffinity(0)) > 1 else 0.0


class Wait:
    """Waits for MPI requests as the options say: spin, then sleep longer and longer.

    closed: set by another thread to end a wait.
    """

    def __init__(self, options: MpiOptions) -> None:
        self.closed = False
        self._spin_s = spin_s(options)
        self._sleep_s = options.sleep_us / 1e6
        self._sleep_max_s = options.sleep_max_us / 1e6

    def until(self, request: Any, until: float, status: Any = None) -> bool:
        """Whether `request` was complete before `time.monotonic()` was `until`; raises `PeerLost` once closed."""
        test = request.Test
        pause_s = self._sleep_s
        began = 0.0
        while True:
            for _ in range(BURST):
                if test(status):
                    return True
            if self.closed:
                raise PeerLost("the channel is closed")
            now = time.monotonic()
            if now >= until:
                return False
            if began == 0.0:
                began = now
            waited_s = now - began
            if waited_s >= self._spin_s:
                time.sleep(min(pause_s, until - now))
                pause_s = min(pause_s * 1.5, self._sleep_max_s)
            elif waited_s >= KEEP_CPU_S:
                os.sched_yield()


class MpiLink:
    """Messages to and from one rank under one tag."""

    def __init__(self, world: World, rank: int, tag: int, options: MpiOptions) -> None:
        self.reply = Frame()
        self._world = world
        self._mpi = world.mpi
        self._comm = world.comm
        self._rank = rank
        self._tag = tag
        self._wait = Wait(options)
        self._status = world.mpi.Status()
        # Made once and started for each reply: half the cost of a new request each time.
        self._receiving = world.comm.Recv_init([self.reply.array, self.reply.capacity, self._mpi.BYTE], rank, tag)
        self._posted = False
        self._unsent: list[tuple[Any, Any]] = []
        # Held while MPI is called, so that `close` from another thread takes nothing away from under it.
        self._using = threading.Lock()

    def send(self, frame: Frame, length: int, deadline: float) -> None:
        """Send, with the receive for the reply posted before; raises as `Link` says."""
        with self._using:
            try:
                self._expect()
                self._check_unsent()
                request = self._comm.Isend([frame.array, length, self._mpi.BYTE], self._rank, self._tag)
                if self._wait.until(request, deadline):
                    return
            except self._mpi.Exception as error:
                raise self._lost(error) from error
            # The library may still read the buffer: it keeps that one.
            self._unsent.append((request, frame.array))
            frame.renew()
            raise TransportTimeout("the memory server takes no message")

    def receive(self, until: float) -> int:
        """Receive into `reply`; a receive that found nothing stays posted and catches a late reply."""
        with self._using:
            try:
                self._expect()
                if self._wait.until(self._receiving, until, self._status):
                    self._posted = False
                    return int(self._status.Get_count(self._mpi.BYTE))
            except self._mpi.Exception as error:
                self._posted = False
                if error.Get_error_class() == self._mpi.ERR_TRUNCATE:
                    raise ProtocolError("a reply larger than any message") from error
                raise self._lost(error) from error
            if not self._world.alive(self._rank):
                raise PeerLost(f"the memory server (MPI rank {self._rank}) has ended")
            return 0

    def close(self) -> None:
        """End a wait in another thread, and take the posted receive back; a second call does nothing."""
        self._wait.closed = True
        with self._using:
            if self._posted:
                self._receiving.Cancel()
                self._receiving.Wait()
                self._posted = False
            if self._receiving:
                self._receiving.Free()

    def _expect(self) -> None:
        if self._wait.closed:
            raise PeerLost("the channel is closed")
        if not self._posted:
            self._receiving.Start()
            self._posted = True

    def _check_unsent(self) -> None:
        if self._unsent:
            self._unsent = [waiting for waiting in self._unsent if not waiting[0].Test()]
            if len(self._unsent) >= MAX_UNSENT:
                raise PeerLost(f"the memory server (MPI rank {self._rank}) takes no messages")

    def _lost(self, error: Any) -> PeerLost:
        return PeerLost(f"the memory server (MPI rank {self._rank}) is lost: {' '.join(str(error).split())}")
