"""Idle CPUs are occupied while one thread of a program faults again and again, and left alone otherwise."""

import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.uffd,
    pytest.mark.timeout(150),
    pytest.mark.skipif(
        not 2 <= len(os.sched_getaffinity(0)) <= 4, reason="for machines of two to four CPUs: elsewhere nothing is done"
    ),
]


def occupiers(handler):
    """The threads that occupy CPUs."""
    tasks = Path(f"/proc/{handler}/task").iterdir()
    return [int(task.name) for task in tasks if (task / "comm").read_text() == "edm-beside\n"]


def ran_ns(handler):
    return sum(int(Path(f"/proc/{handler}/task/{t}/schedstat").read_text().split()[0]) for t in occupiers(handler))


def until(condition, why):
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, why
        time.sleep(0.01)


def started(edm, program, *options):
    """A program that faults for as long as it is let, once it has begun to: itself and its DM-Handler."""
    options = ("--transport", "inproc", "--store", "memory", "--local-memory", "4M", *options)
    process = edm.start("run", *options, "--", program("working_set"), 8, 100_000)
    until(lambda: edm.pids(("edm: sidecar",)), "the program was not captured")
    (handler,) = edm.pids(("edm: dm-handler",))
    return process, handler


def test_idle_cpus_are_occupied_as_long_as_a_thread_faults(edm, program):
    process, handler = started(edm, program, "--keep-beside", "on")
    until(lambda: len(occupiers(handler)) == len(os.sched_getaffinity(0)), "no thread on each CPU")
    assert {os.sched_getscheduler(thread) for thread in occupiers(handler)} == {os.SCHED_IDLE}
    until(lambda: ran_ns(handler) > 20_000_000, "no CPU was occupied")

    (app,) = edm.pids(("working_set",))
    os.kill(app, signal.SIGSTOP)

    def at_rest():
        before = ran_ns(handler)
        time.sleep(0.2)
        return ran_ns(handler) - before < 2_000_000

    until(at_rest, "a CPU stays occupied while nothing faults")
    os.kill(app, signal.SIGCONT)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert edm.left_behind() == ({}, [])


def test_no_cpu_is_occupied_where_that_is_not_wanted(edm, program):
    process, handler = started(edm, program, "--keep-beside", "off")
    assert not occupiers(handler)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
