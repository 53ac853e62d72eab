"""The words of the page protocol: pages, references to them, statuses.

Place on the path: used by every step; imports nothing else of EDM.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

PAGE_BYTES: Final = 4096
"""Size of a page in bytes; the one page size EDM moves."""

MAX_BATCH_PAGES: Final = 1024
"""The most pages one message carries."""


class GetStatus(IntEnum):
    """The DMS's answer to a `RequestGetPage`, per page."""

    NEW_PAGE = 0
    EXISTING_PAGE = 1
    ERROR = 2
    LOST = 3
    """Never sent: the DM-Handler gives the page up, and its program gets SIGBUS for it."""


class EvictStatus(IntEnum):
    """The DMS's answer to a `RequestEvictPage`, per page (`AckPage`)."""

    SUCCESS = 0
    FAIL = 1


PAGE_REF: Final = np.dtype(
    [
        ("region", "<u8"),
        ("index", "<u8"),
        ("version", "<u8"),
        ("checksum", "<u4"),
        ("status", "<u2"),
        ("flags", "<u2"),
    ]
)
"""One page reference: 32 bytes, little-endian, the record of every batch.

region: which address space (upper 32 bits: the instance the DMS named in `hello`).
index: page number in it (address / 4096 for a process's memory).
version: evictions count versions upwards; a request to evict carries the new one, the
    answer to a get carries the stored one (0: none).
checksum: CRC-32C of the page's 4096 bytes.
status: `GetStatus` or `EvictStatus`, written by the answering side.
flags: reserved, 0.

The same layout is `struct edm_page_ref` in `native/edm_abi.h`.
"""

if TYPE_CHECKING:
    PageRefs = NDArray[np.void]
    """A one-dimensional array of `PAGE_REF`."""
    Slots = NDArray[np.uint64]
    """A one-dimensional array of page-store slot numbers."""


@attrs.frozen(slots=True)
class PageId:
    """A page: the region it belongs to and its number there."""

    region: int
    index: int

    def __str__(self) -> str:
        return f"{self.region:#x}:{self.index:#x}"


@attrs.frozen(slots=True)
class PageRange:
    """`count` pages of one region from `start` on."""

    region: int
    start: int
    count: int


@attrs.frozen(slots=True)
class SptRows:
    """What the SPT knows of a batch of pages: parallel arrays, one element a page.

    found: bool. slots: where the page store has it. versions: uint64. checksums: uint32.
    Elements whose `found` is False are 0.
    """

    found: NDArray[np.bool_]
    slots: NDArray[np.uint64]
    versions: NDArray[np.uint64]
    checksums: NDArray[np.uint32]


@attrs.frozen(slots=True)
class Inheritance:
    """Where a DM-Handler finds the programs of one that died.

    holder: the process that keeps their descriptors. segment: the descriptor there from which a fault source goes on.
    instances: the DM-Handler's numbers, one from each memory server.
    """

    holder: int
    segment: int
    instances: tuple[int, ...]


@attrs.frozen(slots=True)
class RunContext:
    """What a plugin may know of the run it is opened in.

    run_dir: private directory of this run (mode 0700); sockets live here.
    store_dir: where a store puts its files (may outlive the run).
    role: "dm-handler", "dms" or "launcher".
    deadline_s: longest wait for one answer, in seconds, before `TransportTimeout`.
    inheritance: what a DM-Handler that died has left to this one.
    """

    run_dir: Path
    store_dir: Path
    role: str
    deadline_s: float = 10.0
    inheritance: Inheritance | None = None


@attrs.frozen(slots=True)
class LaunchPlan:
    """The processes a one-command run starts for a transport.

    commands: argument vectors, each started once; environment: set in them beside the launcher's own.
    """

    commands: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str] = attrs.field(factory=dict)


def refs_from(buffer: Any, count: int) -> PageRefs:
    """View the first `count` page references in `buffer` (no copy; writable if it is)."""
    return np.frombuffer(buffer, PAGE_REF, count)
