"""A memory server's rank: takes requests from all DM-Handlers and answers them [6-11].

One thread, one posted receive for whatever comes, in C (native/mpi_serving.c), which answers gets of stored pages and
evictions by itself where the server has a table; everything else is answered here. Idle, it tests in bursts with sleeps
between (in C), which grow from `sleep_us` to `sleep_max_us`; a request ends that at once.
"""

from __future__ import annotations

import errno
import logging
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from edm._native import ffi, lib
from edm.dms.answering import Answerer
from edm.ops import SERVER, SERVER_BYTES, address_of
from edm.plugins.transport_mpi.library import waits_of
from edm.wire import Frame, Kind

if TYPE_CHECKING:
    import threading

    from edm.interfaces import PageServer
    from edm.plugins.transport_mpi import MpiOptions
    from edm.plugins.transport_mpi.world import World

log = logging.getLogger(__name__)

IDLE_S: Final = 0.1
"""Longest wait for a request before looking around."""
MAX_UNSENT: Final = 16
"""Replies that nobody has taken yet; beyond that no new request is."""
SEND_TESTS: Final = 200
"""Tests of a reply on its way before turning to other requests: as long as 256 KiB take when the other side polls."""
DRAIN_S: Final = 2.0
"""How long a server that ends goes on answering what has arrived."""
GONE_S: Final = 1.0
"""Longest from the loss of a process's memory until its death is to be seen."""
LOOK_S: Final = 1.0
"""How often an idle server looks whether its DM-Handlers are still there."""


class MpiServing:
    """The serve loop and what it knows of its peers."""

    def __init__(self, world: World, options: MpiOptions, server: PageServer) -> None:
        self.peers = set(world.handlers)
        self._world = world
        self._mpi = world.mpi
        self._comm = world.comm
        self._options = options
        self._answerer = Answerer(server)
        frame = self._answerer.request
        table = ffi.cast("void *", address_of(server, SERVER, SERVER_BYTES))
        anyone = int(world.mpi.ANY_SOURCE), int(world.mpi.ANY_TAG)
        native = lib.edm_mpi_serving_new(
            world.library, table, frame.pointer, frame.capacity, waits_of(options), *anyone
        )
        if native == ffi.NULL:
            raise MemoryError
        self._native = ffi.gc(native, lib.edm_mpi_serving_free)
        self._served = lib.edm_mpi_served(native)
        self._unsent: list[tuple[Any, Frame]] = []
        self._spare: list[Frame] = []
        self._looked = time.monotonic()

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set or every DM-Handler has said goodbye or is gone."""
        while self.peers and not stop.is_set():
            if not self._burst(IDLE_S):
                self._look(time.monotonic())
        # What has arrived is answered still.
        end = time.monotonic() + DRAIN_S
        while time.monotonic() < end and (self._burst(0.0) or self._on_their_way()):
            """Until nothing is left."""
        lib.edm_mpi_serving_stop(self._native)

    def figures(self) -> dict[str, Any]:
        """What was answered so far."""
        figures = attrs.asdict(self._answerer.figures)
        for name in ("gets", "pages_sent", "evicts", "pages_received"):
            figures[name] += getattr(self._served, name)
        return figures

    def _burst(self, idle_s: float) -> bool:
        """Take requests for as long as they come without a pause, waiting for the first; whether there was one."""
        if self._unsent and not self._room():
            time.sleep(self._options.sleep_us / 1e6)
            return False
        try:
            return self._serve(idle_s)
        except self._mpi.Exception as error:
            self._failed(error)
            return False

    def _serve(self, idle_s: float) -> bool:
        result = lib.edm_mpi_serve(self._native, idle_s)
        if result == lib.EDM_MPI_MESSAGE:
            self._take(self._served.rank, self._served.tag, self._served.length)
        elif result == -errno.EIO:
            raise self._mpi.Exception(self._served.error)
        elif result < 0:
            raise MemoryError
        return bool(result > 0)

    def _on_their_way(self) -> bool:
        self._room()
        return bool(self._unsent) or lib.edm_mpi_serving_unsent(self._native) > 0

    def _take(self, source: int, tag: int, length: int) -> None:
        reply = self._answerer.answer(length, source)
        if reply:
            self._send(source, tag, reply)
        if self._answerer.kind == Kind.BYE:
            self.peers.discard(source)

    def _send(self, rank: int, tag: int, length: int) -> None:
        frame = self._answerer.reply
        request = self._comm.Isend([frame.array, length, self._mpi.BYTE], rank, tag)
        for _ in range(SEND_TESTS):
            if request.Test():
                return
        # A large reply goes when its DM-Handler next polls; the others need not wait for that.
        self._unsent.append((request, frame))
        self._answerer.reply = self._spare.pop() if self._spare else Frame()

    def _room(self) -> bool:
        unsent = []
        for request, frame in self._unsent:
            if request.Test():
                self._spare.append(frame)
            else:
                unsent.append((request, frame))
        self._unsent = unsent
        return len(unsent) < MAX_UNSENT

    def _look(self, now: float) -> None:
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        self._drop_dead()

    def _drop_dead(self) -> bool:
        dead = [rank for rank in sorted(self.peers) if not self._world.alive(rank)]
        for rank in dead:
            log.warning("the DM-Handler of MPI rank %d has ended without a goodbye", rank)
            self.peers.discard(rank)
            self._answerer.forget(rank)
        return bool(dead)

    def _failed(self, error: Any) -> None:
        # Of an MPI that tells of failed processes (ULFM): a receive from anyone fails until that is acknowledged. Where
        # it does not, mpi4py gives both names the class of errors that are not known.
        failed = [getattr(self._mpi, name, None) for name in ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING")]
        error_class = error.Get_error_class()
        if error_class == self._mpi.ERR_TRUNCATE:
            log.warning("refused a message larger than any of EDM's")
        elif error_class in failed and error_class != self._mpi.ERR_UNKNOWN:
            if error_class == failed[1]:
                lib.edm_mpi_serving_posted(self._native)
            self._comm.Ack_failed()
            self._looked = 0.0
        elif not self._somebody_gone():
            raise error

    def _somebody_gone(self) -> bool:
        """Whether a DM-Handler has died: where MPI has no word for it, that is whatever went wrong with a message."""
        end = time.monotonic() + GONE_S
        while not (gone := self._drop_dead()) and time.monotonic() < end:
            time.sleep(GONE_S / 20)
        return gone
