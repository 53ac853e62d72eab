"""The command `edm debug`: a debugger that can reach a captured program's evicted pages."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import click

LIBRARY: Final = Path(__file__).resolve().parents[1] / "libedm_debugger.so"
"""native/debugger: what is preloaded into the debugger."""


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Example: edm debug -- gdb -p 4711",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def command(command: tuple[str, ...]) -> int | None:
    """Run COMMAND, a debugger, with access to evicted pages.

    The kernel does not let a debugger wait for a page that is away: gdb says "Cannot access memory", and shows stacks
    and libraries in part. Under this command what it reads or writes is brought back first, within the budget.
    Works for gdb, gdbserver and whatever else uses /proc/PID/mem. strace and perf need no help.
    """
    from edm.launch.checks import CommandError, find_program  # noqa: PLC0415 (`edm --help` need not import it)

    try:
        program = find_program(command[0])
    except CommandError as error:
        click.echo(f"edm: {error}", err=True)
        return error.status
    theirs = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = f"{LIBRARY}:{theirs}" if theirs else str(LIBRARY)
    sys.stdout.flush()
    return os.execv(program, command)  # noqa: S606 (its terminal, signals and exit status are its own)
