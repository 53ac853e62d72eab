"""The interfaces behind the four hooks.

Place on the path: the DM-Handler calls `FaultSource` [3-5, 12-15] and `Channel` [5, 11]; the DMS side of a
transport calls `PageServer` [6-10]; the DMS calls `SptStore` [6, 9, 10] and `PageStore` [7].

Everything is batch-first and works on buffers the caller owns. `refs` is always a one-dimensional array of
`edm.types.PAGE_REF`; `pages` / `into` is a C-contiguous buffer of exactly `len(refs) * PAGE_BYTES` bytes, page i of
the batch at byte `i * PAGE_BYTES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping, Sequence

    from edm.types import PageRefs, Slots, SptRows

    Buffer = bytes | bytearray | memoryview


@runtime_checkable
class PageServer(Protocol):
    """The DMS as a transport's serving side sees it. Called from one thread at a time per server."""

    def get(self, instance: int, refs: PageRefs, into: memoryview) -> None:
        """Answer a `RequestGetPage` batch in place [6-10].

        Sets status, version and checksum of each ref; page i is written into `into` when its status is
        `EXISTING_PAGE`, and left alone otherwise. Never raises for a single page: that is `GetStatus.ERROR`.
        """

    def evict(self, instance: int, refs: PageRefs, pages: memoryview) -> str:
        """Store a `RequestEvictPage` batch; sets each ref's status in place, returns the error text ("" if none).

        `SUCCESS` means what the store's sync policy promises. A version equal to the stored one is a repeat and
        succeeds without a write; an older one fails.
        """

    def control(self, instance: int, request: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out one control request (see docs/protocol.md); the answer has "ok" and, if false, "error"."""


@runtime_checkable
class Channel(Protocol):
    """One worker thread's way to the DMS. Used by one thread only; calls block, each with the transport's deadline.

    Every method raises `TransportTimeout`, `PeerLost` or `ProtocolError`; after a timeout the same call may be made
    again: a late answer to the first is recognised and thrown away.
    """

    def fetch(self, refs: PageRefs, into: memoryview) -> None:
        """Send `RequestGetPage` for refs, wait, fill statuses, versions, checksums and pages in place [5, 11]."""

    def evict(self, refs: PageRefs, pages: memoryview) -> str:
        """Send `RequestEvictPage`, wait for `AckPage`, fill statuses in place; returns the DMS's error text."""

    def control(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one control request and return the answer."""

    def close(self) -> None:
        """Release the channel; a second call does nothing."""


@runtime_checkable
class Transport(Protocol):
    """Carries messages between the DM-Handler and the DMS."""

    def connect(self) -> Channel:
        """Open a channel (DM-Handler side); call it in the thread that will use it."""

    def serve(self, server: PageServer, stop: threading.Event) -> None:
        """Answer requests (DMS side) until `stop` is set or every peer has said goodbye."""

    def close(self) -> None:
        """Release everything; a second call does nothing."""


@runtime_checkable
class SptStore(Protocol):
    """The stored page table: for each page its slot in the page store, version and checksum.

    Slots are reference-counted here, since a clone shares them: methods that let go of slots return those whose
    last reference is gone, and the DMS frees them in the page store after the next `commit`.

    A store may also have what the DMS asks for by name: `lazy` (True: a commit survives the server's death, but a loss
    of power only after `flush`; freed slots wait for it), `wants_flush` (True: time for a `flush` of both stores), and
    `answer(refs, slots)`, a `lookup` in place for the fault path (see `edm.dms.table.PageTable`).
    """

    def lookup(self, refs: PageRefs) -> SptRows:
        """Where each page is [6]; only `region` and `index` of refs are read."""

    def record(self, refs: PageRefs, slots: Slots) -> Slots:
        """Note that each page now lives in its slot with its version and checksum; returns slots let go of.

        The caller has checked the versions. A page that stands twice in refs: the last one counts.
        """

    def create(self, region: int) -> None:
        """Make an empty region; one that exists is left as it is."""

    def clone(self, region: int, into: int) -> Slots:
        """Make `into` hold exactly the pages of `region`, sharing slots; what `into` held is let go of."""

    def move(self, region: int, start: int, to: int, count: int) -> Slots:
        """Rename pages [start, start+count) to [to, …) as `mremap` does; what was at the target is let go of."""

    def drop(self, region: int, start: int, count: int) -> Slots:
        """Forget pages [start, start+count); returns slots let go of."""

    def drop_region(self, region: int) -> Slots:
        """Forget a region and all its pages; unknown regions are no error."""

    def regions(self) -> dict[int, int]:
        """Every region and how many pages it holds."""

    def pages(self, region: int) -> tuple[PageRefs, Slots]:
        """All pages of a region in index order, with their slots (for verify, list and export)."""

    def note(self, key: int, value: int) -> None:
        """Keep a small number under a key, part of the next commit (the DMS's own: instance numbers, sequences)."""

    def notes(self) -> dict[int, int]:
        """Every number kept by `note`."""

    def commit(self) -> None:
        """Make all changes so far survive a crash, as far as the store's sync policy says."""

    def flush(self) -> None:
        """Commit, and make it survive a loss of power whatever the sync policy; the page store is flushed before."""

    def stat(self) -> dict[str, Any]:
        """Figures for `edm dms status` and `edm store stat`."""

    def close(self) -> None:
        """Commit and release; a second call does nothing."""


@runtime_checkable
class PageStore(Protocol):
    """Keeps pages by slot, out of place: a put never overwrites a slot that is in use.

    A store, SPT stores included, may have what `edm store` asks for by name: `where(slot)` and `offset(slot)` (file and
    byte of a page), `damage` (what was found damaged at opening, and could be done without: `edm.stores.damage`),
    `verify()` (what is damaged that neither opening nor `get` finds), `look(slots)` (`live` where not all slots are
    known: nothing is removed), `compact()` and `trim()` (give room back).
    """

    def put(self, pages: memoryview, checksums: Any) -> Slots:
        """Write a batch, one fresh slot a page; `checksums` are the pages' CRC-32C (uint32 array).

        Raises `StoreFull` with nothing kept of the batch.
        """

    def get(self, slots: Slots, into: memoryview) -> None:
        """Read slots into `into` [7]; raises `Corrupt` naming the slot and file if a stored checksum differs."""

    def free(self, slots: Slots) -> None:
        """Give slots back; they may be reused by the next put."""

    def live(self, slots: Slots) -> None:
        """Called once after opening, with every slot the SPT still refers to: all others are free."""

    def sync(self) -> None:
        """Make every put so far survive a crash, as far as the sync policy says; before the SPT's commit."""

    def flush(self) -> None:
        """Make every put so far survive a loss of power, whatever the sync policy."""

    def stat(self) -> dict[str, Any]:
        """Figures for `edm dms status` and `edm store stat`."""

    def close(self) -> None:
        """Sync and release; a second call does nothing."""


@runtime_checkable
class FaultSource(Protocol):
    """Where page faults come from, with the fault engine behind it (LSPT, LPET, write-back buffer).

    `poll_faults`/`resolve` are called by fault worker threads, each with its own `worker` number;
    `poll_outbox`/`outbox_done` by the one write-back thread; the rest by the main thread.
    """

    def prepare(self, environment: dict[str, str]) -> dict[str, str]:
        """The environment a program must be started with so that its faults come here."""

    def start(self, instance: int) -> None:
        """Begin to accept programs; `instance` is this DM-Handler's number from the DMS's `hello`."""

    def poll_faults(self, worker: int, timeout_us: int) -> int:
        """Wait for faults; resolve what needs no DMS; return how many pages must be fetched now, -1 at the end."""

    def fault_batch(self, worker: int, count: int) -> tuple[PageRefs, memoryview]:
        """The worker's request buffers: `count` refs and the pages to fill."""

    def resolve(self, worker: int, count: int) -> None:
        """Install what was fetched into the worker's buffers, and wake the faulting threads [12-15]."""

    def poll_outbox(self, timeout_us: int) -> OutboxItem | None:
        """The next thing the DMS must be told, in order; None when there is none yet. Raises EOFError at the end."""

    def outbox_done(self, item: OutboxItem) -> None:
        """The DMS has carried out `item` (for an eviction: statuses are in its refs)."""

    def counters(self) -> dict[str, int]:
        """The engine's counters."""

    def stop(self) -> None:
        """End all waiting polls; no further fault is served."""

    def close(self) -> None:
        """Release everything; a second call does nothing."""


@runtime_checkable
class TakesTables(Protocol):
    """A `FaultSource` that can use a channel's C table ("edm.channel_ops", see `edm.ops`) without Python.

    It then polls, fetches and resolves by itself; `poll_faults` and `poll_outbox` return what the table could not do.
    """

    def use_channel(self, worker: int, table: int) -> None:
        """Fetch through the table at address `table`; called in the worker's thread before its first poll."""

    def use_write_back_channel(self, table: int) -> None:
        """Carry evictions through the table at address `table`; called before the first `poll_outbox`."""


@runtime_checkable
class TakesPolicy(Protocol):
    """A `FaultSource` that evicts, in the order of a policy's C table ("edm.policy_ops", see `edm.ops`)."""

    def use_policy(self, table: int) -> int:
        """Evict in the order of the table "edm.policy_ops" at that address, which must stay; called before `start`.

        Returns 0, or the errno with which the kernel refused the idle bits that the policy looks at.
        """


class OutboxItem(Protocol):
    """One ordered message for the DMS: an eviction batch, or a control request."""

    @property
    def refs(self) -> PageRefs | None:
        """The batch, for an eviction."""

    @property
    def pages(self) -> memoryview | None:
        """Its pages."""

    @property
    def request(self) -> Mapping[str, Any] | None:
        """The request, for everything else."""


class EvictionModel(Protocol):
    """An eviction policy over units (runs of pages that move together) that are numbered. One thread, never blocks.

    The caller knows what is resident: it calls `hit` for what is and `fault` for what is not.
    """

    def hit(self, unit: int) -> None:
        """A resident unit was touched. An engine that traps faults cannot see this without idle bits."""
        ...

    def fault(self, unit: int) -> Sequence[int]:
        """A unit comes in: which leave for it. Never more than `capacity` are resident afterwards."""
        ...
