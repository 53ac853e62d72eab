"""The DM-Handler's end of a wire: requests out, replies in, whatever carries them.

Place on the path: a fault worker calls `fetch` [5, 11], the write-back thread `evict` and `control`. A transport brings
`Link`s, one for each memory server; this module numbers requests, waits with a deadline, sends again where the
transport can lose messages, and throws away replies to requests that were given up.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from edm.errors import ProtocolError, TransportError, TransportTimeout
from edm.types import PAGE_BYTES
from edm.wire import Frame, Head, Kind, pack_control, unpack_control

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edm.types import PageRefs


# An enum's members are slow to look up, and these are on the path of every page.
_GET, _PAGES, _EVICT, _ACK, _CONTROL, _ANSWER, _REFUSED = map(
    int, (Kind.GET, Kind.PAGES, Kind.EVICT, Kind.ACK, Kind.CONTROL, Kind.ANSWER, Kind.REFUSED)
)


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


class Session:
    """What all channels of one transport share: the instance number that each memory server gave."""

    def __init__(self, servers: int) -> None:
        self.instances = [0] * servers
        self._next_channel = 1
        self._lock = threading.Lock()

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
        self.late = 0

    def start(self, kind: int, count: int, text_bytes: int, pages: int, deadline: float) -> None:
        """Send the request that stands in `out`; it has to be answered by `deadline` (`time.monotonic()`)."""
        self._request += 1
        instance = self._session.instances[self._server]
        self._length = self.out.seal(kind, count, self._number, instance, self._request, text_bytes, pages)
        self._deadline = deadline
        self.link.send(self.out, self._length, deadline)

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
                self.late += 1
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
            raise TransportTimeout("no answer from the memory server within the deadline")
        if self._resend_s is not None:
            self.link.send(self.out, self._length, self._deadline)


class WireChannel:
    """A `Channel` to one memory server over a `Link`. Threads, blocking and errors as the interface says."""

    def __init__(
        self, link: Link, session: Session, number: int, deadline_s: float, resend_s: float | None = None
    ) -> None:
        self._session = session
        self._deadline_s = deadline_s
        self._conversation = Conversation(link, session, 0, number, resend_s)

    def fetch(self, refs: PageRefs, into: memoryview) -> None:
        """Fill statuses, versions, checksums and pages of a batch of 1 to 1024 references in place [5, 11]."""
        fetch(self._conversation, refs, time.monotonic() + self._deadline_s)
        receive_pages(self._conversation, refs, into)

    def evict(self, refs: PageRefs, pages: memoryview) -> str:
        """Store a batch of 1 to 1024 pages; fills statuses in place, returns the memory server's error text."""
        evict(self._conversation, refs, pages, time.monotonic() + self._deadline_s)
        return receive_ack(self._conversation, refs)

    def control(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one control request and return the answer; the answer to `hello` names this transport's instance."""
        ask(self._conversation, request, time.monotonic() + self._deadline_s)
        answer = receive_answer(self._conversation)
        if request.get("op") == "hello" and answer.get("ok"):
            self._session.instances[0] = int(answer["instance"])
        return answer

    def close(self) -> None:
        """Release the link; a second call does nothing."""
        self._conversation.link.close()


def fetch(conversation: Conversation, refs: PageRefs, deadline: float) -> None:
    """Start a `RequestGetPage`."""
    conversation.out.put_refs(refs)
    conversation.start(_GET, len(refs), 0, 0, deadline)


def receive_pages(conversation: Conversation, refs: PageRefs, into: memoryview) -> None:
    """Finish a `RequestGetPage`: references and pages into the caller's batch."""
    conversation.finish(_PAGES, len(refs))
    conversation.reply.take(refs, into)


def evict(conversation: Conversation, refs: PageRefs, pages: memoryview, deadline: float) -> None:
    """Start a `RequestEvictPage`."""
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
    text_bytes = conversation.out.put_text(pack_control(request))
    conversation.start(_CONTROL, 0, text_bytes, 0, deadline)


def receive_answer(conversation: Conversation) -> dict[str, Any]:
    """Finish a control request."""
    conversation.finish(_ANSWER, 0)
    return unpack_control(conversation.reply.text())
