"""What stands before the memory server: one thread at a time, and no more pages for a client than its quota.

Place on the path: between a transport's `serve` and `MemoryServer` [6-10].
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, Final

from edm.errors import TransportTimeout
from edm.ops import ATTRIBUTE
from edm.types import EvictStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    from edm.interfaces import PageServer, SptStore
    from edm.types import PageRefs

INSTANCE_SHIFT: Final = 32
LOCK_S: Final = 10.0
"""Longest wait for a call through the server's table."""


class GuardedServer:
    """A `PageServer` around another.

    table: the server's SPT store, asked only when an instance comes near its quota.
    quota_pages: the most pages of one client, 0 for no limit; may be changed at any time.
    owner_of: whose an instance is; by itself each is a client of its own. Set before the first request.
    """

    def __init__(self, server: PageServer, table: SptStore, quota_pages: int = 0) -> None:
        self.owner_of: Callable[[int], Hashable] = _its_own
        self._server = server
        self._table = table
        self._lock = threading.Lock()
        # What goes through the table of the server behind needs nothing from here but for evictions under a quota.
        self._answers_from_c = (capsule := getattr(server, ATTRIBUTE, None)) is not None
        if self._answers_from_c:
            self.__edm_ops__ = capsule
        # Never less than what a client has: pages counted at the last look, and all evicted since.
        self._at_most: dict[Hashable, int] = {}
        self._quota_pages = 0
        self.quota_pages = quota_pages

    @property
    def quota_pages(self) -> int:
        """See the class."""
        return self._quota_pages

    @quota_pages.setter
    def quota_pages(self, pages: int) -> None:
        with self._lock:
            if self._answers_from_c:
                self._server.open_table(evictions=not pages)  # type: ignore[attr-defined]
            # What was evicted without a quota was not counted.
            if not self._quota_pages:
                self._at_most.clear()
            self._quota_pages = pages

    def get(self, instance: int, refs: PageRefs, into: memoryview) -> None:
        """See `PageServer`."""
        with self._alone():
            self._server.get(instance, refs, into)

    def evict(self, instance: int, refs: PageRefs, pages: memoryview) -> str:
        """See `PageServer`; a batch that does not fit the quota is refused whole, with nothing changed."""
        with self._alone():
            if self.quota_pages and not self._fits(instance, refs):
                refs["status"] = EvictStatus.FAIL
                return f"the client of instance {instance} is at its quota of {self.quota_pages} pages"
            return self._server.evict(instance, refs, pages)

    def control(self, instance: int, request: Mapping[str, Any]) -> dict[str, Any]:
        """See `PageServer`."""
        with self._alone():
            if request.get("op") == "clone_region":
                # It adds pages without an eviction: count anew at the next one.
                self._at_most.pop(self.owner_of(instance), None)
            return self._server.control(instance, request)

    def usage(self) -> dict[int, int]:
        """Pages stored for each instance."""
        with self._alone():
            return self._usage()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other calls away, those through the server's table included; raises `TransportTimeout`."""
        with self._lock:
            if not self._answers_from_c:
                yield
                return
            if not self._server.enter(LOCK_S):  # type: ignore[attr-defined]
                raise TransportTimeout(f"the stores were busy for {LOCK_S:.0f} s")
            try:
                yield
            finally:
                self._server.leave()  # type: ignore[attr-defined]

    def _fits(self, instance: int, refs: PageRefs) -> bool:
        more, owner = len(refs), self.owner_of(instance)
        at_most = self._at_most.get(owner)
        if at_most is None or at_most + more > self.quota_pages:
            # Some of these pages may only replace themselves, others were dropped since: the table knows.
            at_most = sum(pages for other, pages in self._usage().items() if self.owner_of(other) == owner)
            more -= int(self._table.lookup(refs).found.sum())
            if at_most + more > self.quota_pages:
                self._at_most[owner] = at_most
                return False
        self._at_most[owner] = at_most + more
        return True

    def _usage(self) -> dict[int, int]:
        usage: dict[int, int] = {}
        for region, pages in self._table.regions().items():
            instance = region >> INSTANCE_SHIFT
            usage[instance] = usage.get(instance, 0) + pages
        return usage


def _its_own(instance: int) -> Hashable:
    return instance
