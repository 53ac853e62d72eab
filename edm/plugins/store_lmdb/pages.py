"""The page store `lmdb`: a row a page, in two parts.

Place on the path: step [7], and the end of an eviction.

LMDB keeps a large value on pages of its own, behind 16 bytes of header: a value of 4096 bytes would take two. So a page
is a value of 4080 bytes, which takes exactly one, and its last 16 bytes stand with its checksum in a second table,
about a hundred to a page.

A freed slot keeps its rows until they are written over by a later put, which is half the work of deleting them and
adding others. LMDB writes nothing in place: what a death or a loss of power undoes is there as before.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edm.dms.table import page_checksums
from edm.errors import Corrupt, StoreError, StoreFull
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from edm.plugins.store_lmdb.environment import Environment, Table
    from edm.stores.damage import Damage
    from edm.types import Slots

log = logging.getLogger(__name__)

_HEAD_BYTES: Final = 4080
_TAIL_BYTES: Final = PAGE_BYTES - _HEAD_BYTES
_TAIL_ROW: Final = np.dtype([("tail", f"V{_TAIL_BYTES}"), ("checksum", "<u4"), ("reserved", "<u4")])
_KEY: Final = struct.Struct("=Q")
_MOST_FREE: Final = 16384
"""Freed slots that are kept to be written over: as many as a group of pages; the rows of more are deleted."""
_VALUE_BYTES: Final = {"heads": _HEAD_BYTES, "tails": _TAIL_ROW.itemsize}


class LmdbPages:
    """A `PageStore` in an environment, which it closes."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        # Oldest first. Of puts said to have failed, too: once the environment is opened anew, they may be there or not.
        self._free: deque[Slots] = deque()
        self._free_count = 0
        self._closed = False
        try:
            self._heads = environment.table("heads", integer_key=True)
            self._tails = environment.table("tails", integer_key=True)
            self._next_slot = 1 + int(environment.read(self._last))
            self._pages = int(environment.read(self._count))
        except BaseException:
            with contextlib.suppress(StoreError):
                environment.close("pages")
            raise

    def put(self, pages: memoryview, checksums: Any) -> Slots:
        """See `PageStore`."""
        rows = np.frombuffer(pages, np.uint8).reshape(-1, PAGE_BYTES)
        tails = np.zeros(len(rows), _TAIL_ROW)
        tails["tail"] = np.ascontiguousarray(rows[:, _HEAD_BYTES:]).view(f"V{_TAIL_BYTES}")[:, 0]
        tails["checksum"] = checksums
        heads = [pages[at : at + _HEAD_BYTES] for at in range(0, len(pages), PAGE_BYTES)]
        try:
            return self._put(heads, bytes_of(tails))
        except StoreFull:
            if not self._free:
                raise
            self._delete_now()
            self._environment.turn()
            return self._put(heads, bytes_of(tails))

    def _put(self, heads: list[memoryview], tails: list[bytes]) -> Slots:
        slots, all_new = self._take(len(heads))
        keys = bytes_of(slots)

        def work(transaction: Any) -> None:
            for table, values in ((self._heads, heads), (self._tails, tails)):
                with transaction.cursor(table.handle) as cursor:
                    cursor.putmulti(zip(keys, values, strict=True), append=all_new)

        try:
            self._environment.write(work, may_fill=True)
        except StoreError:
            self._give_back(slots)
            raise
        self._pages += len(slots)
        return slots

    def _take(self, count: int) -> tuple[Slots, bool]:
        """Slots to write, freed ones first; and whether all are new."""
        parts: list[Slots] = []
        try:
            while count and self._free:
                oldest = self._free[0]
                sound = self._sound(oldest[:count])
                self._forget(len(oldest[:count]))
                parts.append(sound)
                count -= len(sound)
        except StoreError:
            for part in parts:
                self._give_back(part)
            raise
        if not count:
            return (parts[0] if len(parts) == 1 else np.concatenate(parts)), False
        new = np.arange(self._next_slot, self._next_slot + count, dtype=np.uint64)
        self._next_slot += count
        return np.concatenate([*parts, new]), not parts

    def _forget(self, count: int) -> None:
        """Take as many freed slots off the list, which may not be longer than its oldest part."""
        oldest = self._free.popleft()
        if len(oldest) > count:
            self._free.appendleft(oldest[count:])
        self._free_count -= count

    def _give_back(self, slots: Slots) -> None:
        self._free.append(slots)
        self._free_count += len(slots)

    def get(self, slots: Slots, into: memoryview) -> None:
        """See `PageStore`."""
        keys = bytes_of(slots)
        rows = np.frombuffer(into, np.uint8).reshape(-1, PAGE_BYTES)
        checksums = np.empty(len(keys), np.uint32)

        def work(transaction: Any) -> None:
            heads, tails = (self._values(transaction, table, keys) for table in (self._heads, self._tails))
            if heads is None or tails is None:
                raise Corrupt(f"{self._environment.path}: slot {self._first_missing(transaction, keys)} holds no page")
            at = 0
            for head in heads:
                into[at : at + _HEAD_BYTES] = head
                at += PAGE_BYTES
            packed = b"".join(tails)
            rows[:, _HEAD_BYTES:] = np.frombuffer(packed, np.uint8).reshape(len(keys), -1)[:, :_TAIL_BYTES]
            checksums[:] = np.frombuffer(packed, _TAIL_ROW)["checksum"]

        self._environment.read(work)
        found = page_checksums(into)
        if not np.array_equal(found, checksums):
            slot = int(slots[np.flatnonzero(found != checksums)[0]])
            raise Corrupt(f"{self._environment.path}: slot {slot}: its checksum does not match")

    @staticmethod
    def _values(transaction: Any, table: Table, keys: list[bytes]) -> list[memoryview] | None:
        """The values of keys, or None if one is missing or has another size."""
        with transaction.cursor(table.handle) as cursor:
            values = [value for _, value in cursor.getmulti(keys)]
        return values if len(values) == len(keys) and set(map(len, values)) <= {_VALUE_BYTES[table.name]} else None

    def _first_missing(self, transaction: Any, keys: list[bytes]) -> int:
        for key in keys:
            if None in [self._values(transaction, table, [key]) for table in (self._heads, self._tails)]:
                return int(_KEY.unpack(key)[0])
        raise AssertionError("unreachable: asked only when one is missing")

    def free(self, slots: Slots) -> None:
        """See `PageStore`; later puts write over them, and where there are many they are deleted."""
        if len(slots):
            self._give_back(np.array(slots, np.uint64))
            self._pages -= len(slots)
        if self._free_count > _MOST_FREE:
            # Where that fails they are kept: nobody waits for the room, or the next put says so.
            with contextlib.suppress(StoreError):
                self._delete_now(self._free_count - _MOST_FREE)

    def live(self, slots: Slots) -> None:
        """See `PageStore`."""
        wanted = np.unique(slots)
        if len(wanted):
            self._next_slot = max(self._next_slot, int(wanted[-1]) + 1)
        there = self._environment.read(self._all_slots)
        self.free(there[~np.isin(there, wanted)])

    def sync(self) -> None:
        """A put is a transaction, which was synced as the policy says."""

    def flush(self) -> None:
        """See `PageStore`."""
        self._environment.flush()

    def verify(self) -> list[Damage]:
        """What of the file is damaged that opening it does not find out."""
        return self._environment.verify()

    def compact(self) -> int:
        """Give the room of what was deleted back to the disk; returns how many bytes."""
        self._delete_now()
        return self._environment.compact()

    def where(self, _slot: int) -> Any:
        """The file that holds a slot."""
        return self._environment.path

    @property
    def damage(self) -> list[Damage]:
        """What was found damaged when it was opened, and could be done without."""
        return self._environment.damage

    def stat(self) -> dict[str, Any]:
        """Pages, and the environment's size."""
        return {"pages": self._pages, **self._environment.stat()}

    def close(self) -> None:
        """See `PageStore`."""
        if self._closed:
            return
        self._closed = True
        try:
            self._delete_now()
        finally:
            self._environment.close("pages")

    def _delete_now(self, at_least: int | None = None) -> None:
        """Delete the rows of freed slots, of all or those first that came free first; raises `StoreError`."""
        chosen: list[Slots] = []
        count, wanted = 0, self._free_count if at_least is None else at_least
        for part in self._free:
            if count >= wanted:
                break
            chosen.append(part)
            count += len(part)
        if not chosen:
            return
        keys = bytes_of(self._sound(np.concatenate(chosen)))

        def work(transaction: Any) -> None:
            # Table by table, and by position.
            delete = transaction.delete
            for table in (self._heads.handle, self._tails.handle):
                for key in keys:
                    delete(key, b"", table)

        self._environment.write(work, may_fill=False)
        for part in chosen:
            self._forget(len(part))

    def _sound(self, slots: Slots) -> Slots:
        """Leave out of freed slots those whose value's header is damaged: they stay, and nobody asks for them.

        Deleting such a value would free as many LMDB pages as that header says.
        """
        at = 0
        while (at := at + self._environment.unsound(self._heads, slots[at:])) < len(slots):
            log.error("%s: slot %d is damaged and is not freed", self._environment.path, slots[at])
            slots = np.delete(slots, at)
        return slots

    def _count(self, transaction: Any) -> int:
        return int(transaction.stat(self._heads.handle)["entries"])

    def _last(self, transaction: Any) -> int:
        # Every slot has a row in both tables; here no row has an LMDB page of its own, which might be damaged.
        with transaction.cursor(self._tails.handle) as cursor:
            return int(_KEY.unpack(cursor.key())[0]) if cursor.last() else 0

    def _all_slots(self, transaction: Any) -> Slots:
        with transaction.cursor(self._tails.handle) as cursor:
            return np.frombuffer(b"".join(cursor.iternext(values=False)), np.uint64)


def bytes_of(array: Any) -> list[bytes]:
    """Each element of a contiguous array as LMDB takes it."""
    parts: list[bytes] = array.view(f"V{array.dtype.itemsize}").tolist()
    return parts
