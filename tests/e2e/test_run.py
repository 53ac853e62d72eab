"""Real programs in a fraction of their memory: the same output, the budget kept, nothing left behind."""

import json
import shutil
import subprocess
import time

import pytest
from test_deaths import wait_for

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(150)]

TRANSPORTS = [pytest.param("mpi", marks=pytest.mark.mpi), "zmq", "inproc"]
SLACK_BYTES = 12 << 20
"""Above the budget for a moment: what a program touches before its new memory is first seen, and one staging area."""


def plain(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, check=True, timeout=60).stdout


def report_of(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_working_set_over_budget_is_the_same_over_every_transport(edm, working, tmp_path, transport):
    options = ("--transport", transport, "--local-memory", "6M", "--report", tmp_path / "r.json")
    run = working(*options, megabytes=24)
    out, err = run.finish()
    assert (run.process.returncode, out, err) == (0, run.alone(), b"")
    counters = report_of(tmp_path / "r.json")["counters"]
    assert counters["evictions"] > 2000
    assert counters["fetches"] > 1000
    assert counters["internal_errors"] == counters["lost"] == 0
    assert edm.left_behind() == ({}, [])


def captured_resident_bytes(pid):
    """Anonymous memory of a process, its stack left out, as the kernel counts it. Source: proc_pid_smaps(5)."""
    total, anonymous = 0, False
    try:
        with open(f"/proc/{pid}/smaps") as file:
            for line in file:
                words = line.split()
                if "-" in words[0] and not words[0].endswith(":"):
                    name = words[5] if len(words) > 5 else ""
                    anonymous = words[1].endswith("p") and words[4] == "0" and name in {"", "[heap]"}
                elif anonymous and words[0] == "Rss:":
                    total += int(words[1]) * 1024
    except OSError:
        return 0
    return total


@pytest.mark.mpi
@pytest.mark.parametrize("local", [32, pytest.param(64, marks=pytest.mark.soak)])
def test_four_times_the_budget_keeps_it(edm, working, tmp_path, local):
    run = working("--local-memory", f"{local}M", "--report", tmp_path / "r.json", megabytes=4 * local)
    pid, peak = wait_for(run.process.pid, "working_set")[0], 0
    while run.process.poll() is None:
        peak = max(peak, captured_resident_bytes(pid))
        run.sign.unlink(missing_ok=True)
        time.sleep(0.05)
    out, err = run.process.communicate(timeout=30)
    assert (run.process.returncode, out, err) == (0, run.alone(), b"")
    report = report_of(tmp_path / "r.json")
    counters = report["counters"]
    assert counters["evictions"] > 1500 * local
    assert counters["fetches"] > 1500 * local
    assert local << 19 < peak <= (local << 20) + SLACK_BYTES
    assert counters["peak_resident"] * 4096 <= (local << 20) + SLACK_BYTES
    assert edm.left_behind() == ({}, [])


def test_what_a_stopped_madvise_drops_does_not_come_back(edm, program):
    command = (program("dontneed_stopped"), 100, 1)
    ran = edm.run("--transport", "inproc", "--store", "memory", "--local-memory", "8M", "--", *command)
    assert (ran.status, ran.out, ran.err) == (0, plain(*command), "")


def test_a_child_of_a_fork_sees_what_its_parent_wrote(edm, tmp_path):
    code = """
import os, hashlib
data = bytearray(12_000_000)
for i in range(0, len(data), 4096):
    data[i] = i // 4096 % 251
for round in range(4):
    before = hashlib.md5(data).hexdigest()
    child = os.fork()
    if child == 0:
        good = hashlib.md5(data).hexdigest() == before
        for i in range(0, len(data), 8192):
            data[i] = 7
        good &= all(data[i] == 7 for i in range(0, len(data), 8192))
        os._exit(0 if good else 3)
    data[round * 1000] ^= 0xFF
    mine = hashlib.md5(data).hexdigest()
    assert os.waitpid(child, 0)[1] == 0
    assert hashlib.md5(data).hexdigest() == mine
    print(round, mine)
"""
    command = (shutil.which("python3"), "-c", code)
    ran = edm.run("--transport", "inproc", "--local-memory", "4M", "--report", tmp_path / "r.json", "--", *command)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == plain(*command)
    counters = report_of(tmp_path / "r.json")["counters"]
    assert counters["events_fork"] >= 4
    assert counters["internal_errors"] == counters["lost"] == 0


def test_a_pipeline_of_captured_programs(edm):
    script = "seq 60000 | sort -R --random-source=/dev/zero | sort -n | md5sum; echo $((6 * 7))"
    ran = edm.run("--transport", "inproc", "--local-memory", "4M", "--", "sh", "-c", script)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == plain("sh", "-c", script)


@pytest.mark.parametrize("threads", [1, 3])
def test_malloc_in_many_threads(edm, program, threads):
    command = (program("thread_malloc"), 16)
    ran = edm.run("--transport", "inproc", "--fault-threads", threads, "--local-memory", "2M", "--", *command)
    assert (ran.status, ran.out, ran.err) == (0, b"ok\n", "")
