"""A captured program whose memory server is far: the link is slowed, loses packets and is cut; the server is killed."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edm.dms.status import ask_status

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(150)]

LINK = Path(__file__).parents[1] / "transports" / "link.py"
EDM = (sys.executable, "-m", "edm")
SHORT = ("-o", "transport.zmq.heartbeat_s=0.5", "-o", "transport.zmq.silence_s=1.5", "-o", "transport.zmq.resend_s=0.5")
SOON_S = 90


def plain(command):
    return subprocess.run([*map(str, command)], capture_output=True, check=True, timeout=60).stdout


def wait_until(done, what, within_s=SOON_S):
    end = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        time.sleep(0.02)


class Link:
    """`edm dms` and `edm run` in two network namespaces, with link.py between them."""

    def __init__(self, edm, directory, command):
        self.status, self.out, self.err = (directory / name for name in ("status", "out", "err"))
        server = (*EDM, "dms", "--listen", "tcp://10.0.0.1:7070", "--path", str(directory / "dms"),
                  "-o", "transport.zmq.insecure=true", *SHORT)  # fmt: skip
        self.sign = directory / "at-work"
        run = (*EDM, "run", "--dms", "tcp://10.0.0.1:7070", "-o", "transport.zmq.insecure=true", *SHORT,
               "--local-memory", "4M", "--", *map(str, command), str(self.sign))  # fmt: skip
        script = f"{shlex.join(run)} >{self.out} 2>{self.err}; echo $? >{self.status}.new; mv {self.status}.new $0"
        self.process = subprocess.Popen(
            [sys.executable, str(LINK), "sh", "-c", f"exec {shlex.join(server)} >&2", "--",
             "sh", "-c", script, str(self.status)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=edm.environment,
        )  # fmt: skip
        self.ready = self.process.stdout.readline().startswith("ready")

    def say(self, command):
        """Change the link; returns how many packets it has forwarded and dropped."""
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return [int(word) for word in self.process.stdout.readline().split()[1:]]

    def close(self):
        self.process.stdin.close()
        self.process.wait(SOON_S)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def linked(edm, tmp_path):
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("no /dev/net/tun")
    made = []

    def start(command):
        made.append(Link(edm, tmp_path, command))
        if not made[0].ready:
            pytest.skip(f"no network namespaces here: {made[0].process.stderr.read().strip().splitlines()[-1]}")
        return made[0]

    yield start
    for link in made:
        link.close()


def test_a_program_waits_for_a_bad_link_and_goes_on(linked, program):
    command = (program("working_set"), 8, 1)
    link = linked(command)
    wait_until(link.sign.exists, "the program at work over the link")

    def carried(packets):
        least = link.say("mend")[0] + packets
        return lambda: link.say("mend")[0] > least

    link.say("delay 0.01")
    wait_until(carried(100), "pages going over a slow link")
    link.say("delay 0")
    link.say("drop 0.05")
    wait_until(lambda: link.say("drop 0.05")[1] > 2, "packets to drop")
    link.say("drop 0")
    wait_until(carried(100), "pages going over the link again")
    at = link.say("cut")
    time.sleep(2.5)  # longer than a silence may last: both sides drop the connection, and make it anew
    link.sign.unlink()
    wait_until(lambda: link.say("cut")[1] > at[1], "packets while it is cut")
    assert not link.status.exists()
    assert link.say("mend")[0] == at[0]
    wait_until(link.status.exists, "the program's end")
    assert link.status.read_text() == "0\n", link.err.read_text()
    assert link.out.read_bytes() == plain(command)


@pytest.fixture
def server(edm, tmp_path):
    """Start `edm dms` over the same store and at the same address as ever."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{listener.getsockname()[1]}"

    def start():
        process = edm.start("dms", "--listen", endpoint, "--path", tmp_path / "dms")
        assert process.stdout.readline().startswith(b"edm: dms ready")
        return process

    start.endpoint = endpoint
    return start


def test_a_program_goes_on_when_its_server_was_killed_and_started_again(working, server, tmp_path):
    serving = server()
    run = working("--dms", server.endpoint, *SHORT, "--local-memory", "4M")
    run.at_work()
    for _ in range(2):
        before = stored(tmp_path / "dms")
        wait_until(lambda before=before: stored(tmp_path / "dms") > before + 300, "evictions")
        serving.send_signal(signal.SIGKILL)
        serving.wait()
        time.sleep(0.7)
        assert run.process.poll() is None
        serving = server()
    out, err = run.finish()
    assert (run.process.returncode, out) == (0, run.alone()), err
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(SOON_S) == 0


def stored(directory):
    """Pages that the server in `directory` has stored since it started."""
    return ask_status(directory)["store"]["server"]["stored"]
