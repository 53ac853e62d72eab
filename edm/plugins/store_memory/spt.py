"""The SPT store `memory`: the table alone.

Place on the path: asked by the memory server [6, 9, 10].
"""

from __future__ import annotations

from edm.dms.table import PageTable


class MemorySpt(PageTable):
    """A `PageTable` with nothing behind it: committing and flushing have nothing to do."""

    @property
    def evicts(self) -> bool:  # type: ignore[override]
        """See `PageTable`; a class of another's may do more here."""
        return type(self) is MemorySpt

    def commit(self) -> None:
        """Nothing survives the server."""

    def flush(self) -> None:
        """Nothing survives the server."""

    def close(self) -> None:
        """The table goes with the object."""
