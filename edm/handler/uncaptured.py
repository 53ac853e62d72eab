"""Memory of captured programs that EDM leaves alone because it is shared: how much, and of which kind.

Place on the path: the DM-Handler looks with each report; the launcher's summary and one warning tell of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from edm.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable

WORTH_BYTES: Final = 16 << 20
"""Less than this is not looked at closely, and never warned of."""
WORTH_PART: Final = 8
"""… and warned of is only more than this part of the budget."""
KINDS: Final = {
    "/dev/zero": "MAP_SHARED|MAP_ANONYMOUS",
    "/SYSV": "System V",
    "/memfd:": "memfd",
    "/anon_hugepage": "huge pages",
}
ELSEWHERE: Final = "tmpfs"
OWN: Final = "/memfd:edm-ctl"


class Uncaptured:
    """The most that one process was seen to have; not summed, since processes may share it.

    peak: kind → bytes, at the moment when there was most.
    """

    def __init__(self, budget_bytes: int | None, proc: Path = Path("/proc")) -> None:
        self._worth = max(WORTH_BYTES, (budget_bytes or 0) // WORTH_PART)
        self._proc = proc
        self._most = 0
        self._warned = False
        self.peak: dict[str, int] = {}

    def look(self, pids: Iterable[int]) -> str:
        """Look at the processes; returns a warning, once."""
        for pid in pids:
            # The kernel walks the page tables for smaps: only when there is more than the last time.
            if _shared_bytes(self._proc / str(pid)) > max(WORTH_BYTES, self._most * 17 // 16):
                kinds = _by_kind(self._proc / str(pid))
                if sum(kinds.values()) > sum(self.peak.values()):
                    self.peak = kinds
                    self._most = sum(kinds.values())
        if self._warned or self._most <= self._worth:
            return ""
        self._warned = True
        return f"a process has {describe(self.peak)}, which is not captured: it stays here, above the budget"


def describe(kinds: dict[str, int]) -> str:
    """The kinds for a person: "64M of shared memory (memfd 60M, tmpfs 4M)"."""
    parts = ", ".join(f"{kind} {format_size(size)}" for kind, size in sorted(kinds.items(), key=lambda item: -item[1]))
    return f"{format_size(sum(kinds.values()))} of shared memory ({parts})"


def _shared_bytes(process: Path) -> int:
    """Source: proc_pid_status(5), RssShmem and HugetlbPages."""
    total = 0
    try:
        with (process / "status").open() as file:
            for line in file:
                if line.startswith(("RssShmem:", "HugetlbPages:")):
                    total += int(line.split()[1]) * 1024
    except OSError:  # it has just ended
        return 0
    return total


def _by_kind(process: Path) -> dict[str, int]:
    """Kind → bytes here, of mappings that are shared and in no file on a disk. Source: proc_pid_smaps(5)."""
    kinds: dict[str, int] = {}
    kind = ""
    try:
        with (process / "smaps").open() as file:
            for line in file:
                words = line.split(None, 5)
                if len(words[0]) > 8 and "-" in words[0]:
                    kind = _kind(words[5].strip()) if len(words) > 5 and words[1][3] == "s" else ""
                elif kind and words[0] in {"Rss:", "Shared_Hugetlb:", "Private_Hugetlb:"}:
                    kinds[kind] = kinds.get(kind, 0) + int(words[1]) * 1024
    except OSError:  # it has just ended
        return {}
    return {kind: size for kind, size in kinds.items() if size}


def _kind(name: str) -> str:
    if name.startswith(OWN):
        return ""
    for start, kind in KINDS.items():
        if name.startswith(start):
            return kind
    return ELSEWHERE if name.startswith("/dev/shm/") else ""  # noqa: S108 (a name to compare with)
