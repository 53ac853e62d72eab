"""Sizes as people write them: "64M", "2G", "25%", and back.

Place on the path: read by `edm.config` before anything starts; used wherever a figure is shown to a person.
"""

from __future__ import annotations

import re
from typing import Final

from edm.errors import UsageError

_FACTORS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE: Final = re.compile(r"(?P<number>\d{1,30}(?:\.\d{1,30})?)\s*(?P<unit>[KMGT]?)(?:i?B)?", re.ASCII | re.IGNORECASE)
_PERCENT: Final = re.compile(r"(?P<number>\d{1,30}(?:\.\d{1,30})?)\s*%", re.ASCII)
_LARGEST: Final = 1 << 63


def parse_size(text: str | int, *, whole_bytes: int | None = None) -> int:
    """Bytes meant by `text`: a number with an optional K, M, G or T (powers of 1024), or a percentage.

    whole_bytes: what a percentage is of; None where a percentage makes no sense. Raises `UsageError`.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise UsageError(_bad_size(str(text), whole_bytes))
    size = text if isinstance(text, int) else _parse(text.strip(), whole_bytes)
    if size is None or size < 0:
        raise UsageError(_bad_size(str(text), whole_bytes))
    if size >= _LARGEST:
        raise UsageError(f"bad size '{text}': larger than any memory")
    return size


def _parse(text: str, whole_bytes: int | None) -> int | None:
    percent = _PERCENT.fullmatch(text)
    if percent and whole_bytes is not None:
        return int(float(percent["number"]) * whole_bytes / 100)
    size = _SIZE.fullmatch(text)
    if size is None:
        return None
    factor = _FACTORS[size["unit"].upper()]
    return int(size["number"]) * factor if size["number"].isdigit() else int(float(size["number"]) * factor)


def _bad_size(text: str, whole_bytes: int | None) -> str:
    percentage = "" if whole_bytes is None else ", or a percentage"
    return f"bad size '{text}': use a number with K, M, G or T{percentage}"


def format_size(size_bytes: float) -> str:
    """`size_bytes` for a person: "64M", "1.5G", "312 bytes"."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes:.0f} bytes"
    for unit, factor in reversed(_FACTORS.items()):
        if abs(size_bytes) >= factor:
            text = f"{size_bytes / factor:.1f}"
            return text.removesuffix(".0") + unit
    raise AssertionError("unreachable: the smallest factor is 1")
