"""What the memory server has changed and not yet made to last, and the slots that come free when it has.

Place on the path: the end of an eviction, before its acknowledgement; called by `MemoryServer`.

The order in which an eviction is made to last is what makes a crash harmless: the pages go to fresh slots, the SPT
notes them, the page store is synced, the SPT commits, the page is acknowledged, and only then are the slots of older
versions free. Whatever is cut short leaves the older version as it was, and the page with its sender.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from edm._native import ffi, lib
from edm.dms.table import words_at
from edm.errors import StoreError
from edm.faultpoints import reached

if TYPE_CHECKING:
    from edm.interfaces import PageStore, SptStore
    from edm.types import PageRefs, Slots

MOST_WAITING: Final = 16384
"""Slots that may wait for a flush where the SPT store does not say how many pages share one: 64 MiB."""


class _Server(Protocol):
    spt: SptStore
    pages: PageStore


class Lasting:
    """Commits and flushes a server's stores, in the order that matters. native: the same server in C, or None."""

    def __init__(self, server: _Server, native: Any) -> None:
        self._server = server
        self._native = native
        # Let go of by the SPT, not free yet: until the commit, or where that is lazy until the next flush. A server in
        # C has them itself, but for those that are being freed.
        self._let_go: list[Slots] = []
        # Recorded, but the commit failed: what a repeat must not be answered from.
        self.unsaved: set[tuple[int, int]] = set()
        self.pending = False
        self.flushes = 0

    def look_behind(self) -> None:
        """Take over what the server in C has left: an eviction that it could not commit."""
        count = 0 if self._native is None else lib.edm_server_unsaved(self._native, ffi.NULL)
        if count:
            names = ffi.new("struct edm_page_name[]", count)
            lib.edm_server_unsaved(self._native, names)
            self.unsaved.update((int(name.region), int(name.index)) for name in names)
            self._set_pending(True)

    def changed(self, let_go: Slots) -> None:
        """The SPT was changed, and let go of slots."""
        self._set_pending(True)
        if len(let_go):
            self._put_by(let_go)

    def stored(self, refs: PageRefs, let_go: Slots) -> None:
        """The SPT has recorded these pages, and let go of slots: commit that; raises `StoreError`."""
        if len(let_go):
            self._put_by(let_go)
        try:
            reached("pages_recorded")
            self.commit()
        except (StoreError, OSError):
            self.unsaved.update(key_of(refs, i) for i in range(len(refs)))
            raise

    def waiting(self) -> int:
        """How many slots wait to be free."""
        behind = 0 if self._native is None else int(lib.edm_server_waiting(self._native))
        return behind + sum(map(len, self._let_go))

    def save(self) -> None:
        """Commit what is pending, if anything is; raises `StoreError`."""
        self.look_behind()
        if self.pending:
            self.commit()

    def commit(self) -> None:
        """Commit, and flush where a group is full; raises `StoreError`."""
        self._set_pending(True)
        spt, pages = self._server.spt, self._server.pages
        pages.sync()
        reached("pages_synced")
        spt.commit()
        self._saved()
        if getattr(spt, "wants_flush", False) or getattr(pages, "wants_flush", False):
            self.flush()
        elif not getattr(spt, "lazy", False):
            self._free()
        elif self.waiting() >= getattr(spt, "group_pages", MOST_WAITING):
            self.flush()  # or what a program gave back at once would stay until it has written as much again

    def flush(self) -> None:
        """Make everything so far survive a loss of power; raises `StoreError`."""
        self.look_behind()
        self.flushes += 1
        spt, pages = self._server.spt, self._server.pages
        getattr(pages, "flush", pages.sync)()
        getattr(spt, "flush", spt.commit)()
        self._saved()
        self._free()

    def _set_pending(self, pending: bool) -> None:
        self.pending = pending
        if self._native is not None:
            lib.edm_server_blocked(self._native, pending)

    def _saved(self) -> None:
        self._set_pending(False)
        if self.unsaved:
            self.unsaved.clear()

    def _put_by(self, slots: Slots) -> None:
        if self._native is None:
            self._let_go.append(slots)
        elif lib.edm_server_put_by(self._native, words_at(slots), len(slots)):
            raise MemoryError

    def _free(self) -> None:
        behind = 0 if self._native is None else int(lib.edm_server_waiting(self._native))
        if behind:
            slots = np.empty(behind, np.uint64)
            lib.edm_server_take_waiting(self._native, words_at(slots))
            self._let_go.append(slots)
        while self._let_go:
            self._server.pages.free(self._let_go[-1])
            self._let_go.pop()


def key_of(refs: PageRefs, at: int) -> tuple[int, int]:
    """The region and number of a page in a batch."""
    return int(refs["region"][at]), int(refs["index"][at])
