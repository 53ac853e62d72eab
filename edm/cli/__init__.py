"""The command line: `edm COMMAND`.

Each module of this package whose name is a command's holds it as `command`, a click command, and is imported only when
that command is used (or help lists them all). A command's integer result is the exit status.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from typing import TYPE_CHECKING, Any

import click

from edm import __version__
from edm.errors import EdmError
from edm.launch.limits import lift_limits

if TYPE_CHECKING:
    from collections.abc import Sequence

USER_MISTAKE = 2


class _Commands(click.Group):
    """The modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(module.name for module in pkgutil.iter_modules(__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        if cmd_name == "dms":  # as for the processes of a run: see NO_THREADS in edm/launch/processes.py
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        if cmd_name == "run":  # before anything large is imported
            lift_limits()
        command = importlib.import_module(f"{__name__}.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edm", message="%(prog)s %(version)s")
def group() -> None:
    """External Distributed Memory: run programs in less memory than they need.

    edm run --local-memory 64M -- sort -S 400M big.txt
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: a user's mistake is one line on stderr and status 2, a bug is a traceback."""
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone: nothing to say, and nowhere to flush to at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        status: Any = group.main(arguments, prog_name="edm", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return USER_MISTAKE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "edm"
        return _complain(f"{error.format_message().rstrip('.')} (see {path} --help)")
    except click.ClickException as error:
        return _complain(error.format_message())
    except EdmError as error:
        return _complain(str(error))
    except (KeyboardInterrupt, click.Abort):
        return 130
    return status if isinstance(status, int) else 0


def _complain(text: str) -> int:
    click.echo(f"edm: {' '.join(text.split())}", err=True)
    return USER_MISTAKE
