"""A coverage-guided fuzzer of the decoder: `python tests/transports/fuzz_wire.py [SECONDS]`; `make soak` runs it.

Each input goes through the answering side as a client's message, and through the asking side as a reply. A crash, an
exception that is none of EDM's, or a frame that grew is a finding, and the input is left behind as atheris leaves it.
"""

import sys

import atheris

with atheris.instrument_imports(include=["edm.wire", "edm.dms.answering", "msgpack"]):
    from edm._native import ffi, lib
    from edm.dms.answering import Answerer
    from edm.errors import ProtocolError
    from edm.testing.pages import DictServer, batch_of
    from edm.wire import Frame, Kind, unpack_control

ANSWERER = Answerer(DictServer())
REPLY = Frame()
NUMBER = ffi.new("uint64_t *")
REFS, PAGES = batch_of(1 << 32, range(4), version=1)
INTO = bytearray(len(PAGES))


def sealed(data):
    """A message whose header is right, so that what is behind it is looked at; the first byte chooses its kind."""
    kind, body = data[0] % 12, data[1:4000]
    frame = ANSWERER.request
    if kind in {Kind.CONTROL, Kind.ANSWER, Kind.REFUSED}:
        return frame.seal(kind, 0, 1, 1, len(data), frame.put_text(body))
    batch = min(len(body) // 32, 4)
    start = 40
    frame.view[start : start + batch * 32] = body[: batch * 32]
    return frame.seal(kind, batch, 1, 1, len(data), 0, batch if kind == Kind.EVICT else 0)


def one_input(data):
    if not data:
        return
    raw = data[: ANSWERER.request.capacity]
    ANSWERER.request.view[: len(raw)] = raw
    assert ANSWERER.answer(len(raw), "peer") <= ANSWERER.reply.capacity
    assert ANSWERER.answer(sealed(data), "peer") <= ANSWERER.reply.capacity
    REPLY.view[: len(raw)] = raw
    # What an MPI link asks of a message that is not checked yet: how much more it may receive behind it.
    assert len(raw) + lib.edm_wire_rest(REPLY.pointer, len(raw), REPLY.capacity, NUMBER) <= REPLY.capacity
    try:
        head = REPLY.open(len(raw))
        if head.batch == len(REFS):
            REPLY.take(REFS.copy(), memoryview(INTO))
    except ProtocolError:
        """Refused, as it should be."""
    try:
        unpack_control(data)
    except ProtocolError:
        """Refused, as it should be."""


if __name__ == "__main__":
    seconds = sys.argv[1] if len(sys.argv) > 1 else "60"
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-rss_limit_mb=1024", "-timeout=5"], one_input)
    atheris.Fuzz()
