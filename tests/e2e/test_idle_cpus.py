"""Idle CPUs are kept awake, or occupied, while a program faults again and again, and left alone otherwise."""

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edm.idle_cpus import DEVICE, idle_cpus, may_ask

LATENCY = Path("/") / DEVICE

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
    process, handler = started(edm, program, "--idle-cpus", "occupy")
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


def latency_us():
    """The shortest that anybody asks for. Source: Linux Documentation/power/pm_qos_interface.rst."""
    return struct.unpack("i", LATENCY.read_bytes())[0]


@pytest.mark.skipif(not may_ask(), reason="no right to write to /dev/cpu_dma_latency")
def test_cpus_are_kept_awake_as_long_as_a_program_faults(edm, program):
    asked = idle_cpus("awake").latency_us
    at_rest = latency_us()
    if at_rest <= asked:
        pytest.skip("somebody else keeps this machine's CPUs awake")
    process, handler = started(edm, program, "--idle-cpus", "awake")
    until(lambda: latency_us() == asked, "no CPU is kept awake")
    assert not occupiers(handler)

    (app,) = edm.pids(("working_set",))
    os.kill(app, signal.SIGSTOP)
    until(lambda: latency_us() == at_rest, "CPUs are kept awake while nothing faults")
    os.kill(app, signal.SIGCONT)
    until(lambda: latency_us() == asked, "no CPU is kept awake any more")
    os.kill(handler, signal.SIGKILL)  # what a process asked for ends with it; its successor asks again
    until(lambda: edm.pids(("edm: dm-handler",)) not in ([], [handler]), "no other DM-Handler was started")
    until(lambda: latency_us() == asked, "no CPU is kept awake after the DM-Handler's death")
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    until(lambda: latency_us() == at_rest, "CPUs are kept awake after the program's end")
    assert edm.left_behind() == ({}, [])


def test_no_cpu_is_kept_awake_where_that_is_not_wanted(edm, program):
    process, handler = started(edm, program, "--idle-cpus", "sleep")
    time.sleep(0.3)
    assert not occupiers(handler)
    assert str(LATENCY) not in [os.readlink(each) for each in Path(f"/proc/{handler}/fd").iterdir()]
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)


def confined(handler):
    """Whether a fault thread may run on fewer CPUs than there are."""
    tasks = Path(f"/proc/{handler}/task").iterdir()
    fault_threads = [int(task.name) for task in tasks if (task / "comm").read_text() == "edm: dm-handler\n"]
    return any(len(os.sched_getaffinity(task)) < len(os.sched_getaffinity(0)) for task in fault_threads)


def idle_share():
    """Of the time of all CPUs over 0.3 s. Source: proc_stat(5)."""

    def ticks():
        every = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(every), every[3] + every[4]

    before = ticks()
    time.sleep(0.3)
    total, idle = (after - then for after, then in zip(ticks(), before, strict=True))
    return idle / total


@pytest.mark.skipif(not may_ask(), reason="no right to write to /dev/cpu_dma_latency")
def test_fault_threads_follow_the_program_only_while_others_want_all_cpus(edm, program):
    if idle_share() < 0.4:
        pytest.skip("somebody else keeps this machine busy")
    process, handler = started(edm, program, "--idle-cpus", "awake")
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * os.cpu_count())]
    try:
        until(lambda: confined(handler), "the fault thread waits for a turn on another CPU")
    finally:
        for other in others:
            other.kill()
            other.wait()
    until(lambda: not confined(handler), "the fault thread stays where it was put")
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert edm.left_behind() == ({}, [])
