"""Fewer privileges, rung by rung: a program of another user's, all of EDM as `nobody`, faults in user mode only."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from patterned import Core, check_contents, start_captured
from watching import wait_for

from edm.errors import UsageError
from edm.launch.checks import check_capturable
from edm.launch.user import find_user

ROOT = Path(__file__).parents[2]
NOBODY = 65534
DEVICE = Path("/dev/userfaultfd")
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
AS_NOBODY = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "cwd": "/"}
PLAIN = f"every page as it was, as user {NOBODY}\n".encode()

pytestmark = [
    pytest.mark.uffd,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user"),
]


@pytest.fixture(scope="module")
def open_python():
    """A Python that nobody may run, and its PYTHONPATH: the environment's own often lies in root's home directory."""
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry.endswith("site-packages"))])
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        command = ["/bin/sh", "-c", 'exec "$0" -c "import edm.engine"', python]
        environment = {**os.environ, "PYTHONPATH": path, "HOME": "/"}
        if subprocess.run(command, env=environment, capture_output=True, **AS_NOBODY).returncode == 0:
            return python, path
    pytest.skip("no Python of this version that nobody may run, or EDM lies where nobody may not read")


@pytest.fixture
def open_directory():
    """One that everybody may come by; pytest's own is the user's."""
    directory = Path(tempfile.mkdtemp(prefix="edm-test-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def roots_edm(open_directory, make_edm):
    runner = make_edm(open_directory)
    yield runner
    runner.close()


@pytest.fixture
def nobodys_runner(open_directory, make_edm, open_python):
    runner = make_edm(open_directory)
    runner.python, runner.environment["PYTHONPATH"] = open_python
    runner.environment["HOME"] = "/"
    for path in (open_directory, runner.sockets, runner.files):
        os.chown(path, NOBODY, NOBODY)
    yield runner
    assert runner.left_behind() == ({}, [])
    runner.close()


@pytest.fixture
def nobodys_edm(open_directory, nobodys_runner):
    """`edm` as nobody, called as the fixture `edm` is."""
    return lambda *arguments: nobodys_runner.run(
        *("--transport", "inproc", "--store", "memory", "--report", open_directory / "report.json", *arguments),
        **AS_NOBODY,
    )


@pytest.fixture
def forks(program, open_directory):
    return shutil.copy(program("forks"), open_directory)


def counters(open_directory):
    return json.loads((open_directory / "report.json").read_text())["counters"]


@pytest.fixture(params=["device", pytest.param("sysctl", marks=pytest.mark.soak)])
def allowed(request):
    """Userfaultfd for everybody, by one of the two ways; afterwards as it was."""
    if request.param == "device":
        mode = DEVICE.stat().st_mode
        DEVICE.chmod(0o666)
        yield
        DEVICE.chmod(mode & 0o777)
    else:
        before = SYSCTL.read_text()
        SYSCTL.write_text("1")
        yield
        SYSCTL.write_text(before)


@pytest.fixture
def not_allowed():
    if DEVICE.stat().st_mode & 0o006 or SYSCTL.read_text().strip() == "1":
        pytest.skip("userfaultfd is open to everybody on this machine")


@pytest.mark.usefixtures("allowed")
def test_all_of_edm_as_nobody_where_that_is_allowed(nobodys_edm, open_directory, forks):
    ran = nobodys_edm("--local-memory", "2M", "--", forks, 6)
    assert (ran.status, ran.out) == (0, PLAIN), ran.err
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("edm: warning: the kernel does not tell user 'nobody' of forks (CAP_SYS_PTRACE)")
    assert counters(open_directory)["fetches"] > 500
    assert counters(open_directory)["processes"] == 6


@pytest.mark.usefixtures("allowed")
def test_child_past_the_c_library_may_fork_where_no_event_tells_of_it(nobodys_edm, open_directory, program):
    raw_clone = shutil.copy(program("raw_clone"), open_directory)
    ran = nobodys_edm("--", raw_clone, 0, 2)  # it has no control page, which such a fork begins with
    assert (ran.status, ran.out) == (0, b"same\n"), ran.err


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(("name", "step"), [("tree", "filtered_fork"), ("rare", "not_dumpable")])
def test_program_that_forbids_itself_system_calls_or_others_to_look_goes_on(
    nobodys_edm, open_directory, program, name, step
):
    ran = nobodys_edm("--local-memory", "1M", "--", shutil.copy(program(name), open_directory), step)
    assert (ran.status, ran.out.decode()) == (0, f"{step}: as it should be\n"), ran.err
    assert counters(open_directory)["fetches"] > 500


@pytest.mark.usefixtures("not_allowed")
def test_user_mode_is_refused_unless_it_is_asked_for(nobodys_edm, open_directory):
    ran = nobodys_edm("--", "touch", open_directory / "ran")
    assert (ran.status, ran.out) == (2, b"")
    assert ran.err.startswith("edm: no permission for userfaultfd as user 'nobody', but in user mode: ")
    assert ran.err.endswith("-o fault_source.uffd.user_mode=on\n")
    assert not (open_directory / "ran").exists()


USER_MODE = ("-o", "fault_source.uffd.user_mode=on", "--local-memory", "2M", "--")
READS = """
import hashlib, sys
digest = hashlib.sha256()
kept = []
for _ in range(12):
    with open(sys.argv[1], "rb") as file:
        kept.append(file.read())
    digest.update(kept[-1])
