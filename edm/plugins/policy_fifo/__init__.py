"""The eviction policy `fifo`: what came first leaves first.

What the engine needs for it: one list; a leaf is put at its end when it takes its first page in, and stays there.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from edm.hookspecs import EvictionPolicySpec, NoOptions, hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


class Fifo:
    """The model. A hit changes nothing."""

    def __init__(self, options: NoOptions, capacity: int) -> None:
        del options
        self._capacity = capacity
        self._queue: OrderedDict[int, None] = OrderedDict()

    def hit(self, unit: int) -> None:
        """Not seen."""

    def fault(self, unit: int) -> list[int]:
        """The first of the queue leaves when it is full."""
        evicted = [self._queue.popitem(last=False)[0]] if len(self._queue) >= self._capacity else []
        self._queue[unit] = None
        return evicted


def _open(options: NoOptions) -> object:
    from edm.policy import fifo  # noqa: PLC0415 (the model needs no C)

    return fifo(options)


@hookimpl
def edm_eviction_policies() -> Iterable[EvictionPolicySpec]:
    """Offer `fifo`."""
    yield EvictionPolicySpec(name="fifo", summary="what came first leaves first", model=Fifo, open=_open)
