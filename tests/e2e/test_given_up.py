"""What root's EDM gives up at its start, and that it can do its work without: on every thread of its processes."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_deaths import descendants, expected, kill_while_at_work, wait_for

from edm.privileges import HANDLER, Capability

NOBODY = 65534

pytestmark = [
    pytest.mark.uffd,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to have something to give up"),
]


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
def test_all_threads_have_only_what_they_need(edm, program, transport, more):
    command = (program("working_set"), 8, 400)
    process = edm.start("run", "--transport", transport, "--local-memory", "4M", "--", *command)
    titles = ("edm: dm-handler", "edm: holder", "edm: dms")
    handler, holder, dms, working, _ = wait_for(process.pid, *titles, "working_set", "edm: sidecar")
    had = threads_of(os.getpid()).pop()[0]
    serving = mask(*{*HANDLER, *more}) & had
    assert threads_of(handler) == threads_of(holder) == {(serving, serving, False)}
    stores = mask(*more) & had
    assert threads_of(dms) == {(stores, stores, False)}
    assert threads_of(working) == threads_of(os.getpid())  # the program is as without EDM
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


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
def test_without_it_another_users_program_is_served_through_a_death(make_edm, program, transport):
    directory = Path("/tmp") / f"edm-test-{os.getpid()}-{transport}"
    directory.mkdir(mode=0o755)
    runner = make_edm(directory)
    try:
        command = (shutil.copy(program("working_set"), directory), 8, 60)
        options = ("--transport", transport, "--user", "nobody", "--local-memory", "4M")
        process = runner.start("run", *options, "--", *command)
        handler, working, _ = wait_for(process.pid, "edm: dm-handler", "working_set", "edm: sidecar")
        kill_while_at_work(handler, working)
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out) == (0, expected(command)), err
        assert b"is there again; the program goes on" in err
        assert descendants(process.pid) == {}
    finally:
        runner.close()
        shutil.rmtree(directory)
