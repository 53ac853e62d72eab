"""What is damaged in a store: found when it is opened or verified, listed by `edm store verify`.

Place on the path: none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from pathlib import Path


@attrs.frozen(kw_only=True)
class Damage:
    """One place. page: its name, if the damage is a page's; offset: the byte in the file, where that is known."""

    file: Path | str
    reason: str
    page: str = ""
    offset: int | None = None

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"page": self.page, "file": str(self.file), "offset": self.offset, "reason": self.reason}
