"""What a memory server that stands alone is told beyond the settings of a run: quota and log level.

From the command line, else from PATH/dms.toml, which is read again at SIGHUP.
"""

from __future__ import annotations

import logging
import tomllib
from typing import TYPE_CHECKING, Any, Final

import attrs

from edm.errors import UsageError
from edm.sizes import parse_size
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

FILE: Final = "dms.toml"
LOG_LEVELS: Final = ("debug", "info", "warning", "error")


@attrs.frozen(kw_only=True)
class DmsSettings:
    """quota_pages: the most pages of one client, 0 for no limit. log_level: one of `LOG_LEVELS`."""

    quota_pages: int = 0
    log_level: str = "warning"

    def apply_log_level(self) -> None:
        """Make it so in this process."""
        logging.getLogger("edm").setLevel(self.log_level.upper())


def read_settings(directory: Path, quota: str | None, log_level: str | None) -> DmsSettings:
    """Settings from the arguments (None: not given) and from `directory`/dms.toml; raises `UsageError`."""
    path = directory / FILE
    given: dict[str, Any] = {}
    try:
        given = tomllib.loads(path.read_text() if path.exists() else "")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    unknown = sorted(set(given) - {"quota", "log_level"})
    if unknown:
        raise UsageError(f"{path}: unknown key '{unknown[0]}' (known: log_level, quota)")
    quota = quota if quota is not None else given.get("quota", 0)
    log_level = log_level if log_level is not None else given.get("log_level", "warning")
    if log_level not in LOG_LEVELS:
        raise UsageError(f"{path}: log_level must be one of {', '.join(LOG_LEVELS)}, not '{log_level}'")
    # A quota of less than a page would read as none.
    return DmsSettings(quota_pages=-(-parse_size(quota) // PAGE_BYTES), log_level=log_level)
