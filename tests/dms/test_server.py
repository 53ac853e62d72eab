"""The memory server's own rules, over the stores in memory."""

import itertools

import numpy as np
import pytest

from edm._native import ffi, lib
from edm.dms.server import MemoryServer
from edm.dms.table import page_checksums
from edm.errors import StoreError, StoreFull
from edm.plugins.store_memory.pages import MemoryPages
from edm.plugins.store_memory.spt import MemorySpt
from edm.testing.pages import batch_of
from edm.testing.stores import open_store
from edm.types import PAGE_BYTES, EvictStatus, GetStatus, PageId


@pytest.fixture
def server():
    server = MemoryServer(MemorySpt(), MemoryPages())
    yield server
    server.close()


@pytest.fixture
def instance(server):
    return server.control(0, {"op": "hello", "client": "test", "protocol": 1})["instance"]


def evict(server, instance, region, indices, version):
    refs, pages = batch_of(region, indices, version)
    return server.evict(instance, refs, memoryview(pages)), refs, pages


def get(server, instance, region, indices):
    refs, _ = batch_of(region, indices, 0)
    into = bytearray(len(refs) * PAGE_BYTES)
    server.get(instance, refs, memoryview(into))
    return refs, into


def test_get_of_what_was_evicted_and_of_what_was_not(server, instance):
    region = instance << 32
    _, _, pages = evict(server, instance, region, range(10), 5)
    refs, into = get(server, instance, region, range(5, 15))
    assert refs["status"].tolist() == [GetStatus.EXISTING_PAGE] * 5 + [GetStatus.NEW_PAGE] * 5
    assert refs["version"].tolist() == [5] * 5 + [0] * 5
    assert into == pages[5 * PAGE_BYTES :] + bytes(5 * PAGE_BYTES)


def test_older_version_is_refused_and_an_equal_one_is_a_repeat(server, instance):
    region = instance << 32
    evict(server, instance, region, range(4), 5)
    error, refs, _ = evict(server, instance, region, [2], 4)
    assert refs["status"].tolist() == [EvictStatus.FAIL]
    assert "older version" in error
    stored = server.counters.stored
    error, refs, _ = evict(server, instance, region, range(4), 5)
    assert (error, refs["status"].tolist()) == ("", [EvictStatus.SUCCESS] * 4)
    assert server.counters.stored == stored


def test_one_refused_page_does_not_keep_the_others(server, instance):
    region = instance << 32
    evict(server, instance, region, [1], 9)
    error, refs, _ = evict(server, instance, region, [0, 1, 2], 5)
    assert error
    assert refs["status"].tolist() == [EvictStatus.SUCCESS, EvictStatus.FAIL, EvictStatus.SUCCESS]
    assert get(server, instance, region, [0, 1, 2])[0]["version"].tolist() == [5, 9, 5]


def test_page_that_stands_twice_keeps_its_newer_version(server, instance):
    refs, pages = batch_of(instance << 32, [3, 3], 5)
    refs["version"] = [6, 5]
    server.evict(instance, refs, memoryview(pages))
    assert refs["status"].tolist() == [EvictStatus.SUCCESS, EvictStatus.FAIL]
    assert get(server, instance, instance << 32, [3])[0]["version"].tolist() == [6]


def test_page_damaged_on_the_way_is_refused(server, instance):
    refs, pages = batch_of(instance << 32, [0, 1], 5)
    pages[PAGE_BYTES] ^= 1
    error = server.evict(instance, refs, memoryview(pages))
    assert "damaged on the way" in error
    assert refs["status"].tolist() == [EvictStatus.SUCCESS, EvictStatus.FAIL]


def test_another_instance_s_pages_are_out_of_reach(server, instance):
    other = server.control(0, {"op": "hello"})["instance"]
    region = instance << 32
    evict(server, instance, region, [0], 1)
    error, refs, _ = evict(server, other, region, [0], 2)
    assert refs["status"].tolist() == [EvictStatus.FAIL]
    assert "not a region of this instance" in error
    refs, into = get(server, other, region, [0])
    assert refs["status"].tolist() == [GetStatus.ERROR]
    assert into == bytes(PAGE_BYTES)
    for op in [
        {"op": "create_region", "region": region + 1},
        {"op": "drop_region", "region": region},
        {"op": "clone_region", "region": region, "into": other << 32},
        {"op": "clone_region", "region": other << 32, "into": region},
        {"op": "move_pages", "region": region, "start": 0, "to": 1, "count": 1},
        {"op": "drop_pages", "ranges": [[other << 32, 0, 1], [region, 0, 1]]},
    ]:
        answer = server.control(other, {**op, "sequence": 1})
        assert not answer["ok"]
        assert "not a region of instance" in answer["error"]
    assert get(server, instance, region, [0])[0]["status"].tolist() == [GetStatus.EXISTING_PAGE]


