"""Stateful tests of stores against models, for hypothesis: what `PageStoreContract` and `SptStoreContract` run."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from edm.dms.table import page_checksums
from edm.testing.pages import batch_of
from edm.types import PAGE_BYTES, PAGE_REF

if TYPE_CHECKING:
    from collections.abc import Callable

    from edm.interfaces import PageStore, SptStore

    Row = tuple[int, int, int]

REGIONS = st.sampled_from([1 << 32, (1 << 32) + 1, 2 << 32, (7 << 32) + 9])
INDICES = st.one_of(st.integers(0, 70), st.integers((1 << 36) - 20, (1 << 36) + 20))
COUNTS = st.integers(0, 80)


class SptMachine(RuleBasedStateMachine):
    """An SPT store and a dict do the same, and must agree."""

    open_store: Callable[[Path], SptStore]
    durable: bool

    def __init__(self) -> None:
        super().__init__()
        self._scratch = tempfile.TemporaryDirectory()
        self._path = Path(self._scratch.name)
        self._store = type(self).open_store(self._path)
        self._model: dict[int, dict[int, Row]] = {}
        self._notes: dict[int, int] = {}
        self._next_slot = 1

    @rule(region=REGIONS, indices=st.lists(INDICES, min_size=1, max_size=40), version=st.integers(0, (1 << 64) - 1))
    def record(self, region: int, indices: list[int], version: int) -> None:
        """Pages go to fresh slots; the last of a page that stands twice counts."""
        refs = np.zeros(len(indices), PAGE_REF)
        refs["region"], refs["index"], refs["version"] = region, np.array(indices, np.uint64), version
        refs["checksum"] = np.arange(len(indices)) + self._next_slot % 1000
        slots = np.arange(self._next_slot, self._next_slot + len(indices), dtype=np.uint64)
        self._next_slot += len(indices)
        before = self._slots()
        gone = self._store.record(refs, slots)
        pages = self._model.setdefault(region, {})
        for at, index in enumerate(indices):
            pages[index] = int(slots[at]), version, int(refs["checksum"][at])
        self._expect_gone(before | set(slots.tolist()), gone)

    @rule(region=REGIONS)
    def create(self, region: int) -> None:
        """Creating what exists changes nothing."""
        self._store.create(region)
        self._model.setdefault(region, {})

    @rule(region=REGIONS, into=REGIONS)
    def clone(self, region: int, into: int) -> None:
        """A clone shares every slot."""
        before = self._slots()
        gone = self._store.clone(region, into)
        self._model[into] = dict(self._model.get(region, {}))
        self._expect_gone(before, gone)

    @rule(region=REGIONS, start=INDICES, to=INDICES, count=COUNTS)
    def move(self, region: int, start: int, to: int, count: int) -> None:
        """As mremap does, overlapping ranges included."""
        before = self._slots()
        gone = self._store.move(region, start, to, count)
        pages = self._model.get(region, {})
        moved = {index - start + to: row for index, row in pages.items() if start <= index < start + count}
        kept = {i: row for i, row in pages.items() if not (start <= i < start + count or to <= i < to + count)}
        if region in self._model:
            self._model[region] = kept | moved
        self._expect_gone(before, gone)

    @rule(region=REGIONS, start=INDICES, count=st.one_of(COUNTS, st.just((1 << 64) - 1)))
    def drop(self, region: int, start: int, count: int) -> None:
        """A range is forgotten."""
        before = self._slots()
        gone = self._store.drop(region, start, count)
        for index in [i for i in self._model.get(region, {}) if start <= i < start + count]:
            del self._model[region][index]
        self._expect_gone(before, gone)

    @rule(region=REGIONS)
    def drop_region(self, region: int) -> None:
        """A region is forgotten."""
        before = self._slots()
        gone = self._store.drop_region(region)
        self._model.pop(region, None)
        self._expect_gone(before, gone)

    @rule(key=st.integers(0, 5), value=st.integers(0, (1 << 64) - 1))
    def note(self, key: int, value: int) -> None:
        """A number is kept."""
        self._store.note(key, value)
        self._notes[key] = value

    @rule(region=REGIONS, indices=st.lists(INDICES, min_size=1, max_size=10))
    def lookup(self, region: int, indices: list[int]) -> None:
        """What is not stored is not found, and its row is zeros."""
        refs = np.zeros(len(indices), PAGE_REF)
        refs["region"], refs["index"] = region, np.array(indices, np.uint64)
        rows = self._store.lookup(refs)
        for at, index in enumerate(indices):
            wanted = self._model.get(region, {}).get(index)
            found = int(rows.slots[at]), int(rows.versions[at]), int(rows.checksums[at])
            assert bool(rows.found[at]) == (wanted is not None)
            assert found == (wanted or (0, 0, 0))

    @rule(flush=st.booleans())
    def commit(self, flush: bool) -> None:
        """A commit changes nothing that can be seen."""
        (self._store.flush if flush else self._store.commit)()

    @precondition(lambda self: self.durable)
    @rule()
    def reopen(self) -> None:
        """A durable store is what it was."""
        self._store.close()
        self._store.close()
        self._store = type(self).open_store(self._path)

    @rule()
    def compare(self) -> None:
        """Regions, pages in index order, and notes agree."""
        assert self._store.regions() == {region: len(pages) for region, pages in self._model.items()}
        for region, pages in self._model.items():
            refs, slots = self._store.pages(region)
            rows = zip(refs["index"].tolist(), slots.tolist(), refs["version"].tolist(), refs["checksum"].tolist(),
                       strict=True)  # fmt: skip
            assert [(index, (slot, *rest)) for index, slot, *rest in rows] == sorted(pages.items())
        assert self._store.notes() == self._notes
        assert self._store.stat()["pages"] == sum(map(len, self._model.values()))

    def teardown(self) -> None:
        """Compare once more, and close."""
        with self._scratch, closing(self._store):
            self.compare()

    def _slots(self) -> set[int]:
        return {row[0] for pages in self._model.values() for row in pages.values()}

    def _expect_gone(self, before: set[int], gone: Any) -> None:
        assert sorted(gone.tolist()) == sorted(before - self._slots())


class PageMachine(RuleBasedStateMachine):
    """A page store and a dict do the same, and must agree."""

    open_store: Callable[[Path], PageStore]
    durable: bool

    def __init__(self) -> None:
        super().__init__()
        self._scratch = tempfile.TemporaryDirectory()
        self._path = Path(self._scratch.name)
        self._store = type(self).open_store(self._path)
        self._pages: dict[int, list[bytes]] = {}
        self._seed = 0

    @initialize()
    def open(self) -> None:
        """Nothing is referred to yet."""
        self._store.live(np.empty(0, np.uint64))

    @rule(kinds=st.lists(st.sampled_from(["random", "zero", "text", "words"]), min_size=1, max_size=30))
    def put(self, kinds: list[str]) -> None:
        """Fresh slots, none of which is in use (a store may give pages of one content one slot)."""
        batch = [self._page(kind) for kind in kinds]
        buffer = bytearray(b"".join(batch))
        slots = self._store.put(memoryview(buffer), page_checksums(buffer))
        buffer[:] = bytes(len(buffer))
        for slot, page in zip(slots.tolist(), batch, strict=True):
            assert all(other == page for other in self._pages.get(slot, []))
            self._pages.setdefault(slot, []).append(page)

    @precondition(lambda self: self._pages)
    @rule(data=st.data())
    def get(self, data: st.DataObject) -> None:
        """Any slots, in any order, repeats included."""
        slots = data.draw(st.lists(st.sampled_from(sorted(self._pages)), min_size=1, max_size=20))
        into = bytearray(len(slots) * PAGE_BYTES)
        self._store.get(np.array(slots, np.uint64), memoryview(into))
        assert into == b"".join(self._pages[slot][0] for slot in slots)

    @precondition(lambda self: self._pages)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """What was freed may be given again; the rest stays."""
        slots = data.draw(st.lists(st.sampled_from(sorted(self._pages)), min_size=1, max_size=20, unique=True))
        self._store.free(np.array(slots, np.uint64))
        for slot in slots:
            self._pages[slot].pop()
            if not self._pages[slot]:
                del self._pages[slot]

    @rule(flush=st.booleans())
    def sync(self, flush: bool) -> None:
        """Syncing changes nothing that can be seen."""
        (self._store.flush if flush else self._store.sync)()

    @precondition(lambda self: self.durable)
    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        """What the SPT refers to is there, the rest is free."""
        # Drawn first: a history may end with any draw, and is to end with an open store.
        dropped = (
            data.draw(st.lists(st.sampled_from(sorted(self._pages)), max_size=5, unique=True)) if self._pages else []
        )
        self._store.close()
        self._store.close()
        for slot in dropped:
            del self._pages[slot]
        self._store = type(self).open_store(self._path)
        self._store.live(np.array([s for s, copies in self._pages.items() for _ in copies], np.uint64))

    def teardown(self) -> None:
        """Read everything once more, and close."""
        with self._scratch, closing(self._store):
            if self._pages:
                into = bytearray(len(self._pages) * PAGE_BYTES)
                self._store.get(np.array(list(self._pages), np.uint64), memoryview(into))
                assert into == b"".join(copies[0] for copies in self._pages.values())
            assert self._store.stat()["pages"] == sum(map(len, self._pages.values()))

    def _page(self, kind: str) -> bytes:
        self._seed += 1
        if kind == "zero":
            return bytes(PAGE_BYTES)
        if kind == "text":
            return (b"line %d of a text\n" % self._seed * 400)[:PAGE_BYTES]
        if kind == "words":
            return bytes(batch_of(1, [self._seed], 1)[1])
        return np.random.default_rng(self._seed).bytes(PAGE_BYTES)
