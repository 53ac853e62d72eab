"""A real memory server in a process of its own, to be killed, and what its client knows of it."""

import contextlib
import os
import pickle
import random
import signal
import socket
import struct
import threading

import numpy as np

from edm.dms.server import MemoryServer
from edm.plugins.store_file import spt as file_spt
from edm.testing.pages import batch_of
from edm.testing.stores import open_store
from edm.types import MAX_BATCH_PAGES, PAGE_BYTES, PAGE_REF, EvictStatus, GetStatus

_LENGTH = struct.Struct("<I")


def open_server(path, spt, pages, spt_options, page_options):
    table = open_store("spt_store", spt, path, spt_options)
    return MemoryServer(table, open_store("page_store", pages, path, page_options))


def _serve(connection, make_server):
    """In the child: answer until the connection ends."""
    server = make_server()
    while (request := _receive(connection)) is not None:
        kind, instance, *rest = request
        if kind == "get":
            refs = rest[0].copy()
            into = bytearray(len(refs) * PAGE_BYTES)
            server.get(instance, refs, memoryview(into))
            _send(connection, (refs, bytes(into)))
        elif kind == "evict":
            refs, pages = rest[0].copy(), bytearray(rest[1])
            _send(connection, (server.evict(instance, refs, memoryview(pages)), refs))
        else:
            _send(connection, server.control(instance, rest[0]))
    server.close()


def _send(connection, message):
    data = pickle.dumps(message)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection):
    head = _read(connection, _LENGTH.size)
    data = _read(connection, _LENGTH.unpack(head)[0]) if head else None
    return pickle.loads(data) if data else None


def _read(connection, count):
    parts = bytearray()
    while len(parts) < count:
        try:
            part = connection.recv(count - len(parts))
        except ConnectionResetError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)


class Killed(Exception):
    """The server died before it answered."""


