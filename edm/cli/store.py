"""The command `edm store`: look into a store's directory while no server has it open."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edm.errors import Corrupt, UsageError
from edm.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from edm.stores.offline import OfflineStore

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_DIRECTORY = click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))


def _open(directory: Path, *, damaged_too: bool = False) -> OfflineStore:
    from edm.stores.offline import OfflineStore  # noqa: PLC0415

    try:
        return OfflineStore(directory, damaged_too=damaged_too)
    except Corrupt as error:
        raise Corrupt(f"{error} (see 'edm store verify {directory}')") from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Look into a memory server's store: DIR is what was given to 'edm dms --path', or the store in it.

    No server may have it open.
    """


@command.command()
@_DIRECTORY
@_JSON
def stat(directory: Path, as_json: bool) -> None:
    """Show how much is in a store, and the room it takes."""
    with _open(directory) as store:
        figures = store.stat()
    if as_json:
        click.echo(json.dumps(figures, indent=2))
        return
    for part, values in figures.items():
        if isinstance(values, dict):
            _print_table(part, ["", ""], [[key, _figure(key, value)] for key, value in values.items()])
        else:
            click.echo(f"{part}: {values}")


@command.command(name="list")
@_DIRECTORY
@_JSON
def list_regions(directory: Path, as_json: bool) -> None:
    """List instances, their regions, and how many pages each has."""
    with _open(directory) as store:
        regions = store.regions()
    if as_json:
        click.echo(json.dumps(regions, indent=2))
        return
    rows = [[str(r["instance"]), f"{r['region']:#x}", str(r["pages"]), format_size(r["bytes"])] for r in regions]
    _print_table("regions", ["instance", "region", "pages", "size"], rows)


@command.command()
@_DIRECTORY
@_JSON
def verify(directory: Path, as_json: bool) -> int:
    """Read and check every page; exit 1 with the list of what is damaged."""
    with _open(directory, damaged_too=True) as store, _Progress("checking", store.page_count) as progress:
        damaged = store.verify(progress.advance)
        pages = store.page_count
    if as_json:
        click.echo(json.dumps({"pages": pages, "damaged": [one.as_json() for one in damaged]}, indent=2))
    elif damaged:
        bad = sum(bool(one.page) for one in damaged)
        title = f"{bad} damaged of {pages} pages{_others(len(damaged) - bad)}"
        rows = [[d.page, str(d.file), "" if d.offset is None else str(d.offset), d.reason] for d in damaged]
        _print_table(title, ["page", "file", "at byte", "reason"], rows)
    else:
        click.echo(f"{pages} pages, all as they were stored")
    return 1 if damaged else 0


@command.command()
@_DIRECTORY
@_JSON
def gc(directory: Path, as_json: bool) -> None:
    """Give the disk back what the store does not need: compact the SPT, free unused room."""
    with _open(directory) as store:
        figures = store.collect()
    if as_json:
        click.echo(json.dumps(figures, indent=2))
    else:
        click.echo(f"{format_size(figures['before_bytes'])} before, {format_size(figures['after_bytes'])} after")


@command.command()
@_DIRECTORY
@click.argument("region", callback=lambda _context, _parameter, text: _region(text))
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write."
)
@_JSON
def export(directory: Path, region: int, output: Path, as_json: bool) -> int:
    """Write a region's pages to a sparse file: page n at byte n * 4096 after the region's first page.

    Beside it, OUTPUT.json says which pages there are. A damaged page is left out, and named; then the status is 1.
    """
    with _open(directory) as store, _Progress("exporting", store.pages_of(region)) as progress:
        damaged = store.export(region, output, progress.advance)
        pages = store.pages_of(region)
    if as_json:
        figures = {"region": region, "output": str(output), "pages": pages - len(damaged)}
        click.echo(json.dumps({**figures, "damaged": [entry.as_json() for entry in damaged]}, indent=2))
    else:
        for entry in damaged:
            click.echo(f"edm: left out page {entry.page}: {entry.file}: {entry.reason}", err=True)
        click.echo(f"{pages - len(damaged)} pages in {output}; which they are is in {output}.json")
    return 1 if damaged else 0


def _region(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise UsageError(f"'{text}' is not a region: use a number as 'edm store list' shows it") from None


def _others(places: int) -> str:
    return f", and {places} other place{'s are' if places > 1 else ' is'} damaged" if places else ""


def _figure(key: str, value: Any) -> str:
    return format_size(value) if key.endswith("bytes") and isinstance(value, int) else str(value)


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


class _Progress:
    """A bar on standard error, where that is a terminal."""

    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import Progress  # noqa: PLC0415

        self._bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
        self._task = self._bar.add_task(what, total=total)
        self.advance: Callable[[int], None] = lambda pages: self._bar.advance(self._task, pages)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
