"""The command `edm dms`: a memory server that stands alone; `edm dms status` asks it for figures."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from edm.config.arguments import config_options
from edm.config.resolve import resolve
from edm.dms.settings import LOG_LEVELS, DmsSettings, read_settings
from edm.errors import UsageError
from edm.plugins.transport_mpi import join_job, under_mpi
from edm.plugins.transport_mpi.commands import RankGroup
from edm.sizes import format_size
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from edm.config import Config

_SETTINGS = ("transport", "spt_store", "page_store", "path")


@click.group(cls=RankGroup, invoke_without_command=True)
@config_options(*_SETTINGS)
@click.option("--listen", metavar="ENDPOINT", help="Serve at ENDPOINT, as tcp://127.0.0.1:7070 (implies zmq).")
@click.option("--quota", metavar="SIZE", help="The most that one client may keep here [no limit].")
@click.option("--log-level", type=click.Choice(LOG_LEVELS), help="What is told on standard error [warning].")
@click.pass_context
def command(
    context: click.Context, config: Config, listen: str | None, quota: str | None, log_level: str | None
) -> None:
    """Keep pages for DM-Handlers, on this machine or others, until SIGTERM.

    Says when it is ready (to systemd, or in a line), and ends in order: what was acknowledged is on disk. SIGHUP makes
    it read the allow-list of clients, and quota and log_level in PATH/dms.toml, again.
    """
    if context.invoked_subcommand is not None:
        return
    _serve(context, config, listen, quota, log_level)


@command.command()
@click.option("--path", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Its directory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(path: Path, as_json: bool) -> None:
    """Say how the memory server in DIR is doing."""
    from edm.dms.status import ask_status  # noqa: PLC0415

    figures = ask_status(path)
    if as_json:
        click.echo(json.dumps(figures, indent=2))
        return
    for key, value in figures.items():
        if isinstance(value, dict):
            click.echo(f"{key.removesuffix('_pages')}:")
            for name, one in value.items():
                click.echo(f"  {name}: {_shown(key, one)}")
        else:
            click.echo(f"{key.removesuffix('_pages')}: {_shown(key, value)}")


def _shown(key: str, value: Any) -> str:
    if key == "quota_pages" and not value:
        return "none"
    return format_size(value * PAGE_BYTES) if key.endswith("_pages") else str(value)


def _serve(
    context: click.Context, config: Config, listen: str | None, quota: str | None, log_level: str | None
) -> None:
    from edm.dms import process  # noqa: PLC0415

    logging.basicConfig(format="edm: %(message)s")
    if config.path is None and config.transport == "mpi" and listen is None and under_mpi():
        # A job whose other ranks do not come is killed: nothing may lie about by then.
        join_job()
    with contextlib.ExitStack() as stack:
        path = config.path or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edm-dms-")))
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--path: cannot use {path}: {error.strerror}") from None

        def settle(config: Config) -> tuple[Config, DmsSettings]:
            config = attrs.evolve(_with_listen(config, listen), path=path)
            return config, read_settings(path, quota, log_level)

        config, settings = settle(config)
        settings.apply_log_level()
        process.run(config, path, settings=settings, reload=lambda: settle(_resolve_again(context)))


def _resolve_again(context: click.Context) -> Config:
    """The same arguments with the files as they are now."""
    given = {key: context.params[key] for key in (*_SETTINGS, "store")}
    return resolve(given, context.params["plugin_options"], file=context.params["config_file"])


def _with_listen(config: Config, listen: str | None) -> Config:
    if listen is None:
        return config
    options = {
        section: {name: dict(given) for name, given in plugins.items()} for section, plugins in config.options.items()
    }
    options.setdefault("transport", {}).setdefault("zmq", {})["listen"] = listen
    return attrs.evolve(config, transport="zmq", options=options)
