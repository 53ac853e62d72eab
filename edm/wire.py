"""The one wire layout of all transports: a header, page references, then pages or a text.

Place on the path: the DM-Handler's side of a transport seals requests [5] and opens replies [11]; the DMS's side the
other way round. docs/protocol.md is the description for implementers; the
implementation is this module and native/wire.c.

A `Frame` is a contiguous buffer that holds one message at a time. It is made once for each channel and direction:
nothing is allocated per message, and a message that claims to be larger than the frame is refused, not fitted.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgpack  # type: ignore[import-untyped]
import numpy as np

from edm._native import ffi, lib
from edm.errors import ProtocolError
from edm.types import MAX_BATCH_PAGES, PAGE_BYTES, PAGE_REF

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edm.types import PageRefs

VERSION: Final = 1
HEADER_BYTES: Final = 40
REF_BYTES: Final = PAGE_REF.itemsize
MAX_TEXT_BYTES: Final = 1024
MAX_CONTROL_BYTES: Final = 256 << 10
MAX_MESSAGE_BYTES: Final = HEADER_BYTES + MAX_BATCH_PAGES * (REF_BYTES + PAGE_BYTES)
_REFS: Final = ffi.typeof("struct edm_page_ref[]")


class Kind(IntEnum):
    """What a message is. A reply's number is its request's and one."""

    GET = 2
    PAGES = 3
    EVICT = 4
    ACK = 5
    CONTROL = 6
    ANSWER = 7
    PING = 8
    PONG = 9
    BYE = 10
    REFUSED = 11


class Head(Protocol):
    """The fixed header of a message that `Frame.open` has accepted.

    batch: page references. channel, instance: who asks. request: number of the request, echoed by the reply.
    text_bytes: length of the text or msgpack map behind the references. pages: pages behind the references.
    """

    kind: int
    batch: int
    channel: int
    instance: int
    request: int
    text_bytes: int
    pages: int


_WRONG: Final = {
    lib.EDM_WIRE_LENGTH: "a message of {length} bytes",
    lib.EDM_WIRE_MAGIC: "not a message of EDM",
    lib.EDM_WIRE_VERSION: "a message of another protocol version; this side speaks version {version}",
    lib.EDM_WIRE_CLAIM: "a message of {length} bytes that says it has another length",
    lib.EDM_WIRE_KIND: "a message of unknown kind {head.kind}",
    lib.EDM_WIRE_SHAPE: "a message of kind {head.kind} with the wrong shape",
    lib.EDM_WIRE_CHECKSUM: "a message whose checksum does not match",
    lib.EDM_WIRE_PRESENT: "a reply with {head.pages} pages whose references say otherwise",
}


class Frame:
    """A buffer for one message, of at most `MAX_MESSAGE_BYTES`. Used by one thread at a time.

    view: the whole buffer, writable. pointer: its address, for C. refs: the page references of a message, of which the
    first `count` mean something.
    """

    __slots__ = ("_head", "array", "capacity", "pointer", "refs", "view")

    def __init__(self) -> None:
        self.capacity = MAX_MESSAGE_BYTES
        self._head = ffi.new("struct edm_wire_head *")
        self.renew()

    def renew(self) -> None:
        """Take a fresh buffer, since a transport has not let go of the old one."""
        # Memory is taken as it is touched: a frame that only ever holds small messages stays small.
        self.array = np.zeros(self.capacity, np.uint8)
        self.view = self.array.data
        self.refs: PageRefs = np.frombuffer(self.array, PAGE_REF, MAX_BATCH_PAGES, HEADER_BYTES)
        self.pointer = ffi.from_buffer(self.array)

    @property
    def kind(self) -> int:
        """The kind of the message that `open` saw last, accepted or not; 0 if it was not EDM's."""
        return self._head.kind  # type: ignore[no-any-return]

    def put_refs(self, refs: PageRefs) -> None:
        """Copy page references in; refs: contiguous."""
        ffi.memmove(self.pointer + HEADER_BYTES, refs, len(refs) * REF_BYTES)

    def take_refs(self, refs: PageRefs) -> None:
        """Copy as many page references out as `refs` has room for; refs: contiguous, writable."""
        ffi.memmove(refs, self.pointer + HEADER_BYTES, len(refs) * REF_BYTES)

    def pages(self, count: int) -> memoryview:
        """The place of the pages in a message of `count` references: `count` pages, writable."""
        start = HEADER_BYTES + count * REF_BYTES
        return self.view[start : start + count * PAGE_BYTES]

    def put_text(self, text: bytes, count: int = 0) -> int:
        """Write a text behind `count` references; returns its length. Raises `ProtocolError` if it is too long."""
        start = HEADER_BYTES + count * REF_BYTES
        if len(text) > self.capacity - start:
            raise ProtocolError(f"a text of {len(text)} bytes does not fit a message")
        self.view[start : start + len(text)] = text
        return len(text)

    def text(self) -> bytes:
        """The text of the message that `open` has accepted last."""
        start = HEADER_BYTES + self._head.batch * REF_BYTES
        return bytes(self.view[start : start + self._head.text_bytes])

    def seal(
        self, kind: int, batch: int, channel: int, instance: int, request: int, text_bytes: int = 0, pages: int = 0
    ) -> int:
        """Write the header over references, text and pages that are in place; returns the message's length.

        The arguments are the fields of `Head`.
        """
        length: int = lib.edm_wire_seal(self.pointer, kind, batch, channel, instance, request, text_bytes, pages)
        return length

    def open(self, length: int) -> Head:
        """Check the message of `length` bytes in this frame; raises `ProtocolError` for whatever breaks the layout.

        What is accepted has the shape its kind demands and a right checksum over header, references and text; pages
        have a checksum each, in their references, which whoever uses the pages verifies. The result is valid until the
        next call.
        """
        wrong = lib.edm_wire_open(self.pointer, length, self.capacity, self._head)
        if wrong:
            raise ProtocolError(_WRONG[wrong].format(length=length, head=self._head, version=VERSION))
        return self._head  # type: ignore[no-any-return]

    def take(self, refs: PageRefs, into: memoryview) -> None:
        """From the reply to a get that `open` has accepted: references to `refs`, existing pages to their places.

        refs: those that were asked for. Pages that do not exist are left alone in `into`. Raises `ProtocolError` if the
        reply is about other pages.
        """
        if lib.edm_wire_take(
            self.pointer, self._head, ffi.from_buffer(_REFS, refs), ffi.from_buffer(into, require_writable=True)
        ):
            raise ProtocolError("a reply about other pages than were asked for")

    def gather(self, batch: int) -> int:
        """Move the existing pages of a batch together, in place, so that only they are sent; how many there are."""
        found: int = lib.edm_wire_gather(self.pointer, batch)
        return found

    def asked_by(self) -> tuple[int, int] | None:
        """The channel and request of the message that `open` has just refused, if it was EDM's: to refuse it by."""
        head = self._head
        return (head.channel, head.request) if head.kind else None


def pack_control(request: Mapping[str, Any]) -> bytes:
    """A control request or answer as bytes; raises `ProtocolError` if it is too large for one message."""
    packed: bytes = msgpack.packb(dict(request))
    if len(packed) > MAX_CONTROL_BYTES:
        raise ProtocolError(f"a control request of {len(packed)} bytes; at most {MAX_CONTROL_BYTES} go in one message")
    return packed


def unpack_control(packed: bytes) -> dict[str, Any]:
    """The map in `packed`; raises `ProtocolError` for anything but one msgpack map with text keys."""
    try:
        request = msgpack.unpackb(packed, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(f"a control message that is no msgpack: {type(error).__name__}") from error
    if not isinstance(request, dict) or not all(isinstance(key, str) for key in request):
        raise ProtocolError("a control message that is no map of texts to values")
    return request


def one_line(text: str) -> bytes:
    """An error text as it goes over the wire: one line, cut at `MAX_TEXT_BYTES`."""
    return " ".join(text.split()).encode()[:MAX_TEXT_BYTES]
