"""What the launcher hears from its processes, down to the way they hang up."""

import json
import os
import resource
import socket
import threading
import time

import pytest

from edm.launch.control import Control


@pytest.fixture
def control(tmp_path):
    control = Control(tmp_path / "control.sock")
    yield control
    control.close()


@pytest.fixture
def peer(control, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(str(tmp_path / "control.sock"))
        say(peer, "ready")
        assert heard(control) == ("dms", "ready")
        yield peer


def say(peer, event):
    peer.sendall(json.dumps({"role": "dms", "event": event, "pid": 7}).encode() + b"\n")


def heard(control):
    event = control.events.get(timeout=60)
    return event.role, event.event


def test_words_arrive_in_order_and_then_the_end(control, peer):
    for event in ("pids", "counters"):
        say(peer, event)
    peer.close()
    assert [heard(control) for _ in range(3)] == [("dms", "pids"), ("dms", "counters"), ("dms", "gone")]


def test_a_death_before_it_has_read_its_orders_is_a_death(control, peer):
    assert control.send("dms", "pids")
    peer.close()  # with something unread: the other end is reset
    assert heard(control) == ("dms", "gone")
    assert control.events.empty()


def test_a_death_in_the_middle_of_a_word_is_a_death(control, peer):
    peer.sendall(b'{"role": "dms", "ev')
    peer.close()
    assert heard(control) == ("dms", "gone")


def test_what_is_no_message_is_an_error(control, peer):
    peer.sendall(b"nonsense\n")
    assert heard(control) == ("dms", "error")
    assert heard(control) == ("dms", "gone")


def test_who_connects_while_there_is_no_descriptor_is_heard_later(control, tmp_path):
    lines = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(lines[0].fileno())]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 64, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.dup(lines[0].fileno()))
        for line, event in zip(lines, ("first", "second"), strict=True):  # accept(2) may have one for the first
            line.connect(str(tmp_path / "control.sock"))
            say(line, event)
        time.sleep(0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)
    assert {heard(control), heard(control)} == {("dms", "first"), ("dms", "second")}
    for line in lines:
        line.close()


def test_who_is_closed_accepts_nothing_more(tmp_path):
    before = set(threading.enumerate())
    control = Control(tmp_path / "control.sock")
    control.close()
    assert set(threading.enumerate()) <= before  # of other tests' some may have ended
    control.close()