class Client:
    """Starts servers on one directory, and holds them to what they acknowledged."""

    def __init__(self, make_server, seed, compact_bytes=1 << 16):
        self._make_server = make_server
        self._compact_bytes = compact_bytes
        self.random = random.Random(seed)
        self.instance = 0
        self.sequence = 0
        self.version = 0
        self.regions = {}
        self.doubt = None
        self.acknowledged = 0

    @contextlib.contextmanager
    def server(self):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                ours.close()
                file_spt._COMPACT_LEAST_BYTES = self._compact_bytes
                _serve(theirs, self._make_server)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        self._connection, self.pid = ours, pid
        try:
            yield
        finally:
            ours.close()
            self.status = os.waitpid(pid, 0)[1]

    def kill_after(self, seconds):
        timer = threading.Timer(seconds, os.kill, (self.pid, signal.SIGKILL))
        timer.start()
        return timer

    def ask(self, *request):
        try:
            _send(self._connection, request)
        except (BrokenPipeError, ConnectionResetError):
            raise Killed from None
        answer = _receive(self._connection)
        if answer is None:
            raise Killed
        return answer

    def hello(self):
        answer = self.ask("control", 0, {"op": "hello", "client": "test", "protocol": 1})
        assert answer["ok"]
        assert answer["instance"] > self.instance
        if not self.instance:
            self.instance = answer["instance"]
            self.regions[self.instance << 32] = {}

    def work(self):
        """One random request; what is in doubt until it is answered is noted first."""
        pick = self.random.random()
        region = self.random.choice(sorted(self.regions))
        if pick < 0.85:
            self.version += 1
            start = self.random.randrange(300)
            indices = list(range(start, start + self.random.choice([1, 1, 7, 64])))
            refs, pages = batch_of(region, indices, self.version, seed=region & 0xFF)
            self.doubt = ("evict", region, dict.fromkeys(indices, (self.version, region & 0xFF)))
            error, refs = self.ask("evict", self.instance, refs, bytes(pages))
            assert not error, error
            assert (refs["status"] == EvictStatus.SUCCESS).all()
            self.acknowledged += len(refs)
        else:
            self.sequence += 1
            self.doubt = ("control", self._structural(region))
            assert self.ask("control", self.instance, self.doubt[1])["ok"]
        self._certain()

    def _structural(self, region):
        base = {"sequence": self.sequence}
        pick = self.random.randrange(4)
        if pick == 0:
            into = (self.instance << 32) + self.random.randrange(4)
            return {**base, "op": "clone_region", "region": region, "into": into}
        start, to = self.random.randrange(300), self.random.randrange(300)
        if pick == 1:
            return {**base, "op": "move_pages", "region": region, "start": start, "to": to, "count": 20}
        if pick == 2 or len(self.regions) == 1:
            return {**base, "op": "drop_pages", "ranges": [[region, start, 40]]}
        return {**base, "op": "drop_region", "region": region}

    def _certain(self):
        kind, *what = self.doubt
        if kind == "evict":
            self.regions[what[0]].update(what[1])
        else:
            self._apply(what[0])
        self.doubt = None

    def _apply(self, request):
        op = request["op"]
        if op == "clone_region":
            self.regions[request["into"]] = dict(self.regions.get(request["region"], {}))
        elif op == "drop_region":
            self.regions.pop(request["region"], None)
        elif op == "drop_pages":
            for region, start, count in request["ranges"]:
                for index in range(start, start + count):
                    self.regions[region].pop(index, None)
        else:
            start, to, count = request["start"], request["to"], request["count"]
            pages = self.regions[request["region"]]
            moved = {i - start + to: pages[i] for i in list(pages) if start <= i < start + count}
            if start != to:
                kept = {i: p for i, p in pages.items() if not start <= i < start + count and not to <= i < to + count}
                self.regions[request["region"]] = kept | moved

    def settle(self):
        """After a restart: a request that was never answered may have been carried out, or not."""
        if self.doubt is None:
            return
        kind, *what = self.doubt
        if kind == "control":
            # Its sequence number makes repeating it safe.
            assert self.ask("control", self.instance, what[0])["ok"]
            self._certain()
            return
        region, new = what
        for index, found in self._fetch(region, sorted(new)).items():
            old = self.regions[region].get(index)
            assert found in {old, new[index]}, f"page {region:#x}:{index:#x} is {found}, was {old} or {new[index]}"
            if found is not None:
                self.regions[region][index] = found
        self.doubt = None

    def check(self):
        """Every page is the version that was acknowledged last; every other page is new."""
        for region, pages in self.regions.items():
            assert self._fetch(region, range(420)) == {i: pages.get(i) for i in range(420)}

    def _fetch(self, region, indices):
        found = {}
        indices = list(indices)
        for at in range(0, len(indices), MAX_BATCH_PAGES):
            refs = np.zeros(len(indices[at : at + MAX_BATCH_PAGES]), PAGE_REF)
            refs["region"], refs["index"] = region, indices[at : at + MAX_BATCH_PAGES]
            refs, pages = self.ask("get", self.instance, refs)
            for i, ref in enumerate(refs):
                index = int(ref["index"])
                assert ref["status"] != GetStatus.ERROR, f"page {region:#x}:{index:#x} cannot be read"
                page = pages[i * PAGE_BYTES : (i + 1) * PAGE_BYTES]
                found[index] = self._name(page, int(ref["version"])) if ref["status"] else None
        return found

    @staticmethod
    def _name(page, version):
        """Version and seed of a page, from its own bytes: whatever is torn is neither."""
        words = np.frombuffer(page, np.uint64)
        assert np.array_equal(words - words[0], np.arange(len(words), dtype=np.uint64)), "a torn page"
        return version, _seed_of(int(words[0]), version)


def _seed_of(first, version):
    for seed in range(8):
        # first = index * K + version * 1_000_003 + seed, and a page keeps its bytes when it is moved.
        start = (first - version * 1_000_003 - seed) * pow(0x9E3779B97F4A7C15, -1, 1 << 64) % (1 << 64)
        if start < 1000:
            return seed
    raise AssertionError(f"not the bytes of version {version}")
