"""The ELF core file's headers and notes, as the kernel writes them and gdb reads them.

Source: elf(5); include/linux/elfcore.h and include/uapi/linux/elfcore.h of Linux for the notes' layouts.
"""

from __future__ import annotations

import platform
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edm.dump.mappings import Mapping
    from edm.dump.threads import Thread

NT_PRSTATUS, NT_PRFPREG, NT_PRPSINFO, NT_AUXV = 1, 2, 3, 6
NT_FILE: Final = 0x46494C45
MACHINES: Final = {"x86_64": (62, ((0x202, b"LINUX"),)), "aarch64": (183, ((0x401, b"LINUX"), (0x405, b"LINUX")))}
"""machine → its e_machine, and the notes with more registers: NT_X86_XSTATE; NT_ARM_TLS, NT_ARM_SVE."""
PT_LOAD, PT_NOTE, ET_CORE, PN_XNUM = 1, 4, 4, 0xFFFF
EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR: Final = struct.Struct("<IIQQQQQQ")
SHDR: Final = struct.Struct("<IIQQQQIIQQ")
PRSTATUS_HEAD: Final = struct.Struct("<3ih2xQQ4i8Q")
PRPSINFO: Final = struct.Struct("<BcBb4xQII4i16s80s")
STATES: Final = b"RSDTZW"


@attrs.frozen
class Segment:
    """A PT_LOAD. file_bytes: 0 where its contents are left out."""

    mapping: Mapping
    offset: int
    file_bytes: int


def note(kind: int, name: bytes, content: bytes) -> bytes:
    """One note, padded."""
    name += b"\0"
    return struct.pack("<III", len(name), len(content), kind) + _padded(name) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def notes_of(pid: int, threads: Sequence[Thread], mappings: Sequence[Mapping]) -> bytes:
    """All notes of a process whose threads stand still: the first thread's first, as gdb expects; raises `OSError`."""
    parts = []
    for number, thread in enumerate(threads):
        parts.append(note(NT_PRSTATUS, b"CORE", _prstatus(thread)))
        if number == 0:
            parts += [
                note(NT_PRPSINFO, b"CORE", _prpsinfo(pid)),
                note(NT_AUXV, b"CORE", Path(f"/proc/{pid}/auxv").read_bytes()),
                note(NT_FILE, b"CORE", _files(mappings)),
            ]
        parts.append(note(NT_PRFPREG, b"CORE", thread.registers(NT_PRFPREG)))
        for kind, name in MACHINES[platform.machine()][1]:
            if registers := thread.registers(kind):
                parts.append(note(kind, name, registers))
    return b"".join(parts)


def _stat(pid: int) -> list[str]:
    """Fields of proc_pid_stat(5) from the third on: state, ppid, pgrp, session and so on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def _prstatus(thread: Thread) -> bytes:
    stat = _stat(thread.tid)
    ticks = [int(stat[i]) for i in (11, 12, 13, 14)]
    times = [part for one in ticks for part in (one // 100, one % 100 * 10_000)]
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{thread.tid}/status").read_text().splitlines() if ":" in line
    )
    pending, held = int(status["SigPnd"], 16), int(status["SigBlk"], 16)
    head = PRSTATUS_HEAD.pack(
        thread.signal, 0, 0, thread.signal, pending, held, thread.tid, *map(int, stat[1:4]), *times
    )
    return head + thread.registers(NT_PRSTATUS) + struct.pack("<i4x", 1)


def _prpsinfo(pid: int) -> bytes:
    stat = _stat(pid)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    letter = stat[0].encode() if stat[0].encode() in STATES else b"T"
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")[:79]
    return PRPSINFO.pack(
        STATES.index(letter),
        letter,
        0,
        int(stat[16]),
        int(stat[6]),
        int(status["Uid"].split()[0]),
        int(status["Gid"].split()[0]),
        pid,
        *map(int, stat[1:4]),
        Path(f"/proc/{pid}/comm").read_bytes().rstrip(b"\n")[:15],
        command,
    )


def _files(mappings: Sequence[Mapping]) -> bytes:
    named = [mapping for mapping in mappings if mapping.inode and mapping.name.startswith("/")]
    head = struct.pack("<QQ", len(named), PAGE_BYTES)
    spans = b"".join(struct.pack("<QQQ", m.start, m.end, m.offset // PAGE_BYTES) for m in named)
    return head + spans + b"".join(m.name.encode(errors="surrogateescape") + b"\0" for m in named)


def layout(mappings: Sequence[Mapping], notes: bytes, left_out: frozenset[int]) -> tuple[bytes, list[Segment]]:
    """(everything before the first segment, the segments). left_out: start addresses of those without contents."""
    count = len(mappings) + 1
    extended = count >= PN_XNUM
    before = EHDR.size + PHDR.size * count + (SHDR.size if extended else 0)
    offset = -(-(before + len(notes)) // PAGE_BYTES) * PAGE_BYTES
    headers = [PHDR.pack(PT_NOTE, 0, before, 0, 0, len(notes), 0, 4)]
    segments = []
    for mapping in mappings:
        size = 0 if mapping.start in left_out else mapping.bytes
        flags = sum(bit for bit, letter in ((4, "r"), (2, "w"), (1, "x")) if letter in mapping.protection)
        headers.append(PHDR.pack(PT_LOAD, flags, offset, mapping.start, 0, size, mapping.bytes, PAGE_BYTES))
        segments.append(Segment(mapping, offset, size))
        offset += size
    sections = EHDR.size + PHDR.size * count if extended else 0
    ehdr = EHDR.pack(
        b"\x7fELF\x02\x01\x01".ljust(16, b"\0"),
        ET_CORE,
        MACHINES[platform.machine()][0],
        1,
        0,
        EHDR.size,
        sections,
        0,
        EHDR.size,
        PHDR.size,
        min(count, PN_XNUM),
        SHDR.size if extended else 0,
        int(extended),
        0,
    )
    # More segments than the header can count: their number is in the first section's sh_info.
    section = SHDR.pack(0, 0, 0, 0, 0, 0, 0, count, 0, 0) if extended else b""
    return ehdr + b"".join(headers) + section + notes, segments
