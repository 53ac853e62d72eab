"""The command `edm run`: a program in less memory than it needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click

from edm.config.arguments import config_options
from edm.plugins.transport_mpi.commands import RankCommand

if TYPE_CHECKING:
    from edm.config import Config


@click.command(
    cls=RankCommand,
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
    epilog="Example: edm run --local-memory 64M -- sort -S 400M big.txt",
)
@config_options()
@click.option("--dms", metavar="ENDPOINT", help="Use the memory server at ENDPOINT (implies --transport zmq).")
@click.option("--summary/--no-summary", default=None, help="Say at the end how it went [on a terminal].")
@click.option("--progress/--no-progress", default=False, help="Show faults, evictions and memory while it runs.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the summary as JSON to FILE. A page that processes share since a fork counts once a process.",
)
@click.option("--user", metavar="NAME", help="Run the program as this user; EDM itself stays root.")
@click.option("--uncaptured", is_flag=True, help="Run a program that cannot be captured all the same, uncaptured.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    config: Config,
    dms: str | None,
    summary: bool | None,
    progress: bool,
    report: Path | None,
    user: str | None,
    uncaptured: bool,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND with the memory it needs beyond --local-memory kept by a memory server.

    Its output is its own; its exit status, or death by signal, is edm's. 126 and 127 mean as in a shell that the
    program cannot be started; 2 is a mistake in edm's own arguments; 70 means that EDM itself failed.
    """
    from edm.launch import run as launch  # noqa: PLC0415 (`edm --help` need not import the core)

    quiet = summary is False
    if summary is None:
        summary = sys.stderr.isatty()
    return launch.run(
        config if dms is None else _with_dms(config, dms),
        command,
        launch.Wishes(summary=summary, progress=progress, report=report, user=user, uncaptured=uncaptured, quiet=quiet),
    )


def _with_dms(config: Config, endpoint: str) -> Config:
    options = {
        section: {name: dict(given) for name, given in plugins.items()} for section, plugins in config.options.items()
    }
    options.setdefault("transport", {}).setdefault("zmq", {})["dms"] = endpoint
    return attrs.evolve(config, transport="zmq", options=options)
