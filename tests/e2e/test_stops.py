"""One of a run's processes is stopped (SIGSTOP) and goes on: nothing is taken for dead, the program waits and is right.

`make soak` stops them for longer than the deadlines between them.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from test_deaths import descendants, state_of, wait_for
from working import WAIT_S

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


def stopped_for(edm, working, transport, victim, seconds):
    """Stop the victim in the midst of the run; returns what was said on stderr, once the output has been compared."""
    run = working("--transport", transport, "--local-memory", "4M")
    program = run.at_work()
    (pid,) = wait_for(run.process.pid, victim)
    before = {p: title for p, title in descendants(run.process.pid).items() if title.startswith("edm: ")}
    os.kill(pid, signal.SIGSTOP)
    try:
        if victim != "edm: holder":  # which is needed only when another dies
            run.sign.unlink()
        time.sleep(seconds)
        assert state_of(pid) == "T", "it was ended, or did not stop"
        assert run.process.poll() is None
        assert Path(f"/proc/{program}").exists(), "the program did not wait"
        after = descendants(run.process.pid)
        assert all(after.get(p) == title for p, title in before.items()), "another was started in its place"
    finally:
        os.kill(pid, signal.SIGCONT)
    run.sign.unlink(missing_ok=True)
    out, err = run.process.communicate(timeout=WAIT_S)
    assert (run.process.returncode, out) == (0, run.alone()), err
    assert b"has died" not in err
    assert edm.left_behind() == ({}, [])
    return err


@pytest.mark.parametrize(("transport", "victim"), VICTIMS)
def test_who_is_stopped_for_a_moment_is_not_dead(edm, working, transport, victim):
    stopped_for(edm, working, transport, victim, 1.0)


@pytest.mark.soak
@pytest.mark.parametrize(("transport", "victim"), FOR_LONG)
def test_who_is_stopped_for_long_is_not_dead(edm, working, transport, victim):
    stopped_for(edm, working, transport, victim, LONGER_THAN_ANY_DEADLINE_S)


def suspended_for(edm, working, transport, seconds):
    """All stand still at once, as in a suspended machine; but time goes on, which it does not there."""
    run = working("--transport", transport, "--local-memory", "4M")
    run.at_work()
    (sidecar,) = wait_for(run.process.pid, "edm: sidecar")
    everybody = [run.process.pid, *descendants(run.process.pid)]
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    # In the order in which it would go wrong first: who waits for the others comes before them.
    for pid in sorted(everybody, key=lambda pid: pid == sidecar):
        os.kill(pid, signal.SIGCONT)
    assert Path(f"/proc/{sidecar}").exists()
    out, err = run.finish()
    assert (run.process.returncode, out, err) == (0, run.alone(), b"")
    assert edm.left_behind() == ({}, [])


def test_after_a_suspend_all_goes_on_as_before(edm, working):
    suspended_for(edm, working, "inproc", 1.0)


@pytest.mark.soak
@pytest.mark.parametrize("transport", ["inproc", "zmq", pytest.param("mpi", marks=pytest.mark.mpi)])
def test_after_a_long_suspend_all_goes_on_as_before(edm, working, transport):
    suspended_for(edm, working, transport, LONGER_THAN_ANY_DEADLINE_S)
