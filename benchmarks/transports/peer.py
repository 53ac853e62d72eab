"""The two programs of `bench_transports.py`: `peer.py dms|dm-handler RUN_DIR`.

Each measures the bare library and EDM's transport over it in turns, in the same two processes and some tenths of a
second apart, so that what else the machine does falls on both alike. The server stops serving for the bare turns.
"""

import ctypes
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np

from edm.config.options import build_options
from edm.ops import CHANNEL, SERVER, address_of, capsule
from edm.registry import Registry
from edm.types import PAGE_BYTES, PAGE_REF, EvictStatus, GetStatus, RunContext

SIZES = (1, 64)
"""Pages a request: 4 KiB and 256 KiB."""
ROUNDS = 9
WARM_UP = 100
REQUEST_BYTES = 72


class ReadyServer:
    """Answers at once, with whatever is in the reply's buffer: the time is the transport's alone.

    Its C table is ready.c, which bench_transports.py has compiled: EDM's own server has one, too.
    """

    def __init__(self, run_dir):
        library = ctypes.CDLL(str(run_dir / "ready.so"))
        self.__edm_ops__ = capsule(ctypes.addressof(ctypes.c_uint32.in_dll(library, "edm_ready")), SERVER)
        self.library = library
        self.stop = threading.Event()

    def enter(self, timeout_s):
        return True

    def leave(self):
        pass

    def get(self, instance, refs, into):
        refs["status"] = GetStatus.EXISTING_PAGE

    def evict(self, instance, refs, pages):
        refs["status"] = EvictStatus.SUCCESS
        return ""

    def control(self, instance, request):
        if request["op"] == "pause":
            self.stop.set()
        return {"ok": True, "instance": 1}

    def serve(self, transport):
        """Until a `pause`, or the goodbye."""
        self.stop.clear()
        transport.serve(self, self.stop)
        return self.stop.is_set()


def repeats(pages):
    return 1500 if pages == 1 else 400


