"""Evictions that never enter Python: the C table of a memory server, and what it leaves to Python."""

import ctypes
import errno

import numpy as np
import pytest

from edm._native import lib
from edm.dms.guard import GuardedServer
from edm.dms.server import MemoryServer
from edm.ops import SERVER, address_of
from edm.plugins.store_file import spt as file_spt
from edm.plugins.store_file.pages import FilePages
from edm.plugins.store_file.spt import FileSpt
from edm.plugins.store_memory.pages import MemoryPages
from edm.plugins.store_memory.spt import MemorySpt
from edm.testing.pages import batch_of
from edm.types import PAGE_BYTES, EvictStatus, GetStatus

CALL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p
)
EAGAIN = -11


class Table(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32),
        ("bytes", ctypes.c_uint32),
        ("self", ctypes.c_void_p),
        ("get", CALL),
        ("evict", CALL),
    )


class World:
    """A memory server over real stores, called through its table first, as a transport does."""

    def __init__(self, path, stores, sync="batch", group_pages=1 << 20):
        self._arguments = path, stores, sync, group_pages
        self.stored = {}
        self.version = 0
        self.open()
        self.instance = self.server.control(0, {"op": "hello"})["instance"]

    def open(self):
        path, stores, sync, group_pages = self._arguments
        spt = FileSpt(path / "spt", sync, group_pages=group_pages) if stores[0] == "file" else MemorySpt()
        self.pages = FilePages(path / "pages", sync, segment_pages=64) if stores[1] == "file" else MemoryPages()
        self.server = MemoryServer(spt, self.pages)
        self.table = Table.from_address(address_of(self.server, SERVER, ctypes.sizeof(Table)))

    def reopen(self):
        self.server.close()
        self.open()

    def batch(self, indices, version=None):
        self.version += 1
        return batch_of(self.instance << 32, indices, version or self.version)

    def by_table(self, refs, pages):
        return self.table.evict(
            self.table.self, self.instance, refs.ctypes.data, len(refs), (ctypes.c_char * len(pages)).from_buffer(pages)
        )

    def evict(self, indices):
        """Through the table, else through Python; whether the table did it."""
        refs, pages = self.batch(indices)
        refs["status"] = EvictStatus.FAIL
        result = self.by_table(refs, pages)
        assert result in {0, EAGAIN}
        if result:
            assert self.server.evict(self.instance, refs, memoryview(pages)) == ""
        assert (refs["status"] == EvictStatus.SUCCESS).all()
        self.stored |= dict.fromkeys(indices, self.version)
        return not result

    def check(self):
        refs, _ = batch_of(self.instance << 32, sorted(self.stored), 0)
        into = bytearray(len(refs) * PAGE_BYTES)
        self.server.get(self.instance, refs, memoryview(into))
        assert (refs["status"] == GetStatus.EXISTING_PAGE).all()
        for at, index in enumerate(sorted(self.stored)):
            assert into[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] == batch_of(1, [index], self.stored[index])[1]


STORES = [("memory", "memory"), ("memory", "file"), ("file", "file"), ("file", "memory")]


@pytest.fixture(params=STORES, ids="-".join)
def world(request, tmp_path):
    world = World(tmp_path, request.param)
    yield world
    world.server.close()


def test_new_versions_are_stored_without_python_and_older_slots_come_free(world):
    for _ in range(20):
        assert world.evict(range(64))
        assert world.evict(range(32, 70))
    figures = world.server.stat()
    assert figures["server"]["stored"] == figures["server"]["evictions"] == 20 * (64 + 38)
    assert figures["spt"]["pages"] == 70
    assert figures["pages"]["pages"] - figures["server"]["slots_waiting"] == 70
    world.check()
    assert world.server.control(world.instance, {"op": "flush"})["ok"]
    assert world.server.stat()["pages"]["pages"] == 70
    world.check()


def test_what_is_stored_from_c_is_there_after_a_restart(tmp_path):
    world = World(tmp_path, ("file", "file"))
    for start in range(0, 200, 10):
        assert world.evict(range(start, start + 30))
        world.server.control(world.instance, {"op": "create_region", "region": (world.instance << 32) + start})
    world.reopen()
    world.check()
    assert world.evict(range(100))
    world.reopen()
    world.check()
    world.server.close()


