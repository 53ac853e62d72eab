"""The one wire layout of all transports: a header, page references, then pages or a text.

Place on the path: the DM-Handler's side of a transport seals requests [5] and opens replies [11]; the DMS's side the
other way round. docs/protocol.md is the description for implementers; this module is the implementation.

A `Frame` is a contiguous buffer that holds one message at a time. It is made once for each channel and direction:
nothing is allocated per message, and a message that claims to be larger than the frame is refused, not fitted.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack  # type: ignore[import-untyped]
import numpy as np

from edm._native import ffi, lib
from edm.errors import ProtocolError
from edm.types import MAX_BATCH_PAGES, PAGE_BYTES, PAGE_REF, GetStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edm.types import PageRefs

MAGIC: Final = int.from_bytes(b"EDMw", "little")
VERSION: Final = 1
HEADER: Final = struct.Struct("<IBBHIIQIIII")
HEADER_BYTES: Final = HEADER.size
KIND_AT: Final = 5
REF_BYTES: Final = PAGE_REF.itemsize
MAX_TEXT_BYTES: Final = 1024
MAX_CONTROL_BYTES: Final = 256 << 10
MAX_MESSAGE_BYTES: Final = HEADER_BYTES + MAX_BATCH_PAGES * (REF_BYTES + PAGE_BYTES)

_CHECKSUM: Final = struct.Struct("<I")
_CHECKSUM_AT: Final = HEADER_BYTES - _CHECKSUM.size


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


class Head(NamedTuple):
    """The fixed header, as far as the two sides use it.

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


# kind → (fewest refs, most refs, most text bytes, what `pages` must be)
_NONE, _ALL, _SOME = range(3)
_SHAPES: Final[dict[int, tuple[int, int, int, int]]] = {
    Kind.GET: (1, MAX_BATCH_PAGES, 0, _NONE),
    Kind.PAGES: (1, MAX_BATCH_PAGES, 0, _SOME),
    Kind.EVICT: (1, MAX_BATCH_PAGES, 0, _ALL),
    Kind.ACK: (1, MAX_BATCH_PAGES, MAX_TEXT_BYTES, _NONE),
    Kind.CONTROL: (0, 0, MAX_CONTROL_BYTES, _NONE),
    Kind.ANSWER: (0, 0, MAX_CONTROL_BYTES, _NONE),
    Kind.PING: (0, 0, 0, _NONE),
    Kind.PONG: (0, 0, 0, _NONE),
    Kind.BYE: (0, 0, 0, _NONE),
    Kind.REFUSED: (0, 0, MAX_TEXT_BYTES, _NONE),
}


