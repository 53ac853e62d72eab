"""The eviction policy `clock`: the source project's, with thresholds and idle bits.

Units stand in a circle; touching one clears its idle bit (the kernel's, where /sys/kernel/mm/page_idle is there). At
the high threshold the hand goes round: what is idle leaves, what is not is marked idle and passed, until the low
threshold is reached. What the engine needs for it: the list, its head being where the hand is; passing a unit is
moving it to the end. Without idle bits nothing is known to be touched, and the clock is `fifo` in batches.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import attrs

from edm.hookspecs import EvictionPolicySpec, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@attrs.frozen
class ClockOptions:
    """Where the hand stops, and what it can see."""

    low_percent: int = attrs.field(
        default=94, metadata={"help": "evict down to so many percent of local memory in edm simulate; a run has --low"}
    )
    idle_bits: bool = attrs.field(default=True, metadata={"help": "the kernel tells what was touched (page_idle)"})

    @low_percent.validator
    def _check_low(self, _field: object, value: int) -> None:
        if not 0 < value <= 100:
            raise ValueError("low_percent must be between 1 and 100")


class Clock:
    """The model."""

    def __init__(self, options: ClockOptions, capacity: int) -> None:
        self._capacity = capacity
        self._low = min(max(capacity * options.low_percent // 100, 1), capacity - 1)
        self._idle_bits = options.idle_bits
        self._circle: OrderedDict[int, bool] = OrderedDict()  # unit → touched since the hand passed

    def hit(self, unit: int) -> None:
        """Clear the idle bit."""
        if self._idle_bits:
            self._circle[unit] = True

    def fault(self, unit: int) -> list[int]:
        """At the high threshold the hand goes round until the low one is reached."""
        evicted = []
        if len(self._circle) >= self._capacity:
            while len(self._circle) > self._low:
                at, touched = self._circle.popitem(last=False)
                if touched:
                    self._circle[at] = False
                else:
                    evicted.append(at)
        self._circle[unit] = False
        return evicted


def _open(options: ClockOptions) -> object:
    from edm.policy import clock  # noqa: PLC0415 (the model needs no C)

    return clock(options)


@hookimpl
def edm_eviction_policies() -> Iterable[EvictionPolicySpec]:
    """Offer `clock`."""
    yield EvictionPolicySpec(
        name="clock",
        summary="second chance by idle bits, between two thresholds",
        options=ClockOptions,
        model=Clock,
        open=_open,
    )
