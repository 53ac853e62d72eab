"""The whole path in this process: the engine, its workers, the in-process transport, a memory server, memory stores."""

import contextlib

import pytest

from edm.config.settings import HandlerSettings
from edm.dms.server import MemoryServer
from edm.engine import Engine
from edm.handler.workers import Workers
from edm.plugins.source_replay import ReplayOptions
from edm.plugins.source_replay.source import ReplaySource
from edm.registry import Registry
from edm.types import RunContext


class Path:
    """The parts of one run; `source` is an `Engine`, started by the test or by `instance`."""

    def __init__(self, directory, source, settings, wrap=lambda server: server):
        registry = Registry()
        context = RunContext(run_dir=directory, store_dir=directory, role="dm-handler")
        spt, pages, transport = (
            registry.spt_store("memory"),
            registry.page_store("memory"),
            registry.transport("inproc"),
        )
        self.source = source
        self.spt = spt.open(spt.options(), context)
        self.pages = pages.open(pages.options(), context)
        self.server = MemoryServer(self.spt, self.pages)
        self.transport = transport.open(transport.options(), context, wrap(self.server))
        self._control = self.transport.connect()
        self.instance = self._control.control({"op": "hello", "client": "test", "protocol": 1})["instance"]
        self.failures = []
        self._workers = Workers(
            source,
            self.transport,
            fault_threads=settings.fault_threads,
            patience_s=10,
            failed=self.failures.append,
            warn=lambda text: None,
        )
        self._workers.start()

    def finish(self):
        """End the run as the DM-Handler does; the memory server must have been told all by then."""
        self.source.stop()
        assert self._workers.join(20), "a worker hangs"
        assert not self.failures
        assert self.spt.regions() == {}, "a program that has ended left pages behind"
        assert self._control.control({"op": "bye"})["ok"]
        self._control.close()
        self.transport.close()
        self.server.close()


@pytest.fixture
def play(tmp_path):
    """Play a trace through the whole path: `play(settings, options)`; returns the source's counters at its end."""

    def run(settings, options, wrap=lambda server: server):
        source = ReplaySource(settings, options)
        path = Path(tmp_path, source, settings, wrap)
        with contextlib.closing(source):
            source.start(path.instance)
            assert source.wait(60), f"the trace hangs: {source.counters()}"
            assert source.error() == ""
            counters = source.counters()
            path.finish()
        return counters

    return run


@pytest.fixture
def engine_path(tmp_path):
    """A path whose program the test plays itself: `engine_path(settings)` is a context manager."""

    @contextlib.contextmanager
    def opened(settings, wrap=lambda server: server):
        engine = Engine(settings)
        path = Path(tmp_path, engine, settings, wrap)
        with contextlib.closing(engine):
            yield path
            path.finish()

    return opened


@pytest.fixture
def settings():
    """A budget of 64 pages and a write-back buffer of 48."""
    return HandlerSettings(local_pages=64, write_back_pages=48, fault_threads=2)


@pytest.fixture
def options():
    """A program of 512 pages, touched at random."""
    return ReplayOptions(pages=512, touches=4000)
