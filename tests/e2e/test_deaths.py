"""One of a run's processes is killed: the program goes on with the right bytes, or is ended; it never reads others."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from watching import wait_for as until
from working import WAIT_S

from edm._native import lib
from edm.launch.session import READY_S

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]

TRANSPORTS = [pytest.param("mpi", marks=pytest.mark.mpi), "inproc"]


def descendants(root):
    """Pid → title of every process below `root`."""
    parent, title = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            pid, fields = int(entry.name), (entry / "stat").read_text().rsplit(")", 1)[1].split()
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            comm = (entry / "comm").read_text().strip()
        except OSError:
            continue
        parent[pid] = int(fields[1])
        title[pid] = line if line.startswith("edm: ") else comm
    found = {}
    for pid in parent:
        at = pid
        while at and at != root:
            at = parent.get(at, 0)
        if at == root and pid != root:
            found[pid] = title[pid]
    return found


def wait_for(root, *titles, within_s=WAIT_S):
    """Pids of the processes below `root` with these titles, once all are there."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        by_title = {title: pid for pid, title in descendants(root).items()}
        if all(title in by_title for title in titles):
            return [by_title[title] for title in titles]
        time.sleep(0.02)
    pytest.fail(f"no {titles} below {root}: {descendants(root)}")


@pytest.fixture
def running(working):
    """Start working_set over a transport, in half of its memory."""
    return lambda transport: working("--transport", transport, "--local-memory", "4M")


def state_of(pid):
    """A process's state letter. Source: proc_pid_stat(5), field 3."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def running_still(pid):
    """Whether a process is there and no zombie."""
    try:
        return state_of(pid) not in "ZX"
    except OSError:
        return False


def cpu_ticks(pid):
    """CPU time a process has had so far, in clock ticks. Source: proc_pid_stat(5), fields 14 and 15."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def at_rest(pid, for_s=0.5):
    """Whether a process takes no CPU time for a while."""
    before = cpu_ticks(pid)
    time.sleep(for_s)
    return cpu_ticks(pid) == before


def stop_between_batches(handler, sidecar):
    """Stop the DM-Handler when the sidecar does not wait for it in the kernel: nobody else could wake it there."""
    for _ in range(200):
        os.kill(handler, signal.SIGSTOP)
        time.sleep(0.05)
        if state_of(sidecar) != "D":
            return
        os.kill(handler, signal.SIGCONT)
        time.sleep(0.01)
    pytest.fail("the sidecar waits for the DM-Handler all the time")


def expected(command):
    return subprocess.run(list(map(str, command)), capture_output=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(
    ("transport", "victim"),
    [
        ("inproc", "edm: dm-handler"),
        ("zmq", "edm: dm-handler"),
        ("zmq", "edm: dms"),
        pytest.param("mpi", "edm: dm-handler", marks=pytest.mark.mpi),
        pytest.param("mpi", "edm: dms", marks=pytest.mark.mpi),
    ],
)
def test_after_a_death_the_program_goes_on(edm, running, transport, victim):
    working = running(transport)
    working.at_work()
    (first,) = wait_for(working.process.pid, victim)
    os.kill(first, signal.SIGKILL)
    out, err = working.finish()
    assert (working.process.returncode, out) == (0, working.alone()), err
    assert b" has died; starting another" in err
    assert b"is there again; the program goes on" in err
    assert edm.left_behind() == ({}, [])


def ranks(root):
    """Pid of each rank of an MPI job below `root` that has not taken its title yet, by its module."""
    found = {}
    for pid in descendants(root):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if words[1:2] == ["-m"]:
            found[words[2]] = pid
    return found


@pytest.mark.soak
@pytest.mark.mpi
@pytest.mark.parametrize("which", [{"edm.dms.process", "edm.handler.process"}, {"edm.dms.process"}])
def test_ranks_that_die_before_they_have_said_a_word_are_started_again(edm, running, which):
    working = running("mpi")
    process = working.process
    working.at_work()
    (handler,) = wait_for(process.pid, "edm: dm-handler")
    os.kill(handler, signal.SIGKILL)
    end = time.monotonic() + WAIT_S
    while not which <= (started := ranks(process.pid)).keys() and time.monotonic() < end:
        """They are young for a tenth of a second at least: they import."""
    for name in which:
        with contextlib.suppress(ProcessLookupError):  # its job has ended it, as the other was dead
            os.kill(started[name], signal.SIGKILL)
    since = time.monotonic()
    assert any(b"is there again; the program goes on" in line for line in process.stderr)
    assert time.monotonic() - since < READY_S  # so long those are waited for that do not come
    out, err = working.finish()
    assert (process.returncode, out) == (0, working.alone()), err
    assert edm.left_behind() == ({}, [])


def test_one_death_after_another(edm, running):
    working = running("inproc")
    working.at_work()
    last = None
    for _ in range(3):
        until(lambda last=last: wait_for(working.process.pid, "edm: dm-handler") != last)
        (handler,) = last = wait_for(working.process.pid, "edm: dm-handler")
        time.sleep(0.1)
        os.kill(handler, signal.SIGKILL)
    out, err = working.finish()
    assert (working.process.returncode, out) == (0, working.alone()), err
    assert 1 <= err.count(b"is there again") <= 3  # one that is killed while it starts is not said to be there


@pytest.mark.parametrize("options", [("--restarts", 0), ("--store", "memory")])
def test_without_another_or_without_the_pages_the_program_ends(edm, working, options):
    run = working("--transport", "inproc", "--local-memory", "4M", *options)
    pid = run.at_work()
    (handler,) = wait_for(run.process.pid, "edm: dm-handler")
    os.kill(handler, signal.SIGKILL)
    out, err = run.process.communicate(timeout=WAIT_S)
    assert (run.process.returncode, out) == (70, b"")
    assert (b"its pages are gone" if "memory" in options else b"the DM-Handler has died") in err
    assert not Path(f"/proc/{pid}").exists()
    assert edm.left_behind() == ({}, [])


def test_with_handler_and_holder_dead_the_sidecar_ends_the_program(edm, running):
    working = running("inproc")
    process, program = working.process, working.at_work()
    handler, holder, sidecar = wait_for(process.pid, "edm: dm-handler", "edm: holder", "edm: sidecar")
    os.kill(process.pid, signal.SIGSTOP)  # it must not be there to end the program itself
    stop_between_batches(handler, sidecar)  # … nor to start another holder
    os.kill(holder, signal.SIGKILL)
    os.kill(handler, signal.SIGKILL)
    until(lambda: not running_still(program))
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=WAIT_S)
    assert out == b""
    assert process.returncode != 0, err


