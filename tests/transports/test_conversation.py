"""The two ends of a wire without a wire: late, duplicate, foreign and broken messages."""

import time

import numpy as np
import pytest

from edm.channel import Session, WireChannel
from edm.dms.answering import Answerer
from edm.errors import PeerLost, ProtocolError, TransportError, TransportTimeout
from edm.spread import SpreadChannel, server_of
from edm.testing.pages import DictServer, batch_of
from edm.testing.transport_cases import wanted
from edm.types import PAGE_BYTES, EvictStatus, GetStatus
from edm.wire import Frame, Kind


class Wire:
    """A `Link` to an `Answerer` in this process; `meddle` turns each reply into the list of messages that arrive."""

    def __init__(self, server=None, meddle=lambda number, message: [message]):
        self.reply = Frame()
        self.answerer = Answerer(server or DictServer())
        self.meddle = meddle
        self.sent = []
        self.arriving = []
        self.closed = False

    def send(self, frame, length, deadline):
        self.sent.append(bytes(frame.view[:length]))
        self.deliver(self.sent[-1])

    def deliver(self, message):
        self.answerer.request.view[: len(message)] = message
        length = self.answerer.answer(len(message), "peer")
        if length:
            self.arriving += self.meddle(len(self.sent), bytes(self.answerer.reply.view[:length]))

    def receive(self, until):
        if self.closed:
            raise PeerLost("the channel is closed")
        if not self.arriving:
            time.sleep(max(until - time.monotonic(), 0))
            return 0
        message = self.arriving.pop(0)
        self.reply.view[: len(message)] = message
        return len(message)

    def close(self):
        self.closed = True


def connect(link, deadline_s=0.2, resend_s=None):
    channel = WireChannel(link, Session(1), 1, deadline_s, resend_s)
    channel.control({"op": "hello"})
    return channel


def fetched(channel, indices):
    refs, into = wanted(1 << 32, indices), bytearray(len(indices) * PAGE_BYTES)
    channel.fetch(refs, memoryview(into))
    return refs, into


def test_duplicate_replies_are_thrown_away():
    link = Wire(meddle=lambda number, message: [message, message, message])
    channel = connect(link)
    for index in range(5):
        refs, pages = batch_of(1 << 32, [index], version=index + 1)
        assert channel.evict(refs, memoryview(pages)) == ""
        assert fetched(channel, [index])[1] == pages


def test_a_delayed_reply_does_not_answer_a_later_request():
    held = []

    def hold_the_third(number, message):
        if number == 3:
            held.append(message)
            return []
        return [*held, message] if number > 3 else [message]

    link = Wire(meddle=hold_the_third)
    channel = connect(link, deadline_s=0.05)
    refs, pages = batch_of(1 << 32, [1], version=1)
    channel.evict(refs, memoryview(pages))
    with pytest.raises(TransportTimeout):
        fetched(channel, [1])
    refs, into = fetched(channel, [2])
    assert refs["status"][0] == GetStatus.NEW_PAGE
    assert into == bytes(PAGE_BYTES)


def test_a_lost_reply_is_asked_for_again_and_the_request_carried_out_once():
    server = DictServer()
    link = Wire(server, meddle=lambda number, message: [] if number in {2, 3} else [message])
    channel = connect(link, deadline_s=5.0, resend_s=0.01)
    assert channel.control({"op": "hello"})["instance"] == 2
    assert len(link.sent) == 4
    assert link.sent[1] == link.sent[2] == link.sent[3]
    assert link.answerer.figures.repeats == 2


def test_a_request_that_was_overtaken_is_not_carried_out():
    link = Wire()
    channel = connect(link)
    refs, pages = batch_of(1 << 32, [1], version=1)
    channel.evict(refs, memoryview(pages))
    delayed = link.sent[-1]
    channel.control({"op": "drop_pages", "ranges": [[1 << 32, 1, 1]], "sequence": 1})
    link.deliver(delayed)
    assert link.answerer.figures.stale == 1
    assert fetched(channel, [1])[0]["status"][0] == GetStatus.NEW_PAGE


def test_a_broken_reply_is_a_protocol_error():
    link = Wire(meddle=lambda number, message: [message if number == 1 else message[:-1]])
    channel = connect(link)
    with pytest.raises(ProtocolError):
        fetched(channel, [1])


def test_a_server_of_another_version_is_named_to_the_client():
    link = Wire()
    channel = connect(link)
    send = link.send

    def send_as_version_2(frame, length, deadline):
        frame.view[4] = 2
        send(frame, length, deadline)

    link.send = send_as_version_2
    with pytest.raises(TransportError, match="this side speaks version 1"):
        fetched(channel, [1])


