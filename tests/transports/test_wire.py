"""The wire layout: what is sealed opens, and nothing else does."""

import struct
import tracemalloc

import google_crc32c
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edm import wire
from edm._native import ffi, lib
from edm.dms.answering import Answerer
from edm.errors import ProtocolError
from edm.testing.pages import DictServer, batch_of
from edm.types import MAX_BATCH_PAGES, PAGE_BYTES, PAGE_REF, GetStatus
from edm.wire import HEADER_BYTES, MAX_CONTROL_BYTES, MAX_TEXT_BYTES, REF_BYTES, Frame, Kind

HEADER = struct.Struct("<4sBBHIIQIIII")
FRAME = Frame()
OTHER = Frame()


def reply_with(statuses, batch_pages=None):
    """A sealed reply to a get in FRAME; its length."""
    refs, pages = batch_of(1 << 32, np.arange(len(statuses)), version=3)
    refs["status"] = statuses
    FRAME.put_refs(refs)
    FRAME.pages(len(refs))[:] = pages
    present = FRAME.gather(len(refs))
    return refs, pages, FRAME.seal(Kind.PAGES, len(refs), 2, 1, 77, 0, present)


def test_header_is_laid_out_as_documented():
    FRAME.put_refs(batch_of(1 << 32, [5], version=1)[0])
    length = FRAME.seal(Kind.GET, 1, 3, 4, 5)
    magic, version, kind, batch, channel, instance, request, text, pages, claimed, checksum = HEADER.unpack_from(
        FRAME.view
    )
    assert (magic, version, kind, batch) == (b"EDMw", 1, 2, 1)
    assert (channel, instance, request, text, pages, claimed) == (3, 4, 5, 0, 0, length)
    checked = bytearray(FRAME.view[:length])
    checked[36:40] = bytes(4)
    assert checksum == google_crc32c.value(bytes(checked))


@given(
    statuses=st.lists(st.sampled_from(list(GetStatus)), min_size=1, max_size=80),
)
@settings(deadline=None)
def test_existing_pages_reach_their_places(statuses):
    refs, pages, length = reply_with(statuses)
    head = FRAME.open(length)
    assert head.pages == statuses.count(GetStatus.EXISTING_PAGE)
    asked = np.zeros(len(refs), PAGE_REF)
    asked["region"], asked["index"] = refs["region"], refs["index"]
    into = bytearray(b"\x5a" * len(pages))
    FRAME.take(asked, memoryview(into))
    assert (asked == refs).all()
    for at, status in enumerate(statuses):
        place = slice(at * PAGE_BYTES, (at + 1) * PAGE_BYTES)
        assert into[place] == (pages[place] if status == GetStatus.EXISTING_PAGE else b"\x5a" * PAGE_BYTES)


def test_reply_about_other_pages_is_refused_and_changes_nothing():
    refs, _, length = reply_with([GetStatus.EXISTING_PAGE] * 3)
    FRAME.open(length)
    asked = refs.copy()
    asked["index"][2] += 1
    before, into = asked.copy(), bytearray(3 * PAGE_BYTES)
    with pytest.raises(ProtocolError, match="other pages"):
        FRAME.take(asked, memoryview(into))
    assert (asked == before).all()
    assert into == bytes(3 * PAGE_BYTES)


@given(
    kind=st.sampled_from(list(Kind)),
    batch=st.integers(0, MAX_BATCH_PAGES),
    numbers=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)),
    text=st.binary(max_size=MAX_TEXT_BYTES + 5),
    pages=st.integers(0, 40),
)
@settings(deadline=None)
def test_a_sealed_message_opens_if_and_only_if_its_kind_has_that_shape(kind, batch, numbers, text, pages):
    pages = min(pages, batch)
    FRAME.refs["status"][:batch] = 0
    FRAME.refs["status"][:pages] = GetStatus.EXISTING_PAGE
    text_bytes = FRAME.put_text(text, batch) if pages == 0 else 0
    length = FRAME.seal(kind, batch, *numbers, text_bytes, pages)
    fits = {
        Kind.GET: batch > 0 and not text_bytes and not pages,
        Kind.PAGES: batch > 0 and not text_bytes,
        Kind.EVICT: batch > 0 and not text_bytes and pages == batch,
        Kind.ACK: batch > 0 and text_bytes <= MAX_TEXT_BYTES and not pages,
        Kind.CONTROL: not batch,
        Kind.ANSWER: not batch,
        Kind.REFUSED: not batch and text_bytes <= MAX_TEXT_BYTES,
    }.get(kind, not batch and not text_bytes)
    if not fits:
        with pytest.raises(ProtocolError):
            FRAME.open(length)
        return
    head = FRAME.open(length)
    assert (head.kind, head.batch, head.channel, head.instance, head.request) == (kind, batch, *numbers)
    assert (head.text_bytes, head.pages) == (text_bytes, pages)
    assert pages or FRAME.text() == text[:text_bytes]


@given(data=st.binary(max_size=300))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_refused(data):
    OTHER.view[: len(data)] = data
    with pytest.raises(ProtocolError):
        OTHER.open(len(data))


@given(
    fields=st.tuples(
        st.just(b"EDMw"), st.integers(0, 3), st.integers(0, 255), st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1),
    ),
    length=st.integers(0, 2**40),
)  # fmt: skip
@settings(deadline=None, max_examples=500)
def test_any_header_is_refused_whatever_length_came(fields, length):
    HEADER.pack_into(OTHER.view, 0, *fields)
    with pytest.raises(ProtocolError):
        OTHER.open(length)
    rest = lib.edm_wire_rest(OTHER.pointer, length, OTHER.capacity, ffi.new("uint64_t *"))
    assert rest == 0 or length + rest <= OTHER.capacity


