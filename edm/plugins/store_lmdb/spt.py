"""The SPT store `lmdb`: the table in memory, a row a page in LMDB.

Place on the path: asked by the memory server [6, 9, 10]; its commit comes before the acknowledgement of an eviction.

Every row has a checksum, and with each transaction goes the number of all rows and the sum of their checksums: a row
that is damaged, missing or too much is found when the store opens. Lookups are answered from memory only.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from edm._native import ffi, lib
from edm.dms.table import NO_SLOTS, PageTable, refs_at, words_at
from edm.errors import Corrupt, StoreError
from edm.plugins.store_lmdb.pages import bytes_of
from edm.types import PAGE_REF

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edm.plugins.store_lmdb.environment import Environment
    from edm.stores.damage import Damage
    from edm.types import PageRefs, Slots

KEY: Final = np.dtype([("region", ">u8"), ("index", ">u8")])
ROW: Final = np.dtype([("slot", "<u8"), ("version", "<u8"), ("checksum", "<u8"), ("hash", "<u8")])
_PAIR: Final = struct.Struct(">QQ")
_TOTALS: Final = struct.Struct("<QQ")
_TOTALS_KEY: Final = b"totals"
_ROWS_AT_ONCE: Final = 1 << 18
_ODD: Final = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_UNCOUNTED_FROM: Final = np.uint64(1 << 63)
"""Slots from here on are no place in a page store (a page of zeros), and many pages may have the same."""


@attrs.define
class _Changes:
    """What a transaction does: ranges to delete, then rows to write, in this order."""

    delete: list[tuple[int, int, int]] = attrs.field(factory=list)
    refs: PageRefs = attrs.field(factory=lambda: np.zeros(0, PAGE_REF))
    slots: Slots = attrs.field(factory=lambda: NO_SLOTS)
    named: list[tuple[str, int, int | None]] = attrs.field(factory=list)
    written_over: tuple[int, int] | None = None
    """How many rows the pages had before, and the sum of those rows' checksums; None: not known."""