def test_a_reply_of_the_wrong_kind_is_a_protocol_error():
    frame = Frame()
    length = frame.seal(Kind.ANSWER, 0, 1, 1, 2, frame.put_text(b"\x80"))
    answer = bytes(frame.view[:length])
    link = Wire(meddle=lambda number, message: [message if number == 1 else answer])
    with pytest.raises(ProtocolError, match="to a request for 1"):
        fetched(connect(link), [1])


@pytest.mark.parametrize("garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", b"EDMw", bytes(5000), b"EDMw" + bytes(100)])
def test_garbage_is_counted_and_harms_nobody(garbage):
    link = Wire()
    channel = connect(link)
    link.deliver(garbage)
    assert link.answerer.figures.garbage == 1
    assert fetched(channel, [1])[0]["status"][0] == GetStatus.NEW_PAGE


def test_a_replys_kind_is_no_request():
    link = Wire()
    frame = Frame()
    link.deliver(bytes(frame.view[: frame.seal(Kind.PONG, 0, 1, 0, 1)]))
    link.reply.view[: len(link.arriving[0])] = link.arriving[0]
    assert link.reply.open(len(link.arriving[0])).kind == Kind.REFUSED


def test_channels_beyond_the_bound_push_out_the_oldest(monkeypatch):
    monkeypatch.setattr("edm.dms.answering.MAX_CHANNELS", 8)
    link = Wire()
    session = Session(1)
    for number in range(1, 30):
        WireChannel(link, session, number, 1.0).control({"op": "stat"})
    assert len(link.answerer._last) == 8


def spread(servers, deadline_s=1.0):
    links = [Wire(DictServer()) for _ in range(servers)]
    for number, link in enumerate(links):
        # Each server gives the instance another number.
        link.answerer._server._instances = 10 * number
    channel = SpreadChannel(links, Session(servers), 1, deadline_s)
    assert channel.control({"op": "hello"})["instance"] == 1
    return channel, links


def test_pages_are_spread_evenly_and_stay_when_a_server_is_added():
    indices = np.arange(0, 64 * 20_000, 64, dtype=np.uint64)
    three, four = server_of(indices, 3), server_of(indices, 4)
    assert np.bincount(three).min() > 6000
    assert 0.2 < (three != four).mean() < 0.3
    assert (four[three != four] == 3).all()


def test_neighbours_share_a_server():
    indices = np.arange(640, 704, dtype=np.uint64)
    assert len(set(server_of(indices, 5).tolist())) == 1


@pytest.mark.parametrize("servers", [2, 3, 5])
def test_a_spread_batch_comes_back_whole(servers):
    channel, links = spread(servers)
    indices = np.arange(0, 40_000, 41)
    refs, pages = batch_of(1 << 32, indices, version=2)
    assert channel.evict(refs, memoryview(pages)) == ""
    assert (refs["status"] == EvictStatus.SUCCESS).all()
    assert all(link.answerer._server._pages for link in links)
    refs, into = fetched(channel, indices)
    assert into == pages
    assert (refs["region"] == 1 << 32).all()


def test_renamed_pages_are_found_on_their_new_servers_and_nowhere_else():
    channel, links = spread(3)
    refs, pages = batch_of(1 << 32, np.arange(1000, 2000), version=5)
    channel.evict(refs, memoryview(pages))
    move = {"op": "move_pages", "region": 1 << 32, "start": 1000, "to": 77_777, "count": 1000, "sequence": 1}
    for _ in range(2):
        assert channel.control(move)["ok"]
        assert fetched(channel, np.arange(77_777, 78_777))[1] == pages
        assert (fetched(channel, np.arange(1000, 2000))[0]["status"] == GetStatus.NEW_PAGE).all()
    assert sum(len(link.answerer._server._pages) for link in links) == 1000


def test_another_instances_region_is_refused_by_every_server():
    channel, _ = spread(2)
    refs, pages = batch_of(11 << 32, np.arange(0, 2000, 64), version=1)
    assert "not of instance" in channel.evict(refs, memoryview(pages))
    assert (refs["status"] == EvictStatus.FAIL).all()


def test_one_lost_server_is_a_timeout_not_a_wrong_page():
    channel, links = spread(2, deadline_s=0.05)
    links[1].meddle = lambda number, message: []
    with pytest.raises(TransportTimeout):
        fetched(channel, np.arange(0, 6400, 64))
