"""Run by test_failing_calls.py with failing_calls.c loaded before libc: every Nth call of one kind fails, for every N.

Arguments: stores, kind of call, error, once or lasting, sync policy, step from N to N, a directory. Prints how many N
were tried and in how many of them something was refused; what is wrong raises.
"""

import contextlib
import ctypes
import errno
import itertools
import os
import shutil
import sys
from pathlib import Path

from edm.dms.server import MemoryServer
from edm.errors import EdmError
from edm.plugins.store_file import spt as file_spt
from edm.testing.pages import batch_of
from edm.testing.stores import open_store
from edm.types import PAGE_BYTES, EvictStatus, GetStatus

KINDS = ["write", "sync", "dirsync", "open", "truncate", "punch", "rename", "unlink", "read"]
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EACCES": errno.EACCES, "short": -1}
STORES = {
    "file": ("file", "file", {"segment": "256K"}),
    "file-direct": ("file", "file", {"segment": "256K", "direct": True}),
    "file-packed": ("file", "file", {"segment": "256K", "compress": "zstd", "elide_zeros": True}),
    "lmdb": ("lmdb", "lmdb", {"map_size": "1M"}),
    "lmdb-packed": ("lmdb", "lmdb", {"map_size": "1M", "compress": "zstd", "elide_zeros": True}),
    "lmdb-file": ("lmdb", "file", {"segment": "256K"}),
    "file-lmdb": ("file", "lmdb", {"map_size": "1M"}),
    "file-memory": ("file", "memory", {}),
    "lmdb-memory": ("lmdb", "memory", {}),
    "memory-file": ("memory", "file", {"segment": "256K"}),
    "memory-lmdb": ("memory", "lmdb", {"map_size": "1M"}),
}


class Shim:
    """The loaded failing_calls.c."""

    def __init__(self, below):
        self._lib = ctypes.CDLL(None)
        self._lib.failing_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int]
        self._lib.failing_struck.restype = ctypes.c_long
        self._below = os.fsencode(below)

    def arm(self, kind, at, error, lasting):
        self._lib.failing_arm(self._below, KINDS.index(kind), at, ERRORS[error], lasting)

    def disarm(self):
        """Nothing fails any more; returns how often something did."""
        struck = self._lib.failing_struck()
        self._lib.failing_arm(b"", -1, 0, 0, 0)
        return struck


