"""How each kind of value is read, from the text of an argument or variable, or from a TOML value.

A reader gets the raw value and the settings already read (local_memory is read before the thresholds that are a
percentage of it); it returns the setting's value or raises `UsageError`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from edm.config.machine import memory_limit
from edm.errors import UsageError
from edm.sizes import parse_size
from edm.types import PAGE_BYTES

Reader = Callable[[Any, Mapping[str, Any]], Any]

MOST_AHEAD: Final = 63
MOST_SPIN_US: Final = 100_000
_TRUE: Final = {"1", "true", "yes", "on"}
_FALSE: Final = {"0", "false", "no", "off"}
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")
_PAGES: Final = re.compile(r"(\d{1,18})p", re.ASCII)
_CPUS: Final = re.compile(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", re.ASCII)


def name(raw: Any, _read: Mapping[str, Any]) -> str:
    """A plugin's name."""
    if not isinstance(raw, str) or not _NAME.fullmatch(raw):
        raise UsageError(f"bad name '{raw}': use lower-case letters, digits, - and _")
    return raw


def size(raw: Any, _read: Mapping[str, Any]) -> int:
    """A size in bytes, of at least one page."""
    return _at_least_a_page(raw, parse_size(raw))


def memory(raw: Any, _read: Mapping[str, Any]) -> int | None:
    """A size, or a percentage of the memory this machine or cgroup has; "auto": most of it; "none": no cap."""
    if raw == "none":
        return None
    limit = memory_limit()
    return limit.budget() if raw == "auto" else _at_least_a_page(raw, parse_size(raw, whole_bytes=limit.bytes))


def is_derived(raw: Any) -> bool:
    """Whether a size is worked out from what there is: a percentage, or "auto"."""
    return isinstance(raw, str) and (raw == "auto" or raw.rstrip().endswith("%"))


def threshold(raw: Any, read: Mapping[str, Any]) -> int | None:
    """A number of pages, from "5000p", a size, or a percentage of local_memory; "auto": derived."""
    if raw == "auto":
        return None
    pages = _PAGES.fullmatch(raw.strip()) if isinstance(raw, str) else None
    if pages:
        return int(pages[1])
    local = read.get("local_memory")
    if is_derived(raw) and local is None:
        raise UsageError(f"'{raw}' is a percentage of local memory, and none is set: add --local-memory")
    try:
        return parse_size(raw, whole_bytes=local or 0) // PAGE_BYTES
    except UsageError as error:
        raise UsageError(f"{error}, or pages as 5000p") from None


def positive(raw: Any, _read: Mapping[str, Any]) -> float:
    """A number above 0."""
    try:
        number = float(raw) if isinstance(raw, str | int | float) and not isinstance(raw, bool) else 0.0
    except (ValueError, OverflowError):
        number = 0.0
    if not 0 < number < 1e9:
        raise UsageError(f"must be a number above 0, not '{raw}'")
    return number


def sweep_ms(raw: Any, _read: Mapping[str, Any]) -> float:
    """A number of milliseconds that leaves the sweep time to sleep: 0.1 to 10000."""
    number = positive(raw, _read)
    if not 0.1 <= number <= 10_000:
        raise UsageError(f"must be from 0.1 to 10000 milliseconds, not '{raw}'")
    return number


def count(raw: Any, _read: Mapping[str, Any]) -> int:
    """A whole number from 1 to 16: the engine has room for no more workers."""
    text = str(raw)
    number = int(text) if not isinstance(raw, bool) and re.fullmatch(r"[0-9]{1,9}", text) else 0
    if not 1 <= number <= 16:
        raise UsageError(f"must be a whole number from 1 to 16, not '{raw}'")
    return number


def ahead(raw: Any, _read: Mapping[str, Any]) -> int:
    """Pages brought ahead of a fault: 0 to 63."""
    return _whole(raw, MOST_AHEAD)


def on_loss(raw: Any, _read: Mapping[str, Any]) -> str:
    """What to do about a DMS that is lost for good."""
    return _one_of(raw, "wait", "poison", "kill")


def on_death(raw: Any, _read: Mapping[str, Any]) -> str:
    """What to do about a DM-Handler or DMS that died and is not started again."""
    return _one_of(raw, "kill", "wait")


def _one_of(raw: Any, *words: str) -> str:
    if raw not in words:
        raise UsageError(f"must be one of {', '.join(words)}, not '{raw}'")
    return str(raw)


def idle_cpus(raw: Any, _read: Mapping[str, Any]) -> str:
    """What becomes of idle CPUs while a program faults."""
    return _one_of(raw, "auto", "awake", "occupy", "sleep")


def restarts(raw: Any, _read: Mapping[str, Any]) -> int:
    """How often what died is started again: 0 to 1000."""
    return _whole(raw, 1000)


def spin_us(raw: Any, _read: Mapping[str, Any]) -> int:
    """Microseconds: 0 to 100000."""
    return _whole(raw, MOST_SPIN_US)


def _whole(raw: Any, most: int) -> int:
    text = str(raw)
    number = int(text) if not isinstance(raw, bool) and re.fullmatch(r"[0-9]{1,9}", text) else -1
    if not 0 <= number <= most:
        raise UsageError(f"must be a whole number from 0 to {most}, not '{raw}'")
    return number


def flag(raw: Any, _read: Mapping[str, Any]) -> bool:
    """True or false."""
    text = str(raw).strip().lower()
    if text not in _TRUE | _FALSE:
        raise UsageError(f"must be true or false, not '{raw}'")
    return text in _TRUE


def path(raw: Any, _read: Mapping[str, Any]) -> Path:
    """A directory or file, made absolute."""
    if not isinstance(raw, str | Path) or not str(raw) or "\0" in str(raw):
        raise UsageError(f"must be a path, not '{raw}'")
    return Path(raw).expanduser().absolute()


def cpus(raw: Any, _read: Mapping[str, Any]) -> str:
    """The word "auto", or a list of CPU numbers."""
    text = str(raw).replace(" ", "")
    if text != "auto":
        if isinstance(raw, bool) or not _CPUS.fullmatch(text):
            raise UsageError(f"must be auto or a list of CPU numbers as 0,2-3, not '{raw}'")
        usable = os.sched_getaffinity(0)
        beyond = [str(number) for number in cpu_numbers(text) if number not in usable]
        if beyond:
            there = ",".join(map(str, sorted(usable)))
            raise UsageError(f"CPU {beyond[0]} is not one this process may use ({there})")
    return text


def cpu_numbers(text: str) -> tuple[int, ...]:
    """The CPU numbers in a list that `cpus` accepted; () for "auto"."""
    if text == "auto":
        return ()
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise UsageError(f"bad list of CPUs '{text}': {part} counts down")
        numbers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


def _at_least_a_page(raw: Any, size_bytes: int) -> int:
    if size_bytes < PAGE_BYTES:
        raise UsageError(f"bad size '{raw}': smaller than one page ({PAGE_BYTES} bytes)")
    return size_bytes
