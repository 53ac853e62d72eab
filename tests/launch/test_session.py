"""What the launcher makes of its processes' ends, those that come sooner than it looks."""

import ctypes
import os
import signal
import subprocess
import sys

import pytest

from edm.config import Config
from edm.launch import revival
from edm.launch.rundir import RunDir
from edm.launch.session import PR_SET_CHILD_SUBREAPER, Session
from edm.types import LaunchPlan

MEMORY_SERVER = """
import json, os, pathlib, socket, sys, time
from subprocess import Popen
control, starts = sys.argv[1], pathlib.Path(sys.argv[2])
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
line.connect(control)
def say(event, pid):
    line.sendall(json.dumps({"role": "dms", "event": event, "pid": pid}).encode() + b"\\n")
if number == 1:
    gone = Popen(["true"])
    gone.wait()
    say("started", gone.pid)  # as a rank of a job that does not end with it
else:
    say("ready", os.getpid())
time.sleep(60)
"""


@pytest.fixture
def session(tmp_path):
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    session = Session(Config(), RunDir(sockets=tmp_path, files=tmp_path), ["dms"])
    yield session
    session.close()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.fixture
def holder():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def test_who_was_gone_before_anybody_looked_is_started_again(session, holder, tmp_path, monkeypatch):
    """It was waited for until the minute in which everybody must be ready was over, and the program was ended."""
    monkeypatch.setattr(revival, "REST_S", 0.1)
    monkeypatch.setattr(revival, "READY_S", 30.0)
    starts = tmp_path / "starts"
    command = (sys.executable, "-c", MEMORY_SERVER, str(tmp_path / "control.sock"), str(starts), "edm.dms.process")
    session.start(LaunchPlan(commands=(command,)))
    session._revival.held(holder, -1)
    os.kill(session._alive["dms"][0], signal.SIGKILL)
    while not session._revival.under_way:
        session._take_events(0.05)
    session._wait_revived()
    assert session._failure is None
    assert starts.read_text() == "xxx"
    assert session.warnings[-1] == "the memory server is there again; the program goes on"
