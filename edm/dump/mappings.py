"""What is mapped in a process, and which pages of it hold anything."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from edm._native import ffi, lib
from edm.errors import NativeError
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINE: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+) *(.*)")
_OWN_NAMES: Final = ("[heap]", "[stack]", "[anon")
_RUNS: Final = 512


@attrs.frozen
class Mapping:
    """One mapping; start, end: bytes. offset: bytes in its file. flags: VmFlags of proc_pid_smaps(5)."""

    start: int
    end: int
    protection: str
    offset: int
    inode: int
    name: str
    flags: frozenset[str]
    anonymous_bytes: int

    @property
    def private_anonymous(self) -> bool:
        """Whether a page nobody has touched is zeros, and need not be read to know it."""
        return (
            not self.inode
            and self.protection.endswith("p")
            and (not self.name or self.name.startswith(_OWN_NAMES))
            and "ht" not in self.flags
        )

    @property
    def wanted(self) -> bool:
        """Not a device's, not marked MADV_DONTDUMP."""
        return not self.flags & {"io", "pf", "dd"}

    @property
    def bytes(self) -> int:
        """Its length."""
        return self.end - self.start


def mappings_of(pid: int) -> list[Mapping]:
    """All mappings in the order of their addresses; raises `OSError`. Source: proc_pid_smaps(5)."""
    found: list[Mapping] = []
    line, anonymous = None, 0
    with Path(f"/proc/{pid}/smaps").open(encoding="utf-8", errors="surrogateescape") as file:
        for text in file:
            match = _LINE.match(text)
            if match:
                line, anonymous = match, 0
            elif text.startswith("Anonymous:"):
                anonymous = int(text.split()[1]) * 1024
            elif text.startswith("VmFlags:") and line:
                start, end, protection, offset, _, inode, name = line.groups()
                flags = frozenset(text.split()[1:])
                found.append(
                    Mapping(
                        int(start, 16),
                        int(end, 16),
                        protection,
                        int(offset, 16),
                        int(inode),
                        _name(name),
                        flags,
                        anonymous,
                    )
                )
    return found


def _name(text: str) -> str:
    """As the file is called: proc_pid_maps(5) escapes a newline."""
    return text.rstrip("\n").replace("\\012", "\n")


def present_runs(pagemap: int, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Runs of pages [a, b) within [first, last) that are in memory or swapped out; raises `NativeError`."""
    out = ffi.new("uint64_t[]", 2 * _RUNS)
    walked = ffi.new("uint64_t *")
    while first < last:
        count = lib.edm_present(pagemap, first, last, out, _RUNS, walked)
        if count < 0:
            raise NativeError(-count, "reading the pagemap")
        for i in range(count):
            yield out[2 * i], out[2 * i + 1]
        if walked[0] <= first:
            return
        first = walked[0]


def data_runs(pid: int, mapping: Mapping) -> Iterator[tuple[int, int]]:
    """Runs of pages of shared memory that hold anything, as far as the kernel tells; all of a file's."""
    whole = mapping.start // PAGE_BYTES, mapping.end // PAGE_BYTES
    try:
        file = os.open(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", os.O_RDONLY)
    except OSError:  # without CAP_SYS_ADMIN nobody may look
        yield whole
        return
    try:
        at, end = mapping.offset, mapping.offset + mapping.bytes
        while at < end:
            try:
                data = os.lseek(file, at, os.SEEK_DATA)
                hole = os.lseek(file, data, os.SEEK_HOLE)
            except OSError:  # ENXIO: nothing behind it
                return
            if data >= end:
                return
            first = whole[0] + (data - mapping.offset) // PAGE_BYTES
            yield first, min(whole[1], whole[0] + -(-(hole - mapping.offset) // PAGE_BYTES))
            at = hole
    finally:
        os.close(file)
