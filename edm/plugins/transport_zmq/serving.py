"""The memory server's side of `zmq` [6-11]: one ROUTER socket, one thread, any number of clients."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import attrs
import zmq

from edm._native import ffi, lib
from edm.dms.answering import Answerer, Figures
from edm.errors import EdmError, TransportError, UsageError
from edm.ops import SERVER, SERVER_BYTES, address_of
from edm.plugins.transport_zmq.client import NAME_BYTES
from edm.plugins.transport_zmq.endpoints import own_endpoint
from edm.plugins.transport_zmq.keys import AllowList, read_list
from edm.plugins.transport_zmq.library import find_library, socket_of
from edm.plugins.transport_zmq.sockets import SLICE_MS, configure_server
from edm.wire import Kind

if TYPE_CHECKING:
    import threading
    from collections.abc import Hashable
    from pathlib import Path

    from edm.interfaces import Channel, PageServer
    from edm.plugins.transport_zmq import ZmqOptions
    from edm.types import RunContext

log = logging.getLogger(__name__)

SILENT_S: Final = 30.0
"""A client of which nothing was heard for so long is gone; it gives a sign of life every few seconds."""
MOST_SEEN: Final = 4096
"""Clients that are counted. Of more, the one that was silent longest is not: one that is killed says no goodbye."""
DRAIN_S: Final = 2.0
"""How long a server that ends goes on answering what has arrived."""
IDLE_MS: Final = 1000
"""Longest wait of a server that has been idle for a while: a signal ends it at once, a stop by a thread does not."""
INSTANCE_AT: Final = slice(12, 16)
"""Of a message. Source: docs/protocol.md."""
OWNERS_FILE: Final = "clients.json"

Wait = Callable[[int], "tuple[bytes, str, int] | None"]
"""Waits so many milliseconds for a message: who sent it, with which key, and its length, 0 if it was thrown away."""


@attrs.frozen
class Client:
    """Who sent a message: the name a client chose, and its public key ("" without keys)."""

    name: bytes
    key: str


class KeyGate:
    """Binds each instance to the key of the client that it was given to, for as long as the stores live."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._owners: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}

    def may_use(self, peer: Hashable, instance: int) -> bool:
        """See `Gate`. Instance 0 says hello and asks for figures."""
        assert isinstance(peer, Client)
        return instance == 0 or self._owners.get(str(instance)) == peer.key

    def owner_of(self, instance: int) -> Hashable:
        """The key that an instance belongs to; what was made without keys is nobody else's."""
        return self._owners.get(str(instance), instance)

    def given(self, peer: Hashable, instance: int) -> None:
        """See `Gate`."""
        assert isinstance(peer, Client)
        self._owners[str(instance)] = peer.key
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(self._owners))
        os.replace(fresh, self._path)  # noqa: PTH105  atomic, and says so


