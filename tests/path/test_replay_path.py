"""A trace goes the whole path, unprivileged and in well under a second, and every read finds what was written."""

import re
import time

import attrs
import numpy as np
import pytest

from edm.dms.table import page_checksums
from edm.errors import EdmError, NativeError
from edm.plugins.source_replay import ReplayOptions
from edm.plugins.source_replay.program import ReplayProgram
from edm.plugins.source_replay.source import ReplaySource
from edm.types import PAGE_BYTES, EvictStatus, GetStatus


@pytest.mark.parametrize("pattern", ["random", "sequential", "hot"])
def test_every_pattern_reads_what_it_wrote(play, settings, options, pattern):
    counters = play(settings, attrs.evolve(options, pattern=pattern))
    assert counters["evictions"] > 500
    assert counters["fetches"] + counters["rescues"] > 100
    assert counters["peak_resident"] <= 64
    assert counters["internal_errors"] == counters["lost"] == counters["over_limit"] == 0
    assert counters["spaces"] == 0


def test_threads_share_the_budget(play, settings, options):
    counters = play(settings, attrs.evolve(options, threads=8, touches=8000))
    assert counters["peak_resident"] <= 64
    assert counters["faults"] > 1000


def test_without_a_budget_nothing_is_evicted(play, settings, options):
    counters = play(attrs.evolve(settings, local_pages=0), options)
    assert counters["evictions"] == 0
    assert counters["zero_fills"] == counters["peak_resident"] > 400


def test_asking_dms_about_new_pages_changes_nothing_for_the_program(play, settings, options):
    counters = play(attrs.evolve(settings, ask=True), options)
    assert counters["fetches"] > 100


def test_read_only_pages_are_written_once(play, settings, options):
    counters = play(settings, attrs.evolve(options, writes=0))
    assert counters["writes"] == 0
    assert counters["evicted_zero"] == counters["evictions"] > 500


class Failing:
    """A memory server that refuses every third eviction batch and answers every fifth fetch batch with errors."""

    def __init__(self, server):
        self._server = server
        self._calls = {"get": 0, "evict": 0}
        self.control = server.control

    def get(self, instance, refs, into):
        self._calls["get"] += 1
        if self._calls["get"] % 5 == 0:
            refs["status"] = GetStatus.ERROR
        else:
            self._server.get(instance, refs, into)

    def evict(self, instance, refs, pages):
        self._calls["evict"] += 1
        if self._calls["evict"] % 3 == 0:
            refs["status"] = EvictStatus.FAIL
            return "no room today"
        return self._server.evict(instance, refs, pages)


def test_memory_server_that_fails_at_times_loses_nothing(play, settings, options):
    counters = play(settings, options, Failing)
    assert counters["write_failures"] > 0
    assert counters["stale"] > 0
    assert counters["lost"] == 0


class Lying(Failing):
    """A memory server that answers with the bytes of some other page, and says that they are the page's."""

    def get(self, instance, refs, into):
        self._server.get(instance, refs, into)
        into[:] = bytes(len(into))


def test_wrong_bytes_become_a_bus_error_never_data(engine_path, settings):
    with engine_path(settings, Lying) as path:
        program = ReplayProgram(path.source, path.instance, 512)
        for page in range(512):
            program.write(page, page + 1)
        while path.source.counters()["staged"]:
            time.sleep(0.001)
        with pytest.raises(NativeError, match="Bad address"):
            program.read(0)
        assert path.source.counters()["lost"] == 1
        sums = re.search(r"CRC-32C ([0-9a-f]{8}); came: \d+, ([0-9a-f]{8})\)$", path.source.error())
        assert sums, path.source.error()
        assert sums[1] != sums[2] == f"{page_checksums(bytes(PAGE_BYTES))[0]:08x}"
        program.close()


def test_trace_file_with_address_space_changes_is_played(play, settings, tmp_path):
    trace = tmp_path / "small.trace"
    trace.write_text(
        "w 1 11\nw 2 22\nremap 1 2 300  # to where nothing was\nr 300\nr 301\nr 1\nunmap 300 1\nr 300\nr 301\n"
    )
    assert play(settings, ReplayOptions(trace=trace))["events_remap"] == 1


def test_lost_write_is_found_and_named(settings, tmp_path, monkeypatch):
    """The check itself: a trace that expects something else than the program wrote fails."""
    from edm.plugins.source_replay import trace

    expected = trace.expected_reads
    monkeypatch.setattr(trace, "expected_reads", lambda operations, pages: expected(operations, pages) + np.uint64(1))
    source = ReplaySource(attrs.evolve(settings, local_pages=0), ReplayOptions(pages=8, touches=20))
    source.start(1)
    while source.poll_faults(0, 1000) >= 0 and not source.wait(0):
        pass
    assert "not 0x1: a write was lost" in source.error()
    with pytest.raises(EdmError, match="a write was lost"):
        source.close()
    source.close()


def test_stop_cuts_a_trace_short(settings, options, caplog):
    source = ReplaySource(settings, options)
    source.start(1)  # nobody polls: the first touch waits
    assert not source.wait(0.05)
    source.close()
    assert source.wait(0)
    assert "cut short after 0 of 4000" in caplog.text


def test_program_beside_a_trace_is_started_as_it_is(settings, options):
    source = ReplaySource(settings, options)
    environment = {"PATH": "/bin", "LD_PRELOAD": "x.so"}
    assert source.prepare(environment) == environment
    source.close()


def test_fork_leaves_parent_and_child_their_own_pages(engine_path, settings):
    with engine_path(settings) as path:
        parent = ReplayProgram(path.source, path.instance, 300)
        for page in range(300):
            parent.write(page, page + 1)
        child = parent.fork()
        for page in range(0, 300, 3):
            child.write(page, 1000 + page)
            parent.write(page, 2000 + page)
        for page in range(300):
            assert parent.read(page) == (page + 1 if page % 3 else 2000 + page)
            assert child.read(page) == (page + 1 if page % 3 else 1000 + page)
        parent.close()
        assert child.read(150) == 1150
        child.close()
        assert path.source.counters()["events_fork"] == 1


def test_pinned_pages_stay(engine_path, settings):
    with engine_path(settings) as path:
        program = ReplayProgram(path.source, path.instance, 300)
        program.pin(0, 8)
        for page in range(300):
            program.write(page, page)
        faults = path.source.counters()["faults"]
        assert [program.read(page) for page in range(8)] == list(range(8))
        assert path.source.counters()["faults"] == faults
        assert path.source.counters()["move_refused"] > 0
        assert program.present() <= 64
        program.close()
