"""The command `edm simulate`: which eviction policy would have kept what a program needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from edm.errors import MissingExtra, UsageError
from edm.sizes import format_size, parse_size
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from edm.simulate.replaying import Units

DEFAULT_MEMORY = ("10%", "25%", "50%", "75%")
OPTIMUM = "optimum"


@click.command(epilog="Example: edm simulate touches.npy --policy scan --policy fifo --memory 25% --memory 64M")
@click.argument("trace", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--policy", "policies", multiple=True, metavar="NAME", help="May be repeated. [every policy]")
@click.option(
    "--memory", multiple=True, metavar="SIZE", help="Local memory, or % of what is touched. [10, 25, 50, 75 %]"
)
@click.option("--unit", default=1, type=click.IntRange(1), help="Neighbouring pages that move together. [1]")
@click.option("-o", "--option", "options", multiple=True, metavar="policy.NAME.KEY=VALUE", help="A policy's option.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Draw it (.png, .svg, .pdf)."
)
def command(
    trace: Path,
    policies: tuple[str, ...],
    memory: tuple[str, ...],
    unit: int,
    options: tuple[str, ...],
    as_json: bool,
    plot: Path | None,
) -> None:
    """Play TRACE over eviction policies, and print the share of accesses that would have found their page here.

    TRACE is what the fault source 'replay' plays (text, or a NumPy array), or what 'edm run --trace' recorded. That one
    holds faults only: record it with little --local-memory, since what stays here makes none. The optimum is Belady's:
    it knows the future.
    """
    units = _units(trace, unit)
    document = _simulate(units, unit, policies, memory or DEFAULT_MEMORY, options)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        _print(document)
    if plot is not None:
        _draw(document, plot)


def _units(trace: Path, unit: int) -> Units:
    from edm.plugins.source_replay.trace import WRITE, read  # noqa: PLC0415
    from edm.trace import as_operations, is_fault_trace  # noqa: PLC0415
    from edm.trace import read as read_faults  # noqa: PLC0415

    operations = as_operations(read_faults(trace).records) if is_fault_trace(trace) else read(trace)
    touches = operations[operations["kind"] <= WRITE]
    if not len(touches):
        raise UsageError(f"{trace}: no page is read or written in it")
    return (touches["page"] // np.uint64(unit)).astype(np.int64)


def _simulate(
    units: Units, unit: int, policies: tuple[str, ...], memory: tuple[str, ...], given: tuple[str, ...]
) -> dict[str, Any]:
    from edm.registry import Registry  # noqa: PLC0415
    from edm.simulate.replaying import hits, optimal_hits  # noqa: PLC0415

    registry = Registry()
    names = policies or tuple(registry.names("policy"))
    specs = [registry.policy(name) for name in names]
    built = {spec.name: _build(spec, given) for spec in specs}
    touched = len(np.unique(units))
    budgets = []
    for text in memory:
        capacity = _capacity(text, touched, unit)
        found = {spec.name: hits(spec, built[spec.name], units, capacity) / len(units) for spec in specs}
        found[OPTIMUM] = optimal_hits(units, capacity) / len(units)
        budgets.append({"memory": text, "bytes": capacity * unit * PAGE_BYTES, "hit_ratio": found})
    return {
        "accesses": len(units),
        "touched_bytes": touched * unit * PAGE_BYTES,
        "unit_pages": unit,
        "policies": list(names),
        "budgets": budgets,
    }


def _build(spec: Any, given: tuple[str, ...]) -> Any:
    from edm.config.options import build_options, check_keys  # noqa: PLC0415

    values = {}
    for text in given:
        path, equals, value = text.partition("=")
        parts = path.split(".")
        if not equals or len(parts) != 3 or parts[0] != "policy":
            raise UsageError(f"-o {text}: write policy.NAME.KEY=VALUE")
        if parts[1] == spec.name:
            values[parts[2]] = value
    origins = dict.fromkeys(values, "-o")
    check_keys([spec.options], values, origins, f"policy.{spec.name}")
    return build_options(spec.options, values, origins, f"policy.{spec.name}")


def _capacity(text: str, touched: int, unit: int) -> int:
    if text.endswith("%"):
        try:
            share = float(text[:-1])
        except ValueError:
            share = 0.0
        if not 0 < share <= 100:
            raise UsageError(f"--memory: '{text}' is not a share of what is touched")
        capacity = int(touched * share / 100)
    else:
        capacity = parse_size(text) // (PAGE_BYTES * unit)
    if capacity < 2:
        raise UsageError(f"--memory {text}: less than two units of {unit} pages: there is nothing to choose from")
    return capacity


def _print(document: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    names = [*document["policies"], OPTIMUM]
    touched = format_size(document["touched_bytes"])
    table = Table(title=f"hit ratio of {document['accesses']:,} accesses to {touched}", title_justify="left")
    for column in ("local memory", *names):
        table.add_column(column, justify="right")
    for budget in document["budgets"]:
        of = f" ({budget['memory']})" if budget["memory"].endswith("%") else ""
        ratios = [f"{budget['hit_ratio'][name]:.1%}" for name in names]
        table.add_row(f"{format_size(budget['bytes'])}{of}", *ratios)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def _draw(document: dict[str, Any], path: Path) -> None:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise MissingExtra("a plot needs matplotlib: pip install 'edm[plot]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    budgets = sorted(document["budgets"], key=lambda budget: int(budget["bytes"]))
    for name in [*document["policies"], OPTIMUM]:
        style: dict[str, Any] = {"linestyle": "--", "color": "black"} if name == OPTIMUM else {"marker": "o"}
        axes.plot([b["bytes"] / 2**20 for b in budgets], [b["hit_ratio"][name] for b in budgets], label=name, **style)
    axes.set_xlabel("local memory, MiB")
    axes.set_ylabel("hit ratio")
    axes.legend()
    figure.savefig(path)
