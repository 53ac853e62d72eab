"""The SPT's journal: changes to the table, in frames whose checksums chain (read back by `reading`).

Place on the path: written by the SPT store `file` at each commit. A journal begins with frames that hold a whole table,
so a snapshot and a journal are one thing: compacting is writing the next journal, and renaming it into place.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any, Final

from edm._native import ffi, lib
from edm.errors import StoreError, StoreFull
from edm.plugins.store_file.reading import CHAIN, HEADER, MAGIC
from edm.stores.directory import FULL, saying

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from edm.dms.table import PageTable
    from edm.plugins.store_file.reading import Replayed
    from edm.types import PageRefs, Slots

_PAGES_PER_FRAME: Final = 1 << 16
_HEADS: Final = {
    kind: struct.Struct(f"<II{words}Q") for kind, words in ((2, 1), (3, 2), (4, 4), (5, 3), (6, 1), (7, 2))
}
_RECORD_HEAD: Final = struct.Struct("<II")


def change(kind: int, *words: int) -> bytes:
    """One change that is a few numbers: CREATE, CLONE, MOVE, DROP, DROP_REGION or NOTE."""
    return _HEADS[kind].pack(kind, 1, *words)


def record(refs: PageRefs, slots: Slots) -> bytes:
    """A batch of pages and the slots they went to."""
    return _RECORD_HEAD.pack(lib.EDM_SPT_RECORD, len(refs)) + refs.tobytes() + slots.tobytes()


def whole_table(table: PageTable) -> Iterator[bytes]:
    """Changes that make a table from nothing, a few MiB at a time."""
    shares = table.shares()
    small = [change(lib.EDM_SPT_NOTE, key, value) for key, value in table.notes().items()]
    small += [change(lib.EDM_SPT_CREATE, region) for region in table.regions()]
    yield b"".join(small)
    for region in table.regions():
        refs, slots = table.pages(region)
        for at in range(0, len(refs), _PAGES_PER_FRAME):
            yield record(refs[at : at + _PAGES_PER_FRAME], slots[at : at + _PAGES_PER_FRAME])
    if len(shares):
        yield _RECORD_HEAD.pack(lib.EDM_SPT_SHARE, len(shares)) + shares.tobytes()


class JournalWriter:
    """Appends frames to a journal file. write, sync: os.pwrite and os.fdatasync, for tests to replace.

    state: where the next frame goes; native/journal.c writes some, too, and counts the pages in those.
    """

    def __init__(
        self,
        path: Path,
        at: Replayed,
        write: Callable[[int, Any, int], int] = os.pwrite,
        sync: Callable[[int], None] = os.fdatasync,
    ) -> None:
        self.path = path
        self.state = ffi.gc(
            ffi.new("struct edm_journal *", {"fd": -1, "end": at.end, "frames": at.frames, "chain": at.chain}),
            lib.edm_journal_clear,
        )
        self._write = write
        self._sync = sync
        with saying(path):
            self.state.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.cut()
        except StoreError:
            self.close()
            raise

    @property
    def end(self) -> int:
        """The bytes written so far."""
        return int(self.state.end)

    def append(self, changes: bytes, flags: int) -> None:
        """Write one frame; raises `StoreFull` or `StoreError`, and the next try overwrites what was torn."""
        checksum = lib.edm_crc32c(ffi.from_buffer(changes), len(changes))
        fields = (MAGIC, flags, self.state.frames, len(changes), checksum)
        before = CHAIN.pack(*fields, self.state.chain)
        chain = lib.edm_crc32c(ffi.from_buffer(before), len(before))
        frame = HEADER.pack(*fields, chain) + changes
        try:
            self._write_whole(frame)
        except OSError as error:
            self.cut()
            raise _failed("writing", self.path, error) from None
        self.state.end += len(frame)
        self.state.frames += 1
        self.state.chain = chain

    def sync(self) -> None:
        """To the disk; raises `StoreError`."""
        try:
            self._sync(self.state.fd)
        except OSError as error:
            raise _failed("syncing", self.path, error) from None

    def cut(self) -> None:
        """Cut off what a write that failed has left; raises `StoreError`."""
        try:
            os.ftruncate(self.state.fd, self.end)
        except OSError as error:
            raise _failed("shortening", self.path, error) from None

    def close(self) -> None:
        """Close the file."""
        if self.state.fd >= 0:
            os.close(self.state.fd)
            self.state.fd = -1

    def goes_on_from(self, older: JournalWriter) -> None:
        """Write in the place of another, which is closed: whoever has that one's `state` has this one's from now on."""
        here, there = self.state, older.state
        there.fd, there.end, there.frames, there.chain = here.fd, here.end, here.frames, here.chain
        here.fd = -1
        self.state = there

    def _write_whole(self, frame: bytes) -> None:
        done = self._write(self.state.fd, frame, self.end)
        while done < len(frame):
            more = self._write(self.state.fd, memoryview(frame)[done:], self.end + done)
            if not more:
                raise OSError(errno.EIO, "nothing was written")
            done += more


def _failed(doing: str, path: Path, error: OSError) -> StoreError:
    kind = StoreFull if error.errno in FULL else StoreError
    return kind(f"{doing} {path}: {error.strerror}")
