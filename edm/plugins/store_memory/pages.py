"""The page store `memory`: pages in slabs of anonymous memory, kept by native/slabs.c.

Place on the path: step [7], and the end of an eviction. This module says in words what failed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edm._native import ffi, lib
from edm.config.machine import memory_limit
from edm.dms.table import words_at
from edm.errors import Corrupt, StoreFull
from edm.ops import PAGE_STORE, capsule
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from edm.types import Slots

SLAB_PAGES: Final = 4096


class MemoryPages:
    """A `PageStore` in RAM. limit_bytes: of page bytes; 0 for half of what the machine has or the cgroup allows."""

    def __init__(self, limit_bytes: int = 0) -> None:
        self._limit_pages = (limit_bytes or memory_limit().bytes // 2) // PAGE_BYTES
        native = lib.edm_slabs_new(SLAB_PAGES, self._limit_pages)
        if native == ffi.NULL:
            raise MemoryError
        self.native = ffi.gc(native, lib.edm_slabs_free)
        self.__edm_ops__ = capsule(int(ffi.cast("uintptr_t", lib.edm_slabs_table(native))), PAGE_STORE)

    def put(self, pages: memoryview, checksums: Any) -> Slots:
        """See `PageStore`."""
        count = len(pages) // PAGE_BYTES
        slots = np.empty(count, np.uint64)
        sums = ffi.from_buffer("uint32_t[]", np.ascontiguousarray(checksums, np.uint32))
        self._check(lib.edm_slabs_put(self.native, ffi.from_buffer(pages), sums, count, words_at(slots)))
        return slots

    def get(self, slots: Slots, into: memoryview) -> None:
        """See `PageStore`."""
        where = words_at(np.ascontiguousarray(slots, np.uint64))
        self._check(lib.edm_slabs_get(self.native, where, ffi.NULL, len(slots), ffi.from_buffer(into)))

    def free(self, slots: Slots) -> None:
        """See `PageStore`; a slab that holds nothing any more goes back to the machine."""
        lib.edm_slabs_release(self.native, words_at(np.ascontiguousarray(slots, np.uint64)), len(slots))

    def live(self, slots: Slots) -> None:
        """Nothing is here from before: whatever a durable SPT still refers to is lost, and never served."""
        if len(slots):
            lib.edm_slabs_keep_off(self.native, int(slots.max()))

    def where(self, slot: int) -> str:
        """What is to be named where a slot is damaged: there is no file."""
        return f"memory store: slot {slot}"

    def sync(self) -> None:
        """Memory survives no crash."""

    def flush(self) -> None:
        """Memory survives no crash."""

    def stat(self) -> dict[str, Any]:
        """Pages, and the memory they take."""
        figures = ffi.new("struct edm_slabs_figures *")
        lib.edm_slabs_stat(self.native, figures)
        return {
            "pages": int(figures.pages),
            "bytes": int(figures.bytes),
            "limit_bytes": self._limit_pages * PAGE_BYTES,
        }

    def close(self) -> None:
        """Let go of the memory."""
        lib.edm_slabs_clear(self.native)

    def _check(self, result: int) -> None:
        """Raise what a result of the C core means."""
        if not result:
            return
        if result == -errno.EDQUOT:
            raise StoreFull(f"memory store: its limit of {self._limit_pages} pages is reached")
        if result == -errno.ENOMEM:
            raise MemoryError
        reason = "holds no page" if result == -errno.ENOENT else "its checksum does not match"
        raise Corrupt(f"memory store: slot {int(lib.edm_slabs_failed(self.native))}: {reason}")
