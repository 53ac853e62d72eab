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
    """Appends frames to a journal file. write, sync: os.pwrite and os.fdatasync, for tests to replace."""

    def __init__(
        self,
        path: Path,
        at: Replayed,
        write: Callable[[int, Any, int], int] = os.pwrite,
        sync: Callable[[int], None] = os.fdatasync,
    ) -> None:
        self.path = path
        self.end = at.end
        self._frames = at.frames
        self._chain = at.chain
        self._write = write
        self._sync = sync
        with saying(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.cut()
        except StoreError:
            self.close()
            raise

    def append(self, changes: bytes, flags: int) -> None:
        """Write one frame; raises `StoreFull` or `StoreError`, and the next try overwrites what was torn."""
        checksum = lib.edm_crc32c(ffi.from_buffer(changes), len(changes))
        fields = (MAGIC, flags, self._frames, len(changes), checksum)
        before = CHAIN.pack(*fields, self._chain)
        chain = lib.edm_crc32c(ffi.from_buffer(before), len(before))
        frame = HEADER.pack(*fields, chain) + changes
        try:
            self._write_whole(frame)
        except OSError as error:
            self.cut()
            raise _failed("writing", self.path, error) from None
        self.end += len(frame)
        self._frames += 1
        self._chain = chain

    def sync(self) -> None:
        """To the disk; raises `StoreError`."""
        try:
            self._sync(self._fd)
        except OSError as error:
            raise _failed("syncing", self.path, error) from None

    def cut(self) -> None:
        """Cut off what a write that failed has left; raises `StoreError`."""
        try:
            os.ftruncate(self._fd, self.end)
        except OSError as error:
            raise _failed("shortening", self.path, error) from None

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write_whole(self, frame: bytes) -> None:
        done = self._write(self._fd, frame, self.end)
        while done < len(frame):
            more = self._write(self._fd, memoryview(frame)[done:], self.end + done)
            if not more:
                raise OSError(errno.EIO, "nothing was written")
            done += more


def _failed(doing: str, path: Path, error: OSError) -> StoreError:
    kind = StoreFull if error.errno in FULL else StoreError
    return kind(f"{doing} {path}: {error.strerror}")
