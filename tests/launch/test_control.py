"""What the launcher hears from its processes, down to the way they hang up."""

import json
import socket

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
    event = control.events.get(timeout=20)
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