class Frame:
    """A buffer for one message, of at most `MAX_MESSAGE_BYTES`. Used by one thread at a time.

    view: the whole buffer, writable. refs: the page references of a message, of which the first `count` mean something.
    """

    __slots__ = ("_pointer", "array", "capacity", "refs", "view")

    def __init__(self) -> None:
        self.capacity = MAX_MESSAGE_BYTES
        self.renew()

    def renew(self) -> None:
        """Take a fresh buffer, since a transport has not let go of the old one."""
        # Memory is taken as it is touched: a frame that only ever holds small messages stays small.
        self.array = np.zeros(self.capacity, np.uint8)
        self.view = self.array.data
        self.refs: PageRefs = np.frombuffer(self.array, PAGE_REF, MAX_BATCH_PAGES, HEADER_BYTES)
        self._pointer = ffi.from_buffer(self.array)

    def put_refs(self, refs: PageRefs) -> None:
        """Copy page references in; refs: contiguous."""
        ffi.memmove(self._pointer + HEADER_BYTES, refs, len(refs) * REF_BYTES)

    def take_refs(self, refs: PageRefs) -> None:
        """Copy as many page references out as `refs` has room for; refs: contiguous, writable."""
        ffi.memmove(refs, self._pointer + HEADER_BYTES, len(refs) * REF_BYTES)

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

    def text(self, head: Head) -> bytes:
        """The text of a message that `open` has accepted."""
        start = HEADER_BYTES + head.batch * REF_BYTES
        return bytes(self.view[start : start + head.text_bytes])

    def seal(self, head: Head) -> int:
        """Write the header over references, text and pages that are in place; returns the message's length."""
        kind, count, channel, instance, request, text_bytes, pages = head
        checked = HEADER_BYTES + count * REF_BYTES + text_bytes
        length = checked + pages * PAGE_BYTES
        HEADER.pack_into(
            self.view, 0, MAGIC, VERSION, kind, count, channel, instance, request, text_bytes, pages, length, 0
        )
        _CHECKSUM.pack_into(self.view, _CHECKSUM_AT, lib.edm_crc32c(self._pointer, checked))
        return length

    def open(self, length: int) -> Head:
        """Check the message of `length` bytes in this frame; raises `ProtocolError` for whatever breaks the layout.

        What is accepted has the shape its kind demands and a right checksum over header, references and text; pages
        have a checksum each, in their references, which whoever uses the pages verifies.
        """
        if not HEADER_BYTES <= length <= self.capacity:
            raise ProtocolError(f"a message of {length} bytes")
        magic, version, kind, count, channel, instance, request, text_bytes, pages, claimed, checksum = (
            HEADER.unpack_from(self.view)
        )
        if magic != MAGIC:
            raise ProtocolError("not a message of EDM")
        if version != VERSION:
            raise ProtocolError(f"a message of protocol version {version}; this side speaks {VERSION}")
        head = Head(kind, count, channel, instance, request, text_bytes, pages)
        checked = HEADER_BYTES + count * REF_BYTES + text_bytes
        if claimed != length or checked + pages * PAGE_BYTES != length:
            raise ProtocolError(f"a message of {length} bytes that says it has {claimed}")
        _check_shape(head)
        _CHECKSUM.pack_into(self.view, _CHECKSUM_AT, 0)
        if lib.edm_crc32c(self._pointer, checked) != checksum:
            raise ProtocolError("a message whose checksum does not match")
        if kind == Kind.PAGES and existing(self.refs[:count]) != pages:
            raise ProtocolError(f"a reply with {pages} pages whose references say otherwise")
        return head

    def request_number(self, length: int) -> tuple[int, int] | None:
        """The channel and request of a message that `open` refused, where it is at least EDM's: to refuse it by."""
        if length < HEADER_BYTES:
            return None
        magic, _, _, _, channel, _, request, *_ = HEADER.unpack_from(self.view)
        return (channel, request) if magic == MAGIC else None


def _check_shape(head: Head) -> None:
    shape = _SHAPES.get(head.kind)
    if shape is None:
        raise ProtocolError(f"a message of unknown kind {head.kind}")
    fewest, most, most_text, pages = shape
    fits = (
        fewest <= head.batch <= most
        and head.text_bytes <= most_text
        and (head.pages <= head.batch if pages == _SOME else head.pages == (head.batch if pages == _ALL else 0))
    )
    if not fits:
        raise ProtocolError(f"a message of kind {Kind(head.kind).name} with the wrong shape")


def existing(refs: PageRefs) -> int:
    """How many of `refs` have a page in the reply."""
    if len(refs) == 1:
        return int(refs["status"][0] == GetStatus.EXISTING_PAGE)
    return int(np.count_nonzero(refs["status"] == GetStatus.EXISTING_PAGE))


def gather(refs: PageRefs, pages: memoryview) -> int:
    """Move the existing pages of a batch together, in place, so that only they are sent; returns how many there are."""
    found = np.flatnonzero(refs["status"] == GetStatus.EXISTING_PAGE)
    for to, at in enumerate(found.tolist()):
        if to != at:
            pages[to * PAGE_BYTES : (to + 1) * PAGE_BYTES] = pages[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
    return len(found)


def scatter(refs: PageRefs, pages: memoryview, into: memoryview) -> None:
    """Put the pages of a reply where they belong in the batch; pages that do not exist are left alone in `into`."""
    found = np.flatnonzero(refs["status"] == GetStatus.EXISTING_PAGE)
    if len(found) == len(refs):
        into[: len(found) * PAGE_BYTES] = pages[: len(found) * PAGE_BYTES]
        return
    for at, to in enumerate(found.tolist()):
        into[to * PAGE_BYTES : (to + 1) * PAGE_BYTES] = pages[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]


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
