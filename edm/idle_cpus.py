"""What becomes of CPUs that are idle while a program faults: each answer would have to wait until one has woken.

Place on the path: between a fault [2] and its answer, and again until the program goes on [14].
Source: Linux Documentation/power/pm_qos_interface.rst, admin-guide/pm/cpuidle.rst; drivers/cpuidle/cpuidle-haltpoll.c.
"""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Final

import attrs

from edm._native import lib
from edm.config.machine import cpu_quota
from edm.errors import UsageError

DEVICE: Final = Path("dev/cpu_dma_latency")
_DRIVER: Final = Path("sys/devices/system/cpu/cpuidle/current_driver")
GUEST_DRIVER: Final = "haltpoll"
"""Of a virtual machine: its CPUs only halt, so no latency at all is asked for, and they poll."""
_GUEST_US: Final = 0
_SHALLOW_US: Final = 2
"""The lightest sleep of a real CPU, which costs next to nothing to leave."""
MOST_POLLING: Final = 16
"""CPUs; where there are more, too much would be burnt for one program."""
MOST_OCCUPIED: Final = 4


class IdleWay(enum.IntEnum):
    """See `enum edm_idle` in native/edm_abi.h."""

    SLEEP = lib.EDM_IDLE_SLEEP
    OCCUPY = lib.EDM_IDLE_OCCUPY
    AWAKE = lib.EDM_IDLE_AWAKE


@attrs.frozen
class IdleCpus:
    """What is done, and for AWAKE how long a CPU may take to wake, in microseconds."""

    way: IdleWay
    latency_us: int = 0


def idle_cpus(setting: str, *, placed: bool = False, cpus: int = 0, root: Path = Path("/")) -> IdleCpus:
    """Settle what `idle_cpus` = auto, awake, occupy or sleep comes to on this machine.

    UsageError where `awake` cannot be had. placed: fault threads run on CPUs that somebody chose. cpus: how many there
    are, 0: those this process may use.
    root: where /dev, /sys, /proc and the cgroups' files are looked for.
    """
    if setting == "occupy":
        return IdleCpus(IdleWay.OCCUPY)
    driver = _driver(root)
    latency_us = _GUEST_US if driver in {"", GUEST_DRIVER} else _SHALLOW_US
    if setting == "awake":
        if not may_ask(root):
            raise UsageError(f"idle_cpus = awake: this process may not write to /{DEVICE}")
        return IdleCpus(IdleWay.AWAKE, latency_us)
    cpus = cpus or len(os.sched_getaffinity(0))
    if setting == "sleep" or cpus < 2:
        return IdleCpus(IdleWay.SLEEP)
    if driver and may_ask(root) and (driver != GUEST_DRIVER or cpus <= MOST_POLLING):
        return IdleCpus(IdleWay.AWAKE, latency_us)
    # What occupies a CPU uses up a quota of CPU time that the program has a part in.
    if not placed and cpus <= MOST_OCCUPIED and cpu_quota(root) is None:
        return IdleCpus(IdleWay.OCCUPY)
    return IdleCpus(IdleWay.SLEEP)


def may_ask(root: Path = Path("/")) -> bool:
    """Whether this process may ask the kernel for a latency."""
    return os.access(root / DEVICE, os.W_OK)


def _driver(root: Path) -> str:
    """What puts CPUs to sleep; empty: nothing that heeds a latency."""
    try:
        name = (root / _DRIVER).read_text().strip()
    except OSError:
        return ""
    return "" if name == "none" else name
