"""The DMS's process: opens the stores and the transport that were chosen, says so, and serves until it is told to stop.

Place on the path: one end of the transport [5, 11], with the memory server [6-10] behind it. Started by the launcher of
a one-command run as `python -m edm.dms.process CONFIG_JSON RUN_DIR`, or by `edm dms`, which calls `run`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import setproctitle

from edm import faultpoints, privileges
from edm.config import Config
from edm.dms.guard import GuardedServer
from edm.dms.reports import Forwarding, LauncherReports, notify_reloading, open_reports
from edm.dms.server import MemoryServer
from edm.dms.settings import DmsSettings
from edm.dms.status import StatusSocket
from edm.errors import EdmError, UsageError
from edm.plugins.transport_mpi import end_job
from edm.registry import Registry
from edm.types import RunContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edm.dms.reports import Reports
    from edm.interfaces import PageStore, SptStore, Transport

log = logging.getLogger(__name__)

TITLE: Final = "edm: dms"
ROLE: Final = "dms"
ORPHAN_LOOK_S: Final = 0.5
"""How often a DMS without its launcher looks whether its DM-Handlers are gone too."""
STORE_DIR: Final = "store"
USER_MISTAKE: Final = 2
INTERNAL_ERROR: Final = 70


class DmsProcess:
    """One DMS, from its settings to its end.

    reload: gives fresh settings at SIGHUP; of these the quota, the log level, and what the transport can change while
    it serves, are taken over.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        settings: DmsSettings | None = None,
        reload: Callable[[], tuple[Config, DmsSettings]] | None = None,
    ) -> None:
        self.stop = threading.Event()
        self._config = config
        self._run_dir = run_dir
        self._settings = settings or DmsSettings()
        self._reload = reload
        self._registry = Registry()
        self._started = time.monotonic()
        self._guarded: GuardedServer | None = None
        self._transport: Transport | None = None

    def run(self, reports: Reports) -> None:
        """Serve until `stop` is set or every peer is gone; then drain, sync and close. Raises `EdmError`."""
        self._handle_signals(reports)
        context = self._context()
        spec = self._registry.transport(self._config.transport)
        options = self._config.plugin_options("transport", spec.name, spec)
        with contextlib.ExitStack() as stack:
            table, pages = open_stores(self._config, context, self._registry)
            server = stack.enter_context(contextlib.closing(MemoryServer(table, pages)))
            self._guarded = GuardedServer(server, table, self._settings.quota_pages)
            self._transport = transport = spec.open(options, context)
            self._guarded.owner_of = getattr(transport, "owner_of", self._guarded.owner_of)
            with StatusSocket(self._run_dir, self.status):
                reports.ready(str(getattr(transport, "address", spec.name)))
                transport.serve(self._guarded, self.stop)
                reports.stopping()
            # Leaving the transport may mean waiting for other processes: the stores are safe on disk before that.
            server.close()
            transport.close()

    def give_up_privileges(self, *, launched: bool) -> None:
        """It needs none but its transport's; before any thread is started. launched: it listens at no port either."""
        ports = [] if launched else [privileges.Capability.NET_BIND_SERVICE]
        transport = self._registry.transport(self._config.transport)
        places = [self._context().store_dir, self._run_dir]
        privileges.keep_only([*ports, *transport.capabilities], writes_to=places)

    def status(self) -> dict[str, Any]:
        """Figures for `edm dms status`: may be asked from any thread."""
        assert self._guarded is not None
        assert self._transport is not None
        figures = getattr(self._transport, "figures", None)
        return {
            "transport": self._config.transport,
            "address": str(getattr(self._transport, "address", "")),
            "uptime_s": round(time.monotonic() - self._started, 3),
            "peers": self._peers(),
            "quota_pages": self._guarded.quota_pages,
            "usage_pages": {str(instance): pages for instance, pages in self._guarded.usage().items()},
            "requests": figures() if figures is not None else {},
            "store": self._guarded.control(0, {"op": "stat"}),
        }

    def launcher_gone(self) -> None:
        """End as soon as no DM-Handler is left: called in a thread of its own."""
        while self._transport is not None and self._peers():
            time.sleep(ORPHAN_LOOK_S)
        self.stop.set()

    def _peers(self) -> int:
        peers = getattr(self._transport, "peers", None)
        return int(peers()) if peers is not None else 0

    def _context(self) -> RunContext:
        store_dir = (self._config.path or self._run_dir) / STORE_DIR
        store_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return RunContext(self._run_dir, store_dir, ROLE)

    def _handle_signals(self, reports: Reports) -> None:
        signal.signal(signal.SIGTERM, lambda *_: self.stop.set())
        # A terminal's Ctrl-C goes to the app of a run, and the DMS ends after it; alone, it is a stop like SIGTERM.
        signal.signal(signal.SIGINT, signal.SIG_IGN if reports.launched else lambda *_: self.stop.set())
        if self._reload is not None:
            signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=self._do_reload, args=(reports,)).start())

    def _do_reload(self, reports: Reports) -> None:
        assert self._reload is not None
        notify_reloading()
        try:
            config, settings = self._reload()
            settings.apply_log_level()
            if self._guarded is not None:
                self._guarded.quota_pages = settings.quota_pages
            reload_transport = getattr(self._transport, "reload", None)
            if reload_transport is not None:
                spec = self._registry.transport(self._config.transport)
                reload_transport(config.plugin_options("transport", spec.name, spec))
        except EdmError as error:
            # A mistake in the new settings must not end a server in use: it keeps the old ones.
            print(f"edm: not reloaded: {error}", file=sys.stderr, flush=True)
        reports.ready(str(getattr(self._transport, "address", self._config.transport)))


