"""What the launcher makes of its processes' ends, those that come sooner than it looks."""

import ctypes
import os
import signal
import subprocess
import sys
import threading

import pytest

from edm.config import Config
from edm.launch import revival
from edm.launch.control import Event
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
def say(event, pid, **details):
    line.sendall(json.dumps({"role": "dms", "event": event, "pid": pid, **details}).encode() + b"\\n")
if number == 0 or number > int(sys.argv[3]):
    say("ready", os.getpid())
elif sys.argv[4] == "fails":
    say("error", os.getpid(), message="no room")
    sys.exit(1)
else:
    gone = Popen(["true"])
    gone.wait()
    say("started", gone.pid)  # as a rank of a job that does not end with it
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


@pytest.fixture
def after_a_death(session, holder, tmp_path):
    """Kill a memory server of which `number` are to `fail` when they are started again; how often one was started."""

    def run(number, how):
        starts = tmp_path / "starts"
        arguments = (str(tmp_path / "control.sock"), str(starts), str(number), how, "edm.dms.process")
        session.start(LaunchPlan(commands=((sys.executable, "-c", MEMORY_SERVER, *arguments),)))
        session._revival.held(holder, -1)
        os.kill(session._alive["dms"][0], signal.SIGKILL)
        while not session._revival.under_way:
            session._take_events(0.05)
        session._wait_revived()
        return len(starts.read_text())

    return run


def test_who_was_gone_before_anybody_looked_is_started_again(session, after_a_death, monkeypatch):
    """It was waited for until the minute in which everybody must be ready was over, and the program was ended."""
    monkeypatch.setattr(revival, "TOGETHER_S", 0.1)
    monkeypatch.setattr(revival, "READY_S", 30.0)
    assert after_a_death(1, "dies") == 3
    assert session._failure is None
    assert session.warnings[-1] == "the memory server is there again; the program goes on"


def test_who_cannot_start_again_is_tried_again(session, after_a_death):
    """What it lacks, descriptors or memory, may be there a moment later."""
    assert after_a_death(2, "fails") == 4
    assert session._failure is None
    assert session.warnings[1:] == ["no room", "no room", "the memory server is there again; the program goes on"]


def test_who_cannot_start_again_is_not_tried_for_ever(session, after_a_death):
    assert after_a_death(1000, "fails") == 1 + Config().restarts
    assert session._failure == "what died could not be started again: no room"


def test_who_serves_still_ends_the_run_while_another_is_started_again(session, holder, tmp_path):
    """As `--on-loss kill` does while the memory server is not there."""
    arguments = (str(tmp_path / "control.sock"), str(tmp_path / "starts"), "0", "", "edm.dms.process")
    session.start(LaunchPlan(commands=((sys.executable, "-c", MEMORY_SERVER, *arguments),)))
    session._revival.held(holder, -1)
    assert session._revival.begin(with_handler=False)
    session._waiting_for.add("dms")
    session._take(Event("dm-handler", "error", {"message": "enough"}))
    assert session._failure == "enough"


def test_the_last_word_of_one_that_has_ended_is_heard(session):
    """A DM-Handler that had finished was said to have died, where its end was seen before its last word was read."""
    with subprocess.Popen(["true"]) as handler:
        session._alive["dm-handler"] = (handler.pid, os.pidfd_open(handler.pid))
    session._plan, session._ready_once = LaunchPlan(commands=((sys.executable, "-m", "edm.handler.process"),)), True
    last = Event("dm-handler", "finished", {"counters": {"faults": 7}})
    word = threading.Timer(0.3, session._control.events.put, [last])
    word.start()
    session.finish()
    word.join()
    assert (session._failure, session.counters) == (None, {"faults": 7})
