"""Plays a sequence of accesses against a policy's model, and against Belady's optimum.

A unit is one or more neighbouring pages that come and go together; 64 is a leaf of the engine's.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edm.hookspecs import EvictionPolicySpec

    Units = NDArray[np.int64]
    """The units accessed, in order."""


def hits(spec: EvictionPolicySpec, options: Any, units: Units, capacity: int) -> int:
    """How many of the accesses find their unit here, with room for `capacity` (1 or more) units.

    Raises `AssertionError` for a model that evicts what is not there, or holds more than there is room for.
    """
    model = spec.model(options, capacity)
    resident: set[int] = set()
    found = 0
    for unit in units.tolist():
        if unit in resident:
            found += 1
            model.hit(unit)
            continue
        for victim in model.fault(unit):
            if victim not in resident:
                raise AssertionError(f"{spec.name} evicted unit {victim}, which is not here")
            resident.remove(victim)
        resident.add(unit)
        if len(resident) > capacity:
            raise AssertionError(f"{spec.name} holds {len(resident)} units where there is room for {capacity}")
    return found


def optimal_hits(units: Units, capacity: int) -> int:
    """Belady's optimum: what is needed again last leaves. No policy finds more."""
    never = len(units)
    order = np.argsort(units, kind="stable")
    following = np.full(never, never, np.int64)
    same = units[order[:-1]] == units[order[1:]]
    following[order[:-1][same]] = order[1:][same]
    resident: dict[int, int] = {}  # unit → when it is needed next
    latest: list[tuple[int, int]] = []
    found = 0
    for unit, needed in zip(units.tolist(), following.tolist(), strict=True):
        if unit in resident:
            found += 1
        elif len(resident) >= capacity:
            while True:
                when, victim = heapq.heappop(latest)
                if resident.get(victim) == -when:  # else it was needed since, and stands further down
                    del resident[victim]
                    break
        resident[unit] = needed
        heapq.heappush(latest, (-needed, unit))
    return found
