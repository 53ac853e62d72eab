"""The DMS's end of a wire: one request in, one reply out, whatever carries them.

Place on the path: called by a transport's `serve` for each message; calls the `PageServer` [6-10] and seals the reply
that goes back [11]. Never raises for what a client sent: that is a `REFUSED` reply, or silence for what is not EDM's.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from edm.errors import EdmError, ProtocolError
from edm.wire import Frame, Head, Kind, one_line, pack_control, unpack_control

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from edm.interfaces import PageServer

log = logging.getLogger(__name__)

MAX_CHANNELS: Final = 65536
"""Channels whose last request is remembered; beyond that the one that was silent longest is forgotten."""
MAX_KEPT_BYTES: Final = 1024
"""The longest answer to a control request that is kept for a repeat of it."""


# An enum's members are slow to look up, and these are on the path of every page.
_PAGES, _ACK, _ANSWER, _PING, _PONG, _BYE, _REFUSED = map(
    int, (Kind.PAGES, Kind.ACK, Kind.ANSWER, Kind.PING, Kind.PONG, Kind.BYE, Kind.REFUSED)
)


class Gate(Protocol):
    """Decides which client may speak for which instance."""

    def may_use(self, peer: Hashable, instance: int) -> bool:
        """Whether requests of `peer` may be for `instance`."""

    def given(self, peer: Hashable, instance: int) -> None:
        """`peer` said hello and was given `instance`."""


class OpenGate:
    """Lets every client name any instance: for transports that start all clients themselves."""

    def may_use(self, peer: Hashable, instance: int) -> bool:  # noqa: ARG002
        """True."""
        return True

    def given(self, peer: Hashable, instance: int) -> None:
        """Nothing to note."""


@attrs.define
class Figures:
    """What a serving transport counts, for `edm dms status`."""

    gets: int = 0
    evicts: int = 0
    controls: int = 0
    pages_sent: int = 0
    pages_received: int = 0
    repeats: int = 0
    stale: int = 0
    refused: int = 0
    garbage: int = 0


@attrs.define
class _Last:
    """A channel's last request, and the reply to it if it was a control request."""

    request: int
    answer: bytes = b""


class Answerer:
    """Answers requests for one `PageServer`; called from one thread.

    request: the frame a transport receives into. reply: the frame it sends from.
    """

    def __init__(self, server: PageServer, gate: Gate | None = None) -> None:
        self.request = Frame()
        self.reply = Frame()
        self.figures = Figures()
        self._server = server
        self._gate = gate or OpenGate()
        self._last: OrderedDict[tuple[Hashable, int], _Last] = OrderedDict()
        self._carry_out: dict[int, Callable[[Head, Hashable, _Last], int]] = {
            Kind.GET: self._get,
            Kind.EVICT: self._evict,
            Kind.CONTROL: self._control,
        }

    def answer(self, length: int, peer: Hashable) -> int:
        """Answer the message of `length` bytes in `request`; the length of what is in `reply`, 0 for no reply.

        peer: who sent it, the same for all channels of one client.
        """
        try:
            head = self.request.open(length)
            if head.kind == _PING:
                return self.reply.seal(_PONG, 0, head.channel, head.instance, head.request)
            if head.kind == _BYE:
                self.forget(peer)
                return self.reply.seal(_BYE, 0, head.channel, head.instance, head.request)
            return self._dispatch(head, peer)
        except ProtocolError as error:
            return self._refuse_broken(error)

    @property
    def kind(self) -> int:
        """The kind of the message answered last, 0 if it was not EDM's."""
        return self.request.kind

    def forget(self, peer: Hashable) -> None:
        """Let go of what is remembered of a client that is gone."""
        for key in [key for key in self._last if key[0] == peer]:
            del self._last[key]

    def refuse(self, channel: int, request: int, instance: int, reason: str) -> int:
        """Put a refusal into `reply`; returns its length."""
        self.figures.refused += 1
        text_bytes = self.reply.put_text(one_line(reason))
        return self.reply.seal(_REFUSED, 0, channel, instance, request, text_bytes)

    def _dispatch(self, head: Head, peer: Hashable) -> int:
        carry_out = self._carry_out.get(head.kind)
        if carry_out is None:
            raise ProtocolError(f"a request of kind {head.kind}")
        if not self._gate.may_use(peer, head.instance):
            return self.refuse(head.channel, head.request, head.instance, f"instance {head.instance} is not yours")
        last = self._remember(head, peer)
        if last is None:
            # Sent before a request that is answered already: overtaken by its own repeat. Nobody waits for it, and
            # carrying it out now could bring back what a later request dropped.
            self.figures.stale += 1
            return 0
        try:
            return carry_out(head, peer, last)
        except EdmError as error:
            return self.refuse(head.channel, head.request, head.instance, str(error))

    def _remember(self, head: Head, peer: Hashable) -> _Last | None:
        key = (peer, head.channel)
        last = self._last.get(key)
        if last is None:
            last = self._last[key] = _Last(0)
            if len(self._last) > MAX_CHANNELS:
                self._last.popitem(last=False)
        else:
            self._last.move_to_end(key)
        if head.request < last.request:
            return None
        if head.request == last.request:
            self.figures.repeats += 1
        else:
            last.request = head.request
            last.answer = b""
        return last

    def _get(self, head: Head, _peer: Hashable, _last: _Last) -> int:
        count = head.batch
        self.figures.gets += 1
        refs = self.reply.refs[:count]
        self.request.take_refs(refs)
        self._server.get(head.instance, refs, self.reply.pages(count))
        present = self.reply.gather(count)
        self.figures.pages_sent += present
        return self.reply.seal(_PAGES, count, head.channel, head.instance, head.request, 0, present)

    def _evict(self, head: Head, _peer: Hashable, _last: _Last) -> int:
        count = head.batch
        self.figures.evicts += 1
        self.figures.pages_received += count
        refs = self.reply.refs[:count]
        self.request.take_refs(refs)
        error = self._server.evict(head.instance, refs, self.request.pages(count))
        text_bytes = self.reply.put_text(one_line(error), count) if error else 0
        return self.reply.seal(_ACK, count, head.channel, head.instance, head.request, text_bytes)

    def _control(self, head: Head, peer: Hashable, last: _Last) -> int:
        self.figures.controls += 1
        if not last.answer:
            request = unpack_control(self.request.text())
            answer = self._server.control(head.instance, request)
            if request.get("op") == "hello" and answer.get("ok"):
                self._gate.given(peer, int(answer["instance"]))
            packed = _packed(answer)
            # What changes something has a short answer; a long one (figures) may be made anew for a repeat.
            last.answer = packed if len(packed) <= MAX_KEPT_BYTES else b""
        else:
            packed = last.answer
        text_bytes = self.reply.put_text(packed)
        return self.reply.seal(_ANSWER, 0, head.channel, head.instance, head.request, text_bytes)

    def _refuse_broken(self, error: ProtocolError) -> int:
        self.figures.garbage += 1
        log.warning("refused %s", error)
        asked = self.request.asked_by()
        if asked is None:
            return 0
        return self.refuse(*asked, 0, str(error))


def _packed(answer: dict[str, Any]) -> bytes:
    try:
        return pack_control(answer)
    except ProtocolError as error:
        return pack_control({"ok": False, "error": str(error)})