def test_batch_with_pages_of_two_instances_answers_the_own_ones(server, instance):
    other = server.control(0, {"op": "hello"})["instance"]
    _, _, pages = evict(server, instance, instance << 32, [0], 1)
    refs, _ = batch_of(instance << 32, [0, 0, 7], 0)
    refs["region"][1] = other << 32
    into = bytearray(3 * PAGE_BYTES)
    server.get(instance, refs, memoryview(into))
    assert refs["status"].tolist() == [GetStatus.EXISTING_PAGE, GetStatus.ERROR, GetStatus.NEW_PAGE]
    assert into == pages + bytes(2 * PAGE_BYTES)


def test_structural_request_is_carried_out_once(server, instance):
    region = instance << 32
    evict(server, instance, region, [0], 1)
    move = {"op": "move_pages", "region": region, "start": 0, "to": 10, "count": 1, "sequence": 1}
    assert server.control(instance, move) == {"ok": True}
    evict(server, instance, region, [0], 2)
    assert server.control(instance, move) == {"ok": True}
    assert get(server, instance, region, [0, 10])[0]["version"].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"op": "fly"}, "unknown request 'fly'"),
        ({}, "unknown request None"),
        ({"op": "create_region"}, "'region' must be a number"),
        ({"op": "create_region", "region": -1}, "'region' must be a number"),
        ({"op": "create_region", "region": True}, "'region' must be a number"),
        ({"op": "drop_pages", "ranges": [[1]]}, "'ranges' must be a list"),
        ({"op": "drop_pages"}, "'ranges' must be a list"),
        ({"op": "hello", "protocol": 99}, "protocol 1, not 99"),
        ({"op": "drop_region", "region": 1 << 32, "sequence": "x"}, "'sequence' must be a number"),
    ],
)
def test_bad_request_is_answered_with_one_line(server, instance, request_, error):
    answer = server.control(instance, request_)
    assert not answer["ok"]
    assert error in answer["error"]


def test_request_that_the_store_cannot_carry_out_may_be_made_again(server, instance, monkeypatch):
    region = instance << 32
    evict(server, instance, region, range(3), 1)
    request = {"op": "drop_pages", "ranges": [[region, 0, 2]], "sequence": 1}

    def full():
        raise StoreFull("no room for a journal frame")

    with monkeypatch.context() as patched:
        patched.setattr(server.spt, "commit", full)
        answer = server.control(instance, request)
        assert answer == {"ok": False, "error": "no room for a journal frame", "again": True}
    assert server.control(instance, request) == {"ok": True}
    refs, _ = get(server, instance, region, range(3))
    assert refs["status"].tolist() == [GetStatus.NEW_PAGE] * 2 + [GetStatus.EXISTING_PAGE]


def test_full_store_fails_the_batch_and_loses_nothing():
    server = MemoryServer(MemorySpt(), MemoryPages(100 * PAGE_BYTES))
    assert evict(server, 1, 1 << 32, range(80), 1)[0] == ""
    error, refs, _ = evict(server, 1, 1 << 32, range(80, 120), 1)
    assert "limit of 100 pages" in error
    assert set(refs["status"].tolist()) == {EvictStatus.FAIL}
    refs, _ = get(server, 1, 1 << 32, range(120))
    assert refs["status"].tolist() == [1] * 80 + [0] * 40
    assert server.control(1, {"op": "drop_pages", "ranges": [[1 << 32, 0, 40]], "sequence": 1})["ok"]
    assert evict(server, 1, 1 << 32, range(80, 120), 1)[0] == ""


class AnotherSpt(MemorySpt):
    """One of somebody else's, which may do more than its base: the server calls its methods."""


def test_commit_that_fails_is_not_a_success_and_its_repeat_is_written_again(monkeypatch):
    def fail():
        raise StoreError("no disk today")

    server, instance = MemoryServer(AnotherSpt(), MemoryPages()), 1
    region = instance << 32
    evict(server, instance, region, [0], 1)
    monkeypatch.setattr(server.spt, "commit", fail, raising=False)
    error, refs, pages = evict(server, instance, region, [0], 2)
    assert (error, refs["status"].tolist()) == ("no disk today", [EvictStatus.FAIL])
    monkeypatch.undo()
    stored = server.counters.stored
    assert server.evict(instance, refs, memoryview(pages)) == ""
    assert server.counters.stored == stored + 1
    assert get(server, instance, region, [0])[1] == pages
    assert server.pages.stat()["pages"] == 1
    server.close()


NAMES = ["memory", "file", "lmdb"]


