"""What every transport must do, as functions of a connected DM-Handler's side; `TransportContract` runs them.

They run in a process that the transport's own `plan` has started, against a `DictServer` on the other side.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs
import numpy as np

from edm.errors import PeerLost, TransportError, TransportTimeout
from edm.testing.pages import batch_of, crc32c
from edm.types import MAX_BATCH_PAGES, PAGE_BYTES, PAGE_REF, EvictStatus, GetStatus

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edm.interfaces import Channel, Transport
    from edm.types import PageRefs

_T = TypeVar("_T")
DEADLINE_S: Final = 30.0
"""The deadline the transport is opened with: longer than a busy machine may stand still."""
LATE_S: Final = 1.0
"""The same, for the cases in which it passes."""
SLOW_S: Final = 1.2
"""Shorter than the deadline."""


@attrs.define
class Peer:
    """The DM-Handler's side of a transport that has said hello.

    directory: of both sides. region: a region of this instance that the case has for itself.
    """

    transport: Transport
    channel: Channel
    instance: int
    directory: Path
    region: int = 0
    sequence: int = 0

    def evict(self, refs: PageRefs, pages: bytearray) -> None:
        """Evict, and demand that all of it is taken."""
        error = self.channel.evict(refs, memoryview(pages))
        assert error == ""
        assert (refs["status"] == EvictStatus.SUCCESS).all()

    def hold(self, channel: Channel) -> Path:
        """Have the next request held up; the file whose making lets it go on."""
        go_on = self.directory / f"go-on-{self.region}"
        assert channel.control({"op": "test_delay", "until": str(go_on), "requests": 1})["ok"]
        return go_on

    def structural(self, **request: Any) -> dict[str, Any]:
        """Send a structural request with the next sequence number."""
        self.sequence += 1
        return self.channel.control({**request, "sequence": self.sequence})


def wanted(region: int, indices: Any) -> PageRefs:
    """References as a fault worker makes them."""
    refs = np.zeros(len(indices), PAGE_REF)
    refs["region"], refs["index"] = region, indices
    return refs


def pages_come_back_in_batches_of_every_size(peer: Peer) -> None:
    """From 1 to 1024 pages, with their versions and checksums."""
    for size in (1, 2, 3, 17, 64, 65, 255, 1023, MAX_BATCH_PAGES):
        indices = np.arange(size) * 3 + size * 10_000
        refs, pages = batch_of(peer.region, indices, version=size)
        peer.evict(refs, pages)
        asked = wanted(peer.region, indices)
        into = bytearray(size * PAGE_BYTES)
        peer.channel.fetch(asked, memoryview(into))
        assert (asked["status"] == GetStatus.EXISTING_PAGE).all()
        assert (asked["version"] == size).all()
        assert (asked["checksum"] == refs["checksum"]).all()
        assert into == pages


def pages_never_stored_are_new_and_leave_the_buffer_alone(peer: Peer) -> None:
    """A reply carries only pages that exist."""
    for size in (1, 7, MAX_BATCH_PAGES):
        asked = wanted(peer.region, np.arange(size) + 5_000_000)
        into = bytearray(b"\x5a" * (size * PAGE_BYTES))
        peer.channel.fetch(asked, memoryview(into))
        assert (asked["status"] == GetStatus.NEW_PAGE).all()
        assert into == b"\x5a" * (size * PAGE_BYTES)


def new_and_existing_pages_mix_in_one_batch(peer: Peer) -> None:
    """Each existing page arrives at its own place in the batch."""
    refs, pages = batch_of(peer.region, np.arange(0, 400, 3), version=1)
    peer.evict(refs, pages)
    asked = wanted(peer.region, np.arange(400))
    into = bytearray(b"\x5a" * (400 * PAGE_BYTES))
    peer.channel.fetch(asked, memoryview(into))
    for index in range(400):
        page = into[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
        if index % 3 == 0:
            assert asked["status"][index] == GetStatus.EXISTING_PAGE
            assert crc32c(bytes(page)) == asked["checksum"][index]
            assert page == pages[index // 3 * PAGE_BYTES : (index // 3 + 1) * PAGE_BYTES]
        else:
            assert asked["status"][index] == GetStatus.NEW_PAGE
            assert page == b"\x5a" * PAGE_BYTES


def zero_pages_come_back_as_existing_zeros(peer: Peer) -> None:
    """A page of zeros is a page like any other."""
    refs = wanted(peer.region, np.arange(64))
    refs["version"], refs["checksum"] = 1, crc32c(bytes(PAGE_BYTES))
    peer.evict(refs, bytearray(64 * PAGE_BYTES))
    asked = wanted(peer.region, np.arange(64))
    into = bytearray(b"\xff" * (64 * PAGE_BYTES))
    peer.channel.fetch(asked, memoryview(into))
    assert (asked["status"] == GetStatus.EXISTING_PAGE).all()
    assert into == bytes(64 * PAGE_BYTES)


def one_refused_page_fails_alone_and_says_why(peer: Peer) -> None:
    """Statuses are per page, the text is the first reason."""
    peer.evict(*batch_of(peer.region, [1], version=9))
    refs, pages = batch_of(peer.region, [0, 1, 2], version=8)
    error = peer.channel.evict(refs, memoryview(pages))
    assert "older" in error
    assert refs["status"].tolist() == [EvictStatus.SUCCESS, EvictStatus.FAIL, EvictStatus.SUCCESS]


def a_repeated_eviction_succeeds(peer: Peer) -> None:
    """The same version again is what a timeout leads to."""
    for _ in range(3):
        peer.evict(*batch_of(peer.region, np.arange(50), version=4))


def requests_of_one_channel_are_carried_out_in_order(peer: Peer) -> None:
    """Each fetch sees the eviction and the drop before it."""
    for version in range(1, 60):
        refs, pages = batch_of(peer.region, [7, 8], version=version)
        peer.evict(refs, pages)
        if version % 3 == 0:
            assert peer.structural(op="drop_pages", ranges=[[peer.region, 7, 1]])["ok"]
        asked, into = wanted(peer.region, [7, 8]), bytearray(2 * PAGE_BYTES)
        peer.channel.fetch(asked, memoryview(into))
        dropped = version % 3 == 0
        assert asked["status"][0] == (GetStatus.NEW_PAGE if dropped else GetStatus.EXISTING_PAGE)
        assert asked["version"][1] == version
        assert into[PAGE_BYTES:] == pages[PAGE_BYTES:]


def pages_moved_are_found_where_they_went(peer: Peer) -> None:
    """A rename, as mremap makes it, of more pages than one message carries."""
    for start in range(100_000, 103_000, 1000):
        peer.evict(*batch_of(peer.region, np.arange(start, start + 1000), version=3))
    assert peer.structural(op="move_pages", region=peer.region, start=100_500, to=900_000, count=2000)["ok"]
    kept, gone, moved = (wanted(peer.region, [index]) for index in (100_499, 100_500, 900_000))
    into = bytearray(PAGE_BYTES)
    peer.channel.fetch(kept, memoryview(into))
    peer.channel.fetch(gone, memoryview(into))
    peer.channel.fetch(moved, memoryview(into))
    assert kept["status"][0] == GetStatus.EXISTING_PAGE
    assert gone["status"][0] == GetStatus.NEW_PAGE
    assert moved["status"][0] == GetStatus.EXISTING_PAGE
    assert into == batch_of(peer.region, [100_500], version=3)[1]
    last = wanted(peer.region, [901_999, 902_000])
    peer.channel.fetch(last, memoryview(bytearray(2 * PAGE_BYTES)))
    assert last["status"].tolist() == [GetStatus.EXISTING_PAGE, GetStatus.NEW_PAGE]


def many_channels_do_not_mix_their_answers(peer: Peer) -> None:
    """Eight threads, each with a channel; every one gets its own pages."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            channel = peer.transport.connect()
            for turn in range(40):
                indices = np.arange(1 + (turn * 7 + number) % 90) + number * 100_000
                refs, pages = batch_of(peer.region, indices, version=turn + 1, seed=number)
                assert channel.evict(refs, memoryview(pages)) == ""
                asked, into = wanted(peer.region, indices), bytearray(len(pages))
                channel.fetch(asked, memoryview(into))
                assert into == pages
            channel.close()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def a_control_request_that_fails_says_why(peer: Peer) -> None:
    """The answer carries ok and error."""
    answer = peer.channel.control({"op": "no such thing"})
    assert answer["ok"] is False
    assert "no such thing" in answer["error"]


