"""The command `edm trace`: the steps of recorded faults, with their times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from edm.errors import UsageError

if TYPE_CHECKING:
    from edm.trace import FaultTrace

STEPS = """\
 1–4    the program touches a page that is not there; the kernel queues a message
   5 R  the DM-Handler reads it: time 0 of each fault
   5 A  … and puts a RequestGetPage into a batch for the DMS
6–11 B  the DMS looks into its SPT and store, and its reply is here
12/13 D UFFDIO_ZEROPAGE (new page) or UFFDIO_COPY (existing page) has returned
  15    … and has woken the program's thread, in the same call
  14 L  the page is in the LSPT\
"""
_FILE = click.argument("file", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Look at what 'edm run --trace FILE' has recorded: every fault of a program, step by step."""


@command.command()
@_FILE
@click.option("--faults", default=20, type=click.IntRange(0), help="Print so many faults; 0: none. [20]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every fault of it.")
def show(file: Path, faults: int, as_json: bool) -> None:
    """Print the first faults, and how long each step took by what became of the fault."""
    from edm.trace import read, summary  # noqa: PLC0415

    trace = read(file)
    if as_json:
        document = {
            "unrecorded": trace.unrecorded,
            "summary": summary(trace.records),
            "faults": list(_faults(trace, len(trace.records))),
        }
        click.echo(json.dumps(document, indent=1))
        return
    _print(trace, faults, summary(trace.records))


@command.command()
@_FILE
@click.argument("target", metavar="TARGET.npy", type=click.Path(dir_okay=False, path_type=Path))
def touches(file: Path, target: Path) -> None:
    """Write the faults as touches that the fault source 'replay' plays; pages are numbered anew, without gaps."""
    from edm.trace import as_operations, read  # noqa: PLC0415

    if target.suffix != ".npy":
        raise UsageError(f"{target}: must be named ….npy")
    operations = as_operations(read(file).records)
    try:
        np.save(target, operations)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}") from error
    click.echo(f"{len(operations)} touches of {len(np.unique(operations['page']))} pages")


def _faults(trace: FaultTrace, most: int) -> Any:
    from edm.trace import KINDS, OUTCOMES  # noqa: PLC0415

    first = int(trace.records["read_ns"][0]) if len(trace.records) else 0
    for r in trace.records[:most]:
        yield {
            "at_us": round((int(r["read_ns"]) - first) / 1000, 2),
            "region": f"{int(r['region']):#x}",
            "page": f"{int(r['page']):#x}",
            "thread": int(r["thread"]),
            "cpu": int(r["cpu"]),
            "kind": KINDS[int(r["kind"])],
            "outcome": OUTCOMES[int(r["outcome"])],
            **{f"{s}_us": int(r[f"{s}_ns"]) / 1000 or None for s in ("asked", "answered", "done", "listed")},
        }


def _print(trace: FaultTrace, most: int, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if most:
        console.print(f"{STEPS}\n", markup=False)
        table = Table(title="µs after step 5 R", title_justify="left")
        columns = ("at, µs", "region", "page", "thread", "CPU", "kind", "outcome", "5 A", "11 B", "12/13 D", "14 L")
        for column in columns:
            table.add_column(column, justify="left" if column in {"kind", "outcome"} else "right")
        for fault in _faults(trace, most):
            table.add_row(*("" if value is None else str(value) for value in fault.values()))
        console.print(table)
    table = Table(title="µs after step 5 R: median, 99th percentile", title_justify="left")
    for column in ("outcome", "faults", "5 A", "11 B", "12/13 D", "14 L"):
        table.add_column(column, justify="left" if column == "outcome" else "right")
    for row in rows:
        steps = ["" if row[s] is None else f"{row[s][0]:.1f}, {row[s][1]:.1f}" for s in _STEP_NAMES]
        table.add_row(row["outcome"], f"{row['faults']:,}", *steps)
    console.print(table)
    if trace.unrecorded is None:
        click.echo("edm: warning: the run was cut off: its last faults are missing", err=True)
    elif trace.unrecorded:
        click.echo(f"edm: warning: {trace.unrecorded} faults went unrecorded", err=True)


_STEP_NAMES = ("asked", "answered", "done", "listed")
