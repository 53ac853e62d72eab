"""Options that several stores have.

Place on the path: read before anything is opened.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import attrs

SYNC_HELP: Final = "none: never; batch: in groups, and at flush; always: before each acknowledgement"


def option(default: Any, text: str, *, size: bool = False, validator: Any = None) -> Any:
    """A field with its help text; size: a value such as "512M"."""
    metadata = {"help": text, **({"type": "size"} if size else {})}
    return attrs.field(default=default, metadata=metadata, validator=validator)


@attrs.frozen(kw_only=True)
class WrapperOptions:
    """What is done to pages before they are stored, whatever the page store."""

    compress: Literal["none", "lz4", "zstd"] = option("none", "compress pages (extra: compress)")
    elide_zeros: bool = option(False, "keep no bytes of pages that are all zeros")
