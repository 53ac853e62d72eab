"""The opened transport `mpi`: the same class in DM-Handlers and memory servers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from edm._native import lib
from edm.channel import Session
from edm.errors import PeerLost, TransportError, UsageError
from edm.plugins.transport_mpi.link import MpiLink
from edm.plugins.transport_mpi.serving import MpiServing
from edm.plugins.transport_mpi.world import World
from edm.spread import open_channel
from edm.wire import Frame, Kind

if TYPE_CHECKING:
    import threading

    from edm.interfaces import Channel, PageServer
    from edm.plugins.transport_mpi import MpiOptions
    from edm.types import RunContext

GOODBYE_TAG: Final = 1
FIRST_TAG: Final = 2
TAGS: Final = lib.EDM_MPI_PAGES_TAG
"""With as many again for pages, fewer than the smallest bound on tags MPI allows. A tag used twice by threads that ask
one after the other does no harm: replies name their channel."""
GOODBYE_S: Final = 2.0


class MpiTransport:
    """One rank of the job."""

    def __init__(self, options: MpiOptions, context: RunContext) -> None:
        self._options = options
        self._deadline_s = context.deadline_s
        self._world = World(context)
        self._session = Session(len(self._world.servers))
        self._channels: list[Channel] = []
        self._serving: MpiServing | None = None
        self._role = context.role
        self._closed = False

    def connect(self) -> Channel:
        """Open a channel of this DM-Handler, under a tag of its own."""
        if self._closed:
            raise PeerLost("the transport is closed")
        if self._role == "dms":
            raise UsageError("a memory server has nobody to connect to")
        number = self._session.number()
        links = [self._link(rank, FIRST_TAG + number % TAGS) for rank in self._world.servers]
        channel = open_channel(links, self._session, number, self._deadline_s)
        self._channels.append(channel)
        return channel

    def serve(self, server: PageServer, stop: threading.Event) -> None:
        """Answer all DM-Handlers until `stop` is set or every one has said goodbye."""
        self._serving = MpiServing(self._world, self._options, server)
        self._serving.run(stop)

    def peers(self) -> int:
        """How many DM-Handlers are served."""
        return len(self._serving.peers) if self._serving is not None else len(self._world.handlers)

    def figures(self) -> dict[str, Any]:
        """What was answered so far."""
        return self._serving.figures() if self._serving is not None else {}

    def close(self) -> None:
        """Say goodbye and leave the job, where every other rank does too; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for channel in self._channels:
            channel.close()
        if self._role == "dms":
            if self._serving is None or not self._serving.peers:
                self._world.finalize()
        elif self._goodbye():
            self._world.finalize()

    def _goodbye(self) -> bool:
        """Whether every memory server has taken this DM-Handler's goodbye, and so will leave the job as well."""
        frame = Frame()
        length = frame.seal(Kind.BYE, 0, 0, 0, 1)
        taken = True
        for rank in self._world.servers:
            link = self._link(rank, GOODBYE_TAG)
            deadline = time.monotonic() + GOODBYE_S
            try:
                link.send(frame, length, deadline)
                taken = link.receive(deadline) > 0 and taken
            except TransportError:
                taken = False
            link.close()
        return taken

    def _link(self, rank: int, tag: int) -> MpiLink:
        return MpiLink(self._world, rank, tag, self._options)
