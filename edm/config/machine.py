"""How much memory this machine lets us use: what percentages are of."""

from __future__ import annotations

import os
from pathlib import Path


def memory_bytes(root: Path = Path("/")) -> int:
    """The smaller of this machine's memory and the limits of the cgroups this process is in.

    root: where /proc and /sys are looked for. Source: Linux Documentation/admin-guide/cgroup-v2.rst (memory.max),
    cgroup-v1/memory.rst (memory.limit_in_bytes).
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> list[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no cgroups in this kernel
        return []
    limits = []
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        if not controllers:
            top, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        # In a container the path may be the host's: what is mounted at the top is then this process's own group.
        limits += [limit for place in {top, group, *group.parents} if (limit := _limit(place / file)) is not None]
    return limits


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:  # the root group has no such file, and a container does not show its parents
        return None
    return int(text) if text.isdigit() else None
