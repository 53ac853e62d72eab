"""What the DM-Handler's threads do when the memory server does not answer: wait, unless it is gone for good."""

import threading
import time

import attrs
import pytest

from edm.errors import PeerLost, TransportTimeout
from edm.handler.workers import Workers

PATIENCE_S = 30.0


@attrs.define
class Item:
    """One outbox message that is a control request."""

    request: dict
    refs: None = None
    pages: None = None


class Outbox:
    """A source with one control request in its outbox."""

    def __init__(self):
        self.items = [Item({"op": "create_region", "region": 1, "sequence": 1})]
        self.done = threading.Event()

    def poll_outbox(self, timeout_us):
        if self.items:
            return self.items.pop()
        raise EOFError

    def outbox_done(self, item):
        self.done.set()


class Answers:
    """A transport and its channel: raises the errors it was given, one a call, then answers."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.calls = 0

    def connect(self):
        return self

    def control(self, request):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return {"ok": True}

    def close(self):
        pass


@pytest.fixture
def carry():
    """Call it with a transport: the outbox, and what the workers failed with."""

    def run(transport):
        outbox, failures = Outbox(), []
        workers = Workers(
            outbox, transport, fault_threads=0, patience_s=PATIENCE_S, failed=failures.append, warn=lambda text: None
        )
        workers.start()
        assert workers.join(PATIENCE_S)
        return outbox, failures

    return run


def test_a_server_that_does_not_answer_is_asked_again(carry):
    transport = Answers(TransportTimeout("late"), TransportTimeout("late"))
    outbox, failures = carry(transport)
    assert outbox.done.is_set()
    assert transport.calls == 3
    assert not failures


def test_a_server_that_is_gone_for_good_ends_the_run_at_once(carry):
    gone = PeerLost("the memory server (MPI rank 0) has ended")
    transport, began = Answers(TransportTimeout("late"), gone), time.monotonic()
    outbox, failures = carry(transport)
    assert failures == [gone]
    assert not outbox.done.is_set()
    assert transport.calls == 2
    assert time.monotonic() - began < PATIENCE_S / 2
