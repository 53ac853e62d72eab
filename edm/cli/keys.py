"""The command `edm keys`: keys for memory servers and clients that meet on a network."""

from __future__ import annotations

import getpass
import importlib.util
import socket
from pathlib import Path

import click

from edm.errors import MissingExtra


@click.group()
def command() -> None:
    """Make the keys that the transport zmq wants between machines."""


@command.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path())
@click.option("--name", metavar="TEXT", help="Whose key it is, for people [USER@HOST].")
def new(directory: Path, name: str | None) -> None:
    """Make a pair of keys in DIRECTORY: edm.key, to be kept secret, and edm.pub, to be given to the other side.

    A memory server is told its own edm.key and a file with its clients' public keys; a client its own edm.key and the
    server's edm.pub.
    """
    if importlib.util.find_spec("zmq") is None:
        raise MissingExtra("keys are made by pyzmq: pip install 'edm[zmq]'")
    from edm.plugins.transport_zmq.keys import new_keys  # noqa: PLC0415

    secret, public = new_keys(directory, name or f"{getpass.getuser()}@{socket.gethostname()}")
    click.echo(f"{secret}  (keep it secret)")
    click.echo(f"{public}  {public.read_text().strip()}")
