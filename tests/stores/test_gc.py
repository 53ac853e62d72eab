"""`edm store gc` gives room back, and whatever cuts it short leaves the store as it was."""

import json
import os
import random
import signal
import time

import numpy as np
import pytest
from click.testing import CliRunner
from stores_crashing import open_server

from edm.cli.store import command
from edm.dms.table import PageTable
from edm.testing.pages import batch_of
from edm.types import PAGE_BYTES, PAGE_REF, EvictStatus, GetStatus

KEPT = range(0, 1500, 10)
LMDB = {"map_size": "1M", "sync": "none"}
STORES = {
    "lmdb": ("lmdb", "lmdb", LMDB, LMDB),
    "lmdb-file": ("lmdb", "file", LMDB, {"segment": "1M"}),
    "file-lmdb": ("file", "lmdb", {}, LMDB),
    "file": ("file", "file", {}, {"segment": "16M"}),
}


def fill(path, name):
    """1500 pages of which every tenth stays; returns the instance."""
    server = open_server(path, *STORES[name])
    instance = server.control(0, {"op": "hello"})["instance"]
    for at in range(0, 1500, 500):
        refs, pages = batch_of(instance << 32, range(at, at + 500), 1)
        assert server.evict(instance, refs, memoryview(pages)) == ""
        assert (refs["status"] == EvictStatus.SUCCESS).all()
    ranges = [[instance << 32, index + 1, 9] for index in KEPT]
    assert server.control(instance, {"op": "drop_pages", "ranges": ranges})["ok"]
    server.close()
    return instance


def check(path, name, instance):
    server = open_server(path, *STORES[name])
    refs, _ = batch_of(instance << 32, KEPT, 0)
    into = bytearray(len(KEPT) * PAGE_BYTES)
    server.get(instance, refs, memoryview(into))
    assert (refs["status"] == GetStatus.EXISTING_PAGE).all()
    assert into == batch_of(1, KEPT, 1)[1]
    assert server.evict(instance, *_again(instance)) == ""
    server.close()


def _again(instance):
    refs, pages = batch_of(instance << 32, KEPT, 1)
    return refs, memoryview(pages)


def gc(path):
    result = CliRunner().invoke(command, ["gc", "--json", str(path)], standalone_mode=False)
    assert not result.exception, result.exception
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", STORES)
def test_gc_gives_room_back(tmp_path, name):
    instance = fill(tmp_path, name)
    figures = gc(tmp_path)
    assert figures["after_bytes"] < figures["before_bytes"]
    if "lmdb" in STORES[name][1]:
        assert figures["after_bytes"] < figures["before_bytes"] / 3
    check(tmp_path, name, instance)
    assert not (tmp_path / "lmdb" / "copy").exists()


@pytest.mark.parametrize("name", ["lmdb", "file"])
def test_gc_killed_at_any_point_loses_nothing(tmp_path, name):
    instance = fill(tmp_path, name)
    begun = time.monotonic()
    gc(tmp_path)
    takes_s = time.monotonic() - begun
    check(tmp_path, name, instance)
    for version in range(1, 11):
        fill_more(tmp_path, name, instance, version)
        pid = os.fork()
        if not pid:
            try:
                gc(tmp_path)
            finally:
                os._exit(0)
        time.sleep(random.uniform(0, 1.2 * takes_s))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        check(tmp_path, name, instance)
    assert gc(tmp_path)
    check(tmp_path, name, instance)


def fill_more(path, name, instance, version):
    """Something for the next one to collect."""
    server = open_server(path, *STORES[name])
    refs, pages = batch_of(instance << 32, range(2000, 2400), version)
    assert server.evict(instance, refs, memoryview(pages)) == ""
    assert server.control(instance, {"op": "drop_pages", "ranges": [[instance << 32, 2000, 400]]})["ok"]
    server.close()


def test_the_table_in_memory_gives_back_what_dropped_pages_took():
    table = PageTable()
    for region, pages in ((1, 200_000), (2, 1_000)):
        refs = np.zeros(pages, PAGE_REF)
        refs["region"], refs["index"], refs["version"] = region, np.arange(pages), 1
        table.record(refs, np.arange(pages, dtype=np.uint64) + np.uint64(region << 32))
    full = table.stat()["memory_bytes"]
    assert len(table.drop(1, 50_000, 150_000)) == 150_000
    assert table.stat()["memory_bytes"] < full // 2
    assert len(table.drop_region(1)) == 50_000
    assert table.stat()["memory_bytes"] < full // 20
    refs, slots = table.pages(2)
    assert slots.tolist() == [(2 << 32) + i for i in range(1_000)]
    assert table.lookup(refs).slots.tolist() == slots.tolist()
