"""The eviction policy `scan`: a scan passes through without driving out what is in use. It learns from refaults alone.

An engine that traps faults sees no hits. It sees that something comes back, and how soon: the *refault distance* of a
unit is the number of evictions between its own and its return. A distance of no more than the capacity means that a
memory of twice the size would not have lost it; a scan's distance is longer, or there is none.

- Two queues, `probation` and `kept`. `evictions` counts; each evicted unit remembers the count at which it left.
- Fault: refault distance <= capacity: to the end of `kept`; otherwise to the end of `probation`.
- While `kept` holds more than `kept_percent` of the capacity, its head goes to the end of `probation`.
- When room is needed, the head of `probation` leaves, and only if there is none the head of `kept`.

What the engine needs for it: a second list, one count, and 8 bytes a leaf for where the count stood. A fault in a leaf
that is listed already puts it at the end of its own list. Source: the distance is that of Linux mm/workingset.c;
the two queues those of 2Q (Johnson and Shasha, VLDB 1994).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import attrs

from edm.hookspecs import EvictionPolicySpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@attrs.frozen
class ScanOptions:
    """How much is kept for what came back."""

    kept_percent: int = attrs.field(default=75, metadata={"help": "percent of local memory for what came back soon"})

    @kept_percent.validator
    def _check_kept(self, _field: object, value: int) -> None:
        if not 0 <= value <= 100:
            raise ValueError("kept_percent must be between 0 and 100")


class Scan:
    """The model. A hit changes nothing: the engine does not see it."""

    def __init__(self, options: ScanOptions, capacity: int) -> None:
        self._capacity = capacity
        self._most_kept = capacity * options.kept_percent // 100
        self._probation: OrderedDict[int, None] = OrderedDict()
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._left_at: dict[int, int] = {}
        self._evictions = 0

    def hit(self, unit: int) -> None:
        """Not seen."""

    def fault(self, unit: int) -> list[int]:
        """To `kept` if it was away for a short time only, to `probation` otherwise."""
        left_at = self._left_at.pop(unit, None)
        soon = left_at is not None and self._evictions - left_at <= self._capacity
        evicted = self._make_room()
        (self._kept if soon else self._probation)[unit] = None
        while len(self._kept) > self._most_kept:
            self._probation[self._kept.popitem(last=False)[0]] = None
        return evicted

    def _make_room(self) -> list[int]:
        if len(self._probation) + len(self._kept) < self._capacity:
            return []
        victim = (self._probation or self._kept).popitem(last=False)[0]
        self._left_at[victim] = self._evictions
        self._evictions += 1
        return [victim]


def _open(options: ScanOptions) -> object:
    from edm.policy import scan  # noqa: PLC0415 (the model needs no C)

    return scan(options)


@hookimpl
def edm_eviction_policies() -> Iterable[EvictionPolicySpec]:
    """Offer `scan`."""
    yield EvictionPolicySpec(
        name="scan", summary="keeps what comes back soon, lets scans pass", options=ScanOptions, model=Scan, open=_open
    )
