"""The SPT's table in memory (native/spt_table.c): what every SPT store of EDM answers from.

Place on the path: called by `MemoryServer` [6, 9, 10], alone as the SPT store `memory`, and as the table that the SPT
stores `file` and `lmdb` keep on disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edm._native import ffi, lib
from edm.types import PAGE_BYTES, PAGE_REF, SptRows

if TYPE_CHECKING:
    from edm.types import PageRefs, Slots

NO_SLOTS: Final = np.empty(0, np.uint64)


def refs_at(refs: PageRefs) -> Any:
    """The C pointer to a batch; the array stays the caller's."""
    return ffi.from_buffer("struct edm_page_ref[]", refs)


def words_at(words: Any) -> Any:
    """The C pointer to a uint64 array."""
    return ffi.from_buffer("uint64_t[]", words)


def page_checksums(pages: Any) -> Any:
    """The CRC-32C of each page in a buffer: an array of uint32."""
    checksums = np.empty(len(pages) // PAGE_BYTES, np.uint32)
    lib.edm_crc32c_pages(ffi.from_buffer(pages), len(checksums), ffi.from_buffer("uint32_t[]", checksums))
    return checksums


class PageTable:
    """Region and page number → slot, version, checksum; slots counted by reference.

    Every change may raise MemoryError, and has then changed nothing. evicts: whether the memory server may record and
    commit evictions from C, past this object's methods; journal: where, NULL for nowhere (`edm_server_evicts`).
    """

    evicts = False
    journal = ffi.NULL

    def __init__(self) -> None:
        table = lib.edm_spt_new()
        if table == ffi.NULL:
            raise MemoryError
        self.native = ffi.gc(table, lib.edm_spt_free)

    def answer(self, refs: PageRefs, slots: Slots) -> int:
        """Fill version, checksum and status (1: stored, 0: not) of each ref and its slot; how many are stored."""
        return int(lib.edm_spt_lookup(self.native, refs_at(refs), len(refs), words_at(slots)))

    def lookup(self, refs: PageRefs) -> SptRows:
        """See `SptStore`."""
        found = refs.copy()
        slots = np.empty(len(refs), np.uint64)
        lib.edm_spt_lookup(self.native, refs_at(found), len(refs), words_at(slots))
        return SptRows(
            found["status"].astype(np.bool_),
            slots,
            np.ascontiguousarray(found["version"]),
            np.ascontiguousarray(found["checksum"]),
        )

    def record(self, refs: PageRefs, slots: Slots) -> Slots:
        """See `SptStore`."""
        refs, slots = np.ascontiguousarray(refs), np.ascontiguousarray(slots, np.uint64)
        _changed(lib.edm_spt_record(self.native, refs_at(refs), words_at(slots), len(refs)))
        return self._gone()

    def create(self, region: int) -> None:
        """See `SptStore`."""
        _changed(lib.edm_spt_create(self.native, region))

    def clone(self, region: int, into: int) -> Slots:
        """See `SptStore`."""
        _changed(lib.edm_spt_clone(self.native, region, into))
        return self._gone()

    def move(self, region: int, start: int, to: int, count: int) -> Slots:
        """See `SptStore`."""
        _changed(lib.edm_spt_move(self.native, region, start, to, count))
        return self._gone()

    def drop(self, region: int, start: int, count: int) -> Slots:
        """See `SptStore`."""
        _changed(lib.edm_spt_drop(self.native, region, start, count))
        return self._gone()

    def drop_region(self, region: int) -> Slots:
        """See `SptStore`."""
        _changed(lib.edm_spt_drop_region(self.native, region))
        return self._gone()

    def regions(self) -> dict[int, int]:
        """See `SptStore`."""
        count = lib.edm_spt_regions(self.native, ffi.NULL, ffi.NULL, 0)
        ids, pages = np.empty(count, np.uint64), np.empty(count, np.uint64)
        lib.edm_spt_regions(self.native, words_at(ids), words_at(pages), count)
        return dict(sorted(zip(ids.tolist(), pages.tolist(), strict=True)))

    def pages(self, region: int) -> tuple[PageRefs, Slots]:
        """See `SptStore`."""
        count = self._count(region, 0, ffi.NULL, ffi.NULL)
        refs, slots = np.zeros(count, PAGE_REF), np.empty(count, np.uint64)
        self._count(region, count, refs_at(refs), words_at(slots))
        return refs, slots

    def note(self, key: int, value: int) -> None:
        """See `SptStore`."""
        _changed(lib.edm_spt_note(self.native, key, value))

    def notes(self) -> dict[int, int]:
        """See `SptStore`."""
        pairs = _pairs(lib.edm_spt_notes, self.native)
        return {int(key): int(value) for key, value in pairs}

    def shares(self) -> Any:
        """Slots with more than one reference: rows of (slot, references beyond the first)."""
        return _pairs(lib.edm_spt_shares, self.native)

    def stat(self) -> dict[str, Any]:
        """Pages, regions, and what the table takes."""
        return {
            "pages": int(lib.edm_spt_count(self.native)),
            "regions": int(lib.edm_spt_regions(self.native, ffi.NULL, ffi.NULL, 0)),
            "shared_slots": int(lib.edm_spt_shares(self.native, ffi.NULL, 0)),
            "memory_bytes": int(lib.edm_spt_memory(self.native)),
        }

    def _count(self, region: int, most: int, refs: Any, slots: Any) -> int:
        count = int(lib.edm_spt_pages(self.native, region, refs, slots, most))
        if count < 0:
            raise MemoryError
        return count

    def _gone(self) -> Slots:
        count = lib.edm_spt_gone(self.native, ffi.NULL)
        if not count:
            return NO_SLOTS
        gone = np.empty(count, np.uint64)
        lib.edm_spt_gone(self.native, words_at(gone))
        return gone


def _changed(result: int) -> None:
    if result:
        raise MemoryError


def _pairs(call: Any, table: Any) -> Any:
    count = call(table, ffi.NULL, 0)
    pairs = np.empty((count, 2), np.uint64)
    call(table, words_at(pairs), count)
    return pairs
