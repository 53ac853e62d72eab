"""The command `edm adopt`: another DM-Handler for a program whose own has died."""

from __future__ import annotations

import json

import attrs
import click


@click.command(epilog="Example: edm adopt 4711")
@click.argument("pid", type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(pid: int, as_json: bool) -> int:
    """Start another DM-Handler for process PID, which waits since its own died.

    What dies is started again by itself, as long as edm run is there and --restarts allows it. Where neither is so, a
    program that was started with --on-death wait waits, for this. All processes of its run are served again, from the
    same stores; a memory server of the run that has died is started too.

    Returns when the program goes on. Exit status 1: it could not be taken over, and waits on; or it has ended.
    """
    from edm.launch.adoption import NotAdopted, adopt  # noqa: PLC0415 (`edm --help` need not import the core)

    try:
        done = adopt(pid)
    except NotAdopted as error:
        click.echo(f"edm: {' '.join(str(error).split())}", err=True)
        return 1
    if as_json:
        click.echo(json.dumps(attrs.asdict(done), indent=2))
    else:
        click.echo(f"process {done.pid} is served again, by process {done.handler_pid}, after {done.seconds:.1f} s")
    return 0