class LmdbSpt(PageTable):
    """A `PageTable` that is read from, and kept in, an environment, which it closes."""

    def __init__(self, environment: Environment) -> None:
        super().__init__()
        self._environment = environment
        self._pending: list[_Changes] = []
        self._closed = False
        # Those with an entry in LMDB, or in what is pending.
        self._named: set[int] = set()
        # None: a commit is said to have failed, and may be there all the same once the environment is opened anew.
        self._totals: tuple[int, int] | None = None
        try:
            self._rows = environment.table("spt", integer_key=False)
            self._names = environment.table("spt regions and notes", integer_key=False)
            self._totals = environment.read(self._load, buffers=False)
        except BaseException:
            with contextlib.suppress(StoreError):
                environment.close("spt")
            raise

    # ---- changes: to the table at once, to LMDB with the next commit

    def record(self, refs: PageRefs, slots: Slots) -> Slots:
        """See `SptStore`."""
        refs, slots = np.ascontiguousarray(refs), np.ascontiguousarray(slots, np.uint64)
        before = self._rows_there(refs)
        gone = super().record(refs, slots)
        # Where it is known how many rows there are, the pages are of one region.
        regions = refs["region"] if before is None else refs["region"][:1]
        new = set(regions.tolist()) - self._named
        self._named |= new
        named: list[tuple[str, int, int | None]] = [("region", region, 0) for region in sorted(new)]
        self._pending.append(_Changes(refs=refs.copy(), slots=slots.copy(), named=named, written_over=before))
        return gone

    def _rows_there(self, refs: PageRefs) -> tuple[int, int] | None:
        """What `_Changes.written_over` says; not known of pages that stand twice in refs, or not in order."""
        count, total = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        if not lib.edm_lmdb_rows_there(self.native, refs_at(refs), len(refs), count, total):
            return None
        return int(count[0]), int(total[0])

    def create(self, region: int) -> None:
        """See `SptStore`."""
        super().create(region)
        self._named.add(region)
        self._pending.append(_Changes(named=[("region", region, 0)]))

    def clone(self, region: int, into: int) -> Slots:
        """See `SptStore`."""
        gone = super().clone(region, into)
        self._named.add(into)
        if region != into:
            refs, slots = self.pages(into)
            self._pending.append(_Changes([(into, 0, 1 << 64)], refs, slots, [("region", into, 0)]))
        else:
            self._pending.append(_Changes(named=[("region", into, 0)]))
        return gone

    def move(self, region: int, start: int, to: int, count: int) -> Slots:
        """See `SptStore`."""
        gone = super().move(region, start, to, count)
        if start != to:
            refs, slots = self.pages(region)
            moved = (refs["index"] >= np.uint64(to)) & (refs["index"] - np.uint64(to) < np.uint64(count))
            self._pending.append(_Changes([(region, start, count), (region, to, count)], refs[moved], slots[moved]))
        return gone

    def drop(self, region: int, start: int, count: int) -> Slots:
        """See `SptStore`."""
        gone = super().drop(region, start, count)
        self._pending.append(_Changes([(region, start, count)]))
        return gone

    def drop_region(self, region: int) -> Slots:
        """See `SptStore`."""
        gone = super().drop_region(region)
        self._named.discard(region)
        self._pending.append(_Changes([(region, 0, 1 << 64)], named=[("region", region, None)]))
        return gone

    def note(self, key: int, value: int) -> None:
        """See `SptStore`."""
        super().note(key, value)
        self._pending.append(_Changes(named=[("note", key, value)]))

    # ---- making them last

    def commit(self) -> None:
        """See `SptStore`: everything since the last commit is one transaction."""
        if self._pending:
            # What frees room must not fail for want of it.
            try:
                self._totals = self._environment.write(self._write, may_fill=False)
            except StoreError:
                self._totals = None
                raise
            self._pending.clear()

    def flush(self) -> None:
        """See `SptStore`."""
        self.commit()
        self._environment.flush()

    def verify(self) -> list[Damage]:
        """What of the file is damaged that opening it does not find out."""
        return self._environment.verify()

    def compact(self) -> int:
        """Give the room of what was deleted back to the disk; returns how many bytes."""
        self.commit()
        return self._environment.compact()

    @property
    def damage(self) -> list[Damage]:
        """What was found damaged when it was opened, and could be done without."""
        return self._environment.damage

    def stat(self) -> dict[str, Any]:
        """The table's figures, and the environment's size."""
        return {**super().stat(), **self._environment.stat()}

    def close(self) -> None:
        """See `SptStore`."""
        if self._closed:
            return
        self._closed = True
        try:
            self.commit()
        finally:
            self._environment.close("spt")

    def _write(self, transaction: Any) -> tuple[int, int]:
        count, total = self._totals or _TOTALS.unpack(
            transaction.get(_TOTALS_KEY, bytes(_TOTALS.size), db=self._names.handle)
        )
        for changes in self._pending:
            for region, start, pages in changes.delete:
                deleted, deleted_sum = self._delete(transaction, region, start, pages)
                count, total = count - deleted, total - deleted_sum
            for kind, key, value in changes.named:
                self._name(transaction, kind, key, value)
            if len(changes.refs):
                # Where it is not sure what is there, the rows that are written over say what they are.
                over = changes.written_over if self._totals else None
                added, added_sum = self._put(transaction, changes.refs, changes.slots, over)
                count, total = count + added, total + added_sum
        totals = count, total % (1 << 64)
        transaction.put(_TOTALS_KEY, _TOTALS.pack(*totals), db=self._names.handle)
        return totals

    def _name(self, transaction: Any, kind: str, key: int, value: int | None) -> None:
        name = f"{kind} {key}".encode()
        if value is None:
            transaction.delete(name, db=self._names.handle)
        else:
            transaction.put(name, _TOTALS.pack(value, _check_of(key, value)), db=self._names.handle)

    def _put(self, transaction: Any, refs: PageRefs, slots: Slots, over: tuple[int, int] | None) -> tuple[int, int]:
        keys, rows, new_sum = rows_of(refs, slots)
        packed_keys, packed_rows = bytes_of(keys), bytes_of(rows)
        with transaction.cursor(self._rows.handle) as cursor:
            if over is not None:
                cursor.putmulti(zip(packed_keys, packed_rows, strict=True))
                return len(refs) - over[0], new_sum - over[1]
            added, total = len(refs), new_sum
            for key, row in zip(packed_keys, packed_rows, strict=True):
                if cursor.set_key(key):
                    added -= 1
                    total -= int.from_bytes(bytes(cursor.value())[-8:], "little")
                cursor.put(key, row)
        return added, total

    def _delete(self, transaction: Any, region: int, start: int, pages: int) -> tuple[int, int]:
        end = _PAIR.pack(region, start + pages) if start + pages < 1 << 64 else None
        deleted = total = 0
        with transaction.cursor(self._rows.handle) as cursor:
            there = cursor.set_range(_PAIR.pack(region, start))
            while there:
                key = bytes(cursor.key())
                if key[:8] != _PAIR.pack(region, 0)[:8] or (end is not None and key >= end):
                    break
                total += int.from_bytes(bytes(cursor.value())[-8:], "little")
                deleted += 1
                there = cursor.delete()
        return deleted, total

    # ---- opening

    def _load(self, transaction: Any) -> tuple[int, int]:
        totals = (0, 0)
        with transaction.cursor(self._names.handle) as cursor:
            for name, value in cursor:
                if len(value) != _TOTALS.size:
                    raise self._damaged(f"the entry {bytes(name)!r}")
                if bytes(name) == _TOTALS_KEY:
                    totals = _TOTALS.unpack(value)
                    continue
                kind, _, key = bytes(name).decode("ascii", errors="replace").partition(" ")
                number, check = _TOTALS.unpack(value)
                if kind not in {"region", "note"} or not key.isdigit() or check != _check_of(int(key), number):
                    raise self._damaged(f"the entry '{kind} {key}'")
                if kind == "region":
                    super().create(int(key))
                    self._named.add(int(key))
                else:
                    super().note(int(key), number)
        if self._load_rows(transaction) != totals:
            raise self._damaged("rows are missing or too many")
        return totals

    def _load_rows(self, transaction: Any) -> tuple[int, int]:
        count = total = 0
        slots_of: list[Slots] = []
        for keys, rows in self._batches(transaction):
            refs = np.zeros(len(keys), PAGE_REF)
            refs["region"], refs["index"] = keys["region"], keys["index"]
            refs["version"], refs["checksum"] = rows["version"], rows["checksum"].astype(np.uint32)
            slots = np.ascontiguousarray(rows["slot"])
            _, again, rows_sum = rows_of(refs, slots)
            if not np.array_equal(again, rows):
                bad = int(np.flatnonzero(again != rows)[0])
                raise self._damaged(f"the row of page {int(refs['region'][bad]):#x}:{int(refs['index'][bad]):#x}")
            super().record(refs, slots)
            slots_of.append(slots[slots < _UNCOUNTED_FROM])
            count += len(refs)
            total += rows_sum
        self._share(np.concatenate(slots_of or [NO_SLOTS]))
        return count, total % (1 << 64)

    def _share(self, slots: Slots) -> None:
        unique, counts = np.unique(slots, return_counts=True)
        several = counts > 1
        pairs = np.ascontiguousarray(np.stack([unique[several], (counts[several] - 1).astype(np.uint64)], axis=1))
        if len(pairs) and lib.edm_spt_share(self.native, words_at(pairs), len(pairs)):
            raise MemoryError

    def _batches(self, transaction: Any) -> Iterator[tuple[Any, Any]]:
        # Two cursors side by side, so that no row is handled by itself: there may be millions.
        with transaction.cursor(self._rows.handle) as at_keys, transaction.cursor(self._rows.handle) as at_rows:
            all_keys, all_rows = at_keys.iternext(values=False), at_rows.iternext(keys=False)
            while keys := b"".join(itertools.islice(all_keys, _ROWS_AT_ONCE)):
                rows = b"".join(itertools.islice(all_rows, _ROWS_AT_ONCE))
                # A row of another size would shift those behind it, whose hashes then tell.
                if len(keys) % KEY.itemsize or len(rows) != len(keys) // KEY.itemsize * ROW.itemsize:
                    raise self._damaged("a row has another size")
                yield np.frombuffer(keys, KEY), np.frombuffer(rows, ROW)

    def _damaged(self, what: str) -> Corrupt:
        return Corrupt(f"{self._environment.path}: the page table is damaged: {what}")


def rows_of(refs: PageRefs, slots: Slots) -> tuple[Any, Any, int]:
    """The keys and rows of pages, each row with its own checksum, and the sum of these, modulo 2^64."""
    keys, rows = np.empty(len(refs), KEY), np.empty(len(refs), ROW)
    words = (words_at(array.view(np.uint64)) for array in (keys, rows))
    return keys, rows, int(lib.edm_lmdb_rows(refs_at(refs), words_at(slots), len(refs), *words))


def _check_of(key: int, value: int) -> int:
    return (key * _ODD[0] + value * _ODD[1] + 1) % (1 << 64)
