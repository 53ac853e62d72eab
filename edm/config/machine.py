"""What this machine lets us use: the memory that percentages, and the default budget, are of; and CPU time."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import attrs

from edm.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SHARE_PERCENT: Final = 80
"""Of the memory there is, the default budget: the rest is for what is never evicted, and for others."""
OWN_BYTES: Final = 256 << 20
"""EDM's own processes count against the same limit, as does what the program touches before it is seen to be there: at
least so much is left for these (but no more than half)."""
_QUOTA_FILES: Final = {"cgroup": ("cpu.cfs_quota_us",), "cgroup2": ("cpu.max",)}
_FILES: Final = {"cgroup": ("memory.limit_in_bytes",), "cgroup2": ("memory.max", "memory.high")}


@attrs.frozen
class MemoryLimit:
    """The least of what this process is allowed. file: the cgroup's that says so; None: it is all the machine has."""

    bytes: int
    file: Path | None = None

    def __str__(self) -> str:
        if self.file is None:
            return f"the machine's {format_size(self.bytes)}"
        return f"the {format_size(self.bytes)} that this cgroup allows ({self.file})"

    def budget(self) -> int:
        """What of it the app's memory may take when nobody said how much."""
        kept = max(self.bytes * (100 - SHARE_PERCENT) // 100, min(OWN_BYTES, self.bytes // 2))
        return self.bytes - kept


def memory_limit(root: Path = Path("/")) -> MemoryLimit:
    """The smaller of this machine's memory and the limits of the cgroups this process is in, up to the topmost.

    root: where /proc and the cgroups' files are looked for. Source: Linux Documentation/admin-guide/cgroup-v2.rst
    (memory.max, memory.high), cgroup-v1/memory.rst (memory.limit_in_bytes), proc_pid_mountinfo(5), cgroups(7).
    """
    machine = MemoryLimit(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min([machine, *_cgroup_limits(root)], key=lambda limit: limit.bytes)


def _cgroup_limits(root: Path) -> list[MemoryLimit]:
    files = _cgroup_files(root, "memory", _FILES)
    return [limit for file in files if (limit := _limit(root, file)) is not None]


def cpu_quota(root: Path = Path("/")) -> Path | None:
    """The file of a cgroup, of those this process is in, that limits its CPU time; None: nothing does.

    root: as for `memory_limit`. Source: Linux Documentation/admin-guide/cgroup-v2.rst (cpu.max),
    scheduler/sched-bwc.rst (cpu.cfs_quota_us).
    """
    for file in _cgroup_files(root, "cpu", _QUOTA_FILES):
        text = _text(root, file)
        if text is not None and text.split()[:1] not in ([], ["max"], ["-1"]):
            return file
    return None


def _cgroup_files(root: Path, controller: str, names: Mapping[str, Sequence[str]]) -> list[Path]:
    """Where the groups this process is in, up to the topmost, have those files; names: of each type of file system."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:  # no cgroups in this kernel
        return []
    paths = dict(_groups(groups, controller))
    files = []
    for line in mounts:
        kind, top, place = _mount(line, controller)
        if kind in paths:
            files += [directory / name for directory in _upwards(paths[kind], top, place) for name in names[kind]]
    return files


def _groups(lines: list[str], controller: str) -> list[tuple[str, str]]:
    """File system type → this process's path in the hierarchy that the controller may be in."""
    fields = [line.split(":", 2) for line in lines]
    first = [("cgroup", path) for _, controllers, path in fields if controller in controllers.split(",")]
    return first + [("cgroup2", path) for _, controllers, path in fields if not controllers]


def _mount(line: str, controller: str) -> tuple[str, str, str]:
    """Of a line of mountinfo: the type ("" if the controller is not there), the hierarchy's part, the place."""
    front, _, back = line.partition(" - ")
    words, (kind, _source, options) = front.split(), back.split(None, 2)
    if kind == "cgroup" and controller not in options.split(","):
        kind = ""
    return kind, _unescaped(words[3]), _unescaped(words[4])


def _unescaped(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _upwards(path: str, top: str, place: str) -> list[Path]:
    """The directories of a group and all above it that can be seen: `top` of the hierarchy is mounted at `place`."""
    group, seen = PurePosixPath(path), PurePosixPath(top)
    if not group.is_relative_to(seen):
        # A container's path may be the host's: what is mounted at the top is then this process's own group.
        return [Path(place), *([Path(place, *group.parts[1:])] if ".." not in group.parts else [])]
    within = group.relative_to(seen)
    return [Path(place, within), *(Path(place, parent) for parent in within.parents)]


def _limit(root: Path, file: Path) -> MemoryLimit | None:
    text = _text(root, file)
    return MemoryLimit(int(text), file) if text is not None and text.isdigit() else None


def _text(root: Path, file: Path) -> str | None:
    try:
        return (root / file.relative_to("/")).read_text().strip()
    except OSError:  # the root group has no such file, and a container does not show its parents
        return None
