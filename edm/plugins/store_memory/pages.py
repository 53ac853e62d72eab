"""The page store `memory`: pages in slabs of anonymous memory.

Place on the path: step [7], and the end of an eviction.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edm._native import ffi, lib
from edm.config.machine import memory_limit
from edm.dms.table import page_checksums
from edm.errors import Corrupt, StoreFull
from edm.ops import PAGE_STORE, capsule
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edm.types import Slots

SLAB_PAGES: Final = 4096


class Slab:
    """16 MiB of pages, their checksums, and which of them are in use."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SLAB_PAGES * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.pages = np.frombuffer(self._memory, np.uint8).reshape(SLAB_PAGES, PAGE_BYTES)
        self.checksums = np.zeros(SLAB_PAGES, np.uint32)
        self.used = np.zeros(SLAB_PAGES, np.bool_)
        self.used_pages = 0


class MemoryPages:
    """A `PageStore` in RAM. limit_bytes: of page bytes; 0 for half of what the machine has or the cgroup allows."""

    def __init__(self, limit_bytes: int = 0) -> None:
        self._limit_pages = (limit_bytes or memory_limit().bytes // 2) // PAGE_BYTES
        self._slabs: dict[int, Slab] = {}
        native = lib.edm_slabs_new(SLAB_PAGES)
        if native == ffi.NULL:
            raise MemoryError
        self._native = ffi.gc(native, lib.edm_slabs_free)
        self.__edm_ops__ = capsule(int(ffi.cast("uintptr_t", lib.edm_slabs_table(native))), PAGE_STORE)
        self._next_slab = 0
        self._free = np.empty(0, np.uint64)
        self._free_count = 0
        self._used_pages = 0

    def put(self, pages: memoryview, checksums: Any) -> Slots:
        """See `PageStore`."""
        count = len(pages) // PAGE_BYTES
        if self._used_pages + count > self._limit_pages:
            raise StoreFull(f"memory store: its limit of {self._limit_pages} pages is reached")
        while self._free_count < count:
            self._add_slab()
        self._free_count -= count
        slots = self._free[self._free_count : self._free_count + count][::-1].copy()
        rows = np.frombuffer(pages, np.uint8).reshape(count, PAGE_BYTES)
        for slab, offsets, part in self._by_slab(slots):
            slab.pages[offsets] = rows[part]
            slab.checksums[offsets] = np.asarray(checksums)[part]
            slab.used[offsets] = True
            slab.used_pages += len(offsets) if isinstance(offsets, np.ndarray) else offsets.stop - offsets.start
        self._used_pages += count
        return slots

    def get(self, slots: Slots, into: memoryview) -> None:
        """See `PageStore`."""
        rows = np.frombuffer(into, np.uint8).reshape(len(slots), PAGE_BYTES)
        sums = np.empty(len(slots), np.uint32)
        for slab, offsets, part in self._by_slab(slots):
            if slab is None or not slab.used[offsets].all():
                raise Corrupt(f"memory store: {self._missing(slots)}")
            rows[part] = slab.pages[offsets]
            sums[part] = slab.checksums[offsets]
        found = page_checksums(into)
        if not np.array_equal(sums, found):
            raise Corrupt(
                f"memory store: slot {int(slots[np.flatnonzero(sums != found)[0]])}: its checksum does not match"
            )

    def free(self, slots: Slots) -> None:
        """See `PageStore`; a slab that holds nothing any more goes back to the machine."""
        empty = []
        for slab, offsets, _part in self._by_slab(slots):
            if slab is None:
                continue
            before = int(slab.used[offsets].sum())
            slab.used[offsets] = False
            slab.used_pages -= before
            self._used_pages -= before
            if not slab.used_pages:
                empty.append(slab)
        # Taken from the end: so that the next batch is a run again if this one was.
        self._give_back(np.asarray(slots, np.uint64)[self._known(slots)][::-1])
        # One empty slab stays, or a store that shrinks and grows by one page would map and unmap all the time.
        if empty and sum(not slab.used_pages for slab in self._slabs.values()) > 1:
            self._drop_slabs(empty[1:] if len(empty) > 1 else empty)

    def live(self, slots: Slots) -> None:
        """Nothing is here from before: whatever a durable SPT still refers to is lost, and never served."""
        if len(slots):
            self._next_slab = max(self._next_slab, int(slots.max()) // SLAB_PAGES + 1)

    def sync(self) -> None:
        """Memory survives no crash."""

    def flush(self) -> None:
        """Memory survives no crash."""

    def stat(self) -> dict[str, Any]:
        """Pages, and the memory they take."""
        return {
            "pages": self._used_pages,
            "bytes": len(self._slabs) * SLAB_PAGES * PAGE_BYTES,
            "limit_bytes": self._limit_pages * PAGE_BYTES,
        }

    def close(self) -> None:
        """Let go of the memory."""
        for number in self._slabs:
            lib.edm_slabs_set(self._native, number, ffi.NULL, ffi.NULL, ffi.NULL)
        self._slabs.clear()
        self._free_count = self._used_pages = 0

    def _by_slab(self, slots: Slots) -> Iterator[tuple[Any, Any, Any]]:
        """Slab (None where there is none), offsets in it, and which of the batch they are."""
        if len(slots) == 1:
            slot = int(slots[0])
            at = slot % SLAB_PAGES
            yield self._slabs.get(slot // SLAB_PAGES), slice(at, at + 1), slice(0, 1)
            return
        if _is_run(slots):
            at = int(slots[0]) % SLAB_PAGES
            yield self._slabs.get(int(slots[0]) // SLAB_PAGES), slice(at, at + len(slots)), slice(0, len(slots))
            return
        numbers, offsets = np.divmod(np.asarray(slots, np.uint64), np.uint64(SLAB_PAGES))
        for number in np.unique(numbers).tolist():
            part = np.flatnonzero(numbers == number)
            inside = offsets[part].astype(np.intp)
            first, last = int(inside[0]), int(inside[-1])
            together = int(part[-1]) - int(part[0]) == len(part) - 1
            if together and last - first == len(inside) - 1 and (np.diff(inside) == 1).all():
                yield self._slabs.get(number), slice(first, last + 1), slice(int(part[0]), int(part[-1]) + 1)
            else:
                yield self._slabs.get(number), inside, part

    def _add_slab(self) -> None:
        first = self._next_slab * SLAB_PAGES
        slab = Slab()
        if lib.edm_slabs_set(
            self._native,
            self._next_slab,
            ffi.from_buffer(slab.pages),
            ffi.from_buffer("uint32_t[]", slab.checksums),
            ffi.from_buffer(slab.used),
        ):
            raise MemoryError
        self._slabs[self._next_slab] = slab
        self._next_slab += 1
        # Taken from the end: the lowest slot last.
        self._give_back(np.arange(first + SLAB_PAGES - 1, first - 1, -1, dtype=np.int64).astype(np.uint64))

    def _give_back(self, slots: Slots) -> None:
        needed = self._free_count + len(slots)
        if needed > len(self._free):
            bigger = np.empty(2 * needed, np.uint64)
            bigger[: self._free_count] = self._free[: self._free_count]
            self._free = bigger
        self._free[self._free_count : needed] = slots
        self._free_count = needed

    def _known(self, slots: Slots) -> Any:
        if _is_run(slots):
            return slice(None) if int(slots[0]) // SLAB_PAGES in self._slabs else slice(0)
        return np.isin(np.asarray(slots, np.uint64) // np.uint64(SLAB_PAGES), list(self._slabs))

    def _drop_slabs(self, slabs: list[Slab]) -> None:
        gone = [number for number, slab in self._slabs.items() if any(slab is empty for empty in slabs)]
        for number in gone:
            lib.edm_slabs_set(self._native, number, ffi.NULL, ffi.NULL, ffi.NULL)
            del self._slabs[number]
        rest = self._free[: self._free_count]
        rest = rest[~np.isin(rest // np.uint64(SLAB_PAGES), gone)]
        self._free[: len(rest)] = rest
        self._free_count = len(rest)

    def _missing(self, slots: Slots) -> str:
        for slot in slots.tolist():
            slab = self._slabs.get(slot // SLAB_PAGES)
            if slab is None or not slab.used[slot % SLAB_PAGES]:
                return f"slot {slot} holds no page"
        raise AssertionError("unreachable: asked only when one is missing")


def _is_run(slots: Slots) -> bool:
    """Whether slots follow each other within one slab, as they do in most batches."""
    if not len(slots):
        return False
    first, last = int(slots[0]), int(slots[-1])
    return (
        last - first == len(slots) - 1
        and first // SLAB_PAGES == last // SLAB_PAGES
        and (len(slots) <= 2 or bool((slots[1:] - slots[:-1] == 1).all()))
    )
