"""The command `edm config`: every setting's value and where it came from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs
import click

from edm.config.arguments import config_options
from edm.config.machine import memory_limit
from edm.config.settings import SECTIONS, setting_names
from edm.registry import Registry
from edm.sizes import format_size

if TYPE_CHECKING:
    from edm.config import Config


@click.command()
@config_options()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(config: Config, as_json: bool) -> None:
    """Show every setting, its value, and where the value came from.

    Takes the same settings as `edm run`, so that a command line can be tried out.
    """
    rows = {key: (getattr(config, key), config.origin(key)) for key in setting_names()}
    if config.memory_derived:
        origin = config.origin("local_memory")
        rows["local_memory"] = config.local_memory, f"{origin}, from {memory_limit()}"
    rows |= _plugin_rows(config)
    if as_json:
        document = {key: {"value": value, "origin": origin} for key, (value, origin) in rows.items()}
        click.echo(json.dumps(document, indent=2, default=str))
        return
    width = max(map(len, rows))
    for key, (value, origin) in rows.items():
        click.echo(f"{key:{width}}  {_shown(key, value):16}  {origin}")


def _plugin_rows(config: Config) -> dict[str, tuple[Any, str]]:
    registry = Registry()
    rows: dict[str, tuple[Any, str]] = {}
    for kind, section in SECTIONS.items():
        name = getattr(config, kind)
        spec = registry.find(kind, name)
        options = config.plugin_options(kind, name, spec)
        for field in attrs.fields(spec.options):
            key = f"{section}.{name}.{field.name}"
            rows[key] = getattr(options, field.name), config.origin(key)
    return rows


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "none" if key == "local_memory" else "auto"
    if isinstance(value, bool):
        return "true" if value else "false"
    if key in {"local_memory", "write_back"}:
        return format_size(value)
    if key in {"high", "low"}:
        return f"{value} pages"
    return f"{value:g}" if isinstance(value, float) else str(value)
