"""A death at each fault point, under load: the program ends with the output it has alone, or is ended.

The quick form kills at the points where most is half done; `make soak` at all of them, and every process at each over
each transport, and prints what came of it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest
from killing import ADOPTING, GIVING, LIVING, OPS, POINTS, SERVING, run_with_death

from edm.faultpoints import VARIABLE

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]

QUICK = {
    *("event_applied", "fork_made", "batch_moved", "outbox_acknowledged"),
    *("rescue_copied", "adopt_held", "pages_recorded", "give_done"),
}
"""What is killed in the quick form: where most is half done."""


def points(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in names]


@pytest.fixture(scope="module")
def plain(program):
    return subprocess.run([program("stamped"), str(OPS)], capture_output=True, check=True, timeout=60).stdout


def check(death, plain):
    assert (death.status, death.out) == (0, plain), death.err


@pytest.mark.parametrize("point", points(LIVING))
def test_the_dm_handler_dies(edm, program, plain, point):
    death = run_with_death(edm, program("stamped"), point)
    assert death.reached, f"never came to {point}"
    check(death, plain)
    assert "is there again" in death.err or point in {"retire_begun", "retire_closed", "retire_told"}
    assert edm.left_behind() == ({}, [])


def test_a_program_that_is_killed_as_it_is_handed_over_takes_nobody_with_it(edm, program):
    """Its memory lasts as long as its sidecar, which the DM-Handler does not know yet."""
    death = run_with_death(edm, program("stamped"), "answered_hello", victim="app", times=0, for_s=0.3)
    assert death.reached
    assert (death.status, death.err) == (-signal.SIGKILL, "")
    assert edm.left_behind() == ({}, [])


@pytest.mark.parametrize("point", points(GIVING))
def test_the_dm_handler_dies_while_a_userfaultfd_of_the_programs_own_gets_memory(edm, program, point):
    steps = ("missing", "write_protected", "taken_in_turns", "written_meanwhile")
    expected = subprocess.run([program("own_uffd"), *steps], capture_output=True, check=True, timeout=60).stdout
    death = run_with_death(edm, program("own_uffd"), point, arguments=steps, times=1)
    assert death.reached, f"never came to {point}"
    check(death, expected)
    assert "is there again" in death.err
    assert edm.left_behind() == ({}, [])


@pytest.mark.parametrize("point", points(ADOPTING))
def test_the_dm_handler_dies_while_it_takes_over(edm, program, plain, point):
    death = run_with_death(edm, program("stamped"), point)
    assert death.reached, f"never came to {point}"
    check(death, plain)
    assert edm.left_behind() == ({}, [])


@pytest.mark.parametrize("point", points(SERVING))
def test_the_memory_server_dies(edm, program, plain, point):
    death = run_with_death(edm, program("stamped"), point, role="dms", transport="zmq")
    assert death.reached, f"never came to {point}"
    check(death, plain)
    assert edm.left_behind() == ({}, [])


MAY_STOP = {
    ("batch_reading", "fail"): "its staging area cannot be read",
    ("batch_summed", "corrupt"): "is lost: checksum",
    ("rescue_begun", "corrupt"): "is lost: checksum",
    ("pages_screened", "corrupt"): "is lost",
}
"""Where the only copy of a page is gone, and what is said then: a program that needs it is stopped."""
QUICK_ACTIONS = {("fork_watched", "fail"), ("rescue_begun", "corrupt"), ("fetch_answered", "corrupt")}
ACTIONS = [
    pytest.param(name, action, marks=[] if (name, action) in QUICK_ACTIONS else pytest.mark.soak, id=f"{name}-{action}")
    for action in ("fail", "corrupt", "delay")
    for name, point in POINTS.items()
    if action in point.actions and name not in GIVING  # this program has no userfaultfd of its own
]


@pytest.mark.parametrize(("point", "action"), ACTIONS)
def test_whatever_is_late_or_fails_or_is_damaged_the_program_goes_on_or_stops(edm, program, plain, point, action):
    role, transport = ("dms", "zmq") if point in SERVING else ("dm-handler", "inproc")
    death = run_with_death(edm, program("stamped"), point, role=role, transport=transport, action=action)
    assert death.reached, f"never came to {point}"
    assert edm.left_behind() == ({}, [])
    if (point, action) in MAY_STOP and death.out != plain:
        stopped = death.status in {-signal.SIGBUS, -signal.SIGKILL, 70}
        assert stopped or (death.status == 1 and re.fullmatch(rb"child: status 0x8?[79]\n", death.out)), death
        assert MAY_STOP[point, action] in death.err
    else:
        check(death, plain)


def test_after_a_takeover_a_page_that_was_stored_is_not_taken_for_a_new_one(edm, program, plain):
    """A DM-Handler that has taken over knows no version of a page; but that the memory server had it."""
    death = run_with_death(edm, program("stamped"), "pages_found", action="fail", after_takeover=True)
    assert death.reached
    assert "is there again" in death.err
    check(death, plain)


def test_what_a_child_writes_after_a_takeover_stays(edm, program):
    """Of its parent's clean pages a child's were taken for clean when they were not write-protected any more."""
    death = run_with_death(edm, program("tree"), "batch_committed", arguments=["child_writes_what_was_read"])
    assert death.reached
    assert (death.status, death.out) == (0, b"child_writes_what_was_read: as it should be\n"), death.err
    assert "is there again" in death.err


@pytest.mark.parametrize("point", points(("fork_made", "messages_read")))
def test_the_dm_handler_dies_where_children_have_other_numbers(edm, program, point):
    """A child whose parent has ended meanwhile, and may no more be asked in which PID namespace it was."""
    inside = ("--pid", "--fork", "--mount-proc")
    if not shutil.which("unshare") or subprocess.run(["unshare", *inside, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces here")
    command = (*inside, program("tree"), "double_fork", "as_daemon")
    death = run_with_death(edm, "unshare", point, arguments=command, times=0)
    assert death.reached, f"never came to {point}"
    assert (death.status, death.out) == (0, b"double_fork: as it should be\nas_daemon: as it should be\n"), death.err
    assert "is there again" in death.err


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_what_a_program_that_has_ended_forked_is_served_after_a_takeover(edm, program, times):
    """Its fork was read, and the child not made; nor is what is committed meanwhile for others taken for its own."""
    death = run_with_death(edm, program("tree"), "fork_made", arguments=("double_fork", "as_daemon"), times=times)
    assert death.reached
    assert (death.status, death.out) == (0, b"double_fork: as it should be\nas_daemon: as it should be\n"), death.err
    assert "is there again" in death.err


GRANDCHILD = """
import os
end, other = os.pipe()
child = os.fork()
if not child:
    if not os.fork():
        os.write(other, b"here")
    os._exit(0)
