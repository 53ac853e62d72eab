"""The contract of a fault source, for pytest."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import attrs
import pytest

from edm.config.options import build_options
from edm.config.settings import HandlerSettings
from edm.errors import UsageError
from edm.handler.workers import Workers
from edm.interfaces import FaultSource
from edm.plugins.transport_inproc.transport import InprocTransport
from edm.registry import Registry
from edm.testing.fault_server import WatchfulServer
from edm.types import RunContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Open = Callable[[], FaultSource]

PROGRAM: Final = str(Path(__file__).with_name("fault_program.py"))
LONGEST_S: Final = 60.0
WORKERS: Final = 2
COUNTERS: Final = frozenset(
    {
        "faults",
        "evictions",
        "fetches",
        "rescues",
        "writes",
        "lost",
        "internal_errors",
        "resident",
        "peak_resident",
        "spaces",
    }
)
"""What `counters` must have at least, as `struct edm_counters` in native/edm_abi.h has it."""


@attrs.frozen
class Played:
    """What was left when a program had run: its output, the source's last counters, and the memory server."""

    output: str
    counters: Mapping[str, int]
    server: WatchfulServer


class FaultSourceContract:
    """What a fault source must do, tried with a real program between it and a memory server that watches.

    Example::

        class TestMine(FaultSourceContract):
            source = "mine"

    options: the plugin's, as a user would write them. budget_pages: resident pages the program may have; its working
    set must be larger. program: what is started with the environment from `prepare`; the default checks its own memory
    and prints the same whenever it runs. A source that brings its own touches, as `replay` does, needs no program.
    """

    source: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    budget_pages: ClassVar[int] = 4096
    program: ClassVar[tuple[str, ...]] = (sys.executable, PROGRAM, "32", "1")

    @pytest.fixture
    def open_source(self, tmp_path: Path) -> Iterator[Open]:
        """Open the source, as often as called; skips where it says that this machine or user may not."""
        spec = Registry().fault_source(self.source)
        options = build_options(spec.options, self.options, dict.fromkeys(self.options, "test"), self.source)
        try:
            spec.check(options)
        except UsageError as error:
            pytest.skip(str(error))
        with contextlib.ExitStack() as opened:

            def open_() -> FaultSource:
                settings = HandlerSettings(local_pages=self.budget_pages, write_back_pages=512, fault_threads=WORKERS)
                run_dir = tmp_path / str(time.monotonic_ns())
                run_dir.mkdir(mode=0o700)
                context = RunContext(run_dir=run_dir, store_dir=run_dir, role="dm-handler")
                return opened.enter_context(contextlib.closing(spec.open(options, settings, context)))

            yield open_

    def test_source_has_all_methods(self, open_source: Open) -> None:
        """It is a `FaultSource`."""
        source = open_source()
        assert isinstance(source, FaultSource)
        assert source.counters().keys() >= COUNTERS

    def test_prepare_adds_to_the_environment(self, open_source: Open) -> None:
        """Nothing the program was to have is taken away, and the dict is not the caller's."""
        given = {"PATH": "/usr/bin:/bin", "EDM_CONTRACT": "yes", "LD_PRELOAD": "libmine.so"}
        before = dict(given)
        prepared = open_source().prepare(given)
        assert given == before
        assert {name: value for name, value in given.items() if value not in prepared.get(name, "")} == {}

    def test_polls_return_when_nothing_happens(self, open_source: Open) -> None:
        """After their timeout."""
        source = open_source()
        assert source.poll_faults(0, 1000) == 0
        assert source.poll_outbox(1000) is None

    def test_stop_ends_polls(self, open_source: Open) -> None:
        """Those that wait, and later ones."""
        source = open_source()
        ends: list[object] = []

        def poll_outbox() -> None:
            try:
                source.poll_outbox(int(LONGEST_S * 1e6))
            except EOFError:
                ends.append("outbox")

        polls = [
            threading.Thread(target=lambda n=number: ends.append(source.poll_faults(n, int(LONGEST_S * 1e6))))
            for number in range(WORKERS)
        ]
        polls.append(threading.Thread(target=poll_outbox))
        for poll in polls:
            poll.start()
        time.sleep(0.05)
        source.stop()
        for poll in polls:
            poll.join(LONGEST_S / 2)
        assert sorted(map(str, ends)) == ["-1", "-1", "outbox"]
        assert source.poll_faults(0, 1000) == -1

    def test_second_close_does_nothing(self, open_source: Open) -> None:
        """Nor a third."""
        source = open_source()
        source.stop()
        source.close()
        source.close()

    def test_program_runs_in_less_memory_than_it_needs(self, open_source: Open) -> None:
        """With the same output as without EDM; the memory server is told all, in order, and of the end too."""
        played = self.play(open_source(), WatchfulServer())
        assert played.output == self.output_without_edm()
        counters = played.counters
        assert counters["evictions"] > 0
        assert counters["fetches"] + counters["rescues"] > 0
        assert counters["peak_resident"] <= self.budget_pages
        assert played.server.evicted > 0
        assert played.server.fetched > 0

    def test_failing_memory_server_loses_nothing(self, open_source: Open) -> None:
        """Every third eviction batch is refused, and every seventh fetch batch answered with errors."""
        server = WatchfulServer(refuse_every=3, fail_every=7)
        played = self.play(open_source(), server)
        assert played.output == self.output_without_edm()
        assert server.refused > 0
        assert server.failed > 0

    def output_without_edm(self) -> str:
        """What the program prints when it runs by itself."""
        return _run(self.program, dict(os.environ))

    def play(self, source: FaultSource, server: WatchfulServer) -> Played:
        """Run the program under `source`, and check what holds after every run."""
        failures: list[BaseException] = []
        transport = InprocTransport(server, 10.0)
        control = transport.connect()
        instance = int(control.control({"op": "hello", "client": "contract", "protocol": 1})["instance"])
        workers = Workers(
            source, transport, fault_threads=WORKERS, patience_s=30, failed=failures.append, warn=lambda _text: None
        )
        source.start(instance)
        workers.start()
        output = _run(self.program, source.prepare(dict(os.environ)))
        _wait_until(lambda: source.counters()["spaces"] == 0 or bool(failures))
        counters = source.counters()
        source.stop()
        assert workers.join(LONGEST_S), "a worker hangs"
        assert failures == []
        assert server.breaches == []
        assert server.regions == {}, "regions are left after the program's end"
        assert counters["internal_errors"] == counters["lost"] == counters["resident"] == 0
        return Played(output, counters, server)


def _run(program: tuple[str, ...], environment: dict[str, str]) -> str:
    done = subprocess.run(
        program,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < end, "the program's end goes unnoticed"
        time.sleep(0.005)