@pytest.mark.parametrize(("spt", "pages"), list(itertools.product(NAMES, NAMES)))
@pytest.mark.parametrize("compress", ["none", "zstd", "lz4"])
def test_every_combination_works_and_what_is_durable_lasts(spt, pages, compress, tmp_path):
    options = {"compress": compress, "elide_zeros": compress == "zstd"}
    quick = {"sync": "none"}

    def opened():
        return MemoryServer(
            open_store("spt_store", spt, tmp_path, {} if spt == "memory" else quick),
            open_store("page_store", pages, tmp_path, options | ({} if pages == "memory" else quick)),
        )

    server = opened()
    instance = server.control(0, {"op": "hello"})["instance"]
    region = instance << 32
    batch = bytearray(np.random.default_rng(1).bytes(20 * PAGE_BYTES)) + bytearray(20 * PAGE_BYTES)
    refs, text = batch_of(region, range(60), 1)
    batch += text[40 * PAGE_BYTES :]
    refs["checksum"] = page_checksums(batch)
    assert server.evict(instance, refs, memoryview(batch)) == ""
    assert server.control(instance, {"op": "clone_region", "region": region, "into": region + 1, "sequence": 1})["ok"]
    assert server.control(instance, {"op": "drop_region", "region": region, "sequence": 2})["ok"]
    assert get(server, instance, region + 1, range(60))[1] == batch
    server.close()
    server = opened()
    assert server.control(0, {"op": "hello"})["instance"] == (1 if spt == "memory" else instance + 1)
    refs, into = get(server, instance, region + 1, range(60))
    if spt == "memory":
        assert set(refs["status"].tolist()) == {GetStatus.NEW_PAGE}
    elif pages == "memory":
        # Zeros take no place in the page store, so they are not lost with it.
        lost = {GetStatus.ERROR} | ({GetStatus.EXISTING_PAGE} if compress == "zstd" else set())
        assert set(refs["status"].tolist()) == lost
        assert into == bytes(len(into))
    else:
        assert set(refs["status"].tolist()) == {GetStatus.EXISTING_PAGE}
        assert into == batch
    # A repeat of what was applied before the restart is not applied again.
    assert server.control(instance, {"op": "drop_region", "region": region + 1, "sequence": 2})["ok"]
    still = GetStatus.NEW_PAGE if spt == "memory" else refs["status"][0]
    assert get(server, instance, region + 1, [0])[0]["status"].tolist() == [still]
    server.close()


def test_closing_twice_and_flushing(server, instance):
    evict(server, instance, instance << 32, range(3), 1)
    assert server.control(instance, {"op": "flush"}) == {"ok": True}
    assert server.control(instance, {"op": "stat"})["server"]["stored"] == 3
    assert server.control(instance, {"op": "bye"}) == {"ok": True}
    server.close()
    server.close()


@pytest.mark.parametrize("name", NAMES)
def test_damaged_page_is_an_error_that_says_page_place_and_both_checksums(name, tmp_path, caplog):
    pages = open_store("page_store", name, tmp_path, {} if name == "memory" else {"sync": "none"})
    server = MemoryServer(MemorySpt(), pages)
    instance = server.control(0, {"op": "hello"})["instance"]
    refs, batch = batch_of(instance << 32, range(20), 1)
    assert server.evict(instance, refs, memoryview(batch)) == ""
    right = bytes(batch[7 * PAGE_BYTES : 8 * PAGE_BYTES])
    wrong = right[:100] + bytes([right[100] ^ 4]) + right[101:]
    if name == "memory":
        place = "memory store: slot "
        slots = [ffi.cast("uint8_t *", lib.edm_slabs_page(pages.native, slot)) for slot in range(len(refs))]
        (at,) = [slot for slot in slots if bytes(ffi.buffer(slot, PAGE_BYTES)) == right]
        at[100] ^= 4
    else:
        (file,) = [path for path in tmp_path.rglob("*") if path.is_file() and right[:2000] in path.read_bytes()]
        place = str(file if name == "file" else file.parent)
        with file.open("r+b") as damaged:
            damaged.seek(file.read_bytes().index(right[:2000]) + 100)
            damaged.write(wrong[100:101])
    refs, into = get(server, instance, instance << 32, range(20))
    assert refs["status"].tolist() == [GetStatus.ERROR if i == 7 else GetStatus.EXISTING_PAGE for i in range(20)]
    assert not any(into[7 * PAGE_BYTES : 8 * PAGE_BYTES])
    (said,) = [record.getMessage() for record in caplog.records if record.name == "edm.dms.server"]
    assert said.startswith(f"page {PageId(instance << 32, 7)}: ")
    assert place in said
    sums = [f"{page_checksums(data)[0]:08x}" for data in (wrong, right)]
    assert said.endswith(" (CRC-32C {}, not {})".format(*sums))
    server.close()


def test_page_that_was_damaged_on_its_way_is_refused_with_both_checksums(server, instance):
    refs, pages = batch_of(instance << 32, range(3), 1)
    pages[PAGE_BYTES] ^= 1
    came = page_checksums(pages[PAGE_BYTES : 2 * PAGE_BYTES])[0]
    said = server.evict(instance, refs, memoryview(pages))
    assert said.endswith(f"damaged on the way (CRC-32C {came:08x}, not {refs['checksum'][1]:08x})")
