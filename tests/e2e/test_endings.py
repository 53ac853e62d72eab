"""How `edm run` ends: the program's exit status and signals are its own, a mistake is one line, nothing is left."""

import os
import shutil
import signal
import stat
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]

SLEEPER = "import time; data = bytearray(8 << 20); print('up', flush=True); [time.sleep(0.05) for _ in range(1200)]"
"""Short sleeps: a signal just before a long one would be noticed only after it, in any Python."""


def one_line(text):
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    assert text.startswith("edm: ")
    return text


@pytest.mark.parametrize("transport", [pytest.param("mpi", marks=pytest.mark.mpi), "inproc"])
def test_exit_status_is_the_programs(edm, transport):
    assert edm.run("--transport", transport, "--", "false").status == 1
    assert edm.run("--transport", transport, "--", "sh", "-c", "exit 37").status == 37
    assert edm.left_behind() == ({}, [])


def test_streams_are_the_programs(edm):
    ran = edm.run("--transport", "inproc", "--", "sh", "-c", "echo out; echo err >&2")
    assert (ran.status, ran.out, ran.err) == (0, b"out\n", "err\n")


def test_unknown_program_is_127(edm):
    ran = edm.run("--", "nosuchprogram")
    assert ran.status == 127
    assert one_line(ran.err) == "edm: nosuchprogram: command not found\n"


