"""The SPT store `memory`: the table alone.

Place on the path: asked by the memory server [6, 9, 10].
"""

from __future__ import annotations

from edm.dms.table import PageTable


class MemorySpt(PageTable):
    """A `PageTable` with nothing behind it: committing and flushing have nothing to do."""

    def commit(self) -> None:
        """Nothing survives the server."""

    def flush(self) -> None:
        """Nothing survives the server."""

    def close(self) -> None:
        """The table goes with the object."""
