"""Slots of the page store `lmdb`: freed ones are written over, unless what stands before their value is damaged."""

import numpy as np
import pytest

from edm.dms.table import page_checksums
from edm.errors import StoreError
from edm.plugins.store_lmdb.environment import Environment
from edm.plugins.store_lmdb.pages import _MOST_FREE
from edm.testing.stores import open_store
from edm.types import PAGE_BYTES


@pytest.fixture
def store(tmp_path):
    made = open_store("page_store", "lmdb", tmp_path, {"map_size": "1M", "sync": "none"})
    yield made
    made.close()


def put(store, count, seed):
    data = bytearray(np.random.default_rng(seed).bytes(count * PAGE_BYTES))
    return store.put(memoryview(data), page_checksums(data)), bytes(data)


def got(store, slots):
    into = bytearray(len(slots) * PAGE_BYTES)
    store.get(slots, memoryview(into))
    return into


def test_freed_slots_are_written_over_first(store):
    kept, kept_bytes = put(store, 10, 1)
    freed, _ = put(store, 20, 2)
    store.free(freed[:15])
    again, again_bytes = put(store, 20, 3)
    assert set(freed[:15].tolist()) < set(again.tolist())
    assert not set(kept.tolist()) & set(again.tolist())
    assert len(set(again.tolist())) == 20
    assert (got(store, kept), got(store, again)) == (kept_bytes, again_bytes)
    assert store.stat()["pages"] == 10 + 5 + 20


def test_slots_of_a_put_that_failed_are_used_again(store, monkeypatch):
    put(store, 3, 1)

    def fail(*_arguments, **_more):
        raise StoreError("no")

    with monkeypatch.context() as patched:
        patched.setattr(Environment, "write", fail)
        for _ in range(3):
            with pytest.raises(StoreError, match="no"):
                put(store, 5, 2)
    assert store.stat()["pages"] == 3
    slots, data = put(store, 5, 3)
    assert slots.tolist() == [4, 5, 6, 7, 8]
    assert got(store, slots) == data


def test_more_free_slots_than_are_kept_are_deleted(store, monkeypatch):
    slots, _ = put(store, 64, 1)
    monkeypatch.setattr("edm.plugins.store_lmdb.pages._MOST_FREE", 40)
    assert _MOST_FREE > 64
    store.free(slots)
    assert set(put(store, 64, 2)[0].tolist()) & set(slots.tolist()) == set()
    assert store.stat()["pages"] == 64


def test_slot_with_a_damaged_head_is_left_alone_and_named(store, tmp_path, caplog):
    slots, data = put(store, 6, 1)
    file = tmp_path / "lmdb" / "data.mdb"
    at = file.read_bytes().index(data[2 * PAGE_BYTES : 3 * PAGE_BYTES - 16])
    with file.open("r+b") as opened:
        opened.seek(at - 4)
        opened.write(b"\x07")
    store.free(slots)
    again, again_bytes = put(store, 6, 2)
    assert set(again.tolist()) == {*slots.tolist(), 7} - {int(slots[2])}
    assert got(store, again) == again_bytes
    assert f"slot {slots[2]} is damaged and is not freed" in caplog.text
