"""Recorded faults: the file `edm run --trace FILE` writes, and what is read from it.

A header of 16 bytes (`MAGIC`), then one `RECORD` a fault, in the order in which they were settled. At the end stands a
record whose outcome is `END` and whose page is the number of faults that are missing; without it the run was cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from edm._native import lib
from edm.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Records = NDArray[np.void]
    """A one-dimensional array of `RECORD`."""

MAGIC: Final = b"EDM faults 1\n\0\0\0"
RECORD: Final = np.dtype(
    [
        ("read_ns", "<u8"),
        ("page", "<u8"),
        ("region", "<u8"),
        ("thread", "<u4"),
        ("cpu", "<u2"),
        ("kind", "u1"),
        ("outcome", "u1"),
        ("asked_ns", "<u4"),
        ("answered_ns", "<u4"),
        ("done_ns", "<u4"),
        ("listed_ns", "<u4"),
    ]
)
"""`struct edm_trace_record` in native/edm_abi.h. The steps' times are nanoseconds after `read_ns`; 0: not reached."""

END: Final = 255
KINDS: Final = {lib.EDM_TRACE_READ: "read", lib.EDM_TRACE_WRITE: "write", lib.EDM_TRACE_PROTECTED: "protected"}
OUTCOMES: Final = {
    0: "none",
    lib.EDM_TRACE_ZERO: "new page",
    lib.EDM_TRACE_FETCHED: "fetched",
    lib.EDM_TRACE_RESCUED: "rescued",
    lib.EDM_TRACE_WRITABLE: "made writable",
    lib.EDM_TRACE_THERE: "was there",
    lib.EDM_TRACE_LOST: "lost",
}


@attrs.frozen(eq=False)
class FaultTrace:
    """A recorded run. unrecorded: faults that are missing; None: the run was cut off, it is not known."""

    records: Records
    unrecorded: int | None


def is_fault_trace(path: Path) -> bool:
    """Whether the file begins as `edm run --trace` writes it."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise UsageError(f"cannot read the trace {path}: {error.strerror}") from error


def read(path: Path) -> FaultTrace:
    """A recorded trace; raises `UsageError`."""
    if not is_fault_trace(path):
        raise UsageError(f"{path}: not recorded by edm run --trace")
    data = path.read_bytes()[len(MAGIC) :]
    records = np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)
    if len(records) and records[-1]["outcome"] == END:
        return FaultTrace(records[:-1], int(records[-1]["page"]))
    return FaultTrace(records, None)


def as_operations(records: Records) -> NDArray[np.void]:
    """The faults as touches for the fault source `replay` (`OPERATION`): pages renumbered densely, in order of address.

    Each region's pages follow the last one's; gaps between mappings are left out. A write writes its own number.
    """
    from edm.plugins.source_replay.trace import OPERATION, READ, WRITE  # noqa: PLC0415

    ids = np.empty(len(records), [("region", "<u8"), ("page", "<u8")])
    ids["region"], ids["page"] = records["region"], records["page"]
    operations = np.zeros(len(records), OPERATION)
    operations["page"] = np.unique(ids, return_inverse=True)[1].reshape(-1)
    writes = records["kind"] != lib.EDM_TRACE_READ
    operations["kind"] = np.where(writes, WRITE, READ)
    operations["value"] = np.where(writes, np.arange(1, len(records) + 1, dtype=np.uint64), np.uint64(0))
    return operations


def summary(records: Records) -> list[dict[str, Any]]:
    """For each outcome: how many faults, and median and 99th percentile of each step, in µs after the read."""
    rows: list[dict[str, Any]] = []
    for number, name in OUTCOMES.items():
        chosen = records[records["outcome"] == number]
        if not len(chosen):
            continue
        row: dict[str, Any] = {"outcome": name, "faults": len(chosen)}
        for step in ("asked", "answered", "done", "listed"):
            times = chosen[f"{step}_ns"]
            times = times[times > 0]
            row[step] = [round(float(t) / 1000, 2) for t in np.percentile(times, (50, 99))] if len(times) else None
        rows.append(row)
    return rows