def a_long_control_request_fits(peer: Peer) -> None:
    """Ten thousand ranges in one request."""
    peer.evict(*batch_of(peer.region, [19_998], version=1))
    ranges = [[peer.region, 2 * number, 1] for number in range(10_000)]
    assert peer.structural(op="drop_pages", ranges=ranges)["ok"]
    asked = wanted(peer.region, [19_998])
    peer.channel.fetch(asked, memoryview(bytearray(PAGE_BYTES)))
    assert asked["status"][0] == GetStatus.NEW_PAGE


def a_structural_request_is_applied_once(peer: Peer) -> None:
    """A repeat with the same sequence number is answered, and does nothing."""
    request = {"op": "drop_pages", "ranges": [[peer.region, 5, 1]], "sequence": peer.sequence + 1}
    peer.sequence += 1
    assert peer.channel.control(request)["ok"]
    peer.evict(*batch_of(peer.region, [5], version=1))
    assert peer.channel.control(request)["ok"]
    asked = wanted(peer.region, [5])
    peer.channel.fetch(asked, memoryview(bytearray(PAGE_BYTES)))
    assert asked["status"][0] == GetStatus.EXISTING_PAGE


def another_instances_pages_are_out_of_reach(peer: Peer) -> None:
    """A region whose upper half is not this instance is an error, page by page."""
    refs, pages = batch_of((peer.instance + 7) << 32, [1, 2], version=1)
    error = peer.channel.evict(refs, memoryview(pages))
    assert error
    assert (refs["status"] == EvictStatus.FAIL).all()


