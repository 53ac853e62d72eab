"""The page store `file`: page files, written and read by native/page_file.c.

Place on the path: step [7], and the end of an eviction. This module opens the directory, and says in words what failed.
"""

from __future__ import annotations

import errno
import os
import re
import resource
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edm._native import ffi, lib
from edm.dms.table import words_at
from edm.errors import Corrupt, StoreError, StoreFull, UsageError
from edm.ops import PAGE_STORE, capsule
from edm.stores.damage import Damage
from edm.stores.directory import FULL, StoreDirectory, saying
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from edm.types import Slots

FORMAT_VERSION: Final = 3
_SEGMENT: Final = re.compile(r"([0-9a-f]{8,16})\.pages")
_NONE_IN_PARTICULAR: Final = (1 << 64) - 1


class FilePages:
    """A `PageStore` in segment files of `segment_pages` each. limit_pages: 0 for none."""

    def __init__(
        self, path: Path, sync: str = "batch", *, segment_pages: int = 65536, limit_pages: int = 0, direct: bool = False
    ) -> None:
        self._directory = StoreDirectory(path, "edm page files", FORMAT_VERSION, {"segment_pages": segment_pages})
        self._path = path
        self._always = sync == "always"
        self._segment_pages = self._directory.figures["segment_pages"]
        self._limit_pages = limit_pages
        self._closed = False
        self.damage = self._directory.damage
        _raise_file_limit()
        self.native = lib.edm_pf_open(self._directory.fd, self._segment_pages, limit_pages, direct)
        try:
            if self.native == ffi.NULL:
                raise MemoryError
            # From C only where `sync` has nothing to do.
            table = lib.edm_pf_table_new(self.native, not self._always)
            if table == ffi.NULL:
                raise MemoryError
            self._table = ffi.gc(table, lib.edm_pf_table_free)
            self.__edm_ops__ = capsule(int(ffi.cast("uintptr_t", self._table)), PAGE_STORE)
            if direct:
                self._check_direct()
            with saying(path):
                self._attach()
            self._directory.begin()
        except BaseException:
            self._release(clean=False)
            raise

    def put(self, pages: memoryview, checksums: Any) -> Slots:
        """See `PageStore`."""
        count = len(pages) // PAGE_BYTES
        slots = np.empty(count, np.uint64)
        sums = ffi.from_buffer("uint32_t[]", checksums)
        self._check(lib.edm_pf_put(self.native, ffi.from_buffer(pages), sums, count, words_at(slots)), "writing")
        return slots

    def get(self, slots: Slots, into: memoryview) -> None:
        """See `PageStore`."""
        self._check(lib.edm_pf_get(self.native, words_at(slots), len(slots), ffi.from_buffer(into)), "reading")

    def free(self, slots: Slots) -> None:
        """See `PageStore`; files that hold nothing any more are removed, long gaps in others become holes."""
        lib.edm_pf_release(self.native, words_at(slots), len(slots))

    def live(self, slots: Slots) -> None:
        """See `PageStore`."""
        self._check(lib.edm_pf_live(self.native, words_at(slots), len(slots)), "opening")

    def look(self, slots: Slots) -> None:
        """Make pages readable as `live` does, where not all that is stored is known: nothing is removed."""
        self._check(lib.edm_pf_mark(self.native, words_at(slots), len(slots)), "opening")

    def sync(self) -> None:
        """See `PageStore`: to the disk only with sync = always; the kernel has it in any case."""
        if self._always:
            self.flush()

    def flush(self) -> None:
        """See `PageStore`."""
        self._check(lib.edm_pf_sync(self.native), "syncing")

    def trim(self) -> int:
        """Give every free slot's room back to the file system; returns the bytes that came free."""
        before = self.stat()["bytes"]
        self._check(lib.edm_pf_trim(self.native, 1), "punching holes into")
        return int(before - self.stat()["bytes"])

    def where(self, slot: int) -> Path:
        """The file that holds a slot."""
        return self._path / f"{slot // self._segment_pages:08x}.pages"

    def offset(self, slot: int) -> int:
        """Where in its file a slot's page begins."""
        return int(lib.edm_pf_offset(self.native, slot))

    def stat(self) -> dict[str, Any]:
        """Pages, files, and the room they take."""
        figures = ffi.new("struct edm_pf_figures *")
        lib.edm_pf_stat(self.native, figures)
        return {
            "pages": int(figures.pages),
            "bytes": int(figures.disk_bytes),
            "files": int(figures.segments),
            "files_missing": int(figures.missing),
            "files_with_damaged_header": int(figures.header_bad),
            "limit_bytes": self._limit_pages * PAGE_BYTES,
            "segment_bytes": self._segment_pages * PAGE_BYTES,
        }

    def close(self) -> None:
        """See `PageStore`."""
        if self._closed:
            return
        try:
            self.flush()
        except BaseException:
            self._release(clean=False)
            raise
        self._release(clean=True)

    def _release(self, *, clean: bool) -> None:
        self._closed = True
        lib.edm_pf_close(self.native)
        self.native = ffi.NULL
        self._directory.close(clean=clean)

    def _attach(self) -> None:
        for entry in sorted(self._path.iterdir()):
            matched = _SEGMENT.fullmatch(entry.name)
            if matched:
                result = lib.edm_pf_attach(self.native, int(matched[1], 16), 0)
                if result < 0:
                    raise StoreError(f"{entry}: {os.strerror(-result)}")
                if result:
                    self.damage.append(Damage(file=entry, offset=0, reason="the file's header is damaged"))

    def _check_direct(self) -> None:
        try:
            os.close(os.open(self._path / "LOCK", os.O_RDWR | os.O_DIRECT))
        except OSError as error:
            raise UsageError(
                f"{self._path}: its file system has no O_DIRECT ({error.strerror}): direct = false"
            ) from None

    def _check(self, result: int, doing: str) -> None:
        """Raise what a result of the C core means."""
        if not result:
            return
        if self._closed:
            raise StoreError(f"{self._path}: closed")
        slot = self._failed_slot()
        where = self._path if slot == _NONE_IN_PARTICULAR else self.where(slot)
        code = -result
        if code in FULL:
            limit = f"its limit of {self._limit_pages} pages is reached" if code == errno.EDQUOT else os.strerror(code)
            raise StoreFull(f"{doing} {where}: {limit}")
        if code == errno.ENOMEM:
            raise MemoryError
        reason = {
            errno.EBADMSG: "its checksum does not match",
            errno.ENODATA: "the file is too short",
            errno.ENOENT: "holds no page",
        }.get(code)
        if reason:
            raise Corrupt(f"{where}: slot {slot}: {reason}")
        raise StoreError(f"{doing} {where}: {os.strerror(code)}")

    def _failed_slot(self) -> int:
        error = ffi.new("struct edm_pf_error *")
        lib.edm_pf_error(self.native, error)
        return int(error.slot)


def _raise_file_limit() -> None:
    """Every segment's file stays open: allow as many as the machine lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
