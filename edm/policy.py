"""The eviction policies that are built in, as objects that offer the C table "edm.policy_ops".

Place on the path: the LPET evicts in the order a policy says; see native/policy.c and `edm.plugins.policy_scan`.
"""

from __future__ import annotations

from typing import Any

from edm._native import ffi, lib
from edm.ops import POLICY, capsule


class NativePolicy:
    """One of the C core's policies, freed with this object. `made`: the struct edm_policy * it takes over."""

    def __init__(self, made: Any) -> None:
        if made == ffi.NULL:
            raise MemoryError
        self._made = ffi.gc(made, lib.edm_policy_free)
        self.__edm_ops__ = capsule(int(ffi.cast("uintptr_t", made)), POLICY)


def fifo(_options: object) -> NativePolicy:
    """What came first leaves first."""
    return NativePolicy(lib.edm_policy_fifo())


def clock(options: Any) -> NativePolicy:
    """A second chance for what was touched, as far as the kernel's idle bits tell."""
    return NativePolicy(lib.edm_policy_clock(options.idle_bits))


def scan(options: Any) -> NativePolicy:
    """What comes back soon is kept."""
    return NativePolicy(lib.edm_policy_scan(options.kept_percent))
