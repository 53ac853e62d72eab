"""Contracts that every plugin of a kind passes: our own, and a third party's by subclassing them in a line or two."""

from __future__ import annotations

from edm.testing.fault_source import FaultSourceContract
from edm.testing.stores import PageStoreContract, SptStoreContract
from edm.testing.transport import TransportContract

__all__ = ["FaultSourceContract", "PageStoreContract", "SptStoreContract", "TransportContract"]
