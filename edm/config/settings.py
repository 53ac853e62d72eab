"""The settings themselves: `Config`, one field each, and the JSON form in which it reaches other processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from edm.config import values
from edm.config.options import build_options
from edm.errors import UsageError
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edm.config.values import Reader
    from edm.hookspecs import PluginSpec

    Options = Mapping[str, Mapping[str, Mapping[str, Any]]]

FORMAT: Final = 1
SECTIONS: Final = {
    "fault_source": "fault_source",
    "transport": "transport",
    "spt_store": "store",
    "page_store": "store",
    "policy": "policy",
}
"""Kind of plugin → the section its options stand in. A store's two halves share one."""


def _setting(default: Any, read: Reader, text: str, metavar: str = "") -> Any:
    return attrs.field(default=default, metadata={"read": read, "help": text, "metavar": metavar})


@attrs.frozen(kw_only=True)
class Config:
    """Every setting of a run. Sizes are bytes, thresholds pages, whatever the user wrote."""

    fault_source: str = _setting("uffd", values.name, "where page faults come from", "NAME")
    transport: str = _setting("mpi", values.name, "what carries pages between DM-Handler and DMS", "NAME")
    spt_store: str = _setting("file", values.name, "where the DMS keeps its page table (SPT)", "NAME")
    page_store: str = _setting("file", values.name, "where the DMS keeps pages", "NAME")
    policy: str = _setting("scan", values.name, "in which order pages are evicted", "NAME")
    local_memory: int | None = _setting(
        None,
        values.memory,
        "the app's memory that may stay here; % is of this machine's, or of the cgroup's limit; auto: 80% of that; "
        "none: no cap",
        "SIZE",
    )
    high: int | None = _setting(
        None, values.threshold, "evict above this: pages as 5000p, a size, or % of local memory", "THRESHOLD"
    )
    low: int | None = _setting(None, values.threshold, "evict down to this", "THRESHOLD")
    write_back: int = _setting(16 << 20, values.size, "buffer of pages evicted and not yet acknowledged", "SIZE")
    sweep_ms: float = _setting(5.0, values.sweep_ms, "look for the app's new memory at least this often", "MS")
    fault_threads: int = _setting(1, values.count, "threads that answer page faults", "N")
    spin_us: int = _setting(
        50, values.spin_us, "how long a fault thread looks for the next fault before it sleeps", "MICROSECONDS"
    )
    idle_cpus: str = _setting(
        "auto",
        values.idle_cpus,
        "while faults follow each other closely, keep the machine's idle CPUs awake (root: /dev/cpu_dma_latency), "
        "occupy them with threads of class SCHED_IDLE, or let them sleep; auto: the first that fits this machine",
        "auto|awake|occupy|sleep",
    )
    patience_s: float = _setting(
        60.0, values.positive, "how long a fault waits for a lost DMS before on_loss", "SECONDS"
    )
    on_loss: str = _setting(
        "wait",
        values.on_loss,
        "after patience_s without the DMS: wait on; poison: SIGBUS for the page; kill: end the program",
        "wait|poison|kill",
    )
    restarts: int = _setting(
        5, values.restarts, "how often in a minute a DM-Handler or DMS that died is started again; 0: never", "N"
    )
    on_death: str = _setting(
        "kill",
        values.on_death,
        "what died is not started again: end the program, or keep it waiting for 'edm adopt'",
        "kill|wait",
    )
    path: Path | None = _setting(
        None, values.path, "directory for the run's files and the page files (default: a temporary one)", "DIR"
    )
    keep: bool = _setting(False, values.flag, "keep the run's directory afterwards, and name it")
    track_writes: bool = _setting(True, values.flag, "know which pages are clean, and drop those without a write")
    prefetch: int = _setting(
        63, values.ahead, "pages brought ahead of a stream of faults, at most 63; 0: none", "PAGES"
    )
    ask: bool = _setting(False, values.flag, "ask the DMS also for pages known to be new")
    record_pfn: bool = _setting(
        False, values.flag, "note each page's frame number with its fault; else when it is asked for"
    )
    cpus: str = _setting("auto", values.cpus, "CPUs of the fault threads: auto, or a list as 0,2-3", "CPUS")
    trace: Path | None = _setting(None, values.path, "record every fault's steps in FILE, for edm trace", "FILE")

    options: Options = attrs.field(factory=dict)
    """Plugin options as they were given: section → plugin → key → value."""
    origins: Mapping[str, str] = attrs.field(factory=dict)
    """Where a setting or option ("transport.mpi.spin_us") came from; what is not here is a default."""
    memory_derived: bool = False
    """Whether local_memory was worked out from the machine's memory or the cgroup's limit: nobody gave a size."""

    def origin(self, key: str) -> str:
        """Where a setting's value came from, for a person: "--store", "EDM_STORE", a file's name, "default"."""
        return self.origins.get(key, "default")

    def plugin_options(self, kind: str, name: str, spec: PluginSpec) -> Any:
        """The options of a chosen plugin, as an instance of `spec.options`; raises `UsageError`."""
        section = SECTIONS[kind]
        given = self.options.get(section, {}).get(name, {})
        origins = {key: self.origin(f"{section}.{name}.{key}") for key in given}
        return build_options(spec.options, given, origins, f"{section}.{name}")

    def handler_settings(self) -> HandlerSettings:
        """What the fault source and its engine are told."""
        return HandlerSettings(
            local_pages=(self.local_memory or 0) // PAGE_BYTES,
            high_pages=self.high or 0,
            low_pages=self.low or 0,
            write_back_pages=self.write_back // PAGE_BYTES,
            sweep_ms=self.sweep_ms,
            fault_threads=self.fault_threads,
            patience_s=self.patience_s,
            on_loss=self.on_loss,
            spin_us=self.spin_us,
            idle_cpus=self.idle_cpus,
            ahead_pages=self.prefetch,
            track_writes=self.track_writes,
            ask=self.ask,
            record_pfn=self.record_pfn,
            cpus=values.cpu_numbers(self.cpus),
        )

    def write(self, path: Path) -> None:
        """Write the JSON form to `path`, readable by its owner only."""
        document = {
            "format": FORMAT,
            "settings": {key: _plain(getattr(self, key)) for key in setting_names()},
            "options": self.options,
            "origins": self.origins,
        }
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(document, file, default=_plain)

    @classmethod
    def read(cls, path: Path) -> Config:
        """Read what `write` wrote, by this version of EDM; raises `UsageError`."""
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the settings in {path}: {error}") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise UsageError(f"{path} does not hold the settings of a run of this version of edm")
        settings = document["settings"]
        if set(settings) != set(setting_names()):
            raise UsageError(f"{path} was written by another version of edm")
        for name in ("path", "trace"):
            settings[name] = settings[name] and Path(settings[name])
        return cls(**settings, options=document["options"], origins=document["origins"])


@attrs.frozen(kw_only=True)
class HandlerSettings:
    """What a fault source's engine is told. Pages of 4096 bytes; 0 pages: no cap, or derived from the others.

    cpus: where the fault threads run; empty: they follow the app.
    """

    local_pages: int = 0
    high_pages: int = 0
    low_pages: int = 0
    write_back_pages: int = 4096
    sweep_ms: float = 5.0
    fault_threads: int = 1
    patience_s: float = 60.0
    on_loss: str = "wait"
    spin_us: int = 50
    idle_cpus: str = "auto"
    ahead_pages: int = 63
    track_writes: bool = True
    ask: bool = False
    record_pfn: bool = False
    cpus: tuple[int, ...] = ()


def setting_names() -> list[str]:
    """The names of all settings, in the order of `Config`."""
    return [field.name for field in setting_fields()]


def setting_fields() -> list[attrs.Attribute[Any]]:
    """The fields of `Config` that are settings; metadata: "read", "help", "metavar" ("" for a switch)."""
    return [field for field in attrs.fields(Config) if "read" in field.metadata]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
