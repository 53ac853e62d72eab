"""A death at each fault point, under load: the program ends with the output it has alone, or is ended.

The quick form kills at the points where most is half done; `make soak` at all of them, and every process at each over
each transport, and prints what came of it.
"""

import subprocess
from collections import Counter

import pytest
from killing import ADOPTING, LIVING, OPS, SERVER_POINTS, run_with_death

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]

QUICK = {
    *("event_applied", "fork_made", "move_done", "batch_moved", "batch_applied", "outbox_acknowledged"),
    *("rescue_copied", "adopt_held", "pages_recorded"),
}
"""What is killed in the quick form: where most is half done."""


def points(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in names]


VICTIMS = {"sidecar": ("edm: sidecar",), "dms": ("edm: dms",), "app": ("stamped",)}


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


@pytest.mark.parametrize("point", points(ADOPTING))
def test_the_dm_handler_dies_while_it_takes_over(edm, program, plain, point):
    death = run_with_death(edm, program("stamped"), point, times=0, first_death=True)
    assert death.reached, f"never came to {point}"
    check(death, plain)
    assert edm.left_behind() == ({}, [])


@pytest.mark.parametrize("point", points(SERVER_POINTS))
def test_the_memory_server_dies(edm, program, plain, point):
    death = run_with_death(edm, program("stamped"), point, role="dms", transport="zmq")
    assert death.reached, f"never came to {point}"
    check(death, plain)
    assert edm.left_behind() == ({}, [])


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_whoever_dies_wherever(tmp_path_factory, make_edm, program, plain):
    """Each victim at each point of the DM-Handler, over each transport; what came of it is printed."""
    outcomes, wrong = Counter(), []
    for transport in ("inproc", "zmq", "mpi"):
        for victim in ("dm-handler", "sidecar", "app", *(() if transport == "inproc" else ("dms",))):
            for point in LIVING:
                edm = make_edm(tmp_path_factory.mktemp("run"))
                names = VICTIMS.get(victim)
                death = run_with_death(edm, program("stamped"), point, victim=names, transport=transport)
                if victim == "app":  # itself, or a child of its own
                    good = death.status in {-9, 0, 1} and (death.out in {b"", plain} or b"status 0x9" in death.out)
                else:
                    good = (death.status, death.out) == (0, plain)
                if not (good and death.reached):
                    wrong.append((transport, victim, point, death))
                    print(*wrong[-1], flush=True)
                outcomes[transport, victim, "right" if death.out == plain else "ended"] += 1
                edm.close()
    for (transport, victim, outcome), count in sorted(outcomes.items()):
        print(f"{transport:8} {victim:12} {outcome:8} {count}")
    assert not wrong