print(digest.hexdigest(), all(one == kept[0] for one in kept))
"""
WRITES = """
import errno, mmap, os, time
memory = mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(memory), 4096):
    memory[at] = 1 + at // 4096 % 255
null, failed = os.open("/dev/zero", os.O_RDWR), set()
pipe, end = os.pipe(), time.monotonic() + 30
while not failed and time.monotonic() < end:  # it takes a moment until something has been evicted
  time.sleep(0.05)
  for at in range(0, len(memory), 4096):
    try:
        os.write(pipe[1], memoryview(memory)[at:at + 4096])
        assert os.read(pipe[0], 4096)[0] == 1 + at // 4096 % 255
    except OSError as error:
        failed.add(error.errno)
assert all(memory[at] == 1 + at // 4096 % 255 for at in range(0, len(memory), 4096))
print(failed == {errno.EFAULT})
"""


@pytest.mark.usefixtures("not_allowed")
def test_user_mode_serves_a_program_and_says_what_will_not_work(nobodys_edm, open_python, open_directory, forks):
    ran = nobodys_edm(*USER_MODE, forks, 6)
    assert (ran.status, ran.out) == (0, PLAIN), ran.err
    warnings = ran.err.splitlines()
    assert len(warnings) == 2
    assert warnings[0].startswith("edm: warning: user 'nobody' has userfaultfd in user mode only: ")
    assert "EFAULT" in warnings[0]
    assert counters(open_directory)["fetches"] > 500

    (open_directory / "file").write_bytes(os.urandom(2_000_000))
    command = [open_python[0], "-c", READS, str(open_directory / "file")]
    ran = nobodys_edm(*USER_MODE, *command)  # into new buffers: nothing of them has been evicted
    assert (ran.status, ran.out) == (0, subprocess.run(command, capture_output=True).stdout), ran.err
    assert counters(open_directory)["fetches"] > 500


@pytest.mark.usefixtures("not_allowed")
def test_in_user_mode_it_is_as_the_warning_says(nobodys_edm, open_python):
    ran = nobodys_edm(*USER_MODE, open_python[0], "-c", WRITES)
    assert (ran.status, ran.out) == (0, b"True\n"), ran.err


@pytest.mark.usefixtures("not_allowed")
def test_dump_is_whole_in_user_mode_too(nobodys_runner, open_directory, program):
    patterned = shutil.copy(program("patterned"), open_directory)
    options = ("--transport", "inproc", "--store", "memory", *USER_MODE[:2])
    running = start_captured(nobodys_runner, lambda _name: patterned, *options, **AS_NOBODY)
    ran = nobodys_runner("dump", running.pid, "-o", nobodys_runner.files / "core", "--json", **AS_NOBODY)
    assert (ran.status, ran.err) == (0, "")
    assert json.loads(ran.out)["brought_pages"] > 100
    check_contents(Core(nobodys_runner.files / "core"), running.place)
    (nobodys_runner.files / "core").unlink()
    out, _ = running.end()
    assert (running.edm.returncode, out) == (0, b"as it was written\n")


@pytest.mark.soak
@pytest.mark.usefixtures("not_allowed")
@pytest.mark.parametrize("after_s", [0.2, 0.5, 0.9, 1.4])
def test_dm_handler_may_die_before_a_fork_that_no_event_tells_of(nobodys_runner, forks, after_s):
    arguments = ("run", "--transport", "zmq", "--store", "file", *USER_MODE, forks, 24)
    running = nobodys_runner.start(*arguments, **AS_NOBODY)
    for _ in range(3):
        wait_for(lambda: nobodys_runner.pids({f"{forks} 24"}) or running.poll() is not None)
        (pid,) = wait_for(lambda: nobodys_runner.pids({"edm: dm-handler"}))
        time.sleep(after_s)
        if running.poll() is not None:
            break
        os.kill(pid, signal.SIGKILL)
        wait_for(
            lambda pid=pid: nobodys_runner.pids({"edm: dm-handler"}) not in ([], [pid]) or running.poll() is not None
        )
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (0, PLAIN), err
    assert b"the DM-Handler is there again" in err


@pytest.mark.parametrize("way", ["--user", pytest.param("exec", marks=pytest.mark.soak), "setuid"])
def test_program_of_nobodys_under_roots_handler(roots_edm, open_directory, forks, way):
    command = {
        "--user": ("--user", "nobody", "--", forks, 6),
        "exec": ("--", "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", forks, 6),
        "setuid": ("--", forks, 6, NOBODY),
    }[way]
    report = open_directory / "report.json"
    ran = roots_edm.run("--transport", "inproc", "--local-memory", "2M", "--report", report, *command)
    assert (ran.status, ran.out, ran.err) == (0, PLAIN, "")
    assert counters(open_directory)["fetches"] > 500
    assert counters(open_directory)["processes"] == 6 + (way == "exec")
    assert roots_edm.left_behind() == ({}, [])


def test_program_of_nobodys_reaches_its_own_memory(roots_edm, open_directory, program):
    command = (shutil.copy(program("reached"), open_directory), "own_read", "of_the_other")
    ran = roots_edm.run("--transport", "inproc", "--local-memory", "1M", "--user", "nobody", "--", *command)
    assert (ran.status, ran.err) == (0, ""), ran.out


def test_user_has_its_own_home_and_groups():
    user = find_user("nobody")
    plain = subprocess.run(["setpriv", "--reuid=nobody", "--regid=nogroup", "--init-groups", "id", "-G"], stdout=-1)
    assert (user.uid, user.gid, user.groups) == (NOBODY, NOBODY, tuple(map(int, plain.stdout.split())))
    assert user.environment({"HOME": "/root", "A": "b"}) == {
        "HOME": user.home,
        "USER": "nobody",
        "LOGNAME": "nobody",
        "A": "b",
    }


def test_user_there_is_not_is_a_mistake():
    with pytest.raises(UsageError, match=r"^--user: no such user 'nosuchuser'$"):
        find_user("nosuchuser")


def test_user_that_may_not_run_the_program_is_126(roots_edm, open_directory, forks):
    os.chmod(forks, 0o700)
    ran = roots_edm.run("--transport", "inproc", "--user", "nobody", "--", forks)
    assert (ran.status, ran.err) == (126, f"edm: {forks}: permission denied for user 'nobody'\n")
    assert roots_edm.left_behind() == ({}, [])


def test_program_that_gains_privileges_is_refused_or_runs_uncaptured(roots_edm, forks):
    os.chmod(forks, 0o4755)
    ran = roots_edm.run("--user", "nobody", "--", forks, 2)
    assert (ran.status, ran.out) == (2, b"")
    assert ran.err.startswith(f"edm: {forks} is set-uid: ")
    assert ran.err.count("\n") == 1
    ran = roots_edm.run("--user", "nobody", "--uncaptured", "--", forks, 2)
    assert (ran.status, ran.out) == (0, PLAIN)
    assert ran.err.startswith(f"edm: warning: {forks} is set-uid: ")


@pytest.mark.parametrize("gain", ["set-uid", "set-gid", "given capabilities"])
def test_what_a_program_gains_is_seen(forks, gain):
    check_capturable(Path(forks), find_user("nobody"))
    if gain == "given capabilities":
        os.setxattr(forks, "security.capability", struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0))
    else:
        os.chmod(forks, 0o4755 if gain == "set-uid" else 0o2755)
    with pytest.raises(UsageError, match=f" is {gain}: "):
        check_capturable(Path(forks), find_user("nobody"))
    check_capturable(Path(forks))  # root gains nothing


STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
line.connect(sys.argv[1])
line.settimeout(10)
print(line.recvmsg(100, 1000)[:2])
"""


def test_a_stranger_gets_nothing_from_the_socket(roots_edm):
    running = roots_edm.start("run", "--transport", "inproc", "--user", "nobody", "--", "sleep", "30")
    path = wait_for(lambda: next(roots_edm.sockets.glob("*/capture.sock"), None))
    wait_for(lambda: roots_edm.pids({"sleep"}) or roots_edm.pids({"sleep 30"}))
    ran = subprocess.run([sys.executable, "-c", STRANGER, path], capture_output=True, timeout=30)
    assert ran.stdout == b"(b'', [])\n", ran.stderr
    roots_edm.end(running)


def test_without_io_uring_a_line_warns_of_what_is_missing(edm, program):
    command = ("--transport", "inproc", "--local-memory", "1M", "--", program("working_set"), 4, 2)
    without = edm.run(*command, wrapper=(program("without_uring"),))
    assert without.status == 0
    assert "no io_uring here" in without.err
    setting = Path("/proc/sys/kernel/io_uring_disabled")
    if not setting.exists() or setting.read_text().strip() == "0":
        assert edm.run(*command).err == ""
