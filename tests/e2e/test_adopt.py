"""`edm adopt`: what is not started again by itself is waited for, and started by hand."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from test_deaths import at_rest, descendants, running_still, wait_for
from watching import wait_for as until
from working import WAIT_S

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(150)]

soak = pytest.mark.soak
TRANSPORTS = [
    "inproc",
    pytest.param("zmq", marks=soak),
    pytest.param("mpi", marks=[soak, pytest.mark.mpi]),
]


@pytest.fixture
def waiting(working):
    """Start working_set so that it waits for its DM-Handler, once that was killed, and kill it.

    Returns (what was started, the program's pid, the holder's).
    """

    def start(transport, *options, launcher_too=False):
        arguments = ("--transport", transport, "--local-memory", "4M", "--on-death", "wait", *options)
        run = working(*arguments, "--restarts", 0)
        pid = run.at_work()
        handler, holder = wait_for(run.process.pid, "edm: dm-handler", "edm: holder")
        if launcher_too:
            run.process.kill()
            run.process.wait(WAIT_S)
        os.kill(handler, signal.SIGKILL)
        until(lambda: not running_still(handler))
        return run, pid, holder

    return start


def waits_in_the_kernel(sidecar):
    """Whether a sidecar that has emptied staging waits for somebody to read the event of it."""
    try:
        return Path(f"/proc/{sidecar}/wchan").read_text() == "userfaultfd_event_wait_completion"
    except OSError:
        return False


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_its_launcher_starts_another_when_it_is_asked(edm, waiting, transport):
    run, pid, _ = waiting(transport)
    until(lambda: at_rest(pid))
    ran = edm("adopt", pid, "--json")
    assert (ran.status, ran.err) == (0, "")
    answer = json.loads(ran.out)
    assert (answer["pid"], answer["by"]) == (pid, "launcher")
    assert descendants(run.process.pid)[answer["handler_pid"]] == "edm: dm-handler"
    out, err = run.finish()
    assert (run.process.returncode, out) == (0, run.alone()), err
    assert f"the program waits: 'edm adopt {pid}' starts another".encode() in err
    assert edm.left_behind() == ({}, [])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_its_launcher_it_is_taken_over_all_the_same(edm, waiting, transport):
    run, pid, _ = waiting(transport, launcher_too=True)
    until(lambda: at_rest(pid))
    assert running_still(pid)
    ran = edm("adopt", pid)
    assert ran.status == 0, ran.err
    assert ran.out.startswith(f"process {pid} is served again, by process ".encode())
    out, _ = run.finish()  # until the program closes its output
    assert out == run.alone()
    assert edm.left_behind() == ({}, [])


@soak
def test_death_after_death_each_is_taken_over_by_hand(edm, waiting):
    run, pid, _ = waiting("inproc", launcher_too=True)
    for _ in range(3):
        handler = json.loads(edm("adopt", pid, "--json").out)["handler_pid"]
        time.sleep(0.3)
        os.kill(handler, signal.SIGKILL)
    assert edm("adopt", pid).status == 0
    assert run.finish()[0] == run.alone()
    assert edm.left_behind() == ({}, [])


def test_what_is_not_to_be_taken_over_is_refused_in_one_line(edm, working):
    run = working("--transport", "inproc")
    pid = run.at_work()
    (handler,) = wait_for(run.process.pid, "edm: dm-handler")
    for arguments, says in (
        ((pid,), f"process {pid} is served: nothing has died"),
        ((os.getpid(),), f"process {os.getpid()} was not captured by EDM"),
        ((2**22 + 1,), f"there is no process {2**22 + 1}"),
    ):
        ran = edm("adopt", *arguments)
        assert (ran.status, ran.out, ran.err) == (2, b"", f"edm: {says}\n")
    run.process.kill()
    run.process.wait(WAIT_S)
    ran = edm("adopt", pid)
    assert (ran.status, ran.err) == (2, f"edm: process {pid} is served by process {handler}: nothing has died\n")
    os.kill(pid, signal.SIGKILL)


@soak
def test_with_its_holder_dead_nothing_can_be_taken_over(edm, waiting):
    run, pid, holder = waiting("inproc", launcher_too=True)
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
    until(lambda: not running_still(pid) or waits_in_the_kernel(sidecar))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    assert run.process.communicate(timeout=WAIT_S)[0] == b""


@soak
def test_a_program_that_waits_can_be_ended(edm, waiting):
    run, pid, _ = waiting("inproc")
    run.process.send_signal(signal.SIGTERM)
    out, err = run.process.communicate(timeout=WAIT_S)
    assert (run.process.returncode, out) == (-signal.SIGTERM, b""), err
    assert not running_still(pid)
    assert edm.left_behind() == ({}, [])
