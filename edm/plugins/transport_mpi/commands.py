"""Commands that may be ranks of an MPI job, whose other ranks must not wait for one that has given up."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click

from edm.errors import EdmError
from edm.plugins.transport_mpi.launch import end_job, under_mpi

if TYPE_CHECKING:
    from collections.abc import Iterator


class RankCommand(click.Command):
    """A command whose user's mistakes end the job."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """As click's."""
        with _ending_the_job():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's."""
        with _ending_the_job():
            return super().invoke(ctx)


class RankGroup(RankCommand, click.Group):
    """The same with commands below it."""


@contextlib.contextmanager
def _ending_the_job() -> Iterator[None]:
    try:
        yield
    except (EdmError, click.ClickException) as error:
        if not under_mpi():
            raise
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"edm: {' '.join(text.split())}", err=True)
        end_job(2)
        # In a job that is over, or that cannot be joined: it has been said already.
        raise SystemExit(2) from None
