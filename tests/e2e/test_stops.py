"""One of a run's processes is stopped (SIGSTOP) and goes on: nothing is taken for dead, the program waits and is right.

`make soak` stops them for longer than the deadlines between them.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_deaths import descendants, wait_for

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(150)]

VICTIMS = [
    ("inproc", "edm: dm-handler"),
    pytest.param("inproc", "edm: sidecar", marks=pytest.mark.soak),
    ("zmq", "edm: dms"),
]
FOR_LONG = [
    ("inproc", "edm: dm-handler"),
    ("inproc", "edm: holder"),
    ("inproc", "working_set"),
    ("zmq", "edm: dms"),
    ("zmq", "edm: dm-handler"),
    pytest.param("mpi", "edm: dms", marks=pytest.mark.mpi),
]
"""Not the sidecar: one that does not answer for five seconds is ended."""


LONGER_THAN_ANY_DEADLINE_S = 25


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def stopped_for(edm, program, transport, victim, seconds, rounds):
    """Stop the victim in the midst of the run; returns what was said on stderr, once the output has been compared."""
    command = (program("working_set"), 8, rounds)
    process = edm.start("run", "--transport", transport, "--local-memory", "4M", "--", *command)
    pid, working, _ = wait_for(process.pid, victim, "working_set", "edm: sidecar")
    before = {p: title for p, title in descendants(process.pid).items() if title.startswith("edm: ")}
    # The holder is needed only when another dies: the program would come to its end meanwhile.
    stopped = [pid, working] if victim == "edm: holder" else [pid]
    for one in stopped:
        os.kill(one, signal.SIGSTOP)
    try:
        time.sleep(seconds)
        assert state(pid) == "T", "it was ended, or did not stop"
        assert process.poll() is None
        assert Path(f"/proc/{working}").exists(), "the program did not wait"
        after = descendants(process.pid)
        assert all(after.get(p) == title for p, title in before.items()), "another was started in its place"
    finally:
        for one in stopped:
            os.kill(one, signal.SIGCONT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert out == subprocess.run(list(map(str, command)), capture_output=True, check=True, timeout=60).stdout
    assert b"has died" not in err
    assert edm.left_behind() == ({}, [])
    return err


@pytest.mark.parametrize(("transport", "victim"), VICTIMS)
def test_who_is_stopped_for_a_moment_is_not_dead(edm, program, transport, victim):
    # Enough of them that the program is not at its end when the victim is found: a server of its own takes longer.
    stopped_for(edm, program, transport, victim, 1.0, 80)


@pytest.mark.soak
@pytest.mark.parametrize(("transport", "victim"), FOR_LONG)
def test_who_is_stopped_for_long_is_not_dead(edm, program, transport, victim):
    stopped_for(edm, program, transport, victim, LONGER_THAN_ANY_DEADLINE_S, 40)


def suspended_for(edm, program, transport, seconds, rounds):
    """All stand still at once, as in a suspended machine; but time goes on, which it does not there."""
    command = (program("working_set"), 8, rounds)
    process = edm.start("run", "--transport", transport, "--local-memory", "4M", "--", *command)
    _, _, sidecar = wait_for(process.pid, "edm: dm-handler", "working_set", "edm: sidecar")
    time.sleep(0.3)
    everybody = [process.pid, *descendants(process.pid)]
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    # In the order in which it would go wrong first: who waits for the others comes before them.
    for pid in sorted(everybody, key=lambda pid: pid == sidecar):
        os.kill(pid, signal.SIGCONT)
    assert Path(f"/proc/{sidecar}").exists()
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, b"")
    assert out == subprocess.run(list(map(str, command)), capture_output=True, check=True, timeout=60).stdout
    assert edm.left_behind() == ({}, [])


def test_after_a_suspend_all_goes_on_as_before(edm, program):
    suspended_for(edm, program, "inproc", 1.0, 40)


@pytest.mark.soak
@pytest.mark.parametrize("transport", ["inproc", "zmq", pytest.param("mpi", marks=pytest.mark.mpi)])
def test_after_a_long_suspend_all_goes_on_as_before(edm, program, transport):
    suspended_for(edm, program, transport, LONGER_THAN_ANY_DEADLINE_S, 40)