def a_closed_channel_says_so(peer: Peer) -> None:
    """`PeerLost`, not a hang; and closing again is no error."""
    channel = peer.transport.connect()
    channel.close()
    channel.close()
    try:
        channel.fetch(wanted(peer.region, [1]), memoryview(bytearray(PAGE_BYTES)))
    except PeerLost:
        return
    raise AssertionError("a closed channel went on working")


def _patiently(call: Callable[[], _T]) -> _T:
    """As a worker does: once more after a timeout."""
    while True:
        with contextlib.suppress(TransportTimeout):
            return call()


def a_late_reply_is_thrown_away(peer: Peer) -> None:
    """A timeout within the deadline; the next request gets its own answer, not the late one."""
    first, pages_first = batch_of(peer.region, [1], version=1, seed=1)
    second, pages_second = batch_of(peer.region, [2], version=2, seed=2)
    peer.evict(first, pages_first)
    peer.evict(second, pages_second)
    slow = peer.transport.connect()
    go_on = peer.hold(slow)
    started = time.monotonic()
    try:
        slow.fetch(wanted(peer.region, [1]), memoryview(bytearray(PAGE_BYTES)))
    except TransportTimeout:
        assert time.monotonic() - started >= LATE_S * 0.9
    else:
        raise AssertionError("there was an answer before the request was carried out")
    go_on.touch()
    asked, into = wanted(peer.region, [2]), bytearray(PAGE_BYTES)
    _patiently(lambda: slow.fetch(asked, memoryview(into)))
    assert asked["version"][0] == 2
    assert into == pages_second
    slow.close()


def a_reply_that_takes_its_time_is_waited_for(peer: Peer) -> None:
    """Within the deadline, however a transport divides its waiting."""
    refs, pages = batch_of(peer.region, np.arange(40), version=1)
    peer.evict(refs, pages)
    assert peer.channel.control({"op": "test_delay", "seconds": SLOW_S, "requests": 1})["ok"]
    asked, into = wanted(peer.region, np.arange(40)), bytearray(len(pages))
    peer.channel.fetch(asked, memoryview(into))
    assert into == pages


def an_eviction_that_timed_out_may_be_sent_again(peer: Peer) -> None:
    """It is stored once, whichever of the two arrives."""
    slow = peer.transport.connect()
    go_on = peer.hold(slow)
    refs, pages = batch_of(peer.region, np.arange(300), version=1)
    try:
        slow.evict(refs, memoryview(pages))
    except TransportTimeout:
        go_on.touch()
        assert _patiently(lambda: slow.evict(refs, memoryview(pages))) == ""
    else:
        raise AssertionError("there was an acknowledgement before the request was carried out")
    asked, into = wanted(peer.region, np.arange(300)), bytearray(len(pages))
    _patiently(lambda: slow.fetch(asked, memoryview(into)))
    assert into == pages
    slow.close()