@pytest.mark.skipif(lib.edm_tie_access() != 0, reason="no io_uring here")
def test_with_all_of_edm_dead_at_once_the_program_waits(edm, running):
    working = running("inproc")
    process, program = working.process, working.at_work()
    handler, holder, sidecar = wait_for(process.pid, "edm: dm-handler", "edm: holder", "edm: sidecar")
    for pid in (process.pid, program, handler, sidecar, holder):  # nobody sees the others end
        os.kill(pid, signal.SIGSTOP)
    for pid in (sidecar, holder, handler):
        os.kill(pid, signal.SIGKILL)
    os.kill(program, signal.SIGCONT)
    time.sleep(1.5)
    until(lambda: at_rest(program))
    assert running_still(program)  # another program's bytes would have ended it
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (70, b""), err
    assert not running_still(program)
    assert edm.left_behind() == ({}, [])


def test_without_its_sidecar_the_program_goes_on_above_the_budget(edm, running):
    working = running("inproc")
    working.at_work()
    (sidecar,) = wait_for(working.process.pid, "edm: sidecar")
    os.kill(sidecar, signal.SIGKILL)
    told = working.process.stderr.readline()
    assert told.startswith(b"edm: warning: the sidecar of 1 process(es) has died: nothing of them is evicted any more")
    time.sleep(2)
    out, err = working.finish()
    assert (working.process.returncode, out, err) == (0, working.alone(), b"")  # it was told once
    assert edm.left_behind() == ({}, [])


def test_another_holder_takes_the_place_of_one_that_died(edm, running):
    working = running("inproc")
    working.at_work()
    holder, handler = wait_for(working.process.pid, "edm: holder", "edm: dm-handler")
    os.kill(holder, signal.SIGKILL)
    until(lambda: wait_for(working.process.pid, "edm: holder") != [holder])
    assert wait_for(working.process.pid, "edm: dm-handler") == [handler]
    out, err = working.finish()
    assert (working.process.returncode, out, err) == (0, working.alone(), b"")
    assert edm.left_behind() == ({}, [])


@pytest.mark.parametrize("transport", [TRANSPORTS[0], pytest.param("inproc", marks=pytest.mark.soak)])
def test_after_the_launchers_death_the_program_goes_on(edm, running, tmp_path, transport):
    working = running(transport)
    working.at_work()
    os.kill(working.process.pid, signal.SIGKILL)
    out, _ = working.finish()  # until the program closes its output
    assert out == working.alone()
    assert edm.left_behind() == ({}, [])


def test_death_of_handler_and_launcher_ends_the_program(edm, running):
    working = running("inproc")
    process, program = working.process, working.at_work()
    (handler,) = wait_for(process.pid, "edm: dm-handler")
    os.kill(process.pid, signal.SIGSTOP)  # it must not be there to end the program itself
    os.kill(handler, signal.SIGKILL)
    os.kill(process.pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=WAIT_S)
    assert out == b""
    until(lambda: not Path(f"/proc/{program}").exists())


@pytest.mark.parametrize(("on_loss", "status"), [("poison", -signal.SIGBUS), ("kill", 70)])
def test_a_memory_server_that_does_not_come_back(edm, working, tmp_path, on_loss, status):
    endpoint = f"ipc://{tmp_path}/pages.sock"
    server = edm.start("dms", "--listen", endpoint, "--path", tmp_path / "kept")
    run = working(
        *("--dms", endpoint, "--local-memory", "2M", "--patience-s", 1, "--on-loss", on_loss),
        *("-o", "transport.zmq.silence_s=0.5", "-o", "transport.zmq.heartbeat_s=0.2"),
    )
    run.at_work()
    server.kill()
    server.wait(WAIT_S)
    out, err = run.process.communicate(timeout=WAIT_S)
    assert (run.process.returncode, out) == (status, b""), err
    assert b"does not answer" in err
    assert (b"is lost: the memory server did not answer in time\n" in err) == (on_loss == "poison")
    assert edm.left_behind() == ({}, [])


def test_a_memory_server_that_comes_back_late_is_waited_for(edm, working, tmp_path):
    endpoint = f"ipc://{tmp_path}/pages.sock"
    server = edm.start("dms", "--listen", endpoint, "--path", tmp_path / "kept")
    run = working(
        *("--dms", endpoint, "--local-memory", "2M", "--patience-s", 0.5),
        *("-o", "transport.zmq.silence_s=0.5", "-o", "transport.zmq.heartbeat_s=0.2"),
    )
    run.at_work()
    server.kill()
    server.wait(WAIT_S)
    run.sign.unlink()
    time.sleep(3)
    assert run.process.poll() is None
    edm.start("dms", "--listen", endpoint, "--path", tmp_path / "kept")
    out, err = run.process.communicate(timeout=WAIT_S)
    assert (run.process.returncode, out) == (0, run.alone()), err
    assert b"the memory server answers again, after " in err
