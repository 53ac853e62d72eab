"""Traces: what a program does to its pages, as a file or made up.

A text file has one operation a line; `#` begins a comment, numbers are decimal or 0x-hexadecimal::

    r 17            read page 17
    w 17 99         write 99 to it
    remove 16 4     madvise(MADV_DONTNEED) of pages 16 to 19
    unmap 16 4      munmap of them, and a fresh mmap
    remap 16 4 64   mremap of them to 64 to 67, and a fresh mmap at 16

A file named `….npy` is a NumPy array of `OPERATION` records. A trace holds what each of its reads must find: what was
written there last, and zeros before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from edm._native import lib
from edm.errors import UsageError
from edm.plugins.source_replay import MAX_PAGES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from edm.plugins.source_replay import ReplayOptions

    Operations = NDArray[np.void]
    """A one-dimensional array of `OPERATION`."""

OPERATION: Final = np.dtype([("kind", "<u4"), ("count", "<u4"), ("page", "<u8"), ("value", "<u8")])
"""`struct edm_replay_op` in native/edm_abi.h.

kind: `READ`, `WRITE`, `REMOVE`, `UNMAP` or `REMAP`. count: pages, of the last three. page: the first one. value: what a
write writes and a read found; where a remap goes.
"""

READ: Final[int] = lib.EDM_REPLAY_READ
WRITE: Final[int] = lib.EDM_REPLAY_WRITE
REMOVE: Final[int] = lib.EDM_REPLAY_REMOVE
UNMAP: Final[int] = lib.EDM_REPLAY_UNMAP
REMAP: Final[int] = lib.EDM_REPLAY_REMAP
_WORDS: Final = {"r": (READ, 1), "w": (WRITE, 2), "remove": (REMOVE, 2), "unmap": (UNMAP, 2), "remap": (REMAP, 3)}
DEFAULT_PAGES: Final = 16_384
BLOCK_PAGES: Final = 64
"""Neighbouring pages belong to one thread in blocks of so many."""


@attrs.frozen(eq=False)
class Trace:
    """Operations on `pages` pages, and for each read the value it must find (0 for other operations)."""

    operations: Operations
    pages: int
    expected: NDArray[np.uint64]

    def split(self, threads: int) -> list[NDArray[np.intp]]:
        """For each thread the indices of its operations, in order; every page is one thread's."""
        owner = self.operations["page"] // np.uint64(BLOCK_PAGES) % np.uint64(threads)
        return [np.flatnonzero(owner == thread) for thread in range(threads)]


def load(options: ReplayOptions) -> Trace:
    """The trace the options ask for; raises `UsageError`."""
    if options.trace is None:
        pages = options.pages or DEFAULT_PAGES
        operations = made_up(options, pages)
    else:
        operations = read(options.trace)
        needed = int(_ends(operations).max()) if len(operations) else 1
        pages = options.pages or needed
        if needed > pages:
            raise UsageError(f"{options.trace}: touches page {needed - 1}, but fault_source.replay.pages is {pages}")
        if options.threads > 1 and (operations["kind"] > WRITE).any():
            raise UsageError(f"{options.trace}: a trace with remove, unmap or remap is played by one thread")
    return Trace(operations, pages, expected_reads(operations, pages))


