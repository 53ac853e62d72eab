"""The SPT store `file`: the table in memory, every change in a journal on disk.

Place on the path: asked by the memory server [6, 9, 10]; its commit comes before the acknowledgement of an eviction.

What each sync policy promises: a commit survives the server's death under all of them, since the kernel has it. A loss
of power is survived with `always` by every commit; with `batch` by everything up to the last flush, of which there is
one for every `group_pages` evicted; with `none` by nothing in particular, and never by wrong bytes.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final

from edm._native import ffi, lib
from edm.dms.table import PageTable
from edm.errors import Corrupt, StoreError
from edm.plugins.store_file.journal import JournalWriter, change, record, whole_table
from edm.plugins.store_file.reading import HEADER, Replayed, replay, salvage
from edm.stores.damage import Damage
from edm.stores.directory import StoreDirectory, saying

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edm.types import PageRefs, Slots

FORMAT_VERSION: Final = 2
_SUFFIX: Final = ".journal"
_COMPACT_LEAST_BYTES: Final = 16 << 20
_COMPACT_LEAST_FRAMES: Final = 1 << 17
_NO_JOURNAL: Final = "its journal is missing: the page table cannot be read"
_UNSEALED: Final = -1
"""In place of the number of frames there were when the last of them was sealed."""


class FileSpt(PageTable):
    """A `PageTable` that is read from, and kept in, a journal. group_pages: how many evicted pages share a flush."""

    def __init__(
        self,
        path: Path,
        sync: str = "batch",
        *,
        group_pages: int = 16384,
        write: Callable[[int, Any, int], int] = os.pwrite,
        datasync: Callable[[int], None] = os.fdatasync,
    ) -> None:
        super().__init__()
        self._always = sync == "always"
        self.lazy = sync == "batch"
        self._loose = lib.EDM_SPT_LOOSE if sync == "none" else 0
        self.group_pages = group_pages
        self._system_calls = (write, datasync)
        self._sealed_at = _UNSEALED
        self._changes: list[bytes] = []
        self._suspect = False
        self._directory_unsynced = False
        self._closed = False
        self._directory = StoreDirectory(path, "edm SPT journal", FORMAT_VERSION)
        try:
            with saying(path):
                self._open()
            self._directory.begin()
        except BaseException:
            self._directory.close(clean=False)
            raise

    # ---- changes: to the table at once, to the journal with the next commit

    def record(self, refs: PageRefs, slots: Slots) -> Slots:
        """See `SptStore`."""
        gone = super().record(refs, slots)
        self._note(record(refs, slots))
        self._journal.state.pages += len(refs)
        return gone

    def create(self, region: int) -> None:
        """See `SptStore`."""
        super().create(region)
        self._note(change(lib.EDM_SPT_CREATE, region))

    def clone(self, region: int, into: int) -> Slots:
        """See `SptStore`."""
        gone = super().clone(region, into)
        self._note(change(lib.EDM_SPT_CLONE, region, into))
        return gone

    def move(self, region: int, start: int, to: int, count: int) -> Slots:
        """See `SptStore`."""
        gone = super().move(region, start, to, count)
        self._note(change(lib.EDM_SPT_MOVE, region, start, to, count))
        return gone

    def drop(self, region: int, start: int, count: int) -> Slots:
        """See `SptStore`."""
        gone = super().drop(region, start, count)
        self._note(change(lib.EDM_SPT_DROP, region, start, count))
        return gone

    def drop_region(self, region: int) -> Slots:
        """See `SptStore`."""
        gone = super().drop_region(region)
        self._note(change(lib.EDM_SPT_DROP_REGION, region))
        return gone

    def note(self, key: int, value: int) -> None:
        """See `SptStore`."""
        super().note(key, value)
        self._note(change(lib.EDM_SPT_NOTE, key, value))

    def _note(self, change_bytes: bytes) -> None:
        self._changes.append(change_bytes)
        # Nothing overtakes it on the way to the journal.
        self._journal.state.held = 1

    # ---- making them last

    @property
    def evicts(self) -> bool:  # type: ignore[override]
        """See `PageTable`: where a commit is a write and nothing else, and that write is the system's own."""
        return type(self) is FileSpt and not self._always and self._system_calls[0] is os.pwrite

    @property
    def journal(self) -> Any:
        """See `PageTable`."""
        return self._journal.state

    @property
    def wants_flush(self) -> bool:
        """A group of pages is full, or the journal has grown long."""
        return (self.lazy and int(self._journal.state.pages) >= self.group_pages) or self._long()

    def commit(self) -> None:
        """See `SptStore`."""
        if self._always:
            self._seal()
        elif self._journal.state.held:
            self._append(self._loose)

    def flush(self) -> None:
        """See `SptStore`; a journal that has grown long is compacted."""
        if self._long():
            self._compact()
        else:
            self._seal()
        self._journal.state.pages = 0

    def compact(self) -> int:
        """Write the table anew, after a flush of the page store; returns by how many bytes the journal is shorter."""
        before = self._journal.end
        self._compact()
        return before - self._journal.end

    def stat(self) -> dict[str, Any]:
        """The table's figures, and the journal's length."""
        return {**super().stat(), "journal_bytes": self._journal.end, "torn_bytes": self._torn_bytes}

    @property
    def damage(self) -> list[Damage]:
        """What was found damaged when it was opened, and could be done without."""
        return self._directory.damage

    def close(self) -> None:
        """See `SptStore`."""
        if self._closed:
            return
        self._closed = True
        clean = False
        try:
            self._seal()
            clean = True
        finally:
            self._journal.close()
            self._directory.close(clean=clean)

    def _append(self, flags: int) -> None:
        # Kept until they are written: a commit that fails is made good by the next, also one of the C core's, which
        # writes only where nothing else is to be written before.
        state = self._journal.state
        first = (
            bytes(ffi.buffer(ffi.cast("char *", state.frame) + HEADER.size, state.unwritten))
            if state.unwritten
            else b""
        )
        self._journal.append(b"".join([first, *self._changes]), flags)
        self._written()

    def _written(self) -> None:
        self._changes.clear()
        self._journal.state.unwritten = self._journal.state.held = 0

    def _seal(self) -> None:
        """Write what is pending as a frame that says: the pages are on disk; and have it there too."""
        if self._suspect:
            # A failed sync may have marked clean what never reached the disk: only a new file is sure to.
            self._compact()
            return
        self._sync_directory()
        state = self._journal.state
        if state.held or self._sealed_at != state.frames:
            self._append(lib.EDM_SPT_SEALED)
        try:
            self._journal.sync()
        except StoreError:
            self._suspect = True
            raise
        self._sealed_at = _UNSEALED if self._loose else int(state.frames)

    def _long(self) -> bool:
        state = self._journal.state
        return bool(state.end > state.most_bytes or state.frames > state.most_frames)

    def _set_limits(self, frames: int, compacted_bytes: int) -> None:
        """How long the journal may get, after so many frames that are a whole table of so many bytes."""
        state = self._journal.state
        state.flags = self._loose
        state.most_bytes = compacted_bytes + max(_COMPACT_LEAST_BYTES, compacted_bytes)
        state.most_frames = frames + _COMPACT_LEAST_FRAMES + compacted_bytes // 64
        state.most_pages = self.group_pages if self.lazy else (1 << 64) - 1

    # ---- files

    def _open(self) -> None:
        """Read the newest journal; one that was being written when the server died has another name."""
        path = self._directory.path
        found = sorted(path.glob("*" + _SUFFIX))
        if not found and not self._directory.is_new:
            raise Corrupt(f"{path}: {_NO_JOURNAL}")
        for left in path.glob("*.new"):
            _remove(left)
        at = Replayed(0, 0, 0, 0)
        if found:
            at = replay(self, found[-1], only_sealed=self._directory.lost_power)
            if not at.frames and at.left_bytes:
                raise Corrupt(f"{found[-1]}: damaged in its first frame: the page table cannot be read")
            # Only a loss of power, or a death in the middle of a write, leaves a journal that ends in a broken frame.
            if at.left_bytes and not self._directory.lost_power and (at.damaged or self._directory.was_clean):
                raise Corrupt(f"{found[-1]}: damaged at byte {at.end}: the page table cannot be read")
            for older in found[:-1]:
                _remove(older)
        self._torn_bytes = at.left_bytes
        self._journal = JournalWriter(found[-1] if found else path / f"{0:08x}{_SUFFIX}", at, *self._system_calls)
        self._set_limits(at.frames, 0)
        if not found:
            self._compact()

    def _compact(self) -> None:
        """Write the whole table into the next journal, and go on there. The old one stays good until the new one is."""
        old = self._journal
        number = int(old.path.stem, 16) + 1
        final = self._directory.path / f"{number:08x}{_SUFFIX}"
        beside = final.with_suffix(".new")
        new = JournalWriter(beside, Replayed(0, 0, 0, 0), *self._system_calls)
        try:
            for changes in whole_table(self):
                new.append(changes, 0)
            new.append(b"", lib.EDM_SPT_SEALED)
            new.sync()
            beside.rename(final)
            new.path = final
        except BaseException as error:
            new.close()
            _remove(beside)
            if isinstance(error, OSError):
                raise StoreError(f"renaming {beside}: {error.strerror}") from None
            raise
        old.close()
        new.goes_on_from(old)
        self._journal = new
        self._written()
        self._set_limits(int(new.state.frames), new.end)
        self._suspect = False
        self._sealed_at = _UNSEALED if self._loose else int(new.state.frames)
        # Where this fails, the older journal is still complete up to here, and the newer is tried first.
        self._directory_unsynced = True
        self._sync_directory()
        _remove(old.path)

    def _sync_directory(self) -> None:
        """Raises `StoreError`; then nothing is sealed until it can be done."""
        if self._directory_unsynced:
            self._directory.sync()
            self._directory_unsynced = False


def inspect(path: Path) -> tuple[PageTable, list[Damage]]:
    """What can be read of a damaged journal, without changing it: the table so far, and where it is damaged."""
    directory = StoreDirectory(path, "edm SPT journal", FORMAT_VERSION)
    try:
        table = PageTable()
        damage = directory.damage
        with saying(path):
            found = sorted(path.glob("*" + _SUFFIX))
            if found:
                damage = damage + salvage(table, found[-1])
            elif not directory.is_new:
                damage = [*damage, Damage(file=path, reason=_NO_JOURNAL)]
        return table, damage
    finally:
        directory.close(clean=False)


def _remove(path: Path) -> None:
    """A journal that is not the newest, or half written, harms nobody where it cannot be removed."""
    with contextlib.suppress(OSError):
        path.unlink()
