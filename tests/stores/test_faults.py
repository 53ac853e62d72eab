"""Every system call of the stores that can fail fails: nothing is lost, the error is said, and work goes on."""

import errno
import os

import numpy as np
import pytest

from edm._native import lib
from edm.dms.server import MemoryServer
from edm.errors import StoreError, StoreFull
from edm.plugins.store_file import spt as file_spt
from edm.plugins.store_file.pages import FilePages
from edm.plugins.store_file.spt import FileSpt
from edm.testing.pages import batch_of
from edm.types import PAGE_BYTES, EvictStatus, GetStatus

FOREVER = 0xFFFFFFFF
CALLS = {"write": lib.EDM_PF_WRITE, "sync": lib.EDM_PF_SYNC, "open": lib.EDM_PF_OPEN}


class FailingCalls:
    """os.pwrite and os.fdatasync, of which call number `at` (and, if it lasts, all later ones) fails with `error`.

    error -1: a write is cut short instead.
    """

    def __init__(self):
        self.fix()

    def fail(self, kind, at, error, *, lasting):
        self._kind, self._at, self._error, self._lasting = kind, at, error, lasting

    def fix(self):
        self._kind = None

    def _strikes(self, kind):
        if kind != self._kind:
            return False
        self._at -= 1
        return self._at == -1 or (self._lasting and self._at < -1)

    def write(self, fd, data, at):
        if self._strikes("write"):
            if self._error == -1 and len(data) > 1:
                return os.pwrite(fd, memoryview(data)[: len(data) // 2], at)
            if self._error != -1:
                raise OSError(self._error, os.strerror(self._error))
        return os.pwrite(fd, data, at)

    def sync(self, fd):
        if self._strikes("sync"):
            raise OSError(self._error, os.strerror(self._error))
        os.fdatasync(fd)


class World:
    """A server over page files and a journal whose calls can be made to fail, and what a client knows."""

    def __init__(self, path, sync):
        self.path, self.sync = path, sync
        self.calls = FailingCalls()
        self.server = self._open()
        self.instance = self.server.control(0, {"op": "hello"})["instance"]
        self.stored = {}
        self.version = 0

    def _open(self):
        spt = FileSpt(self.path / "spt", self.sync, group_pages=64, write=self.calls.write, datasync=self.calls.sync)
        self.pages = FilePages(self.path / "pages", self.sync, segment_pages=64)
        return MemoryServer(spt, self.pages)

    def evict(self, indices):
        """True if every page was acknowledged; what was not is still the client's."""
        self.version += 1
        refs, pages = batch_of(self.instance << 32, indices, self.version)
        error = self.server.evict(self.instance, refs, memoryview(pages))
        if (refs["status"] == EvictStatus.SUCCESS).all():
            assert error == ""
            self.stored |= dict.fromkeys(indices, self.version)
            return True
        assert (refs["status"] == EvictStatus.FAIL).all()
        assert error
        assert "\n" not in error
        self.failed = (list(indices), refs, pages, error)
        return False

    def retry(self):
        """The client sends the very same batch again, as it does until it is acknowledged."""
        indices, refs, pages, _ = self.failed
        assert self.server.evict(self.instance, refs, memoryview(pages)) == ""
        self.stored |= dict.fromkeys(indices, self.version)

    def check(self, *, but=()):
        indices = sorted(set(self.stored) - set(but))
        if not indices:
            return
        refs, _ = batch_of(self.instance << 32, indices, 0)
        into = bytearray(len(indices) * PAGE_BYTES)
        self.server.get(self.instance, refs, memoryview(into))
        assert (refs["status"] == GetStatus.EXISTING_PAGE).all()
        assert refs["version"].tolist() == [self.stored[index] for index in indices]
        for at, index in enumerate(indices):
            assert into[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] == batch_of(1, [index], self.stored[index])[1]

    def reopen(self):
        self.server.close()
        self.server = self._open()


def fail_pages(world, call, at, error, *, lasting):
    assert lib.edm_pf_fail(world.pages.native, CALLS[call], at, FOREVER if lasting else 1, error) == 0


def run(world):
    """Enough to write over everything, open files, let go of slots, compact: some of it fails."""
    outcomes = []
    for round_number in range(4):
        for start in (0, 32, 70, 5):
            outcomes.append(world.evict(range(start, start + 40)))
            if not outcomes[-1]:
                world.check(but=world.failed[0])
                return outcomes
        if round_number == 1:
            answer = world.server.control(world.instance, {"op": "flush"})
            if not answer["ok"]:
                assert answer["error"]
                return [*outcomes, False]
    return outcomes


def recover(world):
    world.calls.fix()
    for call in CALLS.values():
        lib.edm_pf_fail(world.pages.native, call, 0, 0, 0)
    if hasattr(world, "failed"):
        world.retry()
        del world.failed
    assert world.evict(range(200, 240))
    assert world.server.control(world.instance, {"op": "flush"})["ok"]
    world.check()
    world.reopen()
    world.check()
    assert world.evict(range(30))
    world.check()
    world.server.close()


NAMES = {errno.EIO: "EIO", errno.ENOSPC: "ENOSPC", -1: "short"}
CASES = [
    pytest.param(part, call, error, lasting, sync, id=f"{part}-{call}-{NAMES[error]}-{lasting}-{sync}",
                 marks=[pytest.mark.soak] if sync == "batch" else [])
    for part in ["pages", "journal"]
    for call in (["write", "sync", "open"] if part == "pages" else ["write", "sync"])
    for error in ([errno.EIO, errno.ENOSPC, -1] if call == "write" else [errno.EIO, errno.ENOSPC])
    for lasting in ["once", "lasting"]
    for sync in ["always", "batch"]
]  # fmt: skip


@pytest.fixture(autouse=True)
def _compact_often(monkeypatch):
    """So that compacting is among what fails."""
    monkeypatch.setattr(file_spt, "_COMPACT_LEAST_BYTES", 12_000)


@pytest.mark.parametrize(("part", "call", "error", "lasting", "sync"), CASES)
def test_every_nth_call_failing(tmp_path, part, call, error, lasting, sync):
    failures = 0
    for at in range(400):
        path = tmp_path / str(at)
        path.mkdir()
        world = World(path, sync)
        if part == "pages":
            fail_pages(world, call, at, error, lasting=lasting == "lasting")
        else:
            world.calls.fail(call, at, error, lasting=lasting == "lasting")
        outcomes = run(world)
        failures += not all(outcomes)
        recover(world)
        if all(outcomes) and at > 3:
            break
    else:
        pytest.fail("the calls have no end")
    # Short writes are made whole by going on: nobody hears of them.
    assert bool(failures) == (error != -1)


def test_full_disk_is_store_full_and_names_the_file(tmp_path):
    world = World(tmp_path, "none")
    fail_pages(world, "write", 0, errno.ENOSPC, lasting=True)
    assert not world.evict(range(10))
    assert "No space left on device" in world.failed[3]
    assert str(tmp_path / "pages") in world.failed[3]
    with pytest.raises(StoreFull):
        world.pages.put(memoryview(bytearray(PAGE_BYTES)), np.zeros(1, np.uint32))
    recover(world)


def test_read_error_is_an_error_for_that_page_only(tmp_path):
    world = World(tmp_path, "none")
    assert world.evict(range(10))
    # The batch is one read, in C and then through Python; then each page by itself: the first of these fails.
    lib.edm_pf_fail(world.pages.native, lib.EDM_PF_READ, 0, 1, errno.EIO)
    world.check()
    lib.edm_pf_fail(world.pages.native, lib.EDM_PF_READ, 0, 3, errno.EIO)
    refs, _ = batch_of(world.instance << 32, range(10), 0)
    into = bytearray(10 * PAGE_BYTES)
    world.server.get(world.instance, refs, memoryview(into))
    assert refs["status"].tolist() == [GetStatus.ERROR] + 9 * [GetStatus.EXISTING_PAGE]
    assert into[:PAGE_BYTES] == bytes(PAGE_BYTES)
    world.check()


def test_closing_with_a_failing_sync_says_so_and_loses_nothing(tmp_path):
    world = World(tmp_path, "none")
    assert world.evict(range(10))
    fail_pages(world, "sync", 0, errno.EIO, lasting=True)
    with pytest.raises(StoreError, match="Input/output error"):
        world.server.close()
    world.server = world._open()
    world.check()
