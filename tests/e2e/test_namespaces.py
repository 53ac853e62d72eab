"""Programs in a PID namespace of their own: what they take for a process's number is another's outside."""

import json
import shutil
import subprocess

import pytest

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]

INSIDE = ("unshare", "--pid", "--fork", "--mount-proc")
NEXT = 'echo "$1" > /proc/sys/kernel/ns_last_pid && shift && exec "$@"'
"""Whoever is made next has the number behind the first argument."""


@pytest.fixture
def somebody():
    """A process that is nobody's business."""
    with subprocess.Popen(["sleep", "120"]) as process:
        yield process
        process.kill()


def test_a_process_of_the_sidecars_number_there_is_left_alone(edm, program, tmp_path, somebody):
    if not shutil.which("unshare") or subprocess.run([*INSIDE, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces here")
    command, report = (program("stamped"), "2000"), tmp_path / "report.json"
    plain = subprocess.run(command, capture_output=True, check=True, timeout=60)
    number = str(somebody.pid - 2)  # the next one is between the program and its sidecar
    arguments = ("--transport", "inproc", "--local-memory", "1M", "--report", report)
    ran = edm.run(*arguments, "--", *INSIDE, "sh", "-c", NEXT, "sh", number, *command)
    assert (ran.status, ran.out, ran.err) == (0, plain.stdout, "")
    assert somebody.poll() is None
    counters = json.loads(report.read_text())["counters"]
    assert counters["evictions"] > 1000
    assert counters["internal_errors"] == counters["lost"] == counters["sidecars_lost"] == 0
    assert edm.left_behind() == ({}, [])


def test_children_made_past_the_c_library_there_find_what_they_are_to_find(edm, program):
    if not shutil.which("unshare") or subprocess.run([*INSIDE, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces here")
    steps = ("raw_clone", "raw_clone_madvised")
    ran = edm.run("--transport", "inproc", "--local-memory", "1M", "--", *INSIDE, program("tree"), *steps)
    assert (ran.status, ran.out.decode().splitlines()) == (0, [f"{s}: as it should be" for s in steps])


def test_memory_of_others_is_reached_there(edm, program):
    if not shutil.which("unshare") or subprocess.run([*INSIDE, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces here")
    steps = ("own_read", "of_the_other", "traced")
    ran = edm.run("--transport", "inproc", "--local-memory", "1M", "--", *INSIDE, program("reached"), *steps)
    assert (ran.status, ran.out.decode().splitlines(), ran.err) == (0, [f"{s}: as it should be" for s in steps], "")
