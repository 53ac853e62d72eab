"""The DM-Handler's end of a wire: requests out, replies in, whatever carries them.

Place on the path: a fault worker calls `fetch` [5, 11], the write-back thread `evict` and `control`. A transport brings
`Link`s, one for each memory server; this module numbers requests, waits with a deadline, sends again where the
transport can lose messages, and throws away replies to requests that were given up. Over a link that C can carry
messages over, fetches and evictions that go well are made by native/conversation.c; everything else is made here.
"""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from edm._native import ffi, lib
from edm.errors import ProtocolError, TransportError, TransportTimeout
from edm.ops import CHANNEL, capsule
from edm.types import PAGE_BYTES
from edm.wire import Frame, Head, Kind, pack_control, unpack_control

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edm.types import PageRefs


# An enum's members are slow to look up, and these are on the path of every page.
_GET, _PAGES, _EVICT, _ACK, _CONTROL, _ANSWER, _REFUSED = map(
    int, (Kind.GET, Kind.PAGES, Kind.EVICT, Kind.ACK, Kind.CONTROL, Kind.ANSWER, Kind.REFUSED)
)
_REFS: Final = ffi.typeof("struct edm_page_ref[]")
_BYTES: Final = ffi.typeof("char[]")
_LATE: Final = "no answer from the memory server within the deadline"


class Link(Protocol):
    """Carries messages between one channel and one memory server. Used by one thread.

    reply: where messages are received.
    """

    reply: Frame

    def send(self, frame: Frame, length: int, deadline: float) -> None:
        """Send the first `length` bytes of `frame`, which may be reused on return.

        deadline: `time.monotonic()` after which to give up. Raises `TransportTimeout` or `PeerLost`.
        """

    def receive(self, until: float) -> int:
        """Receive one message into `reply`; its length, or 0 if none came before `time.monotonic()` is `until`.

        Raises `PeerLost`, or `ProtocolError` for a message larger than the frame.
        """

    def close(self) -> None:
        """Release the link; a second call does nothing."""


@runtime_checkable
class CarryingLink(Link, Protocol):
    """A link that C can send and receive over as well.

    carrier: a `struct edm_carrier` (native/carrier.h), which lives as long as the link.
    """

    carrier: Any

    def keep(self, frame: Frame) -> None:
        """Give `frame` a fresh buffer: C has sent from the old one, and it may still be read."""

    def check(self) -> None:
        """Raise `PeerLost` if the link is closed or the memory server can be seen to be gone."""


