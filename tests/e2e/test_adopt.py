"""`edm adopt`: what is not started again by itself is waited for, and started by hand."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from test_deaths import cpu_ticks, descendants, expected, kill_while_at_work, running_still, state_of, wait_for

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(150)]

soak = pytest.mark.soak
TRANSPORTS = [
    "inproc",
    pytest.param("zmq", marks=soak),
    pytest.param("mpi", marks=[soak, pytest.mark.mpi]),
]


@pytest.fixture
def waiting(edm, program):
    """Start working_set so that it waits for its DM-Handler, once that was killed, and kill it.

    Returns (the launcher, the command, the program's pid, the holder's).
    """

    def start(transport, *options, launcher_too=False, rounds=40):
        command = (program("working_set"), 8, rounds)
        arguments = ("--transport", transport, "--local-memory", "4M", "--on-death", "wait", *options)
        process = edm.start("run", *arguments, "--restarts", 0, "--", *command)
        handler, holder, working, _ = wait_for(
            process.pid, "edm: dm-handler", "edm: holder", "working_set", "edm: sidecar"
        )
        if launcher_too:
            process.kill()
            process.wait(10)
        kill_while_at_work(handler, working)
        until(lambda: not running_still(handler))
        return process, command, working, holder

    return start


def until(condition, within_s=40):
    end = time.monotonic() + within_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def waits_in_the_kernel(sidecar):
    """Whether a sidecar that has emptied staging waits for somebody to read the event of it."""
    try:
        return Path(f"/proc/{sidecar}/wchan").read_text() == "userfaultfd_event_wait_completion"
    except OSError:
        return False


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_its_launcher_starts_another_when_it_is_asked(edm, waiting, transport):
    process, command, pid, _ = waiting(transport)
    until(lambda: state_of(pid) in "SD")
    time.sleep(0.3)
    busy = cpu_ticks(pid)
    time.sleep(0.3)
    assert cpu_ticks(pid) == busy
    ran = edm("adopt", pid, "--json")
    assert (ran.status, ran.err) == (0, "")
    answer = json.loads(ran.out)
    assert (answer["pid"], answer["by"]) == (pid, "launcher")
    assert descendants(process.pid).get(answer["handler_pid"]) in {"edm: dm-handler", None}  # it may be over
    out, err = process.communicate(timeout=80)
    assert (process.returncode, out) == (0, expected(command)), err
    assert f"the program waits: 'edm adopt {pid}' starts another".encode() in err
    assert edm.left_behind() == ({}, [])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_its_launcher_it_is_taken_over_all_the_same(edm, waiting, transport):
    process, command, pid, _ = waiting(transport, launcher_too=True)
    time.sleep(0.3)
    assert running_still(pid)
    ran = edm("adopt", pid)
    assert ran.status == 0, ran.err
    assert ran.out.startswith(f"process {pid} is served again, by process ".encode())
    out, _ = process.communicate(timeout=80)  # until the program closes its output
    assert out == expected(command)
    assert edm.left_behind(within_s=40) == ({}, [])


@soak
def test_death_after_death_each_is_taken_over_by_hand(edm, waiting):
    process, command, pid, _ = waiting("inproc", launcher_too=True, rounds=200)
    for _ in range(3):
        handler = json.loads(edm("adopt", pid, "--json").out)["handler_pid"]
        kill_while_at_work(handler, pid, 0.3)
    assert edm("adopt", pid).status == 0
    assert process.communicate(timeout=80)[0] == expected(command)
    assert edm.left_behind(within_s=40) == ({}, [])


def test_what_is_not_to_be_taken_over_is_refused_in_one_line(edm, program):
    process = edm.start("run", "--transport", "inproc", "--", program("working_set"), 8, 2000)
    pid, handler, _ = wait_for(process.pid, "working_set", "edm: dm-handler", "edm: sidecar")
    os.kill(pid, signal.SIGSTOP)  # or it may be over first
    for arguments, says in (
        ((pid,), f"process {pid} is served: nothing has died"),
        ((os.getpid(),), f"process {os.getpid()} was not captured by EDM"),
        ((2**22 + 1,), f"there is no process {2**22 + 1}"),
    ):
        ran = edm("adopt", *arguments)
        assert (ran.status, ran.out, ran.err) == (2, b"", f"edm: {says}\n")
    process.kill()
    process.wait(10)
    ran = edm("adopt", pid)
    assert (ran.status, ran.err) == (2, f"edm: process {pid} is served by process {handler}: nothing has died\n")
    os.kill(pid, signal.SIGKILL)


@soak
def test_with_its_holder_dead_nothing_can_be_taken_over(edm, waiting):
    process, _, pid, holder = waiting("inproc", launcher_too=True)
    (sidecar,) = edm.pids(("edm: sidecar",))
    os.kill(pid, signal.SIGSTOP)
    os.kill(holder, signal.SIGKILL)
    ran = edm("adopt", pid)
    if running_still(pid):
        assert ran.status == 1
        assert ran.err == f"edm: the holder of process {pid} has died too: nothing has its pages any more\n"
    with contextlib.suppress(ProcessLookupError):  # it may have been ended already
        os.kill(pid, signal.SIGCONT)
    # Its sidecar ends it within a second or two, unless that waits in the kernel itself.
    until(lambda: not running_still(pid) or waits_in_the_kernel(sidecar), 10)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    assert process.communicate(timeout=20)[0] == b""


@soak
def test_a_program_that_waits_can_be_ended(edm, waiting):
    process, _, pid, _ = waiting("inproc")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (-signal.SIGTERM, b""), err
    assert not running_still(pid)
    assert edm.left_behind() == ({}, [])
