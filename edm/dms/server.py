"""The memory server: answers requests for pages from an SPT store and a page store.

Place on the path: the DMS's DML answers `RequestGetPage` [6-10], its XPET carries out `RequestEvictPage`. Called by a
transport's `serve`, from one thread at a time.

An eviction's pages go to fresh slots, and the SPT notes them; how that comes to last is told in `edm.dms.lasting`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from edm._native import ffi, lib
from edm.dms.control import Control
from edm.dms.lasting import MOST_WAITING, Lasting, key_of
from edm.dms.table import NO_SLOTS, PageTable, page_checksums, refs_at, words_at
from edm.errors import Corrupt, StoreError, StoreFull
from edm.faultpoints import reached
from edm.ops import PAGE_STORE, SERVER, address_of, capsule
from edm.types import MAX_BATCH_PAGES, PAGE_BYTES, EvictStatus, GetStatus, PageId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edm.interfaces import PageStore, SptStore
    from edm.types import PageRefs, Slots

log = logging.getLogger(__name__)

PAGE_STORE_BYTES: Final = 24
"""sizeof(struct edm_page_store_ops)."""
_REFUSALS: Final = {
    lib.EDM_SCREEN_STALE: "an older version than the stored one",
    lib.EDM_SCREEN_OTHER: "the stored version with other bytes",
    lib.EDM_SCREEN_CHECKSUM: "its checksum does not match: damaged on the way",
    lib.EDM_SCREEN_FOREIGN: "not a region of this instance",
}


@attrs.define
class Counters:
    """What the server did, in pages unless it says requests."""

    gets: int = 0
    found: int = 0
    new: int = 0
    errors: int = 0
    evictions: int = 0
    stored: int = 0
    repeats: int = 0
    refused: int = 0
    failed: int = 0
    requests: int = 0


class MemoryServer:
    """A `PageServer` over an SPT store and a page store, which it closes."""

    def __init__(self, spt: SptStore, pages: PageStore) -> None:
        self.spt = spt
        self.pages = pages
        self.counters = Counters()
        self._slots = np.empty(MAX_BATCH_PAGES, np.uint64)
        self._answer = getattr(spt, "answer", None) or self._answer_by_lookup
        self._closed = False
        self._native = self._native_server()
        self._lasting = Lasting(self, self._native)
        pages.live(self._live_slots())
        self._control = Control(self)

    def _native_server(self) -> Any:
        """The same server in C, where both stores can be read, and perhaps written, from there; else None."""
        pages = address_of(self.pages, PAGE_STORE, PAGE_STORE_BYTES)
        if not pages or not isinstance(self.spt, PageTable) or type(self.spt).answer is not PageTable.answer:
            return None
        native = lib.edm_server_new(self.spt.native, ffi.cast("void *", pages))
        if native == ffi.NULL:
            raise MemoryError
        if self.spt.evicts:
            lazy = getattr(self.spt, "lazy", False)
            lib.edm_server_evicts(native, self.spt.journal, lazy, getattr(self.spt, "group_pages", MOST_WAITING))
        self.__edm_ops__ = capsule(int(ffi.cast("uintptr_t", lib.edm_server_table(native))), SERVER)
        return ffi.gc(native, lib.edm_server_free)

    def enter(self, timeout_s: float) -> bool:
        """Take the lock that calls through `__edm_ops__` take; False if it could not be had in time.

        Needed around every other call from a process where that table is used.
        """
        return self._native is None or lib.edm_server_enter(self._native, timeout_s) == 0

    def leave(self) -> None:
        """Give the lock of `enter` back, in the same thread."""
        if self._native is not None:
            lib.edm_server_leave(self._native)

    def open_table(self, *, evictions: bool) -> None:
        """Whether `__edm_ops__` carries evictions out; in any thread."""
        if self._native is not None:
            lib.edm_server_open_table(self._native, evictions)

    # ---- get [6-10]

    def get(self, instance: int, refs: PageRefs, into: memoryview) -> None:
        """See `PageServer`."""
        count = len(refs)
        if self._native is not None:
            pages = ffi.from_buffer(into)
            if not lib.edm_server_get(self._native, instance, refs_at(refs), count, pages):
                return None
        slots = self._slots[:count] if count <= MAX_BATCH_PAGES else np.empty(count, np.uint64)
        counters = self.counters
        counters.gets += count
        if lib.edm_refs_foreign(refs_at(refs), count, instance):
            return self._get_checked(instance, refs, into)
        found = self._answer(refs, slots)
        counters.new += count - found
        if found == count:
            try:
                reached("pages_asked")
                self.pages.get(slots, into)
                if lib.edm_spt_check(refs_at(refs), ffi.from_buffer(into), count) == count:
                    counters.found += count
                    return None
            except (StoreError, OSError) as error:
                log.debug("reading %d pages: %s", count, error)
        if found:
            self._get_singly(refs, slots, into)
        return None

    def _get_checked(self, instance: int, refs: PageRefs, into: memoryview) -> None:
        """A batch with pages of other instances: those are errors, the rest is answered."""
        own = refs["region"] >> np.uint64(32) == np.uint64(instance)
        refs["status"], refs["version"], refs["checksum"] = GetStatus.ERROR, 0, 0
        self.counters.errors += int((~own).sum())
        at = np.flatnonzero(own)
        if len(at):
            mine, pages = refs[at], memoryview(bytearray(len(at) * PAGE_BYTES))
            self.counters.gets -= len(at)
            self.get(instance, mine, pages)
            refs[at] = mine
            for i, target in enumerate(at.tolist()):
                if mine["status"][i] == GetStatus.EXISTING_PAGE:
                    into[target * PAGE_BYTES : (target + 1) * PAGE_BYTES] = pages[i * PAGE_BYTES : (i + 1) * PAGE_BYTES]

    def _get_singly(self, refs: PageRefs, slots: Slots, into: memoryview) -> None:
        """Some are not stored, or one of them cannot be read: each by itself, damaged ones as errors."""
        page = memoryview(bytearray(PAGE_BYTES))
        errors = 0
        for i in np.flatnonzero(refs["status"] == GetStatus.EXISTING_PAGE).tolist():
            reason = self._read(refs[i : i + 1], slots[i : i + 1], page)
            if reason:
                log.log(logging.DEBUG if errors else logging.ERROR, "page %s: %s", _name(refs, i), reason)
                errors += 1
                refs["status"][i] = GetStatus.ERROR
                # What the batch may have left there.
                into[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] = bytes(PAGE_BYTES)
            else:
                self.counters.found += 1
                into[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] = page
        if errors > 1:
            log.error("%d more pages of the same request cannot be read", errors - 1)
        self.counters.errors += errors

    def _read(self, ref: PageRefs, slot: Slots, page: memoryview) -> str:
        """Read one page; why it is not the one that was stored, with both checksums, or ""."""
        page[:] = bytes(PAGE_BYTES)
        stored = int(ref["checksum"][0])
        try:
            self.pages.get(slot, page)
        except Corrupt as error:
            return f"{error}{_sums(page, stored) if any(page) else ''}"
        except (StoreError, OSError) as error:
            return str(error)
        if lib.edm_spt_check(refs_at(ref), ffi.from_buffer(page), 1):
            return ""
        where = getattr(self.pages, "where", None)
        place = where(int(slot[0])) if where else "the page store"
        return f"{place}: not the page that was stored{_sums(page, stored)}"

    def _answer_by_lookup(self, refs: PageRefs, slots: Slots) -> int:
        rows = self.spt.lookup(refs)
        slots[:] = rows.slots
        refs["version"], refs["checksum"], refs["status"] = rows.versions, rows.checksums, rows.found
        return int(rows.found.sum())

    # ---- evict

    def evict(self, instance: int, refs: PageRefs, pages: memoryview) -> str:
        """See `PageServer`."""
        count = len(refs)
        if self._native is not None:
            if not lib.edm_server_evict(self._native, instance, refs_at(refs), count, ffi.from_buffer(pages)):
                return ""
            self._lasting.look_behind()
        self.counters.evictions += count
        try:
            verdicts, odd = self._screen(instance, refs, pages)
            if not odd:
                self._store(refs, pages)
                refs["status"] = EvictStatus.SUCCESS
                return ""
            return self._evict_some(refs, pages, verdicts)
        except (StoreError, OSError, MemoryError) as error:
            self.counters.failed += count
            refs["status"] = EvictStatus.FAIL
            return _one_line(error)

    def _screen(self, instance: int, refs: PageRefs, pages: memoryview) -> tuple[Any, int]:
        rows = self.spt.lookup(refs)
        verdicts = np.empty(len(refs), np.uint8)
        odd = lib.edm_spt_screen(
            refs_at(refs),
            ffi.from_buffer(pages),
            len(refs),
            instance,
            ffi.from_buffer("uint8_t[]", rows.found),
            words_at(rows.versions),
            ffi.from_buffer("uint32_t[]", rows.checksums),
            ffi.from_buffer("uint8_t[]", verdicts),
        )
        if odd < 0:
            raise MemoryError
        return verdicts, odd

    def _evict_some(self, refs: PageRefs, pages: memoryview, verdicts: Any) -> str:
        """A batch in which some pages are refused, or stored already."""
        repeats = verdicts == lib.EDM_SCREEN_REPEAT
        for i in np.flatnonzero(repeats).tolist():
            if key_of(refs, i) in self._lasting.unsaved:
                verdicts[i] = lib.EDM_SCREEN_NEW
        fresh = verdicts == lib.EDM_SCREEN_NEW
        kept = fresh | (verdicts == lib.EDM_SCREEN_REPEAT)
        if fresh.any():
            some = np.frombuffer(pages, np.uint8).reshape(-1, PAGE_BYTES)[fresh]
            self._store(refs[fresh], memoryview(some).cast("B"))
        elif self._lasting.pending:
            self._lasting.commit()
        refs["status"] = np.where(kept, EvictStatus.SUCCESS, EvictStatus.FAIL)
        self.counters.repeats += int((verdicts == lib.EDM_SCREEN_REPEAT).sum())
        refused = np.flatnonzero(~kept)
        self.counters.refused += len(refused)
        if not len(refused):
            return ""
        first = int(refused[0])
        sums = ""
        if verdicts[first] == lib.EDM_SCREEN_CHECKSUM:
            page = memoryview(pages)[first * PAGE_BYTES : (first + 1) * PAGE_BYTES]
            sums = _sums(page, int(refs["checksum"][first]))
        return f"page {_name(refs, first)}: {_REFUSALS[int(verdicts[first])]}{sums}"

    def _store(self, refs: PageRefs, pages: memoryview) -> None:
        checksums = np.ascontiguousarray(refs["checksum"])
        if reached("pages_screened"):
            pages = memoryview(bytes([pages[0] ^ 1]) + bytes(pages[1:]))
        try:
            slots = self.pages.put(pages, checksums)
        except StoreFull:
            if not self._lasting.waiting():
                raise
            # Slots that wait for a flush are room.
            self.flush()
            slots = self.pages.put(pages, checksums)
        try:
            reached("pages_put")
            gone = self.spt.record(refs, slots)
        except BaseException:
            self.pages.free(slots)
            raise
        self._lasting.stored(refs, gone)
        reached("pages_committed")
        self.counters.stored += len(refs)

    # ---- making it last

    def changed(self, let_go: Slots = NO_SLOTS) -> None:
        """The SPT was changed other than by an eviction; `save` makes it last."""
        self._lasting.changed(let_go)

    def save(self) -> None:
        """Commit what is pending, if anything is; raises `StoreError`."""
        self._lasting.save()

    def flush(self) -> None:
        """Make everything so far survive a loss of power; raises `StoreError`."""
        self._lasting.flush()

    # ---- everything else

    def control(self, instance: int, request: Mapping[str, Any]) -> dict[str, Any]:
        """See `PageServer`."""
        self.counters.requests += 1
        return self._control.answer(instance, request)

    def stat(self) -> dict[str, Any]:
        """Figures of the server and both stores."""
        counters = attrs.asdict(self.counters)
        if self._native is not None:
            here = ffi.new("struct edm_server_counts *")
            lib.edm_server_counts(self._native, here)
            counters["gets"] += here.gets
            counters["found"] += here.found
            counters["new"] += here.gets - here.found
            counters["evictions"] += here.stored
            counters["stored"] += here.stored
        return {
            "server": {**counters, "flushes": self._lasting.flushes, "slots_waiting": self._lasting.waiting()},
            "spt": self.spt.stat(),
            "pages": self.pages.stat(),
        }

    def close(self) -> None:
        """Save everything and close both stores; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._native is not None:
            lib.edm_server_close(self._native)
        try:
            self.pages.close()
        finally:
            self.spt.close()

    def _live_slots(self) -> Slots:
        return np.concatenate([self.spt.pages(region)[1] for region in self.spt.regions()] or [NO_SLOTS])


def _sums(page: memoryview, right: int) -> str:
    """What a mismatch is, for a person."""
    return f" (CRC-32C {int(page_checksums(page)[0]):08x}, not {right:08x})"


def _name(refs: PageRefs, at: int) -> PageId:
    return PageId(*key_of(refs, at))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
