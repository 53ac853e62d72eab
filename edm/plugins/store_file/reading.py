"""Reading an SPT journal back, and telling a frame that was cut short from one that is damaged.

Place on the path: when the SPT store `file` opens. The frames are applied by native/spt_replay.c; written by
`edm.plugins.store_file.journal`.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any, Final

import attrs

from edm._native import ffi, lib
from edm.errors import Corrupt
from edm.stores.damage import Damage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edm.dms.table import PageTable

HEADER: Final = struct.Struct("<IIQQII")
CHAIN: Final = struct.Struct("<IIQQII")
MAGIC: Final = 0x4A4D4445
_WINDOW_BYTES: Final = 16 << 20


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
    tried. Raises `Corrupt` where a broken frame stands before what was surely on the disk.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        state = ffi.new("struct edm_spt_replayed *")
        if only_sealed and size:
            end = _walk(file.fileno(), ffi.NULL, state, path)
            if not state.flags & lib.EDM_SPT_LOOSE:
                if size - end and _was_synced(file.fileno(), end, int(state.frames), int(state.chain), path):
                    raise Corrupt(f"{path}: damaged at byte {end}: the page table cannot be read")
                if not state.sealed:
                    return Replayed(0, 0, 0, size)
                state = ffi.new("struct edm_spt_replayed *", {"stop_at": state.sealed})
            else:
                state = ffi.new("struct edm_spt_replayed *")
        end = _walk(file.fileno(), table.native, state, path)
        damaged = _changed_since(os.pread(file.fileno(), HEADER.size, end), int(state.chain), size - end)
        return Replayed(end, int(state.frames), int(state.chain), size - end, damaged)


def salvage(table: PageTable, path: Path) -> list[Damage]:
    """Read what can be read of a damaged journal into an empty table: every whole frame; and what is damaged."""
    damage: list[Damage] = []
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        start, state = 0, ffi.new("struct edm_spt_replayed *")
        while True:
            try:
                end = _walk(file.fileno(), table.native, state, path, start)
            except Corrupt as error:
                return [*damage, Damage(file=path, offset=start, reason=str(error))]
            if end == size:
                return damage
            number, found = int(state.frames), None
            head = os.pread(file.fileno(), HEADER.size, end)
            changed = _changed_since(head, int(state.chain), size - end)
            for at, chain in _frames_behind(file.fileno(), end, number, int(state.chain)):
                found = at, chain
                break
            if changed or found:
                reason = f"frame {number} of the page table's journal is damaged: what it says of pages is not known"
                behind = "; the frames behind it are read" if found else "; nothing behind it can be read"
                damage.append(Damage(file=path, offset=end, reason=reason + behind))
            if found is None:
                return damage
            start = found[0]
            state = ffi.new("struct edm_spt_replayed *", {"frames": number + 1, "chain": found[1]})


def _walk(file: int, table: Any, state: Any, path: Path, start: int = 0) -> int:
    """Apply whole frames (table NULL: only look at them) from a byte on; returns the byte behind the last.

    Read, not mapped: a disk that cannot be read is an error then, and no signal.
    """
    buffer, at = bytearray(_WINDOW_BYTES), start
    while True:
        got = _fill(file, buffer, at)
        with ffi.from_buffer(buffer) as data:
            used = int(lib.edm_spt_replay(table, data, got, state))
        if used == -errno.ENOMEM:
            raise MemoryError
        if used < 0:
            raise Corrupt(f"{path}: frame {state.frames} is not what an SPT journal holds")
        at += used
        if got < len(buffer) or (state.stop_at and state.frames >= state.stop_at):
            return at
        if not used:
            head = bytes(buffer[: HEADER.size])
            wanted_bytes = HEADER.size + int(HEADER.unpack(head)[3])
            if not _in_chain(head, int(state.chain)) or wanted_bytes <= len(buffer):
                return at
            # A frame longer than the window: unless it is cut short.
            if wanted_bytes > os.fstat(file).st_size - at:
                return at
            buffer = bytearray(wanted_bytes)


def _fill(file: int, buffer: bytearray, at: int) -> int:
    done = 0
    with memoryview(buffer) as view:
        while done < len(buffer):
            got = os.preadv(file, [view[done:]], at + done)
            if not got:
                break
            done += got
    return done


def _in_chain(head: bytes, chain: int) -> bool:
    """Whether a frame's header is the one that was written behind the frame of this chain value."""
    *fields, found = HEADER.unpack(head)
    return _chain_of(fields, chain) == int(found)


def _chain_of(fields: list[int], chain: int) -> int:
    before = CHAIN.pack(*fields, chain)
    return int(lib.edm_crc32c(ffi.from_buffer(before), len(before)))


def _changed_since(head: bytes, chain: int, left_bytes: int) -> bool:
    """Whether a frame that does not check out was ever whole: a write that is cut short leaves the start of a frame."""
    if len(head) < HEADER.size:
        return False
    return not _in_chain(head, chain) or left_bytes >= HEADER.size + int(HEADER.unpack(head)[3])


def _frames_behind(file: int, broken_at: int, number: int, chain: int) -> Iterator[tuple[int, int]]:
    """Where the frame behind a broken one may begin, and the chain it goes on from."""
    rest = bytearray(os.fstat(file).st_size - broken_at)
    rest = rest[: _fill(file, rest, broken_at)]
    if len(rest) < 2 * HEADER.size:
        return
    *fields, stored = HEADER.unpack_from(rest)
    # What is damaged is the changes, the header's chain, or the rest of the header: one of the two is right.
    chains = {stored, _chain_of(fields, chain)}
    mark = struct.pack("<I", MAGIC)
    at = rest.find(mark, HEADER.size)
    while 0 <= at <= len(rest) - HEADER.size:
        head = bytes(rest[at : at + HEADER.size])
        if HEADER.unpack(head)[2] == number + 1:
            yield from ((broken_at + at, before) for before in chains if _in_chain(head, before))
        at = rest.find(mark, at + 1)


def _was_synced(file: int, broken_at: int, number: int, chain: int, path: Path) -> bool:
    """Whether a frame was written after one that was sealed after the broken one: then that was on the disk, whole.

    A sealed frame that is the last may have come to the disk before those it was written behind.
    """
    for at, before in _frames_behind(file, broken_at, number, chain):
        start = {"frames": number + 1, "chain": before}
        state = ffi.new("struct edm_spt_replayed *", start)
        _walk(file, ffi.NULL, state, path, at)
        if state.sealed == state.frames:
            state = ffi.new("struct edm_spt_replayed *", {**start, "stop_at": state.sealed - 1})
            _walk(file, ffi.NULL, state, path, at)
        if state.sealed:
            return True
    return False
