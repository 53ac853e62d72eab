"""The DM-Handler's side of `zmq` [5, 11]."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import zmq

from edm.channel import Session
from edm.errors import MissingExtra, PeerLost, ProtocolError, TransportError, TransportTimeout, UsageError
from edm.plugins.transport_zmq.endpoints import own_endpoint
from edm.plugins.transport_zmq.sockets import SLICE_MS, configure_client
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


class ZmqLink:
    """A DEALER socket to one memory server."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, identity: bytes, options: ZmqOptions) -> None:
        self.reply = Frame()
        self._endpoint = endpoint
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        configure_client(self._socket, options)
        self._socket.connect(endpoint)
        self._closed = False
        # Held while libzmq is called: a socket is not for two threads, and `close` may come from another.
        self._using = threading.Lock()

    def send(self, frame: Frame, length: int, deadline: float) -> None:
        """Queue the message; waits for a connection until `deadline`."""
        with self._using:
            while not self._closed:
                try:
                    self._socket.send(frame.view[:length], zmq.NOBLOCK)
                except zmq.Again:
                    remaining_ms = (deadline - time.monotonic()) * 1000
                    if remaining_ms <= 0:
                        raise TransportTimeout(f"cannot reach the memory server at {self._endpoint}") from None
                    self._socket.poll(min(SLICE_MS, remaining_ms), zmq.POLLOUT)
                else:
                    return
        raise PeerLost("the channel is closed")

    def receive(self, until: float) -> int:
        """Receive into `reply`; looks every `SLICE_MS` whether the link was closed."""
        with self._using:
            while not self._closed:
                try:
                    length: int = self._socket.recv_into(self.reply.view)
                except zmq.Again:
                    if time.monotonic() >= until:
                        return 0
                    continue
                if length > self.reply.capacity or self._socket.getsockopt(zmq.RCVMORE):
                    self._drain()
                    raise ProtocolError("a reply that is no single message of EDM's size")
                return length
        raise PeerLost("the channel is closed")

    def close(self) -> None:
        """End a wait in another thread, and close the socket; a second call does nothing."""
        self._closed = True
        with self._using:
            self._socket.close()

    def _drain(self) -> None:
        while self._socket.getsockopt(zmq.RCVMORE):
            self._socket.recv_into(bytearray())


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
        return ZmqLink(self._context, endpoint, self._name + number.to_bytes(4, "big"), self._options)

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