@pytest.mark.parametrize("odd", ["repeat", "stale", "other", "checksum", "foreign", "twice", "too many"])
def test_whatever_is_out_of_the_ordinary_is_left_to_python_with_nothing_changed(world, odd):
    assert world.evict(range(10))
    assert world.evict(range(10))
    before = world.server.stat()
    refs, pages = world.batch(range(5, 15) if odd != "too many" else range(1025))
    if odd in {"repeat", "stale", "other"}:
        refs, pages = world.batch(range(5, 15), 1 if odd == "stale" else 2)
        if odd == "other":
            refs["checksum"][3], pages[3 * PAGE_BYTES : 4 * PAGE_BYTES] = 0x98F94189, bytes(PAGE_BYTES)
    elif odd == "checksum":
        pages[PAGE_BYTES] ^= 1
    elif odd == "foreign":
        refs["region"][4] += 1 << 32
    elif odd == "twice":
        refs["index"][1], refs["version"][1] = refs["index"][0], refs["version"][0] - 1
        refs["checksum"][1] = refs["checksum"][0]
        pages[PAGE_BYTES : 2 * PAGE_BYTES] = pages[:PAGE_BYTES]
    given = refs.copy()
    assert world.by_table(refs, pages) == EAGAIN
    assert (refs == given).all()
    assert world.server.stat() == before
    world.check()


def test_slots_that_wait_and_pages_that_are_not_flushed_end_in_a_flush(tmp_path):
    world = World(tmp_path, ("file", "file"), group_pages=100)
    by_table = [world.evict(range(30)) for _ in range(40)]
    assert 0 < by_table.count(False) < 20
    figures = world.server.stat()
    assert figures["server"]["flushes"] == by_table.count(False)
    assert figures["pages"]["pages"] <= 30 + 100
    world.reopen()
    world.check()
    world.server.close()


def test_a_journal_that_has_grown_long_is_compacted(tmp_path, monkeypatch):
    monkeypatch.setattr(file_spt, "_COMPACT_LEAST_BYTES", 20_000)
    world = World(tmp_path, ("file", "file"), sync="none")
    by_table = [world.evict(range(40)) for _ in range(100)]
    assert 0 < by_table.count(False) < 20
    assert world.server.stat()["spt"]["journal_bytes"] < 30_000
    world.reopen()
    world.check()
    world.server.close()


@pytest.mark.parametrize("sync", ["batch", "none"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, -1], ids=["EIO", "ENOSPC", "short"])
def test_a_commit_that_fails_is_no_success_and_its_repeat_is_written_again(tmp_path, error, sync):
    world = World(tmp_path, ("file", "file"), sync=sync)
    assert world.evict(range(20))
    world.server.spt.journal.fail = error
    refs, pages = world.batch(range(10, 30))
    result = world.by_table(refs, pages)
    if error == -1:  # the rest of a short write is written
        assert result == 0
    else:
        assert result == EAGAIN
        # Nothing overtakes it, and the table is asked no more until it is written.
        more, more_pages = world.batch(range(50, 60))
        assert world.by_table(more, more_pages) == EAGAIN
        # Between the two calls others may have their turn.
        assert world.server.control(world.instance, {"op": "create_region", "region": world.instance << 32})["ok"]
        assert world.server.evict(world.instance, refs, memoryview(pages)) == ""
    assert (refs["status"] == EvictStatus.SUCCESS).all()
    world.stored |= dict.fromkeys(range(10, 30), int(refs["version"][0]))
    assert world.evict(range(40, 50))
    world.check()
    assert world.server.control(world.instance, {"op": "flush"})["ok"]
    assert world.server.stat()["pages"]["pages"] == 40
    world.reopen()
    world.check()
    world.server.close()


def test_changes_that_are_not_written_yet_are_not_overtaken(tmp_path):
    world = World(tmp_path, ("file", "file"))
    assert world.evict(range(10))
    # A change whose commit never came: it must stand in the journal before what is evicted after it.
    world.server.spt.drop(world.instance << 32, 0, 5)
    assert not world.evict(range(10))
    assert world.evict(range(10))
    world.reopen()
    world.check()
    world.server.close()