def duplicate_replies_are_thrown_away(peer: Peer) -> None:
    """Every request is sent twice, so every reply comes twice; each next request gets its own."""
    channel = peer.transport.connect()
    # So that every server has had a request that can be sent again.
    assert not channel.control({"op": "no such thing"})["ok"]
    for turn in range(12):
        # Of a large batch some transports send the pages apart from the rest.
        indices = np.arange(1 if turn % 2 else 70) + turn * 1000
        refs, pages = batch_of(peer.region, indices, version=turn + 1, seed=turn)
        assert channel.evict(refs, memoryview(pages)) == ""
        _send_again(channel)
        asked, into = wanted(peer.region, indices), bytearray(len(pages))
        channel.fetch(asked, memoryview(into))
        assert (asked["version"] == turn + 1).all()
        assert into == pages
        _send_again(channel)
        answer = channel.control({"op": "no such thing", "turn": turn})
        assert "no such thing" in answer["error"]
        _send_again(channel)
    channel.close()


def _send_again(channel: Channel) -> None:
    """As a transport does that may lose messages; a channel without a wire has no replies that could be two."""
    one = getattr(channel, "_conversation", None)
    for conversation in getattr(channel, "_conversations", [one] if one is not None else []):
        conversation.send_again(time.monotonic() + DEADLINE_S)


def a_busy_server_is_a_timeout_for_who_waits(peer: Peer) -> None:
    """One channel's request takes longer than another channel's deadline allows; the other then goes on."""
    busy, other = peer.transport.connect(), peer.transport.connect()
    # Pages that a transport with several servers asks the same one for.
    refs, pages = batch_of(peer.region, [3, 4], version=1)
    peer.evict(refs, pages)
    go_on = peer.hold(busy)

    def be_busy() -> None:
        with contextlib.suppress(TransportTimeout):
            busy.fetch(wanted(peer.region, [3]), memoryview(bytearray(PAGE_BYTES)))

    thread = threading.Thread(target=be_busy)
    thread.start()
    time.sleep(0.1)
    asked, into = wanted(peer.region, [4]), bytearray(PAGE_BYTES)
    try:
        other.fetch(asked, memoryview(into))
    except TransportTimeout:
        go_on.touch()
        _patiently(lambda: other.fetch(asked, memoryview(into)))
    else:
        raise AssertionError("there was an answer before the other's request was carried out")
    assert into == pages[PAGE_BYTES:]
    thread.join()
    assert other.control({"op": "test_delay", "seconds": 0, "requests": 0})["ok"]
    busy.close()
    other.close()


def closing_ends_a_request_in_flight(peer: Peer) -> None:
    """The transport closes while another thread waits for a reply: that thread gets its answer or an error, soon."""
    ended: list[str] = []
    channel = peer.transport.connect()
    assert channel.control({"op": "test_delay", "seconds": 0.5, "requests": 1})["ok"]

    def wait() -> None:
        try:
            channel.fetch(wanted(peer.region, [1]), memoryview(bytearray(PAGE_BYTES)))
            ended.append("answered")
        except TransportError:
            ended.append("lost")

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    peer.transport.close()
    thread.join(2 * DEADLINE_S)
    assert not thread.is_alive()
    assert ended
    try:
        peer.transport.connect()
    except PeerLost:
        return
    raise AssertionError("a closed transport opened a channel")


CASES: Final[tuple[Callable[[Peer], None], ...]] = (
    pages_come_back_in_batches_of_every_size,
    pages_never_stored_are_new_and_leave_the_buffer_alone,
    new_and_existing_pages_mix_in_one_batch,
    zero_pages_come_back_as_existing_zeros,
    one_refused_page_fails_alone_and_says_why,
    a_repeated_eviction_succeeds,
    requests_of_one_channel_are_carried_out_in_order,
    pages_moved_are_found_where_they_went,
    many_channels_do_not_mix_their_answers,
    a_control_request_that_fails_says_why,
    a_long_control_request_fits,
    a_structural_request_is_applied_once,
    another_instances_pages_are_out_of_reach,
    a_closed_channel_says_so,
    duplicate_replies_are_thrown_away,
)
"""Run one after another on one connection."""

SLOW_CASES: Final[tuple[Callable[[Peer], None], ...]] = (a_reply_that_takes_its_time_is_waited_for,)
"""The same, for transports that have replies."""

BUSY_CASES: Final[tuple[Callable[[Peer], None], ...]] = (a_busy_server_is_a_timeout_for_who_waits,)
"""The same, on a connection with a short deadline, `LATE_S`."""

LATE_CASES: Final[tuple[Callable[[Peer], None], ...]] = (
    a_late_reply_is_thrown_away,
    an_eviction_that_timed_out_may_be_sent_again,
)
"""The same, on that connection, for transports that have replies."""

LAST_CASE: Final = closing_ends_a_request_in_flight
"""Closes the transport."""
