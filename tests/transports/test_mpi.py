"""What of the transport `mpi` needs no job: who is alive, and what is found out about the MPI library."""

import os
import subprocess
import sys

import pytest

from edm.plugins.transport_mpi.launch import find_mpiexec, wrong_launcher
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


class Library:
    """What `mpi4py.MPI` says of the library it uses."""

    def __init__(self, vendor, configured=""):
        self.vendor, self.configured = vendor, configured

    def get_vendor(self):
        return self.vendor, (5, 0, 2)

    def Get_library_version(self):
        return f"{self.vendor} Version: 5.0.2\nconfigure: {self.configured}"


def test_another_mpis_launcher_is_told_before_mpi_ends_the_process():
    by_open_mpi, by_mpich = {"OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}, {"PMI_RANK": "0"}
    assert "started by Open MPI's launcher, and mpi4py uses MPICH 5.0.2" in wrong_launcher(
        Library("MPICH", "--with-pm=hydra"), by_open_mpi
    )
    assert wrong_launcher(Library("MPICH", "--with-pmix=/usr"), by_open_mpi) == ""
    assert wrong_launcher(Library("Open MPI"), by_open_mpi) == ""
    assert wrong_launcher(Library("MPICH"), by_mpich) == ""


@pytest.mark.mpi
@pytest.mark.parametrize("command", [["dms", "--transport", "mpi"], ["run", "--", "true"]], ids=lambda words: words[0])
def test_a_rank_of_open_mpis_launcher_over_mpich_is_one_clear_line(command):
    vendor = subprocess.run([sys.executable, "-c", VENDOR], capture_output=True, text=True, check=True).stdout
    if vendor.strip() != "MPICH":
        pytest.skip(f"mpi4py uses {vendor.strip()} here, which says nothing of its own")
    result = subprocess.run(
        [sys.executable, "-m", "edm", *command],
        env={**os.environ, "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if "Open MPI's launcher" in line] == [result.stderr.strip()]


VENDOR = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0])"
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


HANDLER = """
import sys
from pathlib import Path
import numpy as np
from edm.plugins.transport_mpi import MpiOptions, open_transport
from edm.testing.pages import batch_of
from edm.testing.transport_cases import wanted
from edm.types import PAGE_BYTES, RunContext
here = Path(".")
transport = open_transport(MpiOptions(), RunContext(here, here, "dm-handler"))
transport.connect().control({"op": "hello", "client": "sizes", "protocol": 1})
channel = transport.connect()
region = int(transport._session.instances[0]) << 32
for size in (1, 2, 31, 32, 33, 64, 1023, 1024):
    indices = np.arange(size) + size * 10_000
    refs, pages = batch_of(region, indices, version=size)
    assert channel.evict(refs, memoryview(pages)) == ""
    asked, into = wanted(region, indices), bytearray(size * PAGE_BYTES)
    channel.fetch(asked, memoryview(into))
    assert into == pages and (asked["checksum"] == refs["checksum"]).all(), size
    # One page more, which is new: what exists comes to its place, and the rest is left alone.
    asked, into = wanted(region, indices[::-1] + 1), bytearray(b"Z" * size * PAGE_BYTES)
    channel.fetch(asked, memoryview(into))
    assert asked["status"].tolist() == [0] + [1] * (size - 1), size
    assert into[:PAGE_BYTES] == b"Z" * PAGE_BYTES, size
    assert into[-PAGE_BYTES:] == (pages[PAGE_BYTES : 2 * PAGE_BYTES] or b"Z" * PAGE_BYTES), size
figures = channel.control({"op": "stat"})["server"]
print(figures["gets"], figures["found"], flush=True)
transport.close()
"""


@pytest.mark.mpi
def test_pages_of_a_server_that_answers_from_c_come_to_their_places(tmp_path):
    result = subprocess.run(
        [find_mpiexec(), "-n", "1", sys.executable, "-m", "edm", "dms", "--transport", "mpi", "--store", "memory",
         "--path", tmp_path / "dms", ":", "-n", "1", sys.executable, "-c", HANDLER],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    sizes = 1 + 2 + 31 + 32 + 33 + 64 + 1023 + 1024
    assert result.stdout.split() == [str(2 * sizes), str(2 * sizes - 8)]