def made_up(options: ReplayOptions, pages: int) -> Operations:
    """The pattern's touches; the same for the same options."""
    random = np.random.default_rng(options.seed)
    operations = np.zeros(options.touches, OPERATION)
    if options.pattern == "sequential":
        operations["page"] = np.arange(options.touches, dtype=np.uint64) % np.uint64(pages)
    else:
        operations["page"] = random.integers(0, pages, options.touches, np.uint64)
    if options.pattern == "hot":
        hot = random.random(options.touches) < 0.9
        operations["page"][hot] %= np.uint64(max(pages // 10, 1))
    writes = random.random(options.touches) * 100 < options.writes
    operations["kind"] = np.where(writes, WRITE, READ)
    operations["value"] = np.where(writes, np.arange(1, options.touches + 1, dtype=np.uint64), np.uint64(0))
    return operations


def read(path: Path) -> Operations:
    """A trace file's operations; raises `UsageError` naming file and line."""
    try:
        operations = _read_array(path) if path.suffix == ".npy" else _read_text(path)
    except OSError as error:
        raise UsageError(f"cannot read the trace {path}: {error.strerror}") from error
    for index in np.flatnonzero((operations["kind"] < READ) | (operations["kind"] > REMAP))[:1]:
        raise UsageError(f"{path}: operation {index} is of no known kind: {operations['kind'][index]}")
    changes = operations["kind"] > WRITE
    for index in np.flatnonzero(changes & (operations["count"] == 0))[:1]:
        raise UsageError(f"{path}: operation {index} changes no pages")
    source, target, count = (operations[name].astype(np.float64) for name in ("page", "value", "count"))
    overlap = (operations["kind"] == REMAP) & (np.abs(source - target) < count)
    for index in np.flatnonzero(overlap)[:1]:
        raise UsageError(f"{path}: operation {index} remaps pages onto themselves")
    for index in np.flatnonzero(_ends(operations) > np.uint64(MAX_PAGES))[:1]:
        raise UsageError(f"{path}: operation {index} is on a page beyond the last, {MAX_PAGES - 1}")
    return operations


def _read_array(path: Path) -> Operations:
    try:
        operations: Any = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(f"{path}: not a NumPy file: {error}") from None
    if not isinstance(operations, np.ndarray) or operations.dtype != OPERATION or operations.ndim != 1:
        raise UsageError(f"{path}: not a one-dimensional array of {OPERATION}")
    return operations


def _read_text(path: Path) -> Operations:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: neither text nor named ….npy") from None
    return np.array(list(_parse(path, text)), OPERATION)


def _parse(path: Path, text: str) -> Iterator[tuple[int, int, int, int]]:
    for number, line in enumerate(text.splitlines(), 1):
        word, *rest = line.partition("#")[0].split() or [""]
        if not word:
            continue
        kind, arguments = _WORDS.get(word, (0, 0))
        try:
            values = [int(value, 0) for value in rest]
        except ValueError:
            values = [-1]
        if not kind or len(values) != arguments or not all(0 <= value < 1 << 64 for value in values):
            raise UsageError(f"{path}:{number}: '{line.strip()}' is no operation (see: r, w, remove, unmap, remap)")
        page, *more = values
        if kind <= WRITE:
            yield kind, 0, page, more[0] if more else 0
        elif more[0] < 1 << 32:
            yield kind, more[0], page, more[1] if kind == REMAP else 0
        else:
            raise UsageError(f"{path}:{number}: '{line.strip()}' is on more pages than there are")


def _ends(operations: Operations) -> NDArray[np.uint64]:
    """For each operation the page after its last; all ones where that is no number."""
    count = np.where(operations["kind"] > WRITE, operations["count"], 1).astype(np.uint64)
    first = operations["page"]
    target = np.where(operations["kind"] == REMAP, operations["value"], np.uint64(0))
    first = np.maximum(first, target)
    ends: NDArray[np.uint64] = first + count
    ends[ends < first] = np.iinfo(np.uint64).max
    return ends


# ---- what reads must find


def expected_reads(operations: Operations, pages: int) -> NDArray[np.uint64]:
    """For each read what it must find; 0 for other operations."""
    held = np.zeros(pages, np.uint64)
    expected = np.zeros(len(operations), np.uint64)
    changes = np.flatnonzero(operations["kind"] > WRITE)
    start = 0
    for change in [*changes.tolist(), len(operations)]:
        _play_touches(operations[start:change], held, expected[start:change])
        if change < len(operations):
            _play_change(operations[change], held)
        start = change + 1
    return expected


def _play_touches(touches: Operations, held: NDArray[np.uint64], expected: NDArray[np.uint64]) -> None:
    """Touches alone: each finds what was written last before it to its page, or what the page held."""
    if not len(touches):
        return
    order = np.argsort(touches["page"], kind="stable")
    page, value, is_write = touches["page"][order], touches["value"][order], (touches["kind"] == WRITE)[order]
    at = np.arange(len(order))
    first_of_page = np.maximum.accumulate(np.where(np.r_[True, page[1:] != page[:-1]], at, 0))
    last_write = np.maximum.accumulate(np.where(is_write, at, -1))
    found = np.where(last_write >= first_of_page, value[np.maximum(last_write, 0)], held[page])
    expected[order[~is_write]] = found[~is_write]
    last_of_page = np.r_[page[1:] != page[:-1], True]
    held[page[last_of_page]] = found[last_of_page]


def _play_change(change: np.void, held: NDArray[np.uint64]) -> None:
    page, count = int(change["page"]), int(change["count"])
    if change["kind"] == REMAP:
        target = int(change["value"])
        held[target : target + count] = held[page : page + count]
    held[page : page + count] = 0
