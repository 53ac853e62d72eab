"""A loss of power: what was not synced is there, gone or torn, sector by sector; each policy keeps its promise."""

import os
import random
import shutil

import pytest
from children import in_a_child

from edm.dms.server import MemoryServer
from edm.errors import StoreError
from edm.plugins.store_file import spt as file_spt
from edm.plugins.store_file.pages import FilePages
from edm.plugins.store_file.spt import FileSpt
from edm.stores.directory import lock_record
from edm.testing.pages import batch_of
from edm.testing.stores import open_store
from edm.types import PAGE_BYTES, EvictStatus, GetStatus

SECTOR = 512
PAGES = 60


class PowerLost(Exception):
    """Now."""


class Disk:
    """What of a directory has reached the disk for sure, and images of what else may have."""

    def __init__(self, path, random_):
        self.path = path
        self._random = random_
        self._synced = {}
        self._names = {}

    def synced(self, name):
        """A file's bytes are on the disk."""
        path = self.path / name
        self._synced[path.stat().st_ino] = path.read_bytes()

    def all_synced(self):
        """Every file is, and so are their names."""
        self._names = {}
        for path in self.path.iterdir():
            self.synced(path.name)
            self._names[path.name] = self._synced[path.stat().st_ino]

    def image(self, target):
        """Write what may be found after the power is back."""
        target.mkdir(parents=True)
        now = {path.name: self._mixed(path) for path in self.path.iterdir()}
        names = self._random.choice([now, self._names, {**self._names, **now}] if self._names else [now])
        for name, data in names.items():
            (target / name).write_bytes(now.get(name, data))
        (target / "LOCK").write_bytes(lock_record("another-boot"))

    def _mixed(self, path):
        new, old = path.read_bytes(), self._synced.get(path.stat().st_ino, b"")
        kind = self._random.randrange(3)
        length = len(new) if kind or self._random.random() < 0.5 else max(len(old), 0)
        if new == old or kind == 2:
            return new
        if path.name == "FORMAT":
            return new
        out = bytearray(length)
        for at in range(0, length, SECTOR):
            source = old if kind == 0 or self._random.random() < 0.5 else new
            part = source[at : min(at + SECTOR, length)]
            out[at : at + len(part)] = part
        return bytes(out)


class Watched:
    """A store that may lose its power after any call, and tells its disk what was synced."""

    def __init__(self, store, after, power):
        self._store, self._after, self._power = store, after, power

    def __getattr__(self, name):
        found = getattr(self._store, name)
        if name not in {"put", "record", "sync", "commit", "flush", "free"}:
            return found

        def call(*arguments):
            result = found(*arguments)
            self._after(name)
            self._power()
            return result

        return call