def test_pages_that_come_by_themselves_are_known_from_what_stands_before_them():
    _, _, length = reply_with([GetStatus.EXISTING_PAGE] * 40)
    before, number = HEADER_BYTES + 40 * REF_BYTES, ffi.new("uint64_t *")
    assert lib.edm_wire_rest(FRAME.pointer, before, FRAME.capacity, number) == 40 * PAGE_BYTES
    assert number[0] == 77
    assert lib.edm_wire_rest(FRAME.pointer, length, FRAME.capacity, number) == 0
    assert lib.edm_wire_rest(FRAME.pointer, before - 1, FRAME.capacity, number) == 0


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_a_flipped_bit_before_the_pages_is_noticed(data):
    _, _, length = reply_with([GetStatus.EXISTING_PAGE, GetStatus.NEW_PAGE])
    bit = data.draw(st.integers(0, 8 * (HEADER_BYTES + 2 * REF_BYTES) - 1))
    FRAME.view[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        FRAME.open(length)


@given(cut=st.integers(1, HEADER_BYTES + REF_BYTES + PAGE_BYTES))
@settings(deadline=None)
def test_a_truncated_or_longer_message_is_refused(cut):
    _, _, length = reply_with([GetStatus.EXISTING_PAGE])
    with pytest.raises(ProtocolError):
        FRAME.open(length - cut)
    with pytest.raises(ProtocolError):
        FRAME.open(length + cut)


def test_opening_leaves_a_message_as_it_was():
    _, _, length = reply_with([GetStatus.EXISTING_PAGE])
    before = bytes(FRAME.view[:length])
    FRAME.open(length)
    assert FRAME.view[:length] == before


def test_another_version_is_named():
    length = FRAME.seal(Kind.PING, 0, 1, 1, 9)
    FRAME.view[4] = 2
    with pytest.raises(ProtocolError, match="this side speaks version 1"):
        FRAME.open(length)
    assert FRAME.asked_by() == (1, 9)


def test_largest_message_fits_a_frame_exactly():
    refs, pages = batch_of(1 << 32, np.arange(MAX_BATCH_PAGES), version=1)
    FRAME.put_refs(refs)
    FRAME.pages(MAX_BATCH_PAGES)[:] = pages
    length = FRAME.seal(Kind.EVICT, MAX_BATCH_PAGES, 1, 1, 1, 0, MAX_BATCH_PAGES)
    assert length == FRAME.capacity == wire.MAX_MESSAGE_BYTES
    assert FRAME.open(length).pages == MAX_BATCH_PAGES


def test_a_control_request_that_is_too_long_is_refused_by_its_sender():
    with pytest.raises(ProtocolError, match="at most"):
        wire.pack_control({"ranges": [[2**60, 2**60, 2**30]] * 20_000})
    assert len(wire.pack_control({"ranges": [[2**60, 2**40, 9]] * 10_000})) <= MAX_CONTROL_BYTES


@given(packed=st.binary(max_size=200))
@settings(deadline=None, max_examples=500)
def test_any_control_bytes_are_a_map_or_refused(packed):
    try:
        request = wire.unpack_control(packed)
    except ProtocolError:
        return
    assert all(isinstance(key, str) for key in request)


@pytest.mark.parametrize(
    "packed",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1 elements
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"\x91" * 200_000,  # arrays in arrays in arrays
        msgpack.packb([1, 2]),
        msgpack.packb({1: 2}),
        msgpack.packb({"op": "bye"}) + b"\0",
        b"",
    ],
)
def test_a_hostile_control_message_is_refused(packed):
    with pytest.raises(ProtocolError):
        wire.unpack_control(packed)


def test_an_error_text_becomes_one_short_line():
    assert wire.one_line("a\nb\tc") == b"a b c"
    assert len(wire.one_line("x" * 5000)) == MAX_TEXT_BYTES


ANSWERER = Answerer(DictServer())
MOST_ALLOCATED = 4 << 20
"""Sixteen times the largest control message: what msgpack may make of the bytes that are there."""


@given(
    kind=st.integers(0, 12),
    claims=st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    body=st.binary(max_size=2000),
    honest=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_no_message_makes_the_server_allocate_what_it_claims(kind, claims, body, honest):
    batch, text_bytes, pages = claims
    frame = ANSWERER.request
    if honest:
        length = frame.seal(kind, 0, 1, 1, 1, frame.put_text(body), 0)
    else:
        HEADER.pack_into(
            frame.view, 0, b"EDMw", 1, kind, batch, 1, 1, 1, text_bytes, pages, HEADER_BYTES + len(body), 0
        )
        length = HEADER_BYTES + len(body)
    tracemalloc.start()
    try:
        assert ANSWERER.answer(length, "peer") <= ANSWERER.reply.capacity
        assert tracemalloc.get_traced_memory()[1] < MOST_ALLOCATED
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "packed",
    [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
     b"\xc9\xff\xff\xff\xff\x01", b"\x91" * 2000, b"\x81\xa1a" * 2000, b"\xdc\xff\xff" * 600],
)  # fmt: skip
def test_a_control_message_allocates_for_the_bytes_it_has_not_for_those_it_claims(packed):
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            wire.unpack_control(packed)
        assert tracemalloc.get_traced_memory()[1] < MOST_ALLOCATED
    finally:
        tracemalloc.stop()