class ZmqServing:
    """A memory server's addresses and clients."""

    def __init__(self, options: ZmqOptions, context: RunContext) -> None:
        self._options = options
        self._private = not options.listen
        self._seen: dict[Client, tuple[float, float]] = {}
        """When each client came, and when it was heard last."""
        self._closed = False
        self._answerer: Answerer | None = None
        self._natives: list[Any] = []
        self._gate = KeyGate(context.store_dir / OWNERS_FILE) if options.key else None
        self._context: zmq.Context[Any] = zmq.Context()
        self._allowed = (
            AllowList(self._context, read_list(options.clients)) if options.key and options.clients else None
        )
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            configure_server(self._socket, options)
            if self._private:  # whatever the umask has made of its socket file
                self._socket.setsockopt(zmq.IPC_FILTER_UID, os.geteuid())
            self.address = " ".join(self._bind(endpoint) for endpoint in self._endpoints(context))
        except EdmError:
            self.close()
            raise

    def connect(self) -> Channel:
        """Raise `UsageError`: this is the other side."""
        raise UsageError("a memory server has nobody to connect to")

    def serve(self, server: PageServer, stop: threading.Event) -> None:
        """Answer until `stop` is set; a private server also ends when every client has said goodbye."""
        self._answerer = answerer = Answerer(server, self._gate)
        wait = self._wait_in_c(server) or self._wait
        had_clients, idle_ms = False, SLICE_MS
        while not stop.is_set() and not (self._private and had_clients and not self._seen):
            idle_ms = SLICE_MS if self._answer_some(answerer, wait, idle_ms) else min(2 * idle_ms, IDLE_MS)
            had_clients = had_clients or bool(self._seen)
        # What has arrived is answered still; who asks later will ask the next server.
        end = time.monotonic() + DRAIN_S
        while time.monotonic() < end and self._answer_some(answerer, wait, 0):
            """Until nothing is left."""

    def _answer_some(self, answerer: Answerer, wait: Wait, idle_ms: int) -> bool:
        """Whether there was a message within that time."""
        message = wait(idle_ms)
        if message is None:
            return False
        identity, key, length = message
        if length:
            client = Client(identity[:NAME_BYTES], key)
            reply = answerer.answer(length, client)
            self._note(client, answerer.kind)
            if reply:
                self._reply(identity, reply)
            if self._gate is not None and self._native is not None:
                self._say_who_may(client, answerer)
        return True

    def _say_who_may(self, client: Client, answerer: Answerer) -> None:
        """Tell C whose gets it may answer from now on, as the one just answered shows."""
        assert self._gate is not None
        if answerer.kind == Kind.GET:
            instance = int.from_bytes(answerer.request.view[INSTANCE_AT], "little")
            if instance and self._gate.may_use(client, instance):
                lib.edm_zmq_serving_allow(self._native, instance)
        elif answerer.kind == Kind.CONTROL:
            # May have given an instance to someone.
            lib.edm_zmq_serving_allow(self._native, 0)

    def _wait_in_c(self, server: PageServer) -> Wait | None:
        """How C takes messages, and answers gets itself where the server has a table; None where it cannot."""
        library = find_library()
        if library is None:
            return None
        assert self._answerer is not None
        table = ffi.cast("void *", address_of(server, SERVER, SERVER_BYTES))
        frame = self._answerer.request
        native = lib.edm_zmq_serving_new(
            library, socket_of(self._socket), table, self._gate is not None, frame.pointer, frame.capacity
        )
        if native == ffi.NULL:
            raise MemoryError
        self._natives.append((native, library))
        served = lib.edm_zmq_served(native)
        buffer = ffi.buffer(served.identity)

        def wait(idle_ms: int) -> tuple[bytes, str, int] | None:
            result = lib.edm_zmq_serve(native, idle_ms)
            if result == lib.EDM_ZMQ_MESSAGE:
                key = ffi.string(served.key).decode(errors="replace")
                return buffer[: served.identity_bytes], key, served.length
            if result < 0:
                raise TransportError(f"cannot receive: {os.strerror(-result)}")
            return (b"", "", 0) if result == lib.EDM_ZMQ_BUSY else None

        return wait

    def _wait(self, idle_ms: int) -> tuple[bytes, str, int] | None:
        self._socket.setsockopt(zmq.RCVTIMEO, idle_ms)
        try:
            identity, key = self._receive_identity()
        except zmq.Again:
            return None
        return identity, key, self._receive_message()

    @property
    def _native(self) -> Any:
        return self._natives[-1][0] if self._natives else None

    def owner_of(self, instance: int) -> Hashable:
        """Whose an instance is: with keys the client's, whatever number of programs it runs."""
        return self._gate.owner_of(instance) if self._gate is not None else instance

    def peers(self) -> int:
        """How many clients there are, of those that were heard lately."""
        oldest = time.monotonic() - SILENT_S
        return sum(heard >= oldest for _, heard in list(self._seen.values()))

    def figures(self) -> dict[str, Any]:
        """What was answered so far."""
        figures = attrs.asdict(self._answerer.figures if self._answerer else Figures())
        if self._natives:
            served = lib.edm_zmq_served(self._native)
            figures["gets"] += served.gets
            figures["pages_sent"] += served.pages_sent
        return figures

    def reload(self, options: ZmqOptions) -> None:
        """Take over a changed allow-list; raises `UsageError` and keeps the old one if it cannot be read."""
        if self._allowed is not None and options.clients is not None:
            self._allowed.allow(read_list(options.clients))

    def close(self) -> None:
        """Send what is queued, within a second, and let go of the addresses; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._socket.close()
        if self._allowed is not None:
            self._allowed.close()
        self._context.term()
        # libzmq sends replies from where they are, until then.
        while self._natives:
            lib.edm_zmq_serving_free(self._natives.pop()[0])

    def _endpoints(self, context: RunContext) -> tuple[str, ...]:
        return self._options.listen or (own_endpoint(context.run_dir),)

    def _bind(self, endpoint: str) -> str:
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise UsageError(f"cannot listen at {endpoint}: {error.strerror}") from None
        bound = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        # Port * is whichever is free: the one thing about an address that libzmq knows better.
        return (
            endpoint.removesuffix("*") + bound.rstrip(b"\0").decode().rpartition(":")[2]
            if endpoint.endswith(":*")
            else endpoint
        )

    def _receive_identity(self) -> tuple[bytes, str]:
        if self._gate is None:
            return self._socket.recv(), ""
        frame = self._socket.recv(copy=False)
        return frame.bytes, str(frame.get("User-Id"))

    def _receive_message(self) -> int:
        """Receive the one part behind the identity into the answerer's frame; 0 for anything else."""
        assert self._answerer is not None
        if not self._socket.getsockopt(zmq.RCVMORE):
            return 0
        length = self._socket.recv_into(self._answerer.request.view)
        fits = length <= self._answerer.request.capacity
        while self._socket.getsockopt(zmq.RCVMORE):
            self._socket.recv_into(bytearray())
            fits = False
        return length if fits else 0

    def _reply(self, identity: bytes, length: int) -> None:
        assert self._answerer is not None
        # A client that does not take its replies has them dropped beyond its queue; it asks again.
        self._socket.send(identity, zmq.SNDMORE)
        self._socket.send(self._answerer.reply.view[:length])

    def _note(self, client: Client, kind: int) -> None:
        now = time.monotonic()
        came = self._seen[client][0] if client in self._seen else now
        if kind != Kind.BYE:
            # In the order in which they were heard last.
            self._seen.pop(client, None)
            self._seen[client] = came, now
            if len(self._seen) > MOST_SEEN:
                del self._seen[next(iter(self._seen))]
            return
        self._seen.pop(client, None)
        if self._private:
            # Whoever was not heard since this one came had died, and this one took its place.
            self._seen = {other: times for other, times in self._seen.items() if times[1] >= came}
