"""gdb, strace and perf with a captured program: attached to it, around it and under EDM with it. What the program gives
is the same, and it goes on when they are done.
"""

import functools
import os
import shutil
import subprocess
import sys

import pytest
from patterned import MAGIC, MIB, pattern, start_captured
from watching import wait_for

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(150)]

ENVIRONMENT = {**os.environ, "DEBUGINFOD_URLS": ""}
SHOWN = range(0, MIB << 8, 64)
PROGRAM = """
import os, threading
data = [str(i) * 3 for i in range(100000)]
thread = threading.Thread(target=data.sort)
thread.start()
thread.join()
ours, theirs = os.pipe()
if os.fork() == 0:
    os.write(theirs, str(sum(map(len, data))).encode())
    os._exit(0)
os.wait()
print(os.read(ours, 100).decode(), data[777])
raise SystemExit(3)
"""


@functools.cache
def perf_records():
    return subprocess.run(["perf", "record", "-o", "/dev/null", "true"], capture_output=True).returncode == 0


def need(tool):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed: make programs")
    if tool == "perf" and not perf_records():
        pytest.skip("perf may not record here")


@pytest.fixture(scope="module")
def runner(make_edm, tmp_path_factory):
    runner = make_edm(tmp_path_factory.mktemp("edm"))
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def running(runner, program):
    """One program for all that attach: none of them may change it, or end it."""
    running = start_captured(runner, program, "--transport", "inproc", "--store", "memory")
    yield running
    assert running.end() == (b"as it was written\n", b"")
    assert running.edm.returncode == 0
    assert runner.left_behind() == ({}, [])


def gdb_commands(*commands):
    return ["gdb", "-nx", "-batch", *(word for command in commands for word in ("-ex", command))]


def gdb(*words, timeout=100):
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT)


def test_gdb_attaches_and_names_what_is_on_the_stacks(running):
    need("gdb")
    told = gdb(*gdb_commands("bt", "p place.magic", "info threads", "detach"), "-p", str(running.pid))
    assert "wait_for_the_end" in told.stdout
    assert " main (" in told.stdout
    assert str(MAGIC) in told.stdout
    assert "libc.so" in gdb(*gdb_commands("info sharedlibrary"), "-p", str(running.pid)).stdout


def test_gdb_under_edm_debug_reaches_every_page(running):
    need("gdb")
    reads = [f"x/gx place.start + {page} * 512" for page in SHOWN]
    # A word of every page shown is changed, read, and put back.
    writes = [f"set var place.start[{page} * 512 + 1] = {page} + 5" for page in SHOWN]
    changed = [f"p place.start[{page} * 512 + 1]" for page in SHOWN]
    back = [f"set var place.start[{page} * 512 + 1] = word_at({page}, 1)" for page in SHOWN]
    others = ("x/gx place.closed", "x/gx place.untouched + 5 * 512")
    called = gdb(
        sys.executable, "-m", "edm", "debug",
        *gdb_commands("set scheduler-locking on", *reads, *others, *writes, *changed, *back, "detach"),
        "-p", str(running.pid),
    )  # fmt: skip
    assert "annot access" not in called.stdout + called.stderr
    for page, word in zip(SHOWN, pattern(MIB << 8)[:: 512 * 64].tolist(), strict=True):
        assert f"{word:#018x}" in called.stdout
        assert f"= {page + 5}\n" in called.stdout


def test_debug_says_what_cannot_be_started(edm):
    ran = edm("debug", "no-such-debugger")
    assert (ran.status, ran.err) == (127, "edm: no-such-debugger: command not found\n")


def test_strace_attaches_and_lets_go(running, tmp_path):
    need("strace")
    tracing = subprocess.Popen(
        ["strace", "-f", "-p", str(running.pid), "-o", tmp_path / "calls"], stderr=subprocess.DEVNULL
    )
    wait_for(lambda: (tmp_path / "calls").exists() and os.stat(tmp_path / "calls").st_size > 10_000)
    tracing.send_signal(2)
    tracing.wait(60)
    assert "clock_nanosleep(" in (tmp_path / "calls").read_text()


def test_perf_attaches(running, tmp_path):
    need("perf")
    record = ["perf", "record", "-o", tmp_path / "data", "-p", str(running.pid), "--", "sleep"]
    for seconds in ("0.3", "3", "30"):  # it may stand still for a while, as everything else on a machine
        recorded = subprocess.run([*record, seconds], capture_output=True)
        assert recorded.returncode == 0, recorded.stderr
        told = subprocess.run(["perf", "report", "-i", tmp_path / "data", "--stdio"], capture_output=True, text=True)
        if "patterned" in told.stdout:
            break
    assert "patterned" in told.stdout, told.stderr


def traced(tool, output):
    return {
        "strace": ["strace", "-f", "-o", output],
        "perf": ["perf", "record", "-q", "-o", output],
    }[tool]


@pytest.mark.parametrize(
    ("order", "tool"),
    [
        ("within", "strace"),
        pytest.param("within", "perf", marks=pytest.mark.soak),
        pytest.param("around", "strace", marks=pytest.mark.soak),
        pytest.param("around", "perf", marks=pytest.mark.soak),
    ],
)
def test_output_and_exit_status_are_the_same(edm, tmp_path, tool, order):
    need(tool)
    words = [sys.executable, "-c", PROGRAM]
    plain = subprocess.run(words, capture_output=True)
    tracer = traced(tool, tmp_path / "output")
    options = ("run", "--transport", "inproc", "--store", "memory", "--local-memory", "6M", "--")
    around, within = (tracer, ()) if order == "around" else ((), tracer)
    process = edm.start(*options, *within, *words, wrapper=around)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (plain.returncode, plain.stdout), err
    assert os.stat(tmp_path / "output").st_size > 1000


@pytest.mark.soak
def test_program_runs_in_gdb_under_edm(edm, program):
    need("gdb")
    words = gdb_commands(
        "set confirm off", "break wait_for_the_end", "run < /dev/null", "bt 1",
        "p place.start[512*1000] == word_at(1000, 0)", "continue",
    )  # fmt: skip
    debug = (sys.executable, "-m", "edm", "debug", *words, "--args", program("patterned"), str(MIB))
    ran = edm.run("--transport", "inproc", "--store", "memory", "--local-memory", "32M", "--", *debug)
    assert ran.status == 0, ran.err
    assert b"wait_for_the_end ()" in ran.out
    assert b"$1 = 1" in ran.out
    assert b"as it was written" in ran.out
    assert b"exited normally" in ran.out
