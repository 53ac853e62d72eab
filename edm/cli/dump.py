"""The command `edm dump`: a program's memory, whole, in a file."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import attrs
import click

from edm.sizes import format_size

if TYPE_CHECKING:
    from edm.dump import Dump


@click.command(epilog="Example: edm dump 4711 && gdb PROGRAM core.4711")
@click.argument("pid", type=click.IntRange(min=1))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="The file to write [core.PID].")
@click.option(
    "--format",
    "form",
    type=click.Choice(["core", "raw"]),
    default="core",
    help="core: an ELF core file for gdb. raw: the mappings' bytes one behind the other, and where each begins in "
    "FILE.json. [core]",
)
@click.option("--files/--no-files", default=True, help="Also pages of mapped files that are as in the file [yes].")
@click.option("--force", is_flag=True, help="Replace FILE where it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(pid: int, output: Path | None, form: str, files: bool, force: bool, as_json: bool) -> int:
    """Write the memory of process PID to a file, with the pages that have left the machine.

    The process stands still meanwhile and then goes on; Ctrl-C lets it go on at once, and leaves no file. Zeros take no
    room in the file. Left out are devices, what the program has marked MADV_DONTDUMP, mappings of 64 GiB and more that
    hold nothing, and EDM's own staging area. A process that EDM has not captured can be dumped as well.

    Exit status 1: the file could not be written, or pages that are lost are zeros in it (they are counted).
    """
    from edm.dump import DumpFailed, dump  # noqa: PLC0415 (`edm --help` need not import the core)

    path = output or Path(f"core.{pid}")
    signal.signal(signal.SIGTERM, _interrupted)
    signal.signal(signal.SIGHUP, _interrupted)
    try:
        with _Bar(pid) as bar:
            done = dump(pid, path, raw=form == "raw", files=files, force=force, progress=bar.show)
    except DumpFailed as error:
        click.echo(f"edm: {error}", err=True)
        return 1
    _tell(done, as_json=as_json)
    return 1 if done.unreadable else 0


def _interrupted(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _tell(done: Dump, *, as_json: bool) -> None:
    if not done.captured:
        click.echo(f"edm: warning: process {done.pid} is not captured: all of its memory is local", err=True)
    if done.unreadable:
        places = ", ".join(f"{address:#x}" for address in done.unreadable[:3])
        click.echo(f"edm: warning: {len(done.unreadable)} page(s) are lost and zeros in the file: {places} …", err=True)
    if as_json:
        click.echo(json.dumps(attrs.asdict(done), indent=2))
        return
    click.echo(
        f"{done.file}: {format_size(done.memory_bytes)} of {done.mappings} mappings and {done.threads} thread(s), "
        f"{format_size(done.written_bytes)} not zeros; {done.brought_pages} pages were away; "
        f"the program stood still for {done.stopped_s:.2f} s"
    )


class _Bar:
    """A bar on standard error, where that is a terminal."""

    def __init__(self, pid: int) -> None:
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._task = self._bar.add_task(f"dumping {pid}", total=None)

    def show(self, done: int, whole: int) -> None:
        """Bytes done, of how many."""
        self._bar.update(self._task, completed=done, total=whole)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
