import subprocess
import sys
import time
from pathlib import Path

import pytest

from edm.launch.strays import Strays

NOW = float("inf")
"""As if the DM-Handler had spoken after all that is looked at was there."""


@pytest.fixture
def tree():
    """A shell with two processes that sleep, and the pids of all three."""
    shell = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60 & wait"])
    children = Path(f"/proc/{shell.pid}/task/{shell.pid}/children")
    while len(children.read_text().split()) < 2 or any(name_of(pid) != "sleep" for pid in children.read_text().split()):
        time.sleep(0.01)
    pids = [shell.pid, *map(int, children.read_text().split())]
    yield pids
    for pid in pids[1:]:
        subprocess.run(["kill", str(pid)], check=True)
    shell.wait()


@pytest.fixture(autouse=True)
def brought_in(monkeypatch):
    """Every process has what a program that was brought in has."""
    monkeypatch.setattr("edm.launch.strays.CONTROL", "[stack]")


def name_of(pid):
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_uncaptured_program_is_warned_of_once_when_it_has_been_there_for_a_while(tree):
    strays = Strays(tree[0], every_s=0, after_s=0.1)
    assert strays.look(tree[:1], time.monotonic()) == []
    time.sleep(0.11)
    (text,) = strays.look(tree[:1], time.monotonic())
    sleep = Path(f"/proc/{tree[1]}/exe").readlink()
    assert text.startswith(f"process {tree[1]} is not captured, its memory is all local: {sleep} was started without ")
    assert strays.look(tree[:1], time.monotonic()) == []


def test_what_came_after_the_last_word_of_the_captured_is_not_warned_of(tree):
    strays = Strays(tree[0], every_s=0, after_s=0.1)
    told = time.monotonic()
    assert strays.look(tree[:1], told) == []
    time.sleep(0.11)
    assert strays.look(tree[:1], told) == []
    assert strays.look(tree[:1], time.monotonic()) != []


def test_child_that_is_served_but_was_never_brought_in_is_warned_of_once(tree, monkeypatch):
    monkeypatch.setattr("edm.launch.strays.CONTROL", "/memfd:edm-ctl")
    strays = Strays(tree[0], every_s=0, after_s=0)
    texts = strays.look(tree, NOW)
    assert [text.partition(", but none of its memory leaves: ")[0] for text in texts] == [
        f"process {tree[0]} is served",
        f"process {tree[1]} is served",
    ]
    assert strays.look(tree, NOW) == []


def test_captured_programs_are_no_strays(tree):
    strays = Strays(tree[0], every_s=0, after_s=0)
    assert strays.look(tree, NOW) == strays.look(tree, NOW) == []


def test_nobody_is_looked_at_more_often_than_that(tree):
    strays = Strays(tree[0], every_s=60, after_s=0)
    assert strays.look([], time.monotonic()) == strays.look([], time.monotonic()) == []


def test_why_a_program_cannot_be_captured_is_said(tmp_path):
    source, target = tmp_path / "static.c", tmp_path / "static"
    source.write_text("#include <unistd.h>\nint main(void) { return (int)sleep(60); }\n")
    subprocess.run(["cc", "-static", "-o", target, source], check=True)
    process = subprocess.Popen([target])
    while Path(f"/proc/{process.pid}/exe").readlink() != target:
        time.sleep(0.01)
    strays = Strays(process.pid, every_s=0, after_s=0)
    (text,) = strays.look([], NOW)
    process.kill()
    process.wait()
    assert text.endswith("so it cannot be captured")
    assert f"{target} is statically linked" in text
    assert strays.look([], NOW) == []


def test_edms_own_are_not_looked_at():
    code = "import setproctitle, sys; setproctitle.setproctitle('edm: x'); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert Strays(process.pid, every_s=0, after_s=0).look([], NOW) == []
        process.stdin.close()