def test_a_write_that_fails_is_left_to_python_with_nothing_kept(tmp_path):
    world = World(tmp_path, ("file", "file"))
    assert world.evict(range(20))
    lib.edm_pf_fail(world.pages.native, lib.EDM_PF_WRITE, 0, 1, errno.ENOSPC)
    before = world.server.stat()["pages"]["pages"]
    assert world.by_table(*world.batch(range(20))) == EAGAIN
    assert world.server.stat()["pages"]["pages"] == before
    world.check()
    assert world.evict(range(20))
    world.check()
    world.server.close()


def test_the_limit_of_memory_is_store_full_and_slots_that_wait_are_room(tmp_path):
    world = World(tmp_path, ("file", "memory"))
    world.server.close()
    world.pages = MemoryPages(50 * PAGE_BYTES)
    world.server = MemoryServer(FileSpt(tmp_path / "spt2"), world.pages)
    world.table = Table.from_address(address_of(world.server, SERVER, ctypes.sizeof(Table)))
    assert world.evict(range(30))
    assert world.evict(range(20))
    assert not world.evict(range(20))  # a flush frees what the older versions took
    assert world.by_table(*world.batch(range(30, 60))) == EAGAIN
    refs, pages = world.batch(range(30, 60))
    assert "limit of 50 pages" in world.server.evict(world.instance, refs, memoryview(pages))
    world.check()
    world.server.close()


def test_always_and_stores_that_are_not_edms_own_are_left_to_python(tmp_path):
    class AnotherSpt(MemorySpt):
        pass

    world = World(tmp_path, ("file", "file"), sync="always")
    assert not world.evict(range(5))
    world.server.close()
    server = MemoryServer(AnotherSpt(), MemoryPages())
    table = Table.from_address(address_of(server, SERVER, ctypes.sizeof(Table)))
    refs, pages = batch_of(1 << 32, range(5), 1)
    buffer = (ctypes.c_char * len(pages)).from_buffer(pages)
    assert table.evict(table.self, 1, refs.ctypes.data, 5, buffer) == EAGAIN
    server.close()


def test_a_quota_is_kept_whatever_the_table_would_do(world):
    guarded = GuardedServer(world.server, world.server.spt)
    assert world.evict(range(20))
    guarded.quota_pages = 30
    refs, pages = world.batch(range(20, 40))
    assert world.by_table(refs, pages) == EAGAIN
    assert "quota of 30 pages" in guarded.evict(world.instance, refs, memoryview(pages))
    guarded.quota_pages = 0
    assert world.evict(range(20, 40))
    guarded.quota_pages = 45
    refs, pages = world.batch(range(40, 50))
    assert "quota of 45 pages" in guarded.evict(world.instance, refs, memoryview(pages))
    world.check()


def test_a_closed_server_answers_nothing_from_c(world):
    assert world.evict(range(5))
    world.server.close()
    assert world.by_table(*world.batch(range(5))) == EAGAIN
    refs, pages = world.batch(range(5))
    assert world.table.get(world.table.self, world.instance, refs.ctypes.data, 5,
                           (ctypes.c_char * len(pages)).from_buffer(pages)) == EAGAIN  # fmt: skip


def test_random_evictions_and_controls_match_a_model(world):
    random = np.random.default_rng(7)
    region = world.instance << 32
    for step in range(300):
        start, count = int(random.integers(0, 100)), int(random.integers(1, 40))
        if random.random() < 0.8:
            world.evict(range(start, start + count))
        else:
            assert world.server.control(
                world.instance, {"op": "drop_pages", "ranges": [[region, start, count]], "sequence": step + 1}
            )["ok"]
            world.stored = {i: v for i, v in world.stored.items() if not start <= i < start + count}
    world.check()
    figures = world.server.stat()
    assert figures["spt"]["pages"] == len(world.stored)
    assert figures["pages"]["pages"] == len(world.stored) + figures["server"]["slots_waiting"]
