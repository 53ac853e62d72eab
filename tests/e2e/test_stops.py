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

VICTIMS = [("inproc", "edm: dm-handler"), ("inproc", "edm: sidecar"), ("zmq", "edm: dms")]
FOR_LONG = [
    ("inproc", "edm: dm-handler"),
    ("inproc", "edm: holder"),
    ("inproc", "working_set"),
    ("zmq", "edm: dms"),
    ("zmq", "edm: dm-handler"),
    pytest.param("mpi", "edm: dms", marks=pytest.mark.mpi),
]
"""Not the sidecar: one that does not answer for five seconds is ended."""


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
    stopped_for(edm, program, transport, victim, 1.0, 80 if transport == "inproc" else 25)


@pytest.mark.soak
@pytest.mark.parametrize(("transport", "victim"), FOR_LONG)
def test_who_is_stopped_for_long_is_not_dead(edm, program, transport, victim):
    stopped_for(edm, program, transport, victim, 25, 40)
