"""Channels that call a `PageServer` of this process, through its C table where it has one [5-11]."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from edm._native import ffi, lib
from edm.errors import PeerLost, TransportTimeout, UsageError
from edm.ops import CHANNEL, SERVER, SERVER_BYTES, address_of, capsule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edm.interfaces import PageServer
    from edm.types import PageRefs


class InprocTransport:
    """Channels that call `server` under one lock; waiting for the lock has the run's deadline."""

    def __init__(self, server: PageServer, deadline_s: float) -> None:
        self._server = server
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._closed = False
        self.instance = 0
        # Where the server answers from C as well, its own lock keeps those answers and our calls apart.
        self._table = address_of(server, SERVER, SERVER_BYTES)

    def call_channel(self) -> Any:
        """A C channel to the server, where it offers one and the instance is known; else None."""
        if not self._table or not self.instance:
            return None
        channel = lib.edm_call_channel_new(ffi.cast("void *", self._table), self.instance)
        if channel == ffi.NULL:
            raise MemoryError
        return ffi.gc(channel, lib.edm_call_channel_free)

    def connect(self) -> InprocChannel:
        """Open a channel; raises `PeerLost` on a closed transport."""
        if self._closed:
            raise PeerLost("the transport is closed")
        return InprocChannel(self)

    def serve(self, server: PageServer, stop: threading.Event) -> None:  # noqa: ARG002
        """Raise `UsageError`: there is no other process to serve."""
        raise UsageError("the transport 'inproc' lives inside 'edm run'; a DMS that stands alone needs mpi or zmq")

    def close(self) -> None:
        """Let no new request in; one that is being answered ends first."""
        with self._lock:
            self._closed = True

    def enter(self) -> PageServer:
        """Take the server for one request; raises `TransportTimeout` if another thread keeps it past the deadline."""
        if not self._lock.acquire(timeout=self._deadline_s):
            raise TransportTimeout("the memory server in this process did not answer within the deadline")
        if self._closed:
            self._lock.release()
            raise PeerLost("the transport is closed")
        if self._table and not self._server.enter(self._deadline_s):  # type: ignore[attr-defined]
            self._lock.release()
            raise TransportTimeout("the memory server in this process did not answer within the deadline")
        return self._server

    def leave(self) -> None:
        """Give the server back."""
        if self._table:
            self._server.leave()  # type: ignore[attr-defined]
        self._lock.release()


class InprocChannel:
    """A channel that is a lock and a call."""

    def __init__(self, transport: InprocTransport) -> None:
        self._transport = transport
        self._closed = False
        self._native = transport.call_channel()
        if self._native is not None:
            self.__edm_ops__ = capsule(int(ffi.cast("uintptr_t", lib.edm_call_channel_table(self._native))), CHANNEL)

    def fetch(self, refs: PageRefs, into: memoryview) -> None:
        """Have the server answer in the caller's own buffers [5-11]."""
        server = self._enter()
        try:
            server.get(self._transport.instance, refs, into)
        finally:
            self._transport.leave()

    def evict(self, refs: PageRefs, pages: memoryview) -> str:
        """Have the server store the caller's own buffers."""
        server = self._enter()
        try:
            return server.evict(self._transport.instance, refs, pages)
        finally:
            self._transport.leave()

    def control(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Have the server carry out a control request; the answer to `hello` names this transport's instance."""
        if request.get("op") == "resume":
            request = {"op": "resume", "instance": int(request["instances"][0])}
        server = self._enter()
        try:
            answer = server.control(self._transport.instance, request)
            if request.get("op") in {"hello", "resume"} and answer.get("ok"):
                self._transport.instance = int(answer["instance"])
                answer = {**answer, "instances": [self._transport.instance]}
            return answer
        finally:
            self._transport.leave()

    def close(self) -> None:
        """Let the channel carry nothing more; a second call does nothing."""
        self._closed = True

    def _enter(self) -> PageServer:
        if self._closed:
            raise PeerLost("the channel is closed")
        return self._transport.enter()
