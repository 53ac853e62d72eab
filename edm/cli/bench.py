"""The command `edm bench`: what a fault costs here, as ratios to what the kernel itself asks for."""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edm.errors import UsageError
from edm.sizes import parse_size
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from edm.bench.running import Sizes

QUICK_SIZE, SIZE = "128M", "1G"


@click.command(epilog="Example: edm bench --quick --case read-random -- --fault-threads 2")
@click.option("--case", "names", multiple=True, metavar="NAME", help="Only this row; may be repeated. [all]")
@click.option("--list", "list_cases", is_flag=True, help="List the rows, and what each aims at.")
@click.option("--quick", is_flag=True, help=f"A region of {QUICK_SIZE} and fewer accesses: in a minute, less exact.")
@click.option("--size", metavar="SIZE", help=f"The region a program touches. [{SIZE}]")
@click.option("--budget", metavar="SIZE", help="Its local memory. [a quarter of --size]")
@click.option("--cpus", type=click.Choice(["one", "all", "both"]), default="both", help="Where everything runs. [both]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw it (.png, .svg, .pdf)."
)
@click.option("--check", is_flag=True, help="Exit 1 if a figure misses its target.")
@click.argument("run_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- RUN_ARGUMENTS]")
def command(  # noqa: PLR0913, PLR0917 (one for each option)
    names: tuple[str, ...],
    list_cases: bool,
    quick: bool,
    size: str | None,
    budget: str | None,
    cpus: str,
    as_json: bool,
    plot: Path | None,
    check: bool,
    run_arguments: tuple[str, ...],
) -> int:
    """Measure faults, evictions and a sort under 'edm run', each against the bare fault measured in the same run.

    RUN_ARGUMENTS go to every 'edm run'. The floor is a C program that answers its own faults on the CPU they occur on.
    """
    from edm.bench.cases import CASES  # noqa: PLC0415 (as for every command: help imports none of it)

    if list_cases:
        for case in CASES:
            sign = "≥" if case.figure == "speedup" else "≤"
            click.echo(f"{case.name:20} {sign} {case.target:<4g} {case.title}")
        return 0
    known = {case.name: case for case in CASES}
    for name in names:
        if name not in known:
            raise UsageError(f"unknown case '{name}' (there are: {', '.join(known)})")
    chosen = [case for case in CASES if not names or case.name in names]
    document = _measure(chosen, _sizes(quick, size, budget, run_arguments), cpus)
    from edm.bench.report import print_table, write_plot  # noqa: PLC0415

    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        print_table(document)
    if plot is not None:
        write_plot(document, plot)
    if any(row["problems"] for row in document["rows"]):
        return 1
    return 0 if document["met"] or not check else 1


def _sizes(quick: bool, size: str | None, budget: str | None, extra: tuple[str, ...]) -> Sizes:
    from edm.bench.running import Sizes  # noqa: PLC0415

    region = parse_size(size or (QUICK_SIZE if quick else SIZE)) // PAGE_BYTES
    local = parse_size(budget) // PAGE_BYTES if budget else region // 4
    if local < 4096 or region < 2 * local:
        raise UsageError("--budget must be 16M or more, and --size at least twice of it")
    return Sizes(region_pages=region, budget_pages=local, accesses=region // 2, extra=extra)


def _measure(chosen: list[Any], sizes: Sizes, cpus: str) -> dict[str, Any]:
    from edm.bench import report, running  # noqa: PLC0415

    when = datetime.now(UTC).isoformat(timespec="seconds")
    rows = []
    with tempfile.TemporaryDirectory(prefix="edm-bench-") as directory:
        mpi = any("mpi" in case.arguments for case in chosen)
        _say("the floors")
        floors = running.measure_floors(sizes, mpi=mpi, directory=Path(directory))
    placements: tuple[running.Placement, ...] = ("one", "all") if cpus == "both" else (cpus,)  # type: ignore[assignment]
    for case in chosen:
        results: dict[str, running.Result | str] = {}
        for where in placements:
            _say(f"{case.title}, {where} CPU{'s' if where == 'all' else ''}")
            try:
                results[where] = running.measure(case, sizes, where)
            except running.MeasureFailed as error:
                results[where] = str(error)
        rows.append(report.row(case, results, floors))
    _say("")
    return report.as_document(rows, floors, sizes, when)


def _say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text and 'measuring ' + text}")
        sys.stderr.flush()
