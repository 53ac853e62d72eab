"""EDM: External Distributed Memory.

Lets an unmodified program use more memory than its machine has. `edm.hookimpl` marks a plugin's hooks; the specs it
returns are in `edm.hookspecs`, the interfaces it implements in `edm.interfaces`, their contracts in `edm.testing`.
"""

from __future__ import annotations

from edm.hookspecs import hookimpl

__all__ = ["__version__", "hookimpl"]
__version__ = "0.1.0"