class World:
    """A server over real stores, and what its client has been told."""

    def __init__(self, path, name, sync):
        self.path, self.stores, self.sync = path, STORES[name], sync
        self.acknowledged, self.open_to_doubt, self.version = {}, {}, 0
        self.server = self.open(path)
        self.instance = self.server.control(0, {"op": "hello"})["instance"]

    def open(self, path):
        spt, pages, options = self.stores
        own = {"file": {"group": "512K"}, "lmdb": {"map_size": "1M"}}
        spt_options = {} if spt == "memory" else {"sync": self.sync, **own[spt]}
        page_options = {**options, **({} if pages == "memory" else {"sync": self.sync})}
        with contextlib.ExitStack() as opened:
            table = open_store("spt_store", spt, path, spt_options)
            opened.callback(table.close)
            store = open_store("page_store", pages, path, page_options)
            opened.callback(store.close)
            server = MemoryServer(table, store)
            opened.pop_all()
            return server

    def evict(self, indices):
        self.version += 1
        refs, pages = self.batch(indices, self.version)
        return self._send(list(indices), refs, pages)

    def batch(self, indices, version):
        return batch_of(self.instance << 32, indices, version)

    def _send(self, indices, refs, pages):
        error = self.server.evict(self.instance, refs, memoryview(pages))
        if (refs["status"] == EvictStatus.SUCCESS).all():
            assert not error
            self.acknowledged |= dict.fromkeys(indices, self.version)
            self.open_to_doubt = {}
            return True
        assert (refs["status"] == EvictStatus.FAIL).all()
        assert error
        assert "\n" not in error
        self.open_to_doubt = dict.fromkeys(indices, self.version)
        self.again = lambda: self._send(indices, *self.batch(indices, self.version))
        return False

    def drop(self, start, count):
        """Whether it is gone is open until it is answered."""
        for index in range(start, start + count):
            self.acknowledged.pop(index, None)
        request = {"op": "drop_pages", "ranges": [[self.instance << 32, start, count]]}
        answer = self.server.control(self.instance, request)
        self.again = lambda: self.server.control(self.instance, request)["ok"]
        return self.told(answer)

    def flush(self):
        answer = self.server.control(self.instance, {"op": "flush"})
        self.again = lambda: self.server.control(self.instance, {"op": "flush"})["ok"]
        return self.told(answer)

    def compact(self):
        """As `edm store gc` does, where there is something to do."""
        pages = getattr(self.server.pages, "inner", self.server.pages)
        try:
            for store in (self.server.spt, pages):
                if hasattr(store, "compact"):
                    self.server.flush()
                    store.compact()
        except EdmError:
            self.again = self.compact
            return False
        return True

    @staticmethod
    def told(answer):
        assert answer["ok"] or answer["error"]
        return answer["ok"]

    def check(self, server=None):
        """Each acknowledged page is there; one that was refused later may be there newer."""
        indices = sorted(self.acknowledged)
        if not indices:
            return
        refs, _ = self.batch(indices, 0)
        into = bytearray(len(indices) * PAGE_BYTES)
        (server or self.server).get(self.instance, refs, memoryview(into))
        for at, index in enumerate(indices):
            assert refs["status"][at] == GetStatus.EXISTING_PAGE, (index, refs["status"][at])
            version = int(refs["version"][at])
            assert version in {self.acknowledged[index], self.open_to_doubt.get(index)}, index
            assert into[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] == batch_of(1, [index], version)[1], index

    def look(self):
        """Ask for all that is acknowledged: each page comes whole, or as an error."""
        indices = sorted(self.acknowledged)
        refs, _ = self.batch(indices, 0)
        into = bytearray(len(indices) * PAGE_BYTES)
        self.server.get(self.instance, refs, memoryview(into))
        for at, index in enumerate(indices):
            page = into[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
            if refs["status"][at] == GetStatus.ERROR:
                assert page == bytes(PAGE_BYTES), index
            else:
                assert refs["status"][at] == GetStatus.EXISTING_PAGE, index
                assert int(refs["version"][at]) == self.acknowledged[index], index
                assert page == batch_of(1, [index], self.acknowledged[index])[1], index
        self.again = self.look
        return not (refs["status"] == GetStatus.ERROR).any()

    def check_a_copy(self):
        """What a server would find that starts after this one's death."""
        copy = self.path.with_name(self.path.name + "-copy")
        shutil.copytree(self.path, copy)
        server = self.open(copy)
        self.check(server)
        server.close()
        shutil.rmtree(copy)

    def history(self, *, reading):
        """Write over everything, open files, make holes, remove files, compact; stops at the first refusal.

        reading: ask for pages in between.
        """
        for round_number in range(3):
            for start in (0, 32, 70):
                if not self.evict(range(start, start + 40)) or (reading and not self.look()):
                    return False
            if not self.drop(33 if round_number < 2 else 0, 60):
                return False
            if round_number and not (self.flush() if round_number > 1 else self.compact()):
                return False
        return True


def once(path, name, kind, error, lasting, sync, shim, at):
    """One N; whether something was refused, and whether the call came at all."""
    world = World(path, name, sync)
    durable = "memory" not in name
    shim.arm(kind, at, error, lasting)
    done = world.history(reading=kind == "read")
    if not done and lasting:
        world.again()
    # LMDB that must be opened anew, and cannot, answers with errors until it can.
    if not done and lasting and kind != "read" and (kind != "open" or "lmdb" not in name):
        world.check()
    struck = shim.disarm()
    world.check()
    if durable:
        world.check_a_copy()
    if not done:
        assert world.again(), "refused although nothing fails any more"
    assert world.evict(range(100, 140))
    assert world.flush()
    world.check()
    struck += end(world, shim, kind, error, at, lasting)
    if durable:
        struck += begin(world, shim, kind, error, at, lasting)
        world.check()
        assert world.evict(range(30))
        world.check()
        world.server.close()
    return done, struck


def end(world, shim, kind, error, at, lasting):
    """Closing fails, too: it says so, and loses nothing."""
    shim.arm(kind, at, error, lasting)
    with contextlib.suppress(EdmError):
        world.server.close()
    return shim.disarm()


def begin(world, shim, kind, error, at, lasting):
    """So may opening; then it works the next time."""
    shim.arm(kind, at, error, lasting)
    opened = None
    with contextlib.suppress(EdmError):
        opened = world.open(world.path)
    struck = shim.disarm()
    world.server = opened or world.open(world.path)
    return struck


def main(name, kind, error, lasting, sync, step, directory):
    # So that compacting is among what fails.
    file_spt._COMPACT_LEAST_BYTES = 12_000
    shim = Shim(directory)
    tried = refused = 0
    for at in itertools.count(step=int(step)):
        path = Path(directory, f"{at}")
        try:
            done, struck = once(path, name, kind, error, lasting == "lasting", sync, shim, at)
        except BaseException:
            shim.disarm()
            print(f"call {at}", file=sys.stderr)
            raise
        shutil.rmtree(path)
        tried += bool(struck)
        refused += not done
        if not struck:
            break
        assert at < 2000
    print(tried, refused)


if __name__ == "__main__":
    main(*sys.argv[1:])
