"""A DM-Handler's traffic for the tests of a bad link: `writer.py ENDPOINT PAGES OUT`.

Evicts and fetches pages like an app that writes, in an order that follows from a seed, and writes the digest of all it
read to OUT: the same digest as over a good link, or pages were lost or mixed up.
"""

import hashlib
import sys
import time
from pathlib import Path

import numpy as np

from edm.errors import TransportTimeout
from edm.plugins.transport_zmq import ZmqOptions, open_transport
from edm.testing.pages import batch_of
from edm.testing.transport_cases import wanted
from edm.types import PAGE_BYTES, GetStatus, RunContext

PATIENCE_S = 60.0


def patiently(call):
    """What a worker does: the same call again after a timeout."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except TransportTimeout:
            if time.monotonic() > end:
                raise


def main(endpoint, pages, out):
    directory = out.parent
    options = ZmqOptions(dms=(endpoint,), insecure=True, heartbeat_s=0.5, silence_s=2.0, resend_s=0.5)
    transport = open_transport(options, RunContext(directory, directory, "dm-handler", deadline_s=3.0))
    channel = transport.connect()
    instance = patiently(lambda: channel.control({"op": "hello", "client": "writer", "protocol": 1}))["instance"]
    random = np.random.default_rng(7)
    digest = hashlib.sha256()
    latest = {}
    for version in range(1, pages // 16 + 1):
        start = int(random.integers(0, 64)) * 16
        refs, data = batch_of(instance << 32, np.arange(start, start + 16), version)
        error = patiently(lambda refs=refs, data=data: channel.evict(refs, memoryview(data)))
        assert error == "", error
        latest[start] = bytes(data)
        back = list(latest)[int(random.integers(0, len(latest)))]
        asked, into = wanted(instance << 32, np.arange(back, back + 16)), bytearray(16 * PAGE_BYTES)
        patiently(lambda asked=asked, into=into: channel.fetch(asked, memoryview(into)))
        assert (asked["status"] == GetStatus.EXISTING_PAGE).all()
        assert into == latest[back]
        digest.update(into)
        out.with_suffix(".new").write_text(str(version))
        out.with_suffix(".new").rename(out.with_suffix(".turn"))
    transport.close()
    out.write_text(digest.hexdigest())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