def test_file_that_is_not_executable_is_126(edm, tmp_path):
    path = tmp_path / "script"
    path.write_text("#!/bin/sh\n")
    ran = edm.run("--", path)
    assert ran.status == 126
    assert "not executable" in one_line(ran.err)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_death_by_signal_is_ours_too(edm, number):
    ran = edm.run("--transport", "inproc", "--", "sh", "-c", f"kill -{int(number)} $$")
    assert ran.status == -number
    assert edm.left_behind() == ({}, [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("transport", [pytest.param("mpi", marks=pytest.mark.mpi), "inproc"])
def test_signal_ends_everything(edm, transport, number):
    process = edm.start("run", "--transport", transport, "--local-memory", "4M", "--", sys.executable, "-c", SLEEPER)
    assert process.stdout.readline() == b"up\n"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in {-number, 1}  # Python turns SIGINT into KeyboardInterrupt, and then dies of it
    assert edm.left_behind() == ({}, [])


def test_ctrl_c_in_a_terminal_reaches_the_program_once(edm, tmp_path):
    code = """
import signal, sys, time
hits = []
signal.signal(signal.SIGINT, lambda *_: hits.append(1))
print("up", flush=True)
while not hits:
    time.sleep(0.05)
end = time.monotonic() + 1  # for another
while time.monotonic() < end:
    time.sleep(0.05)
print(len(hits), flush=True)
"""
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edm", "run", "--transport", "inproc", "--no-summary", "--", sys.executable, "-c", code],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=edm.environment,
        preexec_fn=lambda: (os.setsid(), __import__("fcntl").ioctl(0, 0x540E, 0)),  # TIOCSCTTY
    )
    try:
        assert process.stdout.readline() == b"up\n"
        os.write(master, b"\x03")
        out, _ = process.communicate(timeout=60)
    finally:
        edm.end(process)
        os.close(master)
        os.close(slave)
    assert (process.returncode, out) == (0, b"1\n")
    assert edm.left_behind() == ({}, [])


def test_titles_in_ps(edm):
    process = edm.start("run", "--transport", "zmq", "--local-memory", "4M", "--", sys.executable, "-c", SLEEPER)
    assert process.stdout.readline() == b"up\n"
    processes, _ = edm.left_behind(within_s=0)
    assert set(processes.values()) >= {"edm: dms", "edm: dm-handler", "edm: holder", "edm: sidecar"}
    edm.end(process)
    assert edm.left_behind() == ({}, [])


def test_a_program_left_behind_is_served_until_it_ends(edm, tmp_path):
    held = tmp_path / "held"
    os.mkfifo(held)
    code = "import sys; data = bytearray(9 << 20); open(sys.argv[1]).read(); print(sum(data))"
    script = f"{sys.executable} -c '{code}' {held} & echo started"
    process = edm.start("run", "--transport", "inproc", "--local-memory", "4M", "--", "sh", "-c", script)
    assert b"still serving 1 process" in process.stderr.readline()
    assert process.poll() is None
    held.write_text("go on")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, b"started\n0\n", b"")
    assert edm.left_behind() == ({}, [])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--transport", "rdma"], "unknown transport 'rdma' (installed: "),
        (["--store", "nosuch"], "unknown store 'nosuch' (installed: "),
        (["--local-memory", "3X"], "bad size '3X'"),
        (["--local-memory", "4K"], "is too small: EDM needs at least 256K"),
        (["--path", "/nosuch/dir"], "--path /nosuch/dir: no such directory"),
        (["--path", "/proc"], "/proc"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(edm, tmp_path, arguments, says):
    flag = tmp_path / "ran"
    ran = edm.run(*arguments, "--", "touch", flag)
    assert ran.status == 2
    assert says.lower() in one_line(ran.err).lower()
    assert not flag.exists()
    assert edm.left_behind() == ({}, [])


def test_static_program_is_refused_with_the_reason(edm, tmp_path):
    source, target = tmp_path / "static.c", tmp_path / "static"
    source.write_text('#include <unistd.h>\nint main(void) { return write(1, "ran\\n", 4) != 4; }\n')
    subprocess.run(["cc", "-static", "-o", target, source], check=True)
    ran = edm.run("--", target)
    assert ran.status == 2
    assert "statically linked" in one_line(ran.err)
    ran = edm.run("--uncaptured", "--", target)
    assert (ran.status, ran.out) == (0, b"ran\n")
    assert "statically linked" in one_line(ran.err)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_no_permission_names_the_remedy():
    if stat.S_IMODE(os.stat("/dev/userfaultfd").st_mode) & 0o006 or _unprivileged_allowed():
        pytest.skip("userfaultfd is open to everybody on this machine")
    code = """
import os, sys
from edm.errors import UsageError
from edm.plugins.source_uffd.permission import check
os.setgid(65534)
os.setuid(65534)
try:
    check()
except UsageError as error:
    print(error)
    sys.exit(2)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    assert "no permission for userfaultfd" in ran.stdout
    assert "sysctl -w vm.unprivileged_userfaultfd=1" in ran.stdout


def _unprivileged_allowed():
    with open("/proc/sys/vm/unprivileged_userfaultfd") as file:
        return file.read().strip() == "1"


@pytest.mark.mpi
def test_ranks_by_hand(edm, program, tmp_path):
    mpiexec = shutil.which("mpiexec", path=os.path.dirname(sys.executable)) or shutil.which("mpiexec")
    command = [program("working_set"), 12, 1]
    edm_command = [sys.executable, "-m", "edm"]
    store = tmp_path / "dms"
    store.mkdir()
    arguments = [
        *(mpiexec, "-n", "1", *edm_command, "dms", "--transport", "mpi", "--path", store, ":"),
        *("-n", "1", *edm_command, "run", "--local-memory", "4M", "--report", tmp_path / "r.json", "--", *command),
    ]
    ran = subprocess.run(list(map(str, arguments)), capture_output=True, timeout=90, env=edm.environment)
    assert ran.returncode == 0, ran.stderr
    expected = subprocess.run(list(map(str, command)), capture_output=True).stdout
    assert ran.stdout.endswith(expected)
    assert b'"fetches": 0' not in (tmp_path / "r.json").read_bytes()
    assert edm.left_behind() == ({}, [])


@pytest.mark.mpi
def test_mistake_of_one_rank_ends_the_job(edm, tmp_path):
    mpiexec = shutil.which("mpiexec", path=os.path.dirname(sys.executable)) or shutil.which("mpiexec")
    edm_command = [sys.executable, "-m", "edm"]
    arguments = [
        *(mpiexec, "-n", "1", *edm_command, "dms", "--transport", "mpi", "--path", tmp_path, ":"),
        *("-n", "1", *edm_command, "run", "--", "nosuchprogram"),
    ]
    ran = subprocess.run(list(map(str, arguments)), capture_output=True, timeout=60, env=edm.environment)
    assert ran.returncode == 127
    assert b"edm: nosuchprogram: command not found\n" in ran.stderr
    assert edm.left_behind() == ({}, [])


@pytest.mark.soak
def test_program_that_cannot_be_captured_and_is_started_by_one_that_is_is_warned_of(edm, tmp_path):
    source, target = tmp_path / "static.c", tmp_path / "static"
    source.write_text('#include <unistd.h>\nint main(void) { sleep(7); return write(1, "ran\\n", 4) != 4; }\n')
    subprocess.run(["cc", "-static", "-o", target, source], check=True)
    ran = edm.run("--transport", "inproc", "--", "sh", "-c", f"{target}; sleep 1")
    assert (ran.status, ran.out) == (0, b"ran\n")
    assert one_line(ran.err).startswith("edm: warning: process ")
    assert f" is not captured, its memory is all local: {target} is statically linked" in ran.err


@pytest.mark.soak
def test_child_made_past_the_c_library_is_warned_of(edm, program):
    raw_clone = program("raw_clone")
    ran = edm.run("--transport", "inproc", "--local-memory", "2M", "--write-back", "256K", "--", raw_clone, "8", "8")
    assert (ran.status, ran.out) == (0, b"same\n")
    assert f" is served, but none of its memory leaves: {raw_clone} made it by a system call" in one_line(ran.err)
