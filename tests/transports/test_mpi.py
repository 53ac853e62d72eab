"""What of the transport `mpi` needs no job: who is alive, and what is found out about the MPI library."""

import os
import subprocess
import sys

import pytest

from edm.plugins.transport_mpi.world import World


@pytest.fixture
def world_of():
    """Call it with process ids: a world of ranks with these, on this machine."""

    def make(*pids):
        world = World.__new__(World)
        world.members = [("dm-handler", os.uname().nodename, pid) for pid in pids]
        return world

    return make


def test_a_rank_that_was_killed_is_not_alive_though_nobody_has_buried_it(world_of):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    world = world_of(os.getpid(), child.pid)
    assert world.alive(0)
    assert world.alive(1)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not world.alive(1)
    child.wait()
    child.stdin.close()
    assert not world.alive(1)


def test_a_rank_of_another_machine_is_taken_to_be_alive(world_of):
    world = world_of(os.getpid())
    world.members = [("dms", "another machine", 2**22)]
    assert world.alive(0)


FOUND = """
from edm._native import lib
from edm.plugins.transport_mpi.library import find_library
from edm.plugins.transport_mpi.world import load_mpi
mpi = load_mpi()
mpi.Init()
library = find_library(mpi, mpi.COMM_WORLD)
assert library.handle_bytes == mpi._sizeof(mpi.Comm)
assert library.comm == mpi._handleof(mpi.COMM_WORLD), (library.comm, mpi._handleof(mpi.COMM_WORLD))
status = mpi.Status()
import ctypes
ctypes.c_int.from_address(mpi._addressof(status) + library.source_at).value = 5
ctypes.c_int.from_address(mpi._addressof(status) + library.tag_at).value = 7
assert (status.Get_source(), status.Get_tag()) == (5, 7)
mpi.Finalize()
"""


@pytest.mark.mpi
def test_the_mpi_library_is_described_as_it_is():
    result = subprocess.run([sys.executable, "-c", FOUND], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
