"""How a run went, for a person and for a script."""

from __future__ import annotations

import json
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any, Final, Self

from edm.config.machine import memory_limit
from edm.sizes import format_size
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from edm.config import Config
    from edm.launch.session import Outcome, Session

PROGRESS_EVERY_S: Final = 0.5


def as_document(config: Config, command: tuple[str, ...], outcome: Outcome) -> dict[str, Any]:
    """The summary as plain data: what `--report` writes. Bytes, pages and seconds."""
    counters = outcome.counters
    return {
        "command": list(command),
        "exit_status": outcome.ending.code,
        "signal": outcome.ending.signal,
        "seconds": round(outcome.seconds, 3),
        "startup_seconds": round(outcome.startup_s, 3),
        "plugins": {
            "fault_source": config.fault_source,
            "transport": config.transport,
            "spt_store": config.spt_store,
            "page_store": config.page_store,
        },
        "local_memory_bytes": config.local_memory,
        "memory_limit": _limit_document(config),
        "peak_resident_bytes": counters.get("peak_resident", 0) * PAGE_BYTES,
        "peak_sampled_bytes": outcome.peak_bytes,
        "uncaptured_bytes": outcome.uncaptured,
        "counters": counters,
        "warnings": outcome.warnings,
    }


def _limit_document(config: Config) -> dict[str, Any]:
    """What there was to take the budget from; decided: it was."""
    limit = memory_limit()
    file = str(limit.file) if limit.file else None
    return {"bytes": limit.bytes, "cgroup_file": file, "decided": config.memory_derived}


def write_report(path: Path, document: dict[str, Any]) -> None:
    """Write the summary as JSON."""
    path.write_text(json.dumps(document, indent=2) + "\n")


def print_summary(document: dict[str, Any]) -> None:
    """A table on stderr."""
    from rich.console import Console  # noqa: PLC0415 (only who wants a table pays for it)
    from rich.table import Table  # noqa: PLC0415

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in _rows(document):
        table.add_row(*row)
    console = Console(file=sys.stderr, highlight=False)
    console.print()
    console.print(table)


def _rows(document: dict[str, Any]) -> list[tuple[str, str, str]]:
    c, plugins = document["counters"], document["plugins"]
    ended = f"signal {document['signal']}" if document["signal"] else f"exit status {document['exit_status']}"
    rows = [
        (shlex.join(document["command"])[:60], ended, ""),
        ("time", f"{document['seconds']:.1f} s", f"and {document['startup_seconds']:.1f} s to start EDM"),
        (
            "memory here, at most",
            format_size(document["peak_resident_bytes"]),
            _allowed(document),
        ),
    ]
    if not c.get("processes"):
        return [*rows, ("captured", "nothing", "the program never handed over its memory")]
    shared = document["uncaptured_bytes"]
    if shared:
        rows.append(
            ("not captured", format_size(sum(shared.values())), f"shared: {', '.join(shared)}; above the budget")
        )
    return [
        *rows,
        ("processes captured", f"{c['processes']:,}", ""),
        ("page faults", f"{c['faults']:,}", ""),
        ("  new pages", f"{c['zero_fills']:,}", "filled with zeros"),
        ("  fetched back", f"{c['fetches']:,}", "from the memory server"),
        ("  rescued", f"{c['rescues']:,}", "from the write-back buffer, without the network"),
        ("  first writes", f"{c['write_protects']:,}", "to pages that were clean"),
        ("pages evicted", f"{c['evictions']:,}", format_size(c["evictions"] * PAGE_BYTES)),
        ("  stored", f"{c['writes']:,}", "written by the memory server and acknowledged"),
        ("  clean", f"{c['evicted_clean']:,}", "dropped: the memory server had them"),
        ("  all zeros", f"{c['evicted_zero']:,}", "nothing to store"),
        (
            "over",
            f"{plugins['fault_source']}, {plugins['transport']}, {plugins['page_store']}",
            "source, transport, store",
        ),
    ]


def _allowed(document: dict[str, Any]) -> str:
    budget, limit = document["local_memory_bytes"], document["memory_limit"]
    if not budget:
        return "no cap was given"
    of = "the cgroup's" if limit["cgroup_file"] else "the machine's"
    whose = f", from {of} {format_size(limit['bytes'])}" if limit["decided"] else ""
    return f"of {format_size(budget)} allowed{whose}"


class Progress:
    """One line on stderr while the program runs, rewritten in place on a terminal."""

    def __init__(self, config: Config, *, enabled: bool) -> None:
        self._budget = config.local_memory
        self._enabled = enabled
        self._tty = sys.stderr.isatty()
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled and self._tty:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def update(self, session: Session) -> None:
        """Called ten times a second; writes twice (on a terminal) or every two seconds (elsewhere)."""
        now = time.monotonic()
        every = PROGRESS_EVERY_S if self._tty else 4 * PROGRESS_EVERY_S
        if not self._enabled or now - self._last < every or not session.counters:
            return
        self._last = now
        c = session.counters
        of = f" of {format_size(self._budget)}" if self._budget else ""
        text = (
            f"edm: {now - self._began:5.1f} s  here {format_size(c['resident'] * PAGE_BYTES)}{of}  "
            f"away {format_size((c['remote'] + c['staged']) * PAGE_BYTES)}  "
            f"evicted {c['evictions']:,}  fetched {c['fetches']:,}"
        )
        sys.stderr.write(f"\r\x1b[K{text}" if self._tty else f"{text}\n")
        sys.stderr.flush()
