"""A DM-Handler's channel to one memory server's rank [5, 11], as Python uses it: thin over native/mpi_link.c."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Final

from edm._native import ffi, lib
from edm.errors import PeerLost, ProtocolError, TransportTimeout
from edm.plugins.transport_mpi.library import waits_of
from edm.wire import Frame

if TYPE_CHECKING:
    from edm.plugins.transport_mpi import MpiOptions
    from edm.plugins.transport_mpi.world import World

SLICE_S: Final = 0.1
"""Longest wait in C before Python looks for signals."""
LOOK_S: Final = 0.5
"""How often a wait looks whether the server's process is still there."""


class MpiLink:
    """Messages to and from one rank under one tag.

    carrier: what `edm_conversation_new` takes.
    """

    def __init__(self, world: World, rank: int, tag: int, options: MpiOptions) -> None:
        self.reply = Frame()
        self._world = world
        self._rank = rank
        self._closed = False
        native = lib.edm_mpi_link_new(
            world.library, waits_of(options), rank, tag, self.reply.pointer, self.reply.capacity
        )
        if native == ffi.NULL:
            raise MemoryError
        self._native = ffi.gc(native, lib.edm_mpi_link_free)
        self.carrier = lib.edm_mpi_link_carrier(native)

    def send(self, frame: Frame, length: int, deadline: float) -> None:
        """Send, with the receive for the reply posted before; raises as `Link` says."""
        result = lib.edm_mpi_link_send(self._native, frame.pointer, length, deadline)
        if result == -errno.EBUSY:
            self.keep(frame)
            raise TransportTimeout("the memory server takes no message")
        if result:
            self._fail(result)

    def receive(self, until: float) -> int:
        """Receive into `reply`; a receive that found nothing stays posted and catches a late reply."""
        look_at = time.monotonic() + LOOK_S
        while True:
            now = time.monotonic()
            if now >= look_at:
                look_at = now + LOOK_S
                self.check()
            length: int = lib.edm_mpi_link_receive(self._native, min(until, now + SLICE_S))
            if length < 0:
                self._fail(length)
            if length or now + SLICE_S >= until:
                break
        if not length:
            self.check()
        return length

    def keep(self, frame: Frame) -> None:
        """Give the frame a fresh buffer: the library may still read its old one, which stays where it is."""
        self._world.kept.append(frame.array)
        frame.renew()

    def check(self) -> None:
        """Raise `PeerLost` if the link is closed or the other side can be seen to be gone."""
        if self._closed:
            raise PeerLost("the channel is closed")
        if not self._world.alive(self._rank):
            raise PeerLost(f"the memory server (MPI rank {self._rank}) has ended")

    def close(self) -> None:
        """End a wait in another thread, and take the posted receive back; a second call does nothing."""
        if not self._closed:
            self._closed = True
            lib.edm_mpi_link_close(self._native)

    def _fail(self, result: int) -> None:
        name = f"the memory server (MPI rank {self._rank})"
        if result == -errno.ESHUTDOWN:
            raise PeerLost("the channel is closed")
        if result == -errno.ENOBUFS:
            raise TransportTimeout(f"{name} takes no messages")
        if result != -errno.EIO:
            raise PeerLost(f"{name} is lost: it stopped halfway through a message")
        error = self._world.mpi.Exception(lib.edm_mpi_link_error(self._native))
        if error.Get_error_class() == self._world.mpi.ERR_TRUNCATE:
            raise ProtocolError("a reply larger than any message") from error
        raise PeerLost(f"{name} is lost: {' '.join(str(error).split())}") from error
