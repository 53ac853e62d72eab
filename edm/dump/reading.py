"""Reading a stopped process's pages from outside, wherever they are."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, Final

from edm.dump.asking import ASK_PAGES, Asker, Capture
from edm.dump.mappings import data_runs, present_runs
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edm.dump.mappings import Mapping

WINDOW_PAGES: Final = 64
MISSES: Final = 10
"""How often in a row a page is missing that is not away either: the program has given it back, or it is lost."""


class Memory:
    """The pages of one process. brought: pages that the DM-Handler was asked for. unreadable: numbers of lost pages."""

    def __init__(self, pid: int, capture: Capture | None) -> None:
        self._pid = pid
        self._mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
        self._asker = Asker(pid, capture) if capture else None
        self._buffer = bytearray(WINDOW_PAGES * PAGE_BYTES)
        self.brought = 0
        self.unreadable: list[int] = []

    def runs(self, mapping: Mapping) -> Iterator[tuple[int, int]]:
        """Runs of pages [a, b) that may hold anything but zeros."""
        first, last = mapping.start // PAGE_BYTES, mapping.end // PAGE_BYTES
        if not mapping.private_anonymous:
            yield from data_runs(self._pid, mapping) if mapping.protection.endswith("s") else [(first, last)]
            return
        if self._asker is None:
            yield from present_runs(self._pagemap, first, last)
            return
        # What is here is looked at first: what leaves meanwhile, the DM-Handler has.
        yield from merged(list(present_runs(self._pagemap, first, last)), list(self._held(first, last)))

    def _held(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        assert self._asker is not None
        while first < last:
            count = min(ASK_PAGES, last - first)
            pages, following = self._asker.held(first, count)
            yield from ((first + a, first + b) for a, b in stretches(pages.tolist()))
            first = following

    def read(self, first: int, last: int, *, file: bool) -> Iterator[tuple[int, memoryview]]:
        """(page number, bytes of some pages from there on), in order, without those that cannot be read.

        The bytes are valid until the next step. file: a file's mapping, whose pages may lie behind the file's end.
        """
        if not file:
            self._bring(first, last)
        for at in range(first, last, WINDOW_PAGES):
            count = min(WINDOW_PAGES, last - at)
            if not file:
                self._bring(at + count, last)  # while this window is read
            yield from self._window(at, count, file=file)

    def _bring(self, first: int, last: int) -> None:
        count = min(WINDOW_PAGES, last - first)
        if self._asker and count:
            self.brought += int(self._asker.bring(first, count).sum())

    def _window(self, at: int, count: int, *, file: bool) -> Iterator[tuple[int, memoryview]]:
        done = start = 0
        view = memoryview(self._buffer)
        while done < count:
            got = self._pread(view[done * PAGE_BYTES : count * PAGE_BYTES], at + done)
            done += got
            if done == count or (not got and not file and self._wait(at + done, count - done)):
                continue
            if got:
                continue
            if done > start:
                yield at + start, view[start * PAGE_BYTES : done * PAGE_BYTES]
            if not file and self._marked(at + done):
                self.unreadable.append(at + done)
            done = start = done + 1
        if done > start:
            yield at + start, view[start * PAGE_BYTES : done * PAGE_BYTES]

    def _pread(self, into: memoryview, page: int) -> int:
        """Pages read, 0 where the first is not there."""
        try:
            return os.preadv(self._mem, [into], page * PAGE_BYTES) // PAGE_BYTES
        except OSError as error:
            if error.errno in {errno.EIO, errno.EFAULT}:
                return 0
            raise

    def _wait(self, page: int, count: int) -> bool:
        """Have pages brought and wait for the first; False if it is nowhere to be had."""
        if self._asker is None:
            return False
        pause, misses = 0.00005, 0
        while not self._there(page):
            # Looked at again after each answer: the page may have come, or gone, between the two.
            misses = 0 if self._asker.bring(page, count)[0] else misses + 1
            if misses == MISSES:
                return False
            time.sleep(pause)
            pause, count = min(pause * 2, 0.002), max(1, count // 2)
        return True

    def _marked(self, page: int) -> bool:
        """Whether the kernel has anything there: if it cannot be read, it is poisoned, since all copies are lost."""
        return bool(list(present_runs(self._pagemap, page, page + 1)))

    def _there(self, page: int) -> bool:
        try:
            return os.preadv(self._mem, [bytearray(1)], page * PAGE_BYTES) == 1
        except OSError:
            return False

    def close(self) -> None:
        """Close everything."""
        os.close(self._mem)
        os.close(self._pagemap)
        if self._asker:
            self._asker.close()


def stretches(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """[a, b) of each run of true values."""
    start = None
    for i, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            yield start, i
            start = None


def merged(*lists: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The union of several lists of runs, in order."""
    runs = sorted(run for one in lists for run in one)
    if not runs:
        return
    start, end = runs[0]
    for a, b in runs[1:]:
        if a > end:
            yield start, end
            start, end = a, b
        end = max(end, b)
    yield start, end
