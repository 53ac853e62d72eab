"""ZeroMQ between two network namespaces over a link that is slowed, drops packets, or is cut for a while."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGES = 800
LONGEST_S = 70


def may_make_links():
    """Why this machine cannot join two namespaces, or ""."""
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no /dev/net/tun"
    tried = subprocess.run([sys.executable, HERE / "link.py", "true", "--", "true"], stdin=subprocess.DEVNULL,
                           capture_output=True, text=True)  # fmt: skip
    return "" if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.strip().splitlines()[-1]}"


@pytest.fixture(scope="module", autouse=True)
def links():
    reason = may_make_links()
    if reason:
        pytest.skip(reason)


class Linked:
    """A server and a writer at the two ends of a link."""

    def __init__(self, directory):
        self.out = directory / "digest"
        options = {"listen": ["tcp://10.0.0.1:7070"], "insecure": True, "heartbeat_s": 0.5, "silence_s": 2.0}
        (directory / "contract.json").write_text(json.dumps({"transport": "zmq", "options": options}))
        server = [sys.executable, "-m", "edm.testing.transport_peer", "dms", str(directory)]
        writer = [sys.executable, str(HERE / "writer.py"), "tcp://10.0.0.1:7070", str(PAGES), str(self.out)]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "link.py"), *server, "--", *writer],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline().startswith("ready")

    def say(self, command):
        """Change the link; returns how many packets it has forwarded and dropped."""
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return [int(word) for word in self.process.stdout.readline().split()[1:]]

    def turn(self):
        progress = self.out.with_suffix(".turn")
        return int(progress.read_text() or -1) if progress.exists() else -1

    def wait_for(self, done):
        end = time.monotonic() + LONGEST_S
        while not done():
            assert time.monotonic() < end, f"stuck at turn {self.turn()}"
            time.sleep(0.02)

    def digest(self):
        self.wait_for(lambda: self.out.exists() and self.out.read_text())
        return self.out.read_text()

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture
def linked(tmp_path):
    made = Linked(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def digest_over_a_good_link(tmp_path_factory):
    good = Linked(tmp_path_factory.mktemp("good"))
    try:
        return good.digest()
    finally:
        good.close()


def test_a_slow_link_gives_the_same_pages(linked, digest_over_a_good_link):
    linked.say("delay 0.01")
    assert linked.digest() == digest_over_a_good_link


def test_a_link_that_drops_packets_gives_the_same_pages(linked, digest_over_a_good_link):
    linked.say("drop 0.03")
    assert linked.digest() == digest_over_a_good_link
    assert linked.say("mend")[1] > 0


@pytest.mark.parametrize("seconds", [1.0, 3.5], ids=["shorter than the silence", "longer than the silence"])
def test_a_link_that_is_cut_is_waited_for(linked, digest_over_a_good_link, seconds):
    linked.wait_for(lambda: linked.turn() >= 10)
    linked.say("cut")
    at = linked.turn()
    time.sleep(seconds)
    assert linked.turn() <= at + 1  # the answer may have been over the link
    linked.say("mend")
    assert linked.digest() == digest_over_a_good_link


def test_a_link_that_is_cut_again_and_again(linked, digest_over_a_good_link):
    for turn in range(8, 48, 10):
        linked.wait_for(lambda turn=turn: linked.turn() >= turn)
        linked.say("cut")
        time.sleep(0.5)
        linked.say("mend")
    assert linked.digest() == digest_over_a_good_link
