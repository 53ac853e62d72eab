"""What a running program has in memory, as the kernel tells it: sampled from outside, over its whole process tree."""

import threading
import time
from pathlib import Path

import attrs

from edm.dump.asking import ASK_PAGES, Asker, capture_of
from edm.errors import EdmError
from edm.types import PAGE_BYTES

LAST_PAGE = 1 << 35
"""Addresses of 47 bits."""
EDM_PROCESSES = ("edm: ", "mpiexec", "hydra_pmi_proxy")


@attrs.frozen
class Memory:
    """Anonymous memory of one process at one moment, in bytes; anonymous: what is here.

    registered: of it, in mappings of a userfaultfd. away: of what EDM has captured, what is not here.
    """

    pid: int
    name: str
    anonymous: int
    registered: int
    mappings: int
    away: int = 0

    @property
    def all(self):
        """Here and away."""
        return self.anonymous + self.away

    @property
    def captured(self):
        """The part of it that is captured: what is away has been."""
        return (self.registered + self.away) / self.all


def children(pid):
    """Pids of a process and all its descendants, without those of EDM."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text()
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        found = [] if name.startswith(EDM_PROCESSES) else [pid]
        for task in tasks:
            for child in (task / "children").read_text().split():
                found += children(int(child))
    except OSError:  # it has just ended
        return []
    return found


def anonymous_bytes(pid):
    """A process's anonymous resident memory, 0 when it has gone. Source: proc_pid_status(5), RssAnon."""
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def memory_of(pid):
    """Where a process's anonymous pages are, None when it has gone. Source: proc_pid_smaps(5), VmFlags um and uw."""
    anonymous = registered = mappings = here = 0
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        with open(f"/proc/{pid}/smaps") as file:
            for line in file:
                if line.startswith("Anonymous:"):
                    here = int(line.split()[1]) * 1024
                    anonymous += here
                    mappings += 1
                elif line.startswith("VmFlags:") and "um" in line.split():
                    registered += here
    except OSError:
        return None
    return Memory(pid, name, anonymous, registered, mappings) if mappings else None


class Askers:
    """What the DM-Handlers of processes say of them, by pid."""

    def __init__(self):
        self._askers = {}

    def held_bytes(self, pid):
        """Of a process's memory what is captured, here or away; 0 where it is not captured (yet, or any more)."""
        try:
            if pid not in self._askers:
                capture = capture_of(pid)
                if not capture or not capture.path:
                    return 0
                self._askers[pid] = Asker(pid, capture)
            return PAGE_BYTES * sum(self._held_pages(self._askers[pid]))
        except (EdmError, OSError):  # it has ended
            if pid in self._askers:
                self._askers.pop(pid).close()
            return 0

    def _held_pages(self, asker):
        page = 0
        while page < LAST_PAGE - ASK_PAGES:
            pages, page = asker.held(page, ASK_PAGES)
            yield int(pages.sum())

    def close(self):
        for asker in self._askers.values():
            asker.close()


class Watch:
    """Samples the tree below `pid` until closed. peak_bytes: the largest sum of anonymous memory seen at once.

    largest: with `detail`, the process (not `pid` itself) that had most, here and away, at that moment.
    evicted: whether any of it may be away; its DM-Handler is asked then, which hears later than the program does what
    that has let go of.
    """

    def __init__(self, pid, *, detail=False, evicted=False, every_s=0.004):
        self._pid, self._detail, self._evicted, self._every_s = pid, detail, evicted, every_s
        self.peak_bytes = 0
        self.largest = Memory(0, "", 0, 0, 0)
        self._askers = Askers()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stop.wait(self._every_s):
            pids = children(self._pid)
            self.peak_bytes = max(self.peak_bytes, sum(map(anonymous_bytes, pids)))
            if self._detail:
                self._look_closely(pids)

    def _look_closely(self, pids):
        for pid in pids:
            memory = memory_of(pid) if pid != self._pid else None
            if not memory:
                continue
            if self._evicted:
                memory = attrs.evolve(memory, away=self._away_bytes(pid, memory))
            if memory.all >= self.largest.all:
                self.largest = memory

    def _away_bytes(self, pid, before):
        """Of what is captured what is not here; never too much, where the program goes on between the looks."""
        held = self._askers.held_bytes(pid) if before.registered else 0
        after = memory_of(pid) if held else None
        return max(0, held - max(before.registered, after.registered)) if after else 0

    def close(self):
        self._stop.set()
        self._thread.join()
        self._askers.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def wait_for(condition, within_s=60.0):
    """Poll until the condition is true; returns its value, or fails."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
    return value
