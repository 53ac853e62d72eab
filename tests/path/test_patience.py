"""What the DM-Handler's threads do when the memory server does not answer: wait, unless it is gone for good."""

import threading
import time

import attrs
import numpy as np

from edm.errors import PeerLost, TransportTimeout
from edm.handler.workers import Workers
from edm.types import PAGE_BYTES, PAGE_REF, EvictStatus

PATIENCE_S = 30.0


@attrs.define
class Item:
    """One outbox message: a control request, or pages."""

    request: dict | None
    refs: object = None
    pages: object = None


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
    """A transport and its channel: raises the errors, or gives the answers, that it was given, then answers."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.calls = 0

    def connect(self):
        return self

    def control(self, request):
        self.calls += 1
        if self.errors:
            error = self.errors.pop(0)
            if isinstance(error, dict):
                return error
            raise error
        return {"ok": True}

    def close(self):
        pass


def workers_over(source, transport):
    """Workers that run, what they failed with, and what they said."""
    failures, said = [], []
    workers = Workers(
        source, transport, fault_threads=0, patience_s=PATIENCE_S, failed=failures.append, warn=said.append
    )
    workers.start()
    return workers, failures, said


def test_a_server_that_does_not_answer_is_asked_again_and_told_of_at_the_begin_and_end():
    outbox, transport = Outbox(), Answers(TransportTimeout("late"), TransportTimeout("late"))
    workers, failures, said = workers_over(outbox, transport)
    assert workers.join(PATIENCE_S)
    assert outbox.done.is_set()
    assert transport.calls == 3
    assert not failures
    begin, end = said
    assert begin == "the memory server does not answer (late); waiting"
    assert end.startswith("the memory server answers again, after ")


def test_a_server_that_is_gone_for_good_ends_the_run_at_once():
    gone = PeerLost("the memory server (MPI rank 0) has ended")
    transport, began = Answers(TransportTimeout("late"), gone), time.monotonic()
    outbox = Outbox()
    workers, failures, _ = workers_over(outbox, transport)
    assert workers.join(PATIENCE_S)
    assert failures == [gone]
    assert not outbox.done.is_set()
    assert transport.calls == 2
    assert time.monotonic() - began < PATIENCE_S / 2


FULL = {"ok": False, "error": "the disk is full", "again": True}


def test_a_full_store_is_waited_for_and_told_once_at_its_begin_and_end():
    outbox, transport = Outbox(), Answers(FULL, FULL, FULL, FULL)
    workers, failures, said = workers_over(outbox, transport)
    assert outbox.done.wait(PATIENCE_S)
    assert workers.join(PATIENCE_S)
    assert not failures
    assert transport.calls == 5
    begin, end = said
    assert begin == "the memory server cannot store pages (the disk is full); waiting for room"
    assert end.startswith("the memory server stores pages again, after ")


def test_a_request_that_is_wrong_ends_the_run():
    outbox, transport = Outbox(), Answers({"ok": False, "error": "no such region"})
    workers, failures, said = workers_over(outbox, transport)
    assert workers.join(PATIENCE_S)
    assert "no such region" in str(failures[0])
    assert not said


class Refusing:
    """A source with the same two pages again until they are taken, and a channel that takes them at the third time."""

    def __init__(self):
        self.tries = 0
        self.done = threading.Event()

    def poll_outbox(self, timeout_us):
        if self.tries < 3:
            return Item(None, np.zeros(2, PAGE_REF), memoryview(bytes(2 * PAGE_BYTES)))
        # As the C table does that carries what goes well: nothing is left for Python.
        self.done.set()
        return None

    def outbox_done(self, item):
        pass

    def connect(self):
        return self

    def evict(self, refs, pages):
        self.tries += 1
        refs["status"] = EvictStatus.FAIL
        return f"no room, try {self.tries}"

    def close(self):
        pass


def test_pages_that_are_refused_are_told_once_at_the_begin_and_end():
    refusing = Refusing()
    workers, failures, said = workers_over(refusing, refusing)
    assert refusing.done.wait(PATIENCE_S)
    end = time.monotonic() + PATIENCE_S
    while len(said) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    refusing.poll_outbox = lambda timeout_us: (_ for _ in ()).throw(EOFError())
    assert workers.join(PATIENCE_S)
    assert not failures
    assert [line.split(" (")[0].split(",")[0] for line in said] == [
        "the memory server cannot store pages",
        "the memory server stores pages again",
    ]
    assert "try 1" in said[0]
