"""What root's EDM gives up at its start, and that it can do its work without: on every thread of its processes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from test_deaths import descendants, expected, wait_for
from watching import wait_for as until
from working import WAIT_S

from edm.privileges import HANDLER, Capability

NOBODY = 65534

pytestmark = [
    pytest.mark.uffd,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to have something to give up"),
]


@pytest.fixture
def open_edm(make_edm):
    """`edm` in a directory that everybody may come by; pytest's own is root's."""
    directory = Path(tempfile.mkdtemp(prefix="edm-test-", dir="/tmp"))
    directory.chmod(0o755)
    runner = make_edm(directory)
    yield runner
    runner.close()
    shutil.rmtree(directory)


def mask(*capabilities):
    return sum(1 << number for number in capabilities)


def threads_of(pid):
    """(permitted, effective capabilities, whether an exec may gain any) of each thread."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        found.add((int(lines["CapPrm"], 16), int(lines["CapEff"], 16), lines["NoNewPrivs"].strip() == "0"))
    return found


MPI = (Capability.SYS_PTRACE, Capability.IPC_LOCK)


@pytest.mark.parametrize(
    ("transport", "more"), [("zmq", ()), pytest.param("mpi", MPI, marks=[pytest.mark.mpi, pytest.mark.soak])]
)
def test_all_threads_have_only_what_they_need(working, transport, more):
    run = working("--transport", transport, "--local-memory", "4M")
    program = run.at_work()
    handler, holder, dms = wait_for(run.process.pid, "edm: dm-handler", "edm: holder", "edm: dms")
    had = threads_of(os.getpid()).pop()[0]
    serving = mask(*{*HANDLER, *more}) & had
    assert threads_of(handler) == threads_of(holder) == {(serving, serving, False)}
    stores = mask(*more) & had
    assert threads_of(dms) == {(stores, stores, False)}
    assert threads_of(program) == threads_of(os.getpid())  # the program is as without EDM
    run.process.send_signal(signal.SIGTERM)
    run.process.communicate(timeout=WAIT_S)


@pytest.mark.soak
def test_a_directory_of_another_users_can_still_hold_the_pages(edm, program, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, NOBODY, NOBODY)
    command = (program("working_set"), 8, 4)
    ran = edm.run("--transport", "inproc", "--local-memory", "4M", "--path", theirs, "--", *command)
    assert (ran.status, ran.out, ran.err) == (0, expected(command), "")
    assert not list(theirs.iterdir())


KEEPS = """
import pathlib, sys
from edm.privileges import Capability, keep_only, permitted
keep_only([Capability.KILL], writes_to=map(pathlib.Path, sys.argv[1:]))
print(*sorted(permitted()))
"""


@pytest.mark.parametrize("owner", [0, NOBODY])
def test_power_over_all_files_is_kept_only_where_a_directory_takes_it(owner, tmp_path):
    place = tmp_path / "place"
    place.mkdir(mode=0o700)
    os.chown(place, owner, owner)
    ran = subprocess.run([sys.executable, "-c", KEEPS, place], capture_output=True, text=True, timeout=60, check=True)
    kept = [Capability.KILL] if owner == 0 else [Capability.DAC_OVERRIDE, Capability.KILL]
    assert ran.stdout.split() == [str(int(one)) for one in kept]


@pytest.mark.soak
@pytest.mark.parametrize("transport", ["inproc", "zmq", pytest.param("mpi", marks=pytest.mark.mpi)])
def test_without_it_another_users_program_is_served_through_a_death(open_edm, program, working, transport):
    path = shutil.copy(program("working_set"), open_edm.directory)
    open_edm.directory.chmod(0o777)  # it makes its sign there
    options = ("--transport", transport, "--user", "nobody", "--local-memory", "4M")
    run = working(*options, by=open_edm, path=path)
    run.at_work()
    (handler,) = wait_for(run.process.pid, "edm: dm-handler")
    os.kill(handler, signal.SIGKILL)
    out, err = run.finish()
    assert (run.process.returncode, out) == (0, run.alone()), err
    assert b"is there again; the program goes on" in err
    assert open_edm.left_behind() == ({}, [])


STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for path in sys.argv[1:]:
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        line = socket.socket(socket.AF_UNIX, kind)
        line.settimeout(20)
        try:
            line.connect(path)
            line.send(b'{"role": "dm-handler", "pid": 1, "event": "error", "message": "said by a stranger"}\\n')
            print(os.path.basename(path), line.recv(100))
        except ConnectionError as error:
            print(os.path.basename(path), type(error).__name__)
        except PermissionError:
            print(os.path.basename(path), "may not connect")
        except OSError as error:
            if error.errno != 91:  # the wrong type of socket
                raise
"""


def test_a_stranger_gets_nothing_from_any_socket_whatever_the_umask(open_edm, working):
    run = working("--transport", "zmq", "--local-memory", "4M", by=open_edm, umask=0)
    run.at_work()
    sockets = sorted(path for path in open_edm.sockets.rglob("*") if path.is_socket())
    ran = subprocess.run([sys.executable, "-c", STRANGER, *sockets], capture_output=True, text=True, timeout=60)
    said = dict(line.split(" ", 1) for line in ran.stdout.splitlines())
    assert said.keys() == {"capture.sock", "control.sock", "dms.sock", "pages.sock"}, ran.stderr
    assert said.pop("dms.sock") == "may not connect"
    assert set(said.values()) <= {"b''", "ConnectionResetError", "BrokenPipeError"}, said
    out, err = run.finish()
    assert (run.process.returncode, out, err) == (0, run.alone(), b"")


def test_no_more_connections_are_taken_than_there_is_a_bound_for(open_edm, working):
    run = working("--transport", "inproc", "--local-memory", "4M", by=open_edm)
    run.at_work()
    (handler,) = open_edm.pids(("edm: dm-handler",))

    def threads():
        return len(os.listdir(f"/proc/{handler}/task"))

    before, lines = threads(), []
    path = str(next(open_edm.sockets.rglob("capture.sock")))
    for _ in range(400):
        lines.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        lines[-1].connect(path)
    until(lambda: threads() == before + 256)
    time.sleep(0.1)
    assert threads() == before + 256
    for line in lines:
        line.close()
    until(lambda: threads() == before)  # those that waited were let in, and were gone
    out, err = run.finish()
    assert (run.process.returncode, out, err) == (0, run.alone(), b"")


@pytest.mark.soak
def test_no_secret_key_is_in_an_environment_a_command_line_or_a_log(edm, working, tmp_path):
    keys = {}
    for who in ("server", "client"):
        (tmp_path / who).mkdir()
        assert edm("keys", "new", tmp_path / who).status == 0
        keys[who] = (tmp_path / who / "edm.key").read_text().split()[0]
    endpoint = f"ipc://{tmp_path}/pages.sock"
    options = {who: ("-o", f"transport.zmq.key={tmp_path}/{who}/edm.key") for who in keys}
    clients = ("-o", f"transport.zmq.clients={tmp_path}/client/edm.pub")
    server = edm.start(
        "dms", "--listen", endpoint, "--path", tmp_path / "kept", "--log-level", "debug", *options["server"], *clients
    )
    assert server.stdout.readline().startswith(b"edm: dms ready at ")
    theirs = ("-o", f"transport.zmq.server_key={tmp_path}/server/edm.pub")
    edm.environment["EDM_INTERNAL_LOG"] = "DEBUG"
    run = working("--dms", endpoint, *options["client"], *theirs, "--keep", "--local-memory", "4M")
    run.at_work()
    told = []
    for pid in (run.process.pid, server.pid, *descendants(run.process.pid)):
        try:
            told += [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline")]
        except OSError:  # it has just ended
            continue
    assert len(told) >= 8
    out, err = run.finish()
    assert (run.process.returncode, out) == (0, run.alone()), err
    server.send_signal(signal.SIGTERM)
    told += [err, *server.communicate(timeout=WAIT_S)]
    kept = [path for place in (edm.files, edm.sockets, tmp_path / "kept") for path in place.rglob("*")]
    logs = [path for path in kept if path.is_file() and path.suffix in {".log", ".json"}]
    assert logs
    told += [path.read_bytes() for path in logs]
    for secret in keys.values():
        assert len(secret) == 40
        assert not any(secret.encode() in text for text in told)
