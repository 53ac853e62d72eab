"""Queues are bounded on both sides: floods, clients that take no replies, and servers that stand still cost little."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

from edm.errors import TransportTimeout
from edm.plugins.transport_zmq import ZmqOptions, open_transport
from edm.testing.pages import batch_of
from edm.testing.transport_cases import wanted
from edm.types import MAX_BATCH_PAGES, PAGE_BYTES, RunContext
from edm.wire import MAX_MESSAGE_BYTES, Frame, Kind

QUEUE_BYTES = 16 * MAX_MESSAGE_BYTES
MOST_BYTES = 2 * QUEUE_BYTES + (64 << 20)
"""For one client: a queue in each direction, the replies on their way, and to spare."""
FLOOD = 240
"""Messages of the largest size: three times what may be taken."""


@pytest.fixture
def server(tmp_path):
    """A memory server's process: its id, and where it listens."""
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "edm", "dms", "--listen", "tcp://127.0.0.1:*", "--path", tmp_path / "dms",
             "--store", "memory"], stdout=out, stderr=out,
        )  # fmt: skip
    end = time.monotonic() + 60
    while not (ready := re.search(r"ready at (\S+)", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    yield process.pid, ready[1]
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()


@pytest.fixture
def transport(server, tmp_path):
    """A client that does as it should, and is given time."""
    opened = open_transport(ZmqOptions(dms=(server[1],)), RunContext(tmp_path, tmp_path, "dm-handler", 30.0))
    yield opened
    opened.close()


@pytest.fixture
def stranger(server):
    """A socket that keeps to no rules of EDM's."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.sndhwm = socket.rcvhwm = 1
    socket.connect(server[1])
    yield socket
    socket.close()
    context.term()


def resident(pid):
    """Bytes of the process's own memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def stored(transport, count=MAX_BATCH_PAGES):
    channel = transport.connect()
    instance = channel.control({"op": "hello", "client": "test", "protocol": 1})["instance"]
    refs, pages = batch_of(instance << 32, np.arange(count), version=1)
    assert channel.evict(refs, memoryview(pages)) == ""
    return channel, instance, refs, pages


def fetch(channel, instance, pages):
    into = bytearray(len(pages))
    channel.fetch(wanted(instance << 32, np.arange(len(pages) // PAGE_BYTES)), memoryview(into))
    assert into == pages


def test_a_client_that_takes_no_replies_fills_its_own_queue_only(server, transport, stranger):
    channel, instance, refs, pages = stored(transport)
    before, frame = resident(server[0]), Frame()
    frame.put_refs(refs)
    most = 0
    for number in range(1, FLOOD + 1):
        stranger.send(bytes(frame.view[: frame.seal(Kind.GET, MAX_BATCH_PAGES, 1, instance, number)]))
        if number % 40 == 0:
            # It is answered meanwhile as if nobody else were there.
            fetch(channel, instance, pages)
        most = max(most, resident(server[0]) - before)
    end = time.monotonic() + 60
    # Not all: a client that takes nothing gives no sign of life either, and its connection is dropped.
    while channel.control({"op": "stat"})["server"]["gets"] * PAGE_BYTES < 2 * MOST_BYTES:
        assert time.monotonic() < end
    assert most < MOST_BYTES


def test_a_server_that_stands_still_takes_a_queue_of_requests_and_no_more(server, transport, stranger):
    _, instance, refs, pages = stored(transport)
    before, frame = resident(server[0]), Frame()
    frame.put_refs(refs)
    frame.pages(MAX_BATCH_PAGES)[:] = pages
    stranger.setsockopt(zmq.SNDTIMEO, 1000)
    os.kill(server[0], signal.SIGSTOP)
    sent = 0
    with pytest.raises(zmq.Again):
        for number in range(1, FLOOD + 1):
            message = bytes(frame.view[: frame.seal(Kind.EVICT, MAX_BATCH_PAGES, 1, instance, number, 0, 1024)])
            stranger.send(message)
            sent += 1
    os.kill(server[0], signal.SIGCONT)
    most = 0
    for number in range(sent + 1, FLOOD + 1):
        stranger.send(bytes(frame.view[: frame.seal(Kind.EVICT, MAX_BATCH_PAGES, 1, instance, number, 0, 1024)]))
        most = max(most, resident(server[0]) - before)
    fetch(transport.connect(), instance, pages)
    assert most < MOST_BYTES < FLOOD * MAX_MESSAGE_BYTES


def test_a_client_of_a_server_that_stands_still_sends_again_into_a_queue_that_ends(server, tmp_path):
    options = ZmqOptions(dms=(server[1],), resend_s=0.01, silence_s=60.0)
    transport = open_transport(options, RunContext(tmp_path, tmp_path, "dm-handler", 1.5))
    channel, instance, _, _ = stored(transport)
    newer, pages = batch_of(instance << 32, np.arange(MAX_BATCH_PAGES), version=2)
    before = resident(os.getpid())
    os.kill(server[0], signal.SIGSTOP)
    # Time for 150 repeats.
    with pytest.raises(TransportTimeout):
        channel.evict(newer, memoryview(pages))
    most = resident(os.getpid()) - before
    os.kill(server[0], signal.SIGCONT)
    end = time.monotonic() + 60
    while True:
        try:
            assert channel.evict(newer, memoryview(pages)) == ""
            break
        except TransportTimeout:
            assert time.monotonic() < end
    fetch(channel, instance, pages)
    transport.close()
    assert most < MOST_BYTES < 150 * MAX_MESSAGE_BYTES
