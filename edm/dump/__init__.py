"""A captured program's memory, whole, in a file: what `edm dump` does.

Not on the path of a fault: it reads from outside, and has the DM-Handler bring what is not there, as after a fault
[5-15].
"""

from __future__ import annotations

from edm.dump.dumping import Dump, DumpFailed, dump

__all__ = ["Dump", "DumpFailed", "dump"]
