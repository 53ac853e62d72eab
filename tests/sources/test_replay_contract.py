"""The fault source `replay` keeps the contract; its touches come from a trace, beside the program."""

import sys
from types import MappingProxyType

from edm.testing import FaultSourceContract


class TestReplay(FaultSourceContract):
    source = "replay"
    options = MappingProxyType({"pages": 6000, "touches": 15_000, "threads": 2})
    program = (sys.executable, "-c", "print('beside the trace')")
    budget_pages = 512
