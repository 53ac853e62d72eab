"""Resource limits: those of `edm run` are the program's; EDM's own processes have what they may have."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Final

import attrs

from edm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

NONE: Final = resource.RLIM_INFINITY
MEBI: Final = 1 << 20


@attrs.frozen
class Need:
    """What EDM's processes want of a resource, and cannot do without; the shell's letter for it, and its unit there."""

    name: str
    letter: str
    unit: int
    wanted: int
    least: int = 0


NEEDS: Final = {
    resource.RLIMIT_NOFILE: Need("open files", "n", 1, 65536, 64),
    resource.RLIMIT_STACK: Need("the stack", "s", 1024, 8 * MEBI),
    resource.RLIMIT_FSIZE: Need("the size of files", "f", 1024, NONE, 2048 * MEBI),
    resource.RLIMIT_CPU: Need("CPU time", "t", 1, NONE),
    resource.RLIMIT_NPROC: Need("processes", "u", 1, NONE),
    resource.RLIMIT_DATA: Need("data", "d", 1024, NONE, 192 * MEBI),
    resource.RLIMIT_AS: Need("address space", "v", 1024, NONE, 3072 * MEBI),
}
"""Memory last: when it is limited again, nothing more is needed."""


def _most(a: int, b: int) -> int:
    return NONE if NONE in {a, b} else max(a, b)


_lifted: dict[int, tuple[int, int]] = {}


def lift_limits() -> None:
    """Lift this process's limits, and those of what it starts, as far as it may.

    Raises `UsageError` where what is left is not enough.
    """
    for kind, need in NEEDS.items():
        soft, hard = resource.getrlimit(kind)
        if _most(soft, need.wanted) == soft:
            continue
        try:
            resource.setrlimit(kind, (need.wanted, _most(hard, need.wanted)))
        except (ValueError, OSError):  # only root may have more than the hard one, and not in every container
            resource.setrlimit(kind, (hard, hard))
            if need.least > hard != NONE:
                raise UsageError(_say_less(need, hard)) from None
        _lifted.setdefault(kind, (soft, hard))


def lifted_limits() -> dict[int, tuple[int, int]]:
    """What the limits were that this process has lifted, (soft, hard): the program's."""
    return dict(_lifted)


def _say_less(need: Need, hard: int) -> str:
    return (
        f"the limit on {need.name} is {hard // need.unit} (ulimit -{need.letter}), also for EDM's own processes, "
        f"which need {need.least // need.unit}: limit the program alone, "
        f"edm run -- sh -c 'ulimit -{need.letter} {hard // need.unit} && exec PROGRAM'"
    )


def impose_limits(limits: Mapping[int, tuple[int, int]]) -> None:
    """This process's limits are these."""
    for kind, pair in limits.items():
        resource.setrlimit(kind, pair)