def open_server(config: Config, context: RunContext, registry: Registry) -> MemoryServer:
    """The memory server over the stores that were chosen; closing it closes them. Raises `EdmError`."""
    return MemoryServer(*open_stores(config, context, registry))


def open_stores(config: Config, context: RunContext, registry: Registry) -> tuple[SptStore, PageStore]:
    """The SPT store and page store that were chosen, in `context.store_dir`. Raises `EdmError`."""
    context.store_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    spt_spec, page_spec = registry.spt_store(config.spt_store), registry.page_store(config.page_store)
    with contextlib.ExitStack() as opened:
        table = spt_spec.open(config.plugin_options("spt_store", spt_spec.name, spt_spec), context)
        opened.callback(table.close)
        pages = page_spec.open(config.plugin_options("page_store", page_spec.name, page_spec), context)
        opened.pop_all()
    return table, pages


@contextlib.contextmanager
def reported(run_dir: Path) -> Iterator[Reports]:
    """Where this process reports to; an `EdmError` inside is reported there, and becomes exit status 2."""
    reports = open_reports(run_dir, ROLE)
    try:
        yield reports
    except EdmError as error:
        reports.error(" ".join(str(error).split()), mistake=isinstance(error, UsageError))
        end_job(USER_MISTAKE)
        sys.exit(USER_MISTAKE)
    except Exception as error:
        # A bug: the traceback goes to the log, and the launcher need not wait for its deadline.
        reports.error(f"internal error in the memory server: {type(error).__name__}: {error}", internal=True)
        log.exception("the memory server failed")
        end_job(INTERNAL_ERROR)
        sys.exit(INTERNAL_ERROR)
    finally:
        reports.close()


def run(
    config: Config,
    run_dir: Path,
    *,
    settings: DmsSettings | None = None,
    reload: Callable[[], tuple[Config, DmsSettings]] | None = None,
) -> None:
    """Be a DMS until told to stop; reports as it was started (launcher, systemd, person)."""
    with reported(run_dir) as reports:
        _run(DmsProcess(config, run_dir, settings=settings, reload=reload), reports)


def _run(process: DmsProcess, reports: Reports) -> None:
    setproctitle.setproctitle(TITLE)
    faultpoints.arm(ROLE)
    process.give_up_privileges(launched=reports.launched)
    if isinstance(reports, LauncherReports):
        reports.when_gone(process.launcher_gone)
        Forwarding(reports.warning).start()
    process.run(reports)


def main(arguments: list[str]) -> None:
    """`python -m edm.dms.process CONFIG_JSON RUN_DIR`."""
    config_json, run_dir = map(Path, arguments)
    with reported(run_dir) as reports:
        _run(DmsProcess(Config.read(config_json), run_dir), reports)


if __name__ == "__main__":
    main(sys.argv[1:])
