"""The DM-Handler's side of `zmq` [5, 11]."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import zmq

from edm.channel import Session
from edm.errors import MissingExtra, PeerLost, TransportError, UsageError
from edm.plugins.transport_zmq.endpoints import own_endpoint
from edm.plugins.transport_zmq.link import ZmqLink, open_link
from edm.spread import open_channel
from edm.wire import Frame, Kind

if TYPE_CHECKING:
    from edm.interfaces import Channel, PageServer
    from edm.plugins.transport_zmq import ZmqOptions
    from edm.types import RunContext

SIGN_OF_LIFE_S: Final = 5.0
"""How often a client that asks nothing tells its memory servers that it is there."""
GOODBYE_S: Final = 1.0
NAME_BYTES: Final = 12
"""Of a connection's identity, how many bytes name the client; 4 more name the channel."""


class ZmqClient:
    """All channels of one DM-Handler, and the thread that gives signs of life."""

    address = ""

    def __init__(self, options: ZmqOptions, context: RunContext) -> None:
        if not hasattr(zmq.Socket, "recv_into"):
            raise MissingExtra("the transport 'zmq' needs pyzmq 26.4 or later: pip install -U 'edm[zmq]'")
        self._options = options
        self._deadline_s = context.deadline_s
        self._endpoints = options.dms or options.listen[:1] or (own_endpoint(context.run_dir),)
        self._context: zmq.Context[Any] = zmq.Context()
        # ZeroMQ keeps identities that begin with 0 for itself.
        self._name = b"E" + os.urandom(NAME_BYTES - 1)
        self._session = Session(len(self._endpoints))
        self._channels: list[Channel] = []
        self._closed = False
        self._ending = threading.Event()
        self._living = threading.Thread(target=self._live, name="edm-alive", daemon=True)
        self._living.start()

    def connect(self) -> Channel:
        """Open a channel with a connection of its own to each memory server."""
        if self._closed:
            raise PeerLost("the transport is closed")
        number = self._session.number()
        links = [self._link(endpoint, number) for endpoint in self._endpoints]
        channel = open_channel(links, self._session, number, self._deadline_s, self._options.resend_s)
        self._channels.append(channel)
        return channel

    def serve(self, server: PageServer, stop: threading.Event) -> None:  # noqa: ARG002
        """Raise `UsageError`: this is the other side."""
        raise UsageError("a DM-Handler does not serve")

    def close(self) -> None:
        """End requests under way, say goodbye, close all connections; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for channel in self._channels:
            channel.close()
        self._ending.set()
        self._living.join()
        self._context.term()

    def _link(self, endpoint: str, number: int) -> ZmqLink:
        return open_link(self._context, endpoint, self._name + number.to_bytes(4, "big"), self._options)

    def _live(self) -> None:
        """Tell every server now and then that this client is there, and at the end that it goes."""
        links = [self._link(endpoint, 0) for endpoint in self._endpoints]
        frame = Frame()
        kind = Kind.PING
        while kind == Kind.PING:
            wait_s = 0.0
            if self._ending.is_set():
                kind, wait_s = Kind.BYE, GOODBYE_S
            for link in links:
                self._tell(link, frame, kind, time.monotonic() + wait_s)
            self._ending.wait(0 if kind == Kind.BYE else SIGN_OF_LIFE_S)
        for link in links:
            link.close()

    def _tell(self, link: ZmqLink, frame: Frame, kind: Kind, deadline: float) -> None:
        length = frame.seal(kind, 0, 0, 0, 1)
        try:
            link.send(frame, length, deadline)
            # Its answers must not pile up; the one to a goodbye says that it has heard.
            while length := link.receive(deadline):
                if link.reply.open(length).kind == Kind.BYE:
                    return
        except TransportError:
            return
