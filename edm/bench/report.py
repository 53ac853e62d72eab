"""The results of `edm bench`: as plain data, as a table, and as a plot."""

from __future__ import annotations

import os
import platform
import sys
from typing import TYPE_CHECKING, Any, Final

from edm.bench.cases import FACTORS, MPI_TARGET, SPREAD_TARGET, Case
from edm.errors import MissingExtra

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from edm.bench.running import Result, Sizes, Spread

Row = dict[str, Any]
JUDGED: Final = "all"
"""The placement whose ratio is held against the target: what a user has who says nothing."""


def ratio(case: Case, result: Result, floors: Mapping[str, Spread]) -> float:
    """A run's figure over the bare fault of the same kind; of speed-ups and whole times, the factor itself.

    The mean of the run, not the median: what eviction costs falls on few accesses, and belongs to all of them.
    """
    return result.mean if case.figure in FACTORS else result.mean / floors[case.floor].median


def row(case: Case, results: Mapping[str, Result | str], floors: Mapping[str, Spread]) -> Row:
    """One row. results: by placement, a text where the run failed."""
    ratios = {where: ratio(case, r, floors) for where, r in results.items() if not isinstance(r, str)}
    where_judged = JUDGED if JUDGED in results else next(iter(results))
    judged = ratios.get(where_judged)
    document: Row = {
        "case": case.name,
        "title": case.title,
        "target": case.target,
        "judged": where_judged,
        "ratio": judged,
        "met": None if judged is None else _met(case, judged),
        "problems": {where: r for where, r in results.items() if isinstance(r, str)},
        "placements": {
            where: {
                "ratio": ratios[where],
                "mean": r.mean,
                "median": r.spread.median,
                "quartiles": [r.spread.low, r.spread.high],
                "apart": list(r.apart),
                "counters": r.counters,
            }
            for where, r in results.items()
            if not isinstance(r, str)
        },
    }
    if len(ratios) == 2:
        # A speed-up is the better the larger it is, and one CPU has none to give.
        document["spread"] = ratios["all"] / ratios["one"] if case.figure != "speedup" else None
        document["spread_met"] = None if document["spread"] is None else document["spread"] <= SPREAD_TARGET
    if case.sums and "mpi" in floors and judged is not None:
        total = sum(floors[name].median for name in ("fault", "mpi", "pread"))
        document["over_sum"] = document["placements"][where_judged]["mean"] / total
        document["over_sum_met"] = document["over_sum"] <= MPI_TARGET
    return document


def _met(case: Case, value: float) -> bool:
    return value >= case.target if case.figure == "speedup" else value <= case.target


def as_document(rows: Sequence[Row], floors: Mapping[str, Spread], sizes: Sizes, when: str) -> dict[str, Any]:
    """Everything, for `--json`. Times in nanoseconds."""
    return {
        "when": when,
        "machine": {"cpus": len(os.sched_getaffinity(0)), "kernel": platform.release(), "machine": platform.machine()},
        "sizes": {
            "region_pages": sizes.region_pages,
            "budget_pages": sizes.budget_pages,
            "accesses": sizes.accesses,
            "edm_run": list(sizes.extra),
        },
        "floors": {name: {"median": f.median, "quartiles": [f.low, f.high]} for name, f in floors.items()},
        "rows": list(rows),
        "met": all(verdict for r in rows for verdict in verdicts(r)),
    }


def verdicts(document: Row) -> Iterator[bool]:
    """Whether each figure of a row keeps its target; one that could not be had does not."""
    yield bool(document["met"])
    for name in ("spread_met", "over_sum_met"):
        if document.get(name) is not None:
            yield document[name]


def print_table(document: dict[str, Any]) -> None:
    """The table on standard output."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    floors = document["floors"]
    named = {"fault": "bare fault", "write": "of a write", "mpi": "bare mpi4py round trip", "pread": "bare pread"}
    shown = ", ".join(f"{named[name]} {f['median'] / 1000:.2f} µs" for name, f in floors.items())
    table = Table(title=f"against the bare fault ({shown})", title_justify="left")
    for column in ("case", "target", "one CPU", "all CPUs", "all / one", "time (quartiles)", "CPUs apart", ""):
        table.add_column(column, justify="left" if column in {"case", ""} else "right")
    for r in document["rows"]:
        table.add_row(*_cells(r))
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(table)
    for r in document["rows"]:
        for where, problem in r["problems"].items():
            console.print(f"{r['case']}, {where}: {problem}", markup=False)


def _cells(r: Row) -> list[str]:
    is_speedup, factor = r["case"] == "threads", r["case"] in {"threads", "sort", "wide"}
    places = r["placements"]
    ratios = [f"{places[where]['ratio']:.2f}" if where in places else "–" for where in ("one", "all")]
    judged = places.get(r["judged"])
    time = "–"
    if judged and not factor:
        low, high = judged["quartiles"]
        time = f"{judged['mean'] / 1000:.2f} µs ({low / 1000:.2f}–{high / 1000:.2f})"
    apart = "–".join(sorted({f"{ns:.0f}" for ns in places.get("all", {}).get("apart", [])}, key=int))
    spread = f"{r['spread']:.2f}" if r.get("spread") else "–"
    if r.get("spread_met") is False:
        spread = f"[red]{spread}[/red]"
    verdict = {True: "[green]met[/green]", False: "[red]missed[/red]", None: "[yellow]not measured[/yellow]"}[r["met"]]
    if "over_sum" in r:
        word = "met" if r["over_sum_met"] else "missed"
        verdict += f"; {r['over_sum']:.2f} × the floors' sum, ≤ {MPI_TARGET}: {word}"
    return [
        r["title"],
        f"{'≥' if is_speedup else '≤'} {r['target']:g}",
        *ratios,
        spread,
        time,
        f"{apart} ns" if apart else "–",
        verdict,
    ]


def write_plot(document: dict[str, Any], path: Path) -> None:
    """Bars of every ratio with its target, in the format the suffix names; raises `MissingExtra`."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra: it is large, and only plots need it)
    except ImportError:
        raise MissingExtra("a plot needs matplotlib: pip install 'edm[plot]'") from None
    rows = [r for r in document["rows"] if r["placements"]][::-1]
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for shift, where, label in ((0.2, "one", "one CPU"), (-0.2, "all", "all CPUs")):
        values = [r["placements"].get(where, {}).get("ratio", 0.0) for r in rows]
        axes.barh([y + shift for y in range(len(rows))], values, 0.38, label=label)
    for y, r in enumerate(rows):
        axes.plot([r["target"]] * 2, [y - 0.45, y + 0.45], color="black", label="target" if y == 0 else None)
    axes.set_yticks(range(len(rows)), [r["title"] for r in rows])
    axes.set_xlabel("ratio to the bare fault (threads: speed-up; sort: to the plain run)")
    axes.legend()
    figure.savefig(path)
