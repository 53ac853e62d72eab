"""The SPT's journal: changes to the table, in frames whose checksums chain (read back by native/spt_replay.c).

Place on the path: written by the SPT store `file` at each commit. A journal begins with frames that hold a whole table,
so a snapshot and a journal are one thing: compacting is writing the next journal, and renaming it into place.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from typing import TYPE_CHECKING, Any, Final

import attrs

from edm._native import ffi, lib
from edm.errors import Corrupt, StoreError, StoreFull
from edm.stores.directory import FULL, saying

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from edm.dms.table import PageTable
    from edm.types import PageRefs, Slots

_HEADER: Final = struct.Struct("<IIQQII")
_CHAIN: Final = struct.Struct("<IIQQII")
_MAGIC: Final = 0x4A4D4445
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


@attrs.frozen
class Replayed:
    """What was read: up to which byte, how many frames, the chain's last value, and bytes behind that were not used.

    damaged: what stands behind is no frame that was cut short while it was written, but one that has changed since.
    """

    end: int
    frames: int
    chain: int
    left_bytes: int
    damaged: bool = False


def replay(table: PageTable, path: Path, *, only_sealed: bool) -> Replayed:
    """Read a journal into an empty table, up to the first frame that is torn.

    only_sealed: the machine went down, so frames behind the last sealed one may speak of pages that were never
    written. They are left out, unless they are of a store that promises nothing (sync = none), and may as well be
    tried.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return Replayed(0, 0, 0, 0)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data, ffi.from_buffer(data) as start:
            state = ffi.new("struct edm_spt_replayed *")
            if only_sealed:
                _replay(ffi.NULL, start, size, state, path)
                if not state.flags & lib.EDM_SPT_LOOSE:
                    if not state.sealed:
                        return Replayed(0, 0, 0, size)
                    state = ffi.new("struct edm_spt_replayed *", {"stop_at": state.sealed})
                else:
                    state = ffi.new("struct edm_spt_replayed *")
            end = _replay(table.native, start, size, state, path)
            damaged = _changed_since(data[end : end + _HEADER.size], int(state.chain), size - end)
            return Replayed(end, int(state.frames), int(state.chain), size - end, damaged)


def _changed_since(head: bytes, chain: int, left_bytes: int) -> bool:
    """Whether a frame that does not check out was ever whole: a write that is cut short leaves the start of a frame."""
    if len(head) < _HEADER.size:
        return False
    *fields, found = _HEADER.unpack(head)
    before = _CHAIN.pack(*fields, chain)
    if lib.edm_crc32c(ffi.from_buffer(before), len(before)) != found:
        return True
    return left_bytes >= _HEADER.size + int(fields[3])


def _replay(table: Any, start: Any, size: int, state: Any, path: Path) -> int:
    result = int(lib.edm_spt_replay(table, start, size, state))
    if result == -errno.ENOMEM:
        raise MemoryError
    if result < 0:
        raise Corrupt(f"{path}: frame {state.frames} is not what an SPT journal holds")
    return result


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
        fields = (_MAGIC, flags, self._frames, len(changes), checksum)
        before = _CHAIN.pack(*fields, self._chain)
        chain = lib.edm_crc32c(ffi.from_buffer(before), len(before))
        frame = _HEADER.pack(*fields, chain) + changes
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
