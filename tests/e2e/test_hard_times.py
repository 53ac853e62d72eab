"""A store that hangs or is slow, a DM-Handler without memory, a clock that jumps: the program waits, and is right."""

import os
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_deaths import expected, wait_for
from watching import wait_for as until
from working import WAIT_S

from edm.faultpoints import VARIABLE

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(150)]


@pytest.fixture
def held(edm, working):
    """Start working_set over a store that hangs at a point; returns it, and the flag that ends that."""

    def start(point, *options):
        flag = edm.directory / "point"
        flag.write_text(f"dm-handler {point} hold 40\n")
        edm.environment[VARIABLE] = str(flag)
        run = working("--transport", "inproc", "--store", "lmdb", "--local-memory", "2M", *options)
        until(lambda: not flag.exists())
        return run, flag

    return start


@pytest.mark.soak
@pytest.mark.parametrize("point", ["pages_asked", "pages_put"])
def test_a_store_that_hangs_is_waited_for_and_told_of(edm, held, point):
    run, flag = held(point)
    told = run.process.stderr.readline()
    assert re.fullmatch(rb"edm: warning: the page store has not answered for \d+ s; waiting\n", told)
    flag.write_text("")
    out, err = run.finish()
    assert (run.process.returncode, out) == (0, run.alone()), err
    assert re.fullmatch(rb"edm: warning: the page store answers again, after [\d.]+ s\n", err)
    assert edm.left_behind()[0] == {}


def test_a_store_that_hangs_for_too_long_ends_the_program_where_that_is_wanted(edm, held):
    run, _ = held("pages_asked", "--on-loss", "kill", "--patience-s", 1)
    out, err = run.process.communicate(timeout=WAIT_S)
    assert (run.process.returncode, out) == (70, b"")
    assert err.endswith(b"edm: the page store did not answer within 1 s\n")
    assert edm.left_behind()[0] == {}


SLOW = """
import sys, time
import edm.plugins.store_lmdb.pages as store
put = store.LmdbPages.put
def slow_put(self, *arguments):
    time.sleep(0.1)
    return put(self, *arguments)
store.LmdbPages.put = slow_put
"""


def memory_of(pid):
    """A process's own and shared memory, in bytes; 0 once it has ended. Source: proc_pid_status(5)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(1024 * int(kb) for kb in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", text, re.MULTILINE))


@pytest.mark.soak
def test_a_slow_store_slows_the_program_down_and_fills_no_memory(edm, program, tmp_path):
    # Where a DM-Handler's Python looks first.
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW)
    edm.environment["PYTHONPATH"] = str(tmp_path / "slow")
    command = (program("working_set"), 32, 1)
    process = edm.start(
        *("run", "--transport", "inproc", "--store", "lmdb", "--local-memory", "2M", "--write-back", "1M"),
        *("--report", tmp_path / "report.json", "--", *command),
    )
    handler, _ = wait_for(process.pid, "edm: dm-handler", "edm: sidecar")
    before = most = memory_of(handler)
    while process.poll() is None:
        most = max(most, memory_of(handler))
        time.sleep(0.02)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, expected(command)), err
    assert '"evictions": 0' not in (tmp_path / "report.json").read_text()
    # The buffer, the tables, what LMDB and a batch take; not the 30 MiB that left the program.
    assert most - before < 12 << 20


@pytest.mark.soak
@pytest.mark.parametrize(
    ("transport", "says"),
    [
        ("zmq", rb"the DM-Handler has died; starting another"),
        # Who gets none first, there: the server that is in it, or the rest.
        ("inproc", rb"the memory server cannot store pages \(Unable to allocate|the DM-Handler has died; starting"),
    ],
    ids=["zmq", "inproc"],
)
def test_a_dm_handler_without_memory_is_replaced_or_waits(edm, working, transport, says):
    run = working("--transport", transport, "--local-memory", "4M", megabytes=64)
    (handler, _) = wait_for(run.process.pid, "edm: dm-handler", "edm: sidecar")
    resource.prlimit(handler, resource.RLIMIT_DATA, (4096, 4096))  # no more than it has
    out, err = run.finish()
    assert (run.process.returncode, out) == (0, run.alone()), err
    assert re.search(says, err)
    assert edm.left_behind() == ({}, [])


# Not gettimeofday(3): nobody in EDM asks it (see below), and by it UCX in an MPI measures how fast its CPU is, and ends
# the rank that it finds too slow.
JUMPS = r"""
#define _GNU_SOURCE
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static _Atomic unsigned calls;
static long off(void) { return ((long)(atomic_fetch_add(&calls, 1) % 7) - 3) * 36000; }
int clock_gettime(clockid_t clock, struct timespec *t) {
    int r = (int)syscall(SYS_clock_gettime, clock, t);
    if (!r && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        t->tv_sec += off();
    return r;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.mark.soak
@pytest.mark.parametrize("transport", ["zmq", pytest.param("mpi", marks=pytest.mark.mpi)])
def test_a_wall_clock_that_jumps_by_hours_changes_nothing(edm, working, tmp_path, transport):
    (tmp_path / "jumps.c").write_text(JUMPS)
    library = tmp_path / "jumps.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, tmp_path / "jumps.c"], check=True)
    edm.environment["LD_PRELOAD"] = str(library)
    run = working("--transport", transport, "--local-memory", "4M")
    run.at_work()
    (server,) = wait_for(run.process.pid, "edm: dms")
    assert str(library) in Path(f"/proc/{server}/maps").read_text()
    os.kill(server, signal.SIGKILL)  # waiting, its limits and what is started again go by a clock as well
    out, err = run.finish()
    assert (run.process.returncode, out) == (0, run.alone()), err
    assert b"is there again; the program goes on" in err
    assert edm.left_behind() == ({}, [])


def test_nothing_that_waits_asks_for_the_time_of_day():
    words = re.compile(r"CLOCK_REALTIME|gettimeofday|pthread_cond_timedwait|sem_timedwait|time\.time\(|datetime\.now")
    # A condition made with CLOCK_MONOTONIC (engine.c) is waited for by that clock.
    allowed = {
        "edm/cli/bench.py": {"datetime.now"},  # the date of a report
        "native/writeback.c": {"pthread_cond_timedwait"},
        "native/reclaim.c": {"pthread_cond_timedwait"},
    }
    found = {}
    for path in [*ROOT.glob("native/**/*.[ch]"), *ROOT.glob("edm/**/*.py")]:
        name = str(path.relative_to(ROOT))
        said = set(words.findall(path.read_text())) - allowed.get(name, set())
        if said and "/tests/" not in name:
            found[name] = said
    assert found == {}
