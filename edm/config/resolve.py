"""One `Config` from all the places a user may have said something."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edm.config.layers import Layer, Value, from_arguments, from_environment, from_file, from_pyproject
from edm.config.options import build_options, check_keys
from edm.config.settings import SECTIONS, Config, setting_fields
from edm.config.values import is_derived
from edm.errors import UnknownPlugin, UsageError
from edm.registry import KINDS, Registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FILE = "edm.toml"
DEFAULT = "default"


def resolve(
    settings: Mapping[str, Any] | None = None,
    options: Iterable[str] = (),
    *,
    file: Path | None = None,
    registry: Registry | None = None,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Config:
    """Resolve every setting, and check every plugin name and option; raises `UsageError`.

    settings: the command line's, None for those not given; "store" sets both halves. options: `-o` texts. file: read
    instead of edm.toml. environ, directory: this process's unless given.
    """
    registry = registry or Registry()
    environ = os.environ if environ is None else environ
    layers = [
        from_arguments(settings or {}, options),
        from_environment(environ),
        *_files(file, directory or Path.cwd()),
    ]
    given: dict[str, Value] = {}
    for layer in layers:
        for key, value in _with_both_stores(layer, registry).items():
            given.setdefault(key, value)
    if "local_memory" not in given and ("high" not in given or is_derived(given["high"].raw)):
        given["local_memory"] = Value("auto", DEFAULT)
    config = _read(given)
    for section, kinds in _kinds_by_section().items():
        for kind in kinds:
            # An unknown name is the first thing to say; only then do options make sense.
            registry.find(kind, getattr(config, kind))
        _name_loose_options(layers, section, kinds, registry)
    return _with_options(config, layers, registry)


def _files(file: Path | None, directory: Path) -> list[Layer]:
    layers = []
    if file is not None:
        layers.append(from_file(file))
    elif (directory / FILE).exists():
        layers.append(from_file(directory / FILE))
    if (directory / "pyproject.toml").exists():
        layers.append(from_pyproject(directory / "pyproject.toml"))
    return layers


def _with_both_stores(layer: Layer, registry: Registry) -> dict[str, Value]:
    """The layer's settings, with "store" replaced by the halves that the plugin of that name offers."""
    settings = dict(layer.settings)
    store = settings.pop("store", None)
    if store is None:
        return settings
    halves = [kind for kind in ("spt_store", "page_store") if registry.offers(kind, str(store.raw))]
    if not halves:
        installed = sorted({*registry.names("spt_store"), *registry.names("page_store")})
        raise UnknownPlugin(
            f"unknown store '{store.raw}' (installed: {', '.join(installed)}); try: pip install edm-store-{store.raw}"
        )
    for kind in halves:
        settings.setdefault(kind, store)
    return settings


def _read(given: Mapping[str, Value]) -> Config:
    read: dict[str, Any] = {}
    for field in setting_fields():
        value = given.get(field.name)
        if value is None:
            read[field.name] = field.default
            continue
        try:
            read[field.name] = field.metadata["read"](value.raw, read)
        except UsageError as error:
            where = value.origin if value.origin.startswith(("--", "EDM_")) else f"{value.origin}: {field.name}"
            raise UsageError(f"{where}: {error}") from None
    config = Config(
        **read,
        origins={key: value.origin for key, value in given.items() if value.origin != DEFAULT},
        memory_derived=is_derived(given["local_memory"].raw) if "local_memory" in given else False,
    )
    _check_thresholds(config)
    return config


def _check_thresholds(config: Config) -> None:
    high, low = config.high, config.low
    if high == 0:
        raise UsageError("high: the threshold must be at least one page")
    if high is not None and low is not None and low > high:
        raise UsageError(f"low ({low} pages) is above high ({high} pages): nothing would be evicted")
    if high is not None and config.local_memory is not None and high * 4096 > config.local_memory:
        raise UsageError(f"high ({high} pages) is above the local memory ({config.local_memory // 4096} pages)")


def _kinds_by_section() -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    for kind, section in SECTIONS.items():
        sections.setdefault(section, []).append(kind)
    return sections


def _name_loose_options(layers: list[Layer], section: str, kinds: list[str], registry: Registry) -> None:
    """Split EDM_STORE_LMDB_MAP_SIZE at the plugin's name, now that the registry can tell it."""
    for layer in layers:
        for (of_section, rest), value in layer.loose.items():
            if of_section != section:
                continue
            names = {name for kind in kinds for name in registry.names(kind)}
            fitting = [name for name in names if rest.startswith(name.replace("-", "_") + "_")]
            if not fitting:
                raise UsageError(
                    f"{value.origin}: no {section.replace('_', ' ')} of that name (installed: {_list(names)})"
                )
            name = max(fitting, key=len)
            layer.options[section, name, rest[len(name) + 1 :]] = value


def _with_options(config: Config, layers: list[Layer], registry: Registry) -> Config:
    given: dict[tuple[str, str, str], Value] = {}
    for layer in layers:
        for name, value in layer.options.items():
            given.setdefault(name, value)
    options: dict[str, dict[str, dict[str, Any]]] = {}
    origins = dict(config.origins)
    for section, plugin, key in sorted(given):
        options.setdefault(section, {}).setdefault(plugin, {})[key] = given[section, plugin, key].raw
        origins[f"{section}.{plugin}.{key}"] = given[section, plugin, key].origin
    _check_options(options, origins, registry)
    values = {field.name: getattr(config, field.name) for field in setting_fields()}
    return Config(**values, options=options, origins=origins, memory_derived=config.memory_derived)


def _check_options(
    options: Mapping[str, Mapping[str, Mapping[str, Any]]], origins: Mapping[str, str], registry: Registry
) -> None:
    """Every section names a plugin there is, every key is one of its options, every value fits."""
    kinds_of = _kinds_by_section()
    for section, plugins in options.items():
        for name, given in plugins.items():
            kinds = [kind for kind in kinds_of[section] if registry.offers(kind, name)]
            key_origins = {key: origins[f"{section}.{name}.{key}"] for key in given}
            if not kinds:
                names = {name for kind in kinds_of[section] for name in registry.names(kind)}
                where = next(iter(key_origins.values()), section)
                title = KINDS[kinds_of[section][0]].title if len(kinds_of[section]) == 1 else section
                raise UsageError(f"{where}: unknown {title} '{name}' in [{section}.{name}] (installed: {_list(names)})")
            specs = [registry.find(kind, name) for kind in kinds]
            check_keys([spec.options for spec in specs], given, key_origins, f"{section}.{name}")
            for spec in specs:
                build_options(spec.options, given, key_origins, f"{section}.{name}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