class FileWorld:
    """Page files and journal over two disks.

    With every second seed the server evicts from C where it can: then the power goes between evictions, and what is not
    synced of one is on the disk in any part.
    """

    def __init__(self, path, policy, seed):
        self.random = random.Random(seed)
        self.policy = policy
        self.live = path / "live"
        self.disks = {half: Disk(self.live / half, self.random) for half in ("spt", "pages")}
        self.countdown = -1
        self.flushed = {}
        self.stored = {}
        self.version = 0
        spt, pages = self._stores(self.live, self._datasync)
        for disk in self.disks.values():
            disk.all_synced()
        watched = Watched(spt, self._spt_called, self._power), Watched(pages, self._pages_called, self._power)
        self.server = MemoryServer(*((spt, pages) if seed % 2 else watched))
        self.server.spt, self.server.pages = watched

    def _stores(self, path, datasync):
        spt = FileSpt(path / "spt", self.policy, group_pages=100, datasync=datasync)
        return spt, FilePages(path / "pages", self.policy, segment_pages=64)

    def _datasync(self, fd):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        self.disks["spt"].synced(name)

    def _pages_called(self, name):
        if name == "flush" or (name == "sync" and self.policy == "always"):
            self.disks["pages"].all_synced()

    def _spt_called(self, name):
        if name == "flush":
            self.disks["spt"].all_synced()
            self.flushed = dict(self.recorded)

    def _power(self):
        self.countdown -= 1
        if self.countdown == 0:
            raise PowerLost

    def evict(self):
        self.version += 1
        start = self.random.randrange(PAGES)
        indices = range(start, start + self.random.choice([1, 5, 20]))
        refs, pages = batch_of(1 << 32, indices, self.version)
        self.recorded = self.stored | dict.fromkeys(indices, self.version)
        assert self.server.evict(1, refs, memoryview(pages)) == ""
        assert (refs["status"] == EvictStatus.SUCCESS).all()
        self.stored = self.recorded
        self._power()

    def lose_power(self):
        self.countdown = self.random.randrange(1, 200)
        with pytest.raises(PowerLost):
            while True:
                self.evict()

    def found(self, image):
        server = MemoryServer(*self._stores(image, os.fdatasync))
        refs, _ = batch_of(1 << 32, range(PAGES + 20), 0)
        into = bytearray(len(refs) * PAGE_BYTES)
        server.get(1, refs, memoryview(into))
        found = {}
        for at, ref in enumerate(refs):
            page = into[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
            if ref["status"] == GetStatus.EXISTING_PAGE:
                found[at] = int(ref["version"])
                assert page == batch_of(1, [at], found[at])[1], f"page {at} is not what version {found[at]} was"
            elif ref["status"] == GetStatus.ERROR:
                found[at] = "error"
        # And it works on.
        new, pages = batch_of(1 << 32, range(5), 1 << 40)
        assert server.evict(1, new, memoryview(pages)) == ""
        server.close()
        return found


def check_policy(world, found):
    sure = {"always": world.stored, "batch": world.flushed, "none": {}}[world.policy]
    for index in range(PAGES + 20):
        version = found.get(index)
        if index in sure:
            assert version != "error"
            assert version is not None
            assert sure[index] <= version <= world.recorded[index]
        elif version is not None and version != "error":
            assert version <= world.recorded[index]
        if world.policy != "none":
            assert version != "error", f"page {index} cannot be read"


def try_power_losses(tmp_path, policy, seeds, images):
    for seed in seeds:
        world = FileWorld(tmp_path / str(seed), policy, seed)
        world.lose_power()
        for number in range(images):
            image = tmp_path / str(seed) / f"image-{number}"
            for half, disk in world.disks.items():
                disk.image(image / half)
            check_policy(world, world.found(image))
            shutil.rmtree(image)
        shutil.rmtree(world.live)


@pytest.fixture(autouse=True)
def _compact_often(monkeypatch):
    monkeypatch.setattr(file_spt, "_COMPACT_LEAST_BYTES", 8_000)


@pytest.mark.parametrize("policy", ["none", "batch", "always"])
def test_power_loss_keeps_what_the_policy_promises(tmp_path, policy):
    try_power_losses(tmp_path, policy, range(6), 4)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("policy", ["none", "batch", "always"])
def test_power_loss_many_times(tmp_path, policy):
    try_power_losses(tmp_path, policy, range(100, 250), 6)


@pytest.mark.parametrize("policy", ["batch", "always"])
def test_lmdb_power_loss_undoes_at_most_what_the_policy_says(tmp_path, policy):
    """Before the data is synced: old meta pages, any mixture of data. After: all data, and with batch either meta."""
    random_ = random.Random(1)
    options = {"sync": policy, "map_size": "1M"}
    live = tmp_path / "live"
    live.mkdir()
    server = MemoryServer(*(open_store(kind, "lmdb", live, options) for kind in ("spt_store", "page_store")))
    file = live / "lmdb" / "data.mdb"
    contents, stored = [file.read_bytes()], [{}]
    for name in ("spt", "pages"):
        store = getattr(server, name)
        environment = store._environment
    write = environment.write

    def noted(work, *, may_fill):
        result = write(work, may_fill=may_fill)
        contents.append(file.read_bytes())
        stored.append(dict(acknowledged))
        return result

    environment.write = noted
    acknowledged = {}
    for version in range(1, 40):
        start = random_.randrange(30)
        refs, pages = batch_of(1 << 32, range(start, start + 8), version)
        assert server.evict(1, refs, memoryview(pages)) == ""
        acknowledged |= dict.fromkeys(range(start, start + 8), version)
    for number in range(1, len(contents), 3):
        old, new = contents[number - 1], contents[number]
        before = bytearray(old[: 2 * PAGE_BYTES] + new[2 * PAGE_BYTES :])
        for at in range(2 * PAGE_BYTES, len(new), SECTOR):
            if random_.random() < 0.5:
                part = old[at : at + SECTOR].ljust(SECTOR, b"\0")
                before[at : at + SECTOR] = part
        undone = old[: 2 * PAGE_BYTES] + new[2 * PAGE_BYTES :]
        for data in [bytes(before), undone if policy == "batch" else new, new]:
            image = tmp_path / "image"
            shutil.copytree(live, image)
            (image / "lmdb" / "data.mdb").write_bytes(data)
            (image / "lmdb" / "LOCK").write_bytes(lock_record("another-boot"))
            _check_lmdb(image, options, stored[max(0, number - 1)])
            shutil.rmtree(image)
    server.close()


def _check_lmdb(image, options, sure):
    server = MemoryServer(*(open_store(kind, "lmdb", image, options) for kind in ("spt_store", "page_store")))
    refs, _ = batch_of(1 << 32, range(40), 0)
    into = bytearray(len(refs) * PAGE_BYTES)
    server.get(1, refs, memoryview(into))
    for at, ref in enumerate(refs):
        assert ref["status"] != GetStatus.ERROR
        if at in sure:
            assert ref["version"] >= sure[at]
        if ref["status"] == GetStatus.EXISTING_PAGE:
            assert into[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] == batch_of(1, [at], int(ref["version"]))[1]
    server.close()


def lmdb_without_syncs(path, images, seed):
    """How often a store that was never synced opened after a loss of power: every sector is of any earlier time."""
    random_, options = random.Random(seed), {"sync": "none", "map_size": "1M"}
    server = MemoryServer(*(open_store(kind, "lmdb", path / "live", options) for kind in ("spt_store", "page_store")))
    file = path / "live" / "lmdb" / "data.mdb"
    contents = []
    for version in range(1, 30):
        start = random_.randrange(30)
        refs, pages = batch_of(1 << 32, range(start, start + 8), version)
        assert server.evict(1, refs, memoryview(pages)) == ""
        contents.append(file.read_bytes())
    server.close()
    opened = 0
    for number in range(images):
        data, image = bytearray(contents[-1]), path / f"image-{number}"
        # Few sectors or many, since a store of which much is missing only refuses.
        for at in random_.sample(range(0, len(data), SECTOR), random_.choice([1, 3, 20, len(data) // SECTOR])):
            data[at : at + SECTOR] = random_.choice(contents)[at : at + SECTOR].ljust(SECTOR, b"\0")
        shutil.copytree(path / "live", image)
        (image / "lmdb" / "data.mdb").write_bytes(data)
        (image / "lmdb" / "LOCK").write_bytes(lock_record("another-boot"))
        word = in_a_child(lambda image=image: _opened(image, options))
        assert word in {"opened", "refused"}, word
        opened += word == "opened"
        shutil.rmtree(image)
    return opened


def _opened(image, options):
    """Whatever is answered is a page as some version of it was, and never newer than that version."""
    try:
        table = open_store("spt_store", "lmdb", image, options)
        server = MemoryServer(table, open_store("page_store", "lmdb", image, options))
    except StoreError:
        return "refused"
    refs, _ = batch_of(1 << 32, range(40), 0)
    into = bytearray(len(refs) * PAGE_BYTES)
    server.get(1, refs, memoryview(into))
    for at, ref in enumerate(refs):
        if ref["status"] == GetStatus.EXISTING_PAGE:
            assert into[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] == batch_of(1, [at], int(ref["version"]))[1]
    return "opened"


def test_lmdb_that_was_never_synced_serves_no_wrong_bytes_after_a_loss_of_power(in_memory):
    assert lmdb_without_syncs(in_memory, 20, 5)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_lmdb_that_was_never_synced_many_times(in_memory):
    opened = 0
    for seed in range(10):
        (in_memory / str(seed)).mkdir()
        opened += lmdb_without_syncs(in_memory / str(seed), 100, seed)
    print(f"1000 images, {opened} opened")


def test_journal_that_is_damaged_from_the_start_is_an_error_that_names_it(tmp_path):
    FileSpt(tmp_path / "spt").close()
    (journal,) = (tmp_path / "spt").glob("*.journal")
    journal.write_bytes(b"\0" * journal.stat().st_size)
    with pytest.raises(StoreError, match=journal.name):
        FileSpt(tmp_path / "spt")
