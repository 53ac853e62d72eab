"""Every setting as an argument: what `edm run`, `edm dms` and `edm config` share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edm.config.resolve import resolve
from edm.config.settings import Config, setting_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Command = TypeVar("Command", bound=Callable[..., Any])


def config_options(*names: str) -> Callable[[Command], Command]:
    """Give a click command the settings of these names as options (all, if none is named).

    The command is called with `config`, the resolved `Config`, in place of them. `--store` comes with the stores, and
    `-o` and `--config` always.
    """
    fields = [field for field in setting_fields() if not names or field.name in names]
    keys = [field.name for field in fields]
    options = [
        _option(field.name, field.metadata["help"], field.metadata["metavar"], field.default) for field in fields
    ]
    if {"spt_store", "page_store"} & set(keys):
        at = keys.index("spt_store") if "spt_store" in keys else keys.index("page_store")
        options.insert(at, click.option("--store", metavar="NAME", help="Both stores, where the plugin offers both."))
        keys.append("store")
    options += [
        click.option("-o", "--option", "plugin_options", multiple=True, metavar="SECTION.PLUGIN.KEY=VALUE",
                     help="A plugin's option, as store.lmdb.map_size=4G (see edm plugins --options)."),
        click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE",
                     help="Read this file in place of ./edm.toml."),
    ]  # fmt: skip

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_config(plugin_options: Iterable[str], config_file: Path | None, **arguments: Any) -> Any:
            given = {key: arguments.pop(key) for key in keys}
            return command(config=resolve(given, plugin_options, file=config_file), **arguments)

        return functools.reduce(lambda made, option: option(made), reversed(options), with_config)  # type: ignore[return-value]

    return decorate


def _option(name: str, text: str, metavar: str, default: Any) -> Callable[[Any], Any]:
    argument = "--" + name.replace("_", "-")
    sentence = f"{text[0].upper()}{text[1:]}."
    if not metavar:
        return click.option(
            f"{argument}/--no-{argument[2:]}", name, default=None, help=f"{sentence} [{shown_default(default)}]"
        )
    shown = "" if default is None else f" [{shown_default(default)}]"
    return click.option(argument, name, metavar=metavar, help=sentence + shown)


def shown_default(default: Any) -> str:
    """A default for help and documentation: "16M", "on", "0.5"."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, int) and default >= 1 << 20:
        return f"{default >> 20}M"
    return f"{default:g}" if isinstance(default, float) else str(default)


__all__ = ["Config", "config_options", "shown_default"]
