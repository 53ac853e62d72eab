"""What a run is told: every setting, its value, and where the value came from.

Place on the path: resolved once by the command line, from arguments > EDM_* variables > edm.toml > [tool.edm] in
pyproject.toml > defaults; written to one JSON file, which the DM-Handler and the DMS read.
"""

from __future__ import annotations

from edm.config.resolve import resolve
from edm.config.settings import Config, HandlerSettings

__all__ = ["Config", "HandlerSettings", "resolve"]
