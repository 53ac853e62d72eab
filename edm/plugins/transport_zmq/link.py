"""A DM-Handler's link to one memory server [5, 11]: from Python, or thin over native/zmq_link.c."""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import zmq

from edm._native import ffi, lib
from edm.errors import PeerLost, ProtocolError, TransportTimeout
from edm.plugins.transport_zmq.library import find_library, socket_of
from edm.plugins.transport_zmq.sockets import SLICE_MS, configure_client
from edm.wire import Frame

if TYPE_CHECKING:
    from edm.plugins.transport_zmq import ZmqOptions

SLICE_S: Final = SLICE_MS / 1000
_TOO_LARGE: Final = "a reply that is no single message of EDM's size"
_CLOSED: Final = "the channel is closed"


def open_link(context: zmq.Context[Any], endpoint: str, identity: bytes, options: ZmqOptions) -> ZmqLink:
    """A link that C can carry messages over, where libzmq can be called from C."""
    library = find_library()
    if library is None:
        return ZmqLink(context, endpoint, identity, options)
    return CarryingZmqLink(context, endpoint, identity, options, library)


class ZmqLink:
    """A DEALER socket to one memory server, used from Python."""

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
                        raise self._unreachable() from None
                    self._socket.poll(min(SLICE_MS, remaining_ms), zmq.POLLOUT)
                else:
                    return
        raise PeerLost(_CLOSED)

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
                    raise ProtocolError(_TOO_LARGE)
                return length
        raise PeerLost(_CLOSED)

    def close(self) -> None:
        """End a wait in another thread, and close the socket; a second call does nothing."""
        self._closed = True
        with self._using:
            self._socket.close()

    def _unreachable(self) -> TransportTimeout:
        return TransportTimeout(f"cannot reach the memory server at {self._endpoint}")

    def _drain(self) -> None:
        while self._socket.getsockopt(zmq.RCVMORE):
            self._socket.recv_into(bytearray())


class CarryingZmqLink(ZmqLink):
    """The same through C.

    carrier: what `edm_conversation_new` takes.
    """

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, identity: bytes, options: ZmqOptions, library: Any
    ) -> None:
        super().__init__(context, endpoint, identity, options)
        self._library = library
        native = lib.edm_zmq_link_new(library, socket_of(self._socket), self.reply.pointer, self.reply.capacity)
        if native == ffi.NULL:
            self._socket.close()
            raise MemoryError
        self._native = ffi.gc(native, lib.edm_zmq_link_free)
        self.carrier = lib.edm_zmq_link_carrier(native)

    def send(self, frame: Frame, length: int, deadline: float) -> None:
        """Queue the message; waits for a connection until `deadline`."""
        while True:
            # In slices: a signal is for Python to look at.
            until = min(deadline, time.monotonic() + SLICE_S)
            result = lib.edm_zmq_link_send(self._native, frame.pointer, length, until)
            if result == 0:
                return
            if result not in {-errno.ETIMEDOUT, -errno.EINTR}:
                self._fail(result)
            if time.monotonic() >= deadline:
                raise self._unreachable()

    def receive(self, until: float) -> int:
        """Receive into `reply`; the length, or 0 if nothing came until then."""
        while True:
            now = time.monotonic()
            length: int = lib.edm_zmq_link_receive(self._native, min(until, now + SLICE_S))
            if length < 0 and length != -errno.EINTR:
                self._fail(length)
            if length > 0:
                return length
            if now + SLICE_S >= until:
                return 0

    def keep(self, frame: Frame) -> None:
        """Give the frame a fresh buffer. libzmq copies what it sends: this is never called for its sake."""
        frame.renew()

    def check(self) -> None:
        """Raise `PeerLost` if the link is closed: whether the other side is there only an answer can say."""
        if self._closed:
            raise PeerLost(_CLOSED)

    def close(self) -> None:
        """End a wait in another thread, and close the socket; a second call does nothing."""
        lib.edm_zmq_link_close(self._native)
        super().close()

    def _fail(self, result: int) -> None:
        if result == -errno.ESHUTDOWN:
            raise PeerLost(_CLOSED)
        if result == -errno.EMSGSIZE:
            raise ProtocolError(_TOO_LARGE)
        raise PeerLost(f"the link to the memory server at {self._endpoint} failed: {os.strerror(-result)}")