print(os.read(end, 4), os.waitpid(child, 0)[1])
"""


def test_the_child_of_a_program_that_ends_at_once_is_found(edm, tmp_path):
    """In which PID namespace it is cannot be seen of a parent that has ended by the time the fork is looked at."""
    flag, report = edm.directory / "point", tmp_path / "report.json"
    flag.write_text("dm-handler fork_begun delay 1\n")
    edm.environment[VARIABLE] = str(flag)
    ran = edm.run("--transport", "inproc", "--report", report, "--", sys.executable, "-c", GRANDCHILD)
    assert (ran.status, ran.out, ran.err) == (0, b"b'here' 0\n", "")
    assert not flag.exists()
    assert json.loads(report.read_text())["counters"]["processes"] == 3


def test_a_point_takes_only_what_can_be_done_there(edm, program):
    death = run_with_death(edm, program("stamped"), "fork_made", action="corrupt")
    assert death.status == 2
    assert "no fault point 'fork_made', or it cannot corrupt" in death.err


def test_nothing_is_left_of_a_program_that_ends_while_nobody_serves_it(edm, program):
    """Its sidecar waits in the kernel then: for somebody to read that it has emptied staging."""
    death = run_with_death(edm, program("stamped"), "staging_dropped", victim="app, dm-handler")
    assert death.reached
    assert death.status == -9, death.err
    assert edm.left_behind() == ({}, [])


PART, PARTS = map(int, os.environ.get("EDM_SOAK_PART", "1/1").split("/"))
"""Of a row of the matrix, which of so many parts is run: "2/6" is every sixth point, from the second on."""


def cases(transport):
    """Each point, and whose it is."""
    server = "dm-handler" if transport == "inproc" else "dms"
    whose = [*(("dm-handler", point) for point in (*LIVING, *ADOPTING)), *((server, point) for point in SERVING)]
    return whose[PART - 1 :: PARTS]


def ended_as_it_must(victim, death, plain):
    """Only a program that is killed itself may end otherwise than alone: itself, or after a child that was."""
    if victim == "app" and death.out != plain:
        return death.status == -9 or (death.status == 1 and b"status 0x9" in death.out)
    return (death.status, death.out) == (0, plain)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("transport", "victim"),
    [
        pytest.param(
            transport, victim, id=f"{transport}-{victim}", marks=[pytest.mark.mpi] if transport == "mpi" else []
        )
        for transport in ("inproc", "zmq", "mpi")
        for victim in ("dm-handler", "dms", "sidecar", "app")
        if (transport, victim) != ("inproc", "dms")
    ],
)
def test_whoever_dies_wherever(tmp_path_factory, make_edm, program, plain, transport, victim):
    """One victim at each point of each process, over one transport; what came of it is printed."""
    outcomes, wrong = Counter(), []
    for role, point in cases(transport):
        edm = make_edm(tmp_path_factory.mktemp("run"))
        himself = role == victim
        death = run_with_death(
            edm, program("stamped"), point, role=role, victim=None if himself else victim, transport=transport
        )
        left = edm.left_behind()
        if not (death.reached and ended_as_it_must(victim, death, plain) and left == ({}, [])):
            wrong.append((point, death.status))
            print(f"WRONG {transport} {victim} {role} {point}: {death} {left}", flush=True)
        outcomes["not reached" if not death.reached else "completed" if death.out == plain else "ended"] += 1
        edm.close()
    part = f" (part {PART} of {PARTS})" if PARTS > 1 else ""
    print(
        f"{transport}, {victim} at {len(cases(transport))} points{part}: {dict(outcomes)}, wrong: {wrong}", flush=True
    )
    assert not wrong