def percentiles(times_ns):
    times_ns.sort()
    return {"p50_us": times_ns[len(times_ns) // 2] / 1e3, "p90_us": times_ns[len(times_ns) * 9 // 10] / 1e3}


def timed(call, count):
    times = []
    for _ in range(count):
        began = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - began)
    return times


class BareMpi:
    """mpi4py ping-pong: blocking Send and Recv between preallocated buffers."""

    def __init__(self, run_dir):
        from edm.plugins.transport_mpi.world import load_mpi

        mpi = load_mpi()
        if not mpi.Is_initialized():
            mpi.Init_thread(mpi.THREAD_MULTIPLE)
        self.comm, self.byte = mpi.COMM_WORLD, mpi.BYTE

    def answer(self, pages):
        request, reply = bytearray(REQUEST_BYTES), np.ones(pages * PAGE_BYTES, np.uint8)
        for _ in range(repeats(pages)):
            self.comm.Recv([request, self.byte], 1, 7)
            self.comm.Send([reply, self.byte], 1, 7)

    def ask(self, pages):
        request, reply = bytearray(REQUEST_BYTES), np.ones(pages * PAGE_BYTES, np.uint8)

        def call():
            self.comm.Send([request, self.byte], 0, 7)
            self.comm.Recv([reply, self.byte], 0, 7)

        return timed(call, repeats(pages))

    def close(self):
        pass


class BareZmq:
    """pyzmq REQ/REP over a socket file."""

    def __init__(self, run_dir):
        import zmq

        self.zmq, self.endpoint = zmq, f"ipc://{run_dir}/bare.sock"
        self.context = zmq.Context()
        self.socket = None

    def answer(self, pages):
        if self.socket is None:
            self.socket = self.context.socket(self.zmq.REP)
            self.socket.bind(self.endpoint)
        reply = bytes(pages * PAGE_BYTES)
        for _ in range(repeats(pages)):
            self.socket.recv()
            self.socket.send(reply)

    def ask(self, pages):
        if self.socket is None:
            self.socket = self.context.socket(self.zmq.REQ)
            self.socket.connect(self.endpoint)
        request = bytes(REQUEST_BYTES)

        def call():
            self.socket.send(request)
            self.socket.recv()

        return timed(call, repeats(pages))

    def close(self):
        if self.socket is not None:
            self.socket.close(linger=0)
        self.context.term()


BARE = {"mpi": BareMpi, "zmq": BareZmq}


def open_transport(settings, run_dir, role):
    spec = Registry().transport(settings["transport"])
    options = build_options(spec.options, settings["options"], dict.fromkeys(settings["options"], "bench"), spec.name)
    server = ReadyServer(run_dir) if spec.embedded else None
    return spec.open(options, RunContext(run_dir, run_dir, role), server)


def batch(pages):
    refs = np.zeros(pages, PAGE_REF)
    refs["region"], refs["index"] = 1 << 32, np.arange(pages)
    return refs, memoryview(bytearray(pages * PAGE_BYTES))


def requests_per_second(transport, channels, library, seconds=1.0):
    """Single pages, every channel in a thread of its own, which stays in C as the engine's workers do."""
    library.edm_ask.restype = ctypes.c_int64
    library.edm_ask.argtypes = [ctypes.c_void_p, ctypes.c_double, ctypes.POINTER(ctypes.c_int64)]
    counts, late = [0] * channels, [ctypes.c_int64() for _ in range(channels)]

    def work(number):
        channel = transport.connect()
        counts[number] = library.edm_ask(address_of(channel, CHANNEL), seconds, late[number])
        channel.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(channels)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if min(counts) < 0:
        sys.exit(f"a request failed: {os.strerror(-min(counts))}")
    if any(number.value for number in late):
        print(f"{channels} channels: {sum(number.value for number in late)} requests took longer than a second")
    return sum(counts) / seconds


def serve(settings, run_dir):
    (run_dir / "dms.pid").write_text(str(os.getpid()))
    transport = open_transport(settings, run_dir, "dms")
    bare, server = BARE[settings["transport"]](run_dir), ReadyServer(run_dir)
    for _ in range(ROUNDS):
        for pages in SIZES:
            bare.answer(pages)
            server.serve(transport)
    server.serve(transport)
    bare.close()
    transport.close()


def measure(settings, run_dir):
    transport = open_transport(settings, run_dir, "dm-handler")
    bare = BARE[settings["transport"]](run_dir) if settings["transport"] in BARE else None
    rounds = {kind: {pages: [] for pages in SIZES} for kind in ("bare", "fetch", "evict")}
    channel = None
    for _ in range(ROUNDS):
        for pages in SIZES:
            if bare:
                rounds["bare"][pages].append(percentiles(bare.ask(pages)))
            if channel is None:
                channel = transport.connect()
                channel.control({"op": "hello"})
            refs, into = batch(pages)
            for kind, call in (("fetch", channel.fetch), ("evict", channel.evict)):
                timed(lambda c=call, r=refs, i=into: c(r, i), WARM_UP)
                times = timed(lambda c=call, r=refs, i=into: c(r, i), repeats(pages))
                rounds[kind][pages].append(percentiles(times))
            if bare:
                channel.control({"op": "pause"})
    results = {kind: {pages: middle(of) for pages, of in sizes.items() if of} for kind, sizes in rounds.items()}
    results["ratio"] = {
        pages: statistics.median(
            ours["p50_us"] / theirs["p50_us"]
            for ours, theirs in zip(rounds["fetch"][pages], rounds["bare"][pages], strict=True)
        )
        for pages in SIZES
        if bare
    }
    library = ctypes.CDLL(str(run_dir / "ready.so"))
    results["requests_per_s"] = {
        channels: requests_per_second(transport, channels, library) for channels in (1, 2, 4)
    }  # fmt: skip
    results["idle_cpu"] = idle_cpu(run_dir) if bare else 0.0
    channel.close()
    transport.close()
    if bare:
        bare.close()
    (run_dir / "results.json").write_text(json.dumps(results))


def middle(rounds):
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def idle_cpu(run_dir, seconds=3.0):
    """Of one CPU, what the idle memory server's process takes."""
    stat = Path(f"/proc/{(run_dir / 'dms.pid').read_text()}/stat")

    def ticks():
        return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))

    time.sleep(0.5)
    before = ticks()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


if __name__ == "__main__":
    run_dir = Path(sys.argv[2])
    settings = json.loads((run_dir / "bench.json").read_text())
    {"dms": serve, "dm-handler": measure}[sys.argv[1]](settings, run_dir)
