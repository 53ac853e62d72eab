"""The page store `lmdb`: a row a page, in two parts.

Place on the path: step [7], and the end of an eviction.

LMDB keeps a large value on pages of its own, behind 16 bytes of header: a value of 4096 bytes would take two. So a page
is a value of 4080 bytes, which takes exactly one, and its last 16 bytes stand with its checksum in a second table,
about a hundred to a page. Slots count upwards and are never given twice.
"""

from __future__ import annotations

import contextlib
import logging
import struct
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import lmdb
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
_FREE_AT_ONCE: Final = 4096
_VALUE_BYTES: Final = {"heads": _HEAD_BYTES, "tails": _TAIL_ROW.itemsize}


class LmdbPages:
    """A `PageStore` in an environment, which it closes."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._to_free: list[bytes] = []
        # Of puts said to have failed, which may be there all the same once the environment is opened anew.
        self._in_doubt: list[bytes] = []
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
        slots = np.arange(self._next_slot, self._next_slot + len(rows), dtype=np.uint64)
        tails = np.zeros(len(rows), _TAIL_ROW)
        tails["tail"] = np.ascontiguousarray(rows[:, _HEAD_BYTES:]).view(f"V{_TAIL_BYTES}")[:, 0]
        tails["checksum"] = checksums
        keys = bytes_of(slots)
        heads = [pages[at : at + _HEAD_BYTES] for at in range(0, len(pages), PAGE_BYTES)]
        packed = bytes_of(tails)

        def work(transaction: Any) -> int:
            self._delete(transaction)
            self._append(transaction, self._heads, zip(keys, heads, strict=True))
            self._append(transaction, self._tails, zip(keys, packed, strict=True))
            return self._count(transaction)

        self._vet()
        try:
            try:
                pages_now = self._environment.write(work, may_fill=True)
            except StoreFull:
                if not self._to_free:
                    raise
                self._delete_now()
                self._environment.turn()
                pages_now = self._environment.write(work, may_fill=True)
        except StoreError:
            self._in_doubt += keys
            self._next_slot += len(rows)
            raise
        self._deleted()
        self._next_slot += len(rows)
        self._pages = pages_now
        return slots

    def _count(self, transaction: Any) -> int:
        return int(transaction.stat(self._heads.handle)["entries"])

    @staticmethod
    def _append(transaction: Any, table: Any, items: Any) -> None:
        with transaction.cursor(table.handle) as cursor:
            cursor.putmulti(items, append=True)

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
        """See `PageStore`; they are deleted with the next put, or once there are many."""
        self._to_free += bytes_of(np.ascontiguousarray(slots, np.uint64))
        if len(self._to_free) >= _FREE_AT_ONCE:
            self._delete_now()

    def live(self, slots: Slots) -> None:
        """See `PageStore`."""
        wanted = np.unique(slots)
        if len(wanted):
            self._next_slot = max(self._next_slot, int(wanted[-1]) + 1)
        there = self._environment.read(self._all_slots)
        self.free(there[~np.isin(there, wanted)])
        self._delete_now()

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
        return {"pages": self._pages - len(self._to_free), **self._environment.stat()}

    def close(self) -> None:
        """See `PageStore`."""
        if self._closed:
            return
        self._closed = True
        try:
            self._delete_now()
        finally:
            self._environment.close("pages")

    def _delete_now(self) -> None:
        self._vet()
        if self._to_free:
            self._pages = int(self._environment.write(self._delete, may_fill=False))
            self._deleted()

    def _deleted(self) -> None:
        self._to_free.clear()
        self._in_doubt.clear()

    def _vet(self) -> None:
        """Leave out of what is to be deleted whose value's header is damaged: it stays, and nobody asks for it.

        Deleting it would free as many LMDB pages as that header says, or make LMDB give the whole transaction up.
        """
        for keys in (self._to_free, self._in_doubt):
            at = 0
            while at < len(keys):
                at = self._environment.read(partial(self._first_damaged, keys, at))
                if at < len(keys):
                    log.error("%s: slot %d is damaged and is not freed", self._environment.path, *_KEY.unpack(keys[at]))
                    del keys[at]

    def _first_damaged(self, keys: list[bytes], start: int, transaction: Any) -> int:
        # All at once; one that cannot be read, or is damaged, is then looked for.
        with contextlib.suppress(lmdb.CorruptedError), transaction.cursor(self._heads.handle) as cursor:
            values = [value for _, value in cursor.getmulti(keys[start:])]
            if self._environment.values_are_sound(values):
                return len(keys)
        is_sound = self._environment.value_is_sound
        with transaction.cursor(self._heads.handle) as cursor:
            for at in range(start, len(keys)):
                try:
                    if cursor.set_key(keys[at]) and not is_sound(cursor.value()):
                        return at
                except lmdb.CorruptedError:
                    return at
        return len(keys)

    def _delete(self, transaction: Any) -> int:
        # Table by table, and by position: this is a quarter of a put.
        delete = transaction.delete
        for table in (self._heads.handle, self._tails.handle):
            for key in (*self._to_free, *self._in_doubt):
                delete(key, b"", table)
        return self._count(transaction)

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
