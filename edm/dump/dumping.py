"""One dump: the program stopped, its memory written, the program let go."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from edm.dump import core
from edm.dump.asking import Capture, capture_of
from edm.dump.mappings import mappings_of
from edm.dump.reading import Memory
from edm.dump.threads import Stopped
from edm.errors import EdmError, NativeError, UsageError
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edm.dump.mappings import Mapping


RESERVED_BYTES: Final = 1 << 36
NEVER: Final = ("[vsyscall]", "/memfd:edm-ctl")


class DumpFailed(EdmError):
    """The dump could not be written; there is no file, and the program runs on."""


@attrs.frozen
class Dump:
    """What was written. memory_bytes: mapped and dumped; written_bytes: of that, not zeros.

    brought_pages: were at the memory server or on their way there. left_out_bytes: see `edm dump --help`.
    unreadable: addresses of pages no copy of which can be had. stopped_s: how long the program stood still.
    """

    pid: int
    program: str
    file: str
    format: str
    captured: bool
    threads: int
    mappings: int
    memory_bytes: int
    written_bytes: int
    left_out_bytes: int
    brought_pages: int
    unreadable: list[int]
    stopped_s: float


@attrs.define
class _Output:
    """The file while it is written. written: bytes so far that are not zeros."""

    path: Path
    fd: int
    written: int = 0

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write pages, without those that are zeros."""
        pages = np.frombuffer(data, np.uint64).reshape(-1, PAGE_BYTES // 8).any(axis=1)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], pages, [False]))))
        for a, b in edges.reshape(-1, 2).tolist():
            self.write_all(memoryview(data)[a * PAGE_BYTES : b * PAGE_BYTES], offset + a * PAGE_BYTES)

    def write_all(self, data: memoryview | bytes, offset: int) -> None:
        """Write bytes as they are."""
        view = memoryview(data)
        self.written += len(view)
        while view:
            done = os.pwrite(self.fd, view, offset)
            view, offset = view[done:], offset + done


def dump(
    pid: int,
    path: Path,
    *,
    raw: bool = False,
    files: bool = True,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Dump:
    """Write the memory of process `pid` to `path`; raises `UsageError` or `DumpFailed`, and leaves no file then.

    raw: the mappings' bytes only, one behind the other, and PATH.json with where each begins. files: also what is as
    in a mapped file. progress: called with bytes done and bytes in all.
    """
    check_process(pid)
    if not force and path.exists():
        raise UsageError(f"{path} exists: give another -o FILE, or --force")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        output = _Output(partial, os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    try:
        done, index = _write(pid, output, raw=raw, files=files, progress=progress)
        if raw:
            Path(f"{path}.json").write_text(json.dumps(index, indent=1) + "\n")
        partial.rename(path)
    except NativeError as error:
        raise _failed(path, error.errno, str(error)) from error
    except OSError as error:
        raise _failed(path, error.errno or 0, error.strerror or str(error)) from error
    finally:
        os.close(output.fd)
        partial.unlink(missing_ok=True)
    return attrs.evolve(done, file=str(path))


def _failed(path: Path, number: int, text: str) -> EdmError:
    if number in {1, 13}:  # EPERM, EACCES
        return UsageError("no permission to read its memory: be its user, or root")
    if number == 3:
        return DumpFailed("the process has ended")
    return DumpFailed(f"{path}: {text}; nothing is kept of it")


def check_process(pid: int) -> None:
    """Raise `UsageError` unless there is such a process with memory of its own."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        raise UsageError(f"there is no process {pid}") from None
    status = {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    if int(status["Tgid"]) != pid:
        raise UsageError(f"{pid} is a thread of process {status['Tgid']}: dump that")
    if status["State"][0] in "ZX":
        raise UsageError(f"process {pid} has ended")
    if "VmSize" not in status:
        raise UsageError(f"process {pid} is the kernel's own: it has no memory to dump")
    if platform.machine() not in core.MACHINES:
        raise UsageError(f"no core files are written on {platform.machine()}")
    try:
        with Path(f"/proc/{pid}/exe").open("rb") as file:
            head = file.read(5)
    except OSError:
        return  # what follows says why
    if head[:4] == b"\x7fELF" and head[4] != 2:
        raise UsageError(f"process {pid} is a 32-bit program: use gdb's gcore")


def _write(
    pid: int, output: _Output, *, raw: bool, files: bool, progress: Callable[[int, int], None]
) -> tuple[Dump, list[dict[str, object]]]:
    capture = capture_of(pid)
    memory = Memory(pid, capture)
    try:
        with Stopped(pid) as stopped:
            since = time.monotonic()
            mappings = [mapping for mapping in mappings_of(pid) if not mapping.name.startswith(NEVER)]
            left_out = frozenset(
                m.start for m in mappings if not _kept(m, capture, files=files) or _only_reserved(m, memory)
            )
            notes = b"" if raw else core.notes_of(pid, stopped.threads, mappings)
            kept = [m for m in mappings if m.start not in left_out] if raw else mappings
            head, segments = core.layout(kept, notes, left_out)
            base = segments[0].offset if raw and segments else 0
            segments = [attrs.evolve(segment, offset=segment.offset - base) for segment in segments]
            if not raw:
                output.write_all(head, 0)
            _contents(memory, output, segments, capture, progress)
            os.ftruncate(output.fd, segments[-1].offset + segments[-1].file_bytes)
            stopped_s, threads = time.monotonic() - since, len(stopped.threads)
    finally:
        memory.close()
    os.fsync(output.fd)
    return Dump(
        pid=pid,
        program=_program(pid),
        file="",
        format="raw" if raw else "core",
        captured=capture is not None,
        threads=threads,
        mappings=len(mappings),
        memory_bytes=sum(segment.file_bytes for segment in segments),
        written_bytes=output.written - (0 if raw else len(head)),
        left_out_bytes=sum(m.bytes for m in mappings if m.start in left_out),
        brought_pages=memory.brought,
        unreadable=[page * PAGE_BYTES for page in memory.unreadable],
        stopped_s=round(stopped_s, 6),
    ), [_entry(segment) for segment in segments]


def _entry(segment: core.Segment) -> dict[str, object]:
    mapping = segment.mapping
    return {
        "offset": segment.offset,
        "address": mapping.start,
        "bytes": segment.file_bytes,
        "protection": mapping.protection,
        "name": mapping.name,
    }


def _only_reserved(mapping: Mapping, memory: Memory) -> bool:
    """Addresses that nothing is at, more than a file system may let a file have, be it all holes."""
    return mapping.private_anonymous and mapping.bytes >= RESERVED_BYTES and not any(memory.runs(mapping))


def _kept(mapping: Mapping, capture: Capture | None, *, files: bool) -> bool:
    if capture and (mapping.start, mapping.end) == capture.staging:
        return False
    return mapping.wanted and (
        files or not mapping.inode or bool(mapping.anonymous_bytes) or mapping.name.startswith("/dev/zero")
    )


def _contents(
    memory: Memory,
    output: _Output,
    segments: Sequence[core.Segment],
    capture: Capture | None,
    progress: Callable[[int, int], None],
) -> None:
    whole, done = sum(segment.file_bytes for segment in segments), 0
    staging = range(*(at // PAGE_BYTES for at in capture.staging)) if capture else range(0)
    for segment in segments:
        mapping = segment.mapping
        start = mapping.start // PAGE_BYTES
        for a, b in memory.runs(mapping) if segment.file_bytes else ():
            for first, last in ((a, min(b, staging.start)), (max(a, staging.stop), b)) if staging else ((a, b),):
                if first >= last:
                    continue
                for page, data in memory.read(first, last, file=not mapping.private_anonymous):
                    output.write(data, segment.offset + (page - start) * PAGE_BYTES)
                    progress(done + (page - start) * PAGE_BYTES, whole)
        done += segment.file_bytes
        progress(done, whole)


def _program(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return ""
