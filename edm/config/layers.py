"""The places settings come from, each read into one `Layer`: arguments, variables, files."""

from __future__ import annotations

import difflib
import tomllib
from typing import TYPE_CHECKING, Any, Final

import attrs

from edm.config.options import suggest
from edm.config.settings import SECTIONS, setting_names
from edm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

PREFIX: Final = "EDM_"
INTERNAL: Final = ("EDM_INTERNAL_", "EDM_TEST_", "EDM_SOCK")
"""Variables with these beginnings are how EDM's processes talk to each other: never settings."""

_SECTIONS: Final = sorted(set(SECTIONS.values()))


@attrs.frozen
class Value:
    """A value as it was written, and where."""

    raw: Any
    origin: str


@attrs.frozen
class Layer:
    """One source's settings (with "store" still standing for both halves) and plugin options.

    options: (section, plugin, key) → value. loose: (section, rest) of variables as EDM_STORE_LMDB_MAP_SIZE, where only
    the registry knows how much of `lmdb_map_size` is the plugin's name.
    """

    settings: dict[str, Value] = attrs.field(factory=dict)
    options: dict[tuple[str, str, str], Value] = attrs.field(factory=dict)
    loose: dict[tuple[str, str], Value] = attrs.field(factory=dict)


def known_keys() -> list[str]:
    """Every key a layer may set."""
    return [*setting_names(), "store"]


def from_arguments(settings: Mapping[str, Any], options: Iterable[str]) -> Layer:
    """The command line's: values that were given (None: not), and `-o section.plugin.key=value` texts."""
    layer = Layer()
    for key, raw in settings.items():
        if raw is not None:
            layer.settings[key] = Value(raw, "--" + key.replace("_", "-"))
    for text in options:
        name, equals, raw = text.partition("=")
        section, _, rest = name.strip().replace("-", "_").partition(".")
        # The plugin's own name may hold a dash, which only its own spelling tells.
        plugin, dot, key = name.strip().partition(".")[2].rpartition(".")
        if not (equals and dot and plugin and key and section in _SECTIONS and rest):
            raise UsageError(f"bad option '{text}': write it as transport.mpi.KEY=VALUE ({', '.join(_SECTIONS)})")
        layer.options[section, plugin, key.replace("-", "_")] = Value(raw.strip(), f"-o {name.strip()}")
    return layer


def from_environment(environ: Mapping[str, str]) -> Layer:
    """The variables EDM_KEY and EDM_SECTION_PLUGIN_KEY.

    A variable that is no setting but nearly one is a `UsageError`; others beginning with EDM_ belong to someone else.
    """
    layer = Layer()
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name.startswith(INTERNAL):
            continue
        key = name.removeprefix(PREFIX).lower()
        section = next((section for section in _SECTIONS if key.startswith(section + "_")), None)
        if key in known_keys():
            layer.settings[key] = Value(environ[name], name)
        elif section:
            layer.loose[section, key.removeprefix(section + "_")] = Value(environ[name], name)
        else:
            close = difflib.get_close_matches(key, known_keys(), 1, 0.8)
            if close:
                raise UsageError(f"{name}: no such setting (did you mean {PREFIX}{close[0].upper()}?)")
    return layer


def from_file(path: Path) -> Layer:
    """An edm.toml: settings at the top, options in [transport.NAME], [store.NAME], [policy.NAME], [fault_source.NAME].

    TOML does not let `transport` be a name and a table at once: beside [transport.mpi], say `transport.use = "mpi"`.
    """
    return from_table(_load(path), str(path.name), "")


def from_pyproject(path: Path) -> Layer:
    """The [tool.edm] of a pyproject.toml, which has the same keys."""
    table = _load(path).get("tool", {}).get("edm", {})
    return from_table(table, str(path.name), "tool.edm.")


def from_table(table: Any, file: str, prefix: str) -> Layer:
    """What a TOML table holds."""
    layer = Layer()
    if not isinstance(table, dict):
        raise UsageError(f"{file}: '{prefix.rstrip('.')}' must be a table")
    for written, raw in table.items():
        key = written.replace("-", "_")
        if key in _SECTIONS and isinstance(raw, dict):
            _add_section(layer, key, raw, file, prefix)
        elif key not in known_keys():
            raise UsageError(f"{file}: unknown key '{prefix}{written}'{suggest(key, [*known_keys(), *_SECTIONS])}")
        elif isinstance(raw, dict | list):
            raise UsageError(f"{file}: '{prefix}{written}' must be one value")
        else:
            layer.settings[key] = Value(raw, file)
    return layer


def _add_section(layer: Layer, section: str, plugins: dict[str, Any], file: str, prefix: str) -> None:
    for plugin, options in plugins.items():
        if plugin == "use" and isinstance(options, str):
            layer.settings[section] = Value(options, file)
            continue
        if not isinstance(options, dict):
            raise UsageError(f"{file}: '{prefix}{section}.{plugin}' must be a table of the plugin's options")
        for key, raw in options.items():
            layer.options[section, plugin, key.replace("-", "_")] = Value(raw, file)


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