class Session:
    """What all channels of one transport share.

    instances: the number that each memory server gave, a C array.
    """

    def __init__(self, servers: int) -> None:
        self.instances = ffi.new("uint32_t[]", servers)
        self._next_channel = 1
        self._lock = threading.Lock()

    def resumed(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Take the instances of a `resume` request for this transport's; the request for each memory server."""
        for server, instance in enumerate(request["instances"]):
            self.instances[server] = int(instance)
        return [{"op": "resume", "instance": instance} for instance in self.instances]

    def number(self) -> int:
        """A channel number that no other channel of this transport has."""
        with self._lock:
            self._next_channel += 1
            return self._next_channel - 1


class Conversation:
    """One channel's requests to one memory server, one at a time.

    `out.refs` and `out.pages` are filled by the caller before `start`; `reply` holds the answer after `finish`.
    resend_s: send the same request again after so long without an answer; None where the transport loses nothing.
    """

    def __init__(self, link: Link, session: Session, server: int, number: int, resend_s: float | None) -> None:
        self.link = link
        self.out = Frame()
        self.reply = link.reply
        self._session = session
        self._server = server
        self._number = number
        self._resend_s = resend_s
        self._request = 0
        self._length = 0
        self._deadline = 0.0
        self._carried = link if isinstance(link, CarryingLink) else None
        carrier = ffi.NULL if self._carried is None else self._carried.carrier
        native = lib.edm_conversation_new(
            carrier, number, session.instances + server, link.reply.pointer, link.reply.capacity, resend_s or 0.0
        )
        if native == ffi.NULL:
            raise MemoryError
        self._native = ffi.gc(native, lib.edm_conversation_free)
        lib.edm_conversation_out(native, self.out.pointer)

    def table(self) -> int:
        """Address of the "edm.channel_ops" over this conversation; 0 where C cannot carry its messages."""
        return 0 if self._carried is None else int(ffi.cast("uintptr_t", lib.edm_conversation_table(self._native)))

    def fetched(self, refs: PageRefs, into: memoryview, deadline: float) -> bool:
        """Whether a fetch was made by C; if not, it is to be made anew. Raises as `finish`."""
        if self._carried is None:
            return False
        result = lib.edm_conversation_fetch(
            self._native, ffi.from_buffer(_REFS, refs), len(refs), ffi.from_buffer(_BYTES, into, True), deadline
        )
        if result == 0:
            return True
        if self._under_way(result, deadline):
            receive_pages(self, refs, into)
            return True
        return False

    def evicted(self, refs: PageRefs, pages: memoryview, deadline: float) -> str | None:
        """What a memory server said to an eviction made by C; None if it is to be made anew. Raises as `finish`."""
        if self._carried is None:
            return None
        result = lib.edm_conversation_evict(
            self._native, ffi.from_buffer(_REFS, refs), len(refs), ffi.from_buffer(pages), deadline
        )
        if result == 0:
            return ""
        return receive_ack(self, refs) if self._under_way(result, deadline) else None

    def _under_way(self, result: int, deadline: float) -> bool:
        """Whether a request of C's has no answer yet: its reply is for `finish`, which goes on waiting."""
        if result == -errno.EBUSY:
            self.ready()
            assert self._carried is not None
            self._carried.check()
            raise TransportTimeout(_LATE)
        if result != -errno.ETIMEDOUT:
            return False
        self._request = lib.edm_conversation_request(self._native)
        self._length = lib.edm_conversation_length(self._native)
        self._deadline = deadline
        return True

    def ready(self) -> None:
        """Make `out` ready for the next request, where the link has kept its buffer."""
        if lib.edm_conversation_lost(self._native):
            assert self._carried is not None
            self._carried.keep(self.out)
            lib.edm_conversation_out(self._native, self.out.pointer)

    def start(self, kind: int, count: int, text_bytes: int, pages: int, deadline: float) -> None:
        """Send the request that stands in `out`; it has to be answered by `deadline` (`time.monotonic()`)."""
        self._request = lib.edm_conversation_next(self._native)
        instance = self._session.instances[self._server]
        self._length = self.out.seal(kind, count, self._number, instance, self._request, text_bytes, pages)
        self._deadline = deadline
        self._send(self._length, deadline)

    def send_again(self, deadline: float) -> None:
        """Send the last request once more, whether it was answered or not: every request may come twice."""
        made_by_c = lib.edm_conversation_request(self._native) != self._request
        self._send(lib.edm_conversation_length(self._native) if made_by_c else self._length, deadline)

    def finish(self, wanted: int, count: int) -> Head:
        """Wait for the reply to the request last sent; it is then in `reply`.

        Raises `TransportTimeout`, `PeerLost`, `ProtocolError`, or `TransportError` with the server's reason if it
        refused the request.
        """
        while True:
            length = self.link.receive(self._until())
            if length == 0:
                self._again()
                continue
            head = self.reply.open(length)
            if head.request != self._request or head.channel != self._number:
                continue
            if head.kind == wanted and head.batch == count:
                return head
            if head.kind == _REFUSED:
                raise TransportError(f"the memory server refused: {self.reply.text().decode(errors='replace')}")
            raise ProtocolError(f"a reply of kind {head.kind} for {head.batch} pages to a request for {count}")

    def _until(self) -> float:
        if self._resend_s is None:
            return self._deadline
        return min(self._deadline, time.monotonic() + self._resend_s)

    def _again(self) -> None:
        if time.monotonic() >= self._deadline:
            raise TransportTimeout(_LATE)
        if self._resend_s is not None:
            self._send(self._length, self._deadline)

    def _send(self, length: int, deadline: float) -> None:
        try:
            self.link.send(self.out, length, deadline)
        finally:
            # A link may have given it another buffer.
            lib.edm_conversation_out(self._native, self.out.pointer)


class WireChannel:
    """A `Channel` to one memory server over a `Link`. Threads, blocking and errors as the interface says."""

    def __init__(
        self, link: Link, session: Session, number: int, deadline_s: float, resend_s: float | None = None
    ) -> None:
        self._session = session
        self._deadline_s = deadline_s
        self._conversation = Conversation(link, session, 0, number, resend_s)
        if table := self._conversation.table():
            self.__edm_ops__ = capsule(table, CHANNEL)

    def fetch(self, refs: PageRefs, into: memoryview) -> None:
        """Fill statuses, versions, checksums and pages of a batch of 1 to 1024 references in place [5, 11]."""
        deadline = time.monotonic() + self._deadline_s
        if self._conversation.fetched(refs, into, deadline):
            return
        fetch(self._conversation, refs, deadline)
        receive_pages(self._conversation, refs, into)

    def evict(self, refs: PageRefs, pages: memoryview) -> str:
        """Store a batch of 1 to 1024 pages; fills statuses in place, returns the memory server's error text."""
        deadline = time.monotonic() + self._deadline_s
        if (said := self._conversation.evicted(refs, pages, deadline)) is not None:
            return said
        evict(self._conversation, refs, pages, deadline)
        return receive_ack(self._conversation, refs)

    def control(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one control request and return the answer; the answer to `hello` names this transport's instance."""
        if request.get("op") == "resume":
            request = self._session.resumed(request)[0]
        ask(self._conversation, request, time.monotonic() + self._deadline_s)
        answer = receive_answer(self._conversation)
        if request.get("op") == "hello" and answer.get("ok"):
            self._session.instances[0] = int(answer["instance"])
            answer = {**answer, "instances": list(self._session.instances)}
        return answer

    def close(self) -> None:
        """Release the link; a second call does nothing."""
        self._conversation.link.close()


def fetch(conversation: Conversation, refs: PageRefs, deadline: float) -> None:
    """Start a `RequestGetPage`."""
    conversation.ready()
    conversation.out.put_refs(refs)
    conversation.start(_GET, len(refs), 0, 0, deadline)


def receive_pages(conversation: Conversation, refs: PageRefs, into: memoryview) -> None:
    """Finish a `RequestGetPage`: references and pages into the caller's batch."""
    conversation.finish(_PAGES, len(refs))
    conversation.reply.take(refs, into)


def evict(conversation: Conversation, refs: PageRefs, pages: memoryview, deadline: float) -> None:
    """Start a `RequestEvictPage`."""
    conversation.ready()
    count = len(refs)
    conversation.out.put_refs(refs)
    conversation.out.pages(count)[:] = pages[: count * PAGE_BYTES]
    conversation.start(_EVICT, count, 0, count, deadline)


def receive_ack(conversation: Conversation, refs: PageRefs) -> str:
    """Finish a `RequestEvictPage` by its `AckPage`."""
    conversation.finish(_ACK, len(refs))
    conversation.reply.take_refs(refs)
    return conversation.reply.text().decode(errors="replace")


def ask(conversation: Conversation, request: Mapping[str, Any], deadline: float) -> None:
    """Start a control request."""
    conversation.ready()
    text_bytes = conversation.out.put_text(pack_control(request))
    conversation.start(_CONTROL, 0, text_bytes, 0, deadline)


def receive_answer(conversation: Conversation) -> dict[str, Any]:
    """Finish a control request."""
    conversation.finish(_ANSWER, 0)
    return unpack_control(conversation.reply.text())
