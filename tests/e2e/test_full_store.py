"""A store that fills up while a program runs: nothing is lost, the program waits, and goes on when there is room."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from watching import wait_for
from working import WAIT_S

from edm.dms.status import ask_status
from edm.errors import UsageError

pytestmark = [
    pytest.mark.uffd,
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root can mount a small tmpfs"),
]


class SmallDisk:
    """A tmpfs of a size that can be changed."""

    def __init__(self, path):
        self.path = path
        path.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12M", "edm-test", path], capture_output=True)
        if made.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {made.stderr.decode().strip()}")

    def grow(self):
        subprocess.run(["mount", "-o", "remount,size=200M", self.path], check=True)

    def full(self):
        """Too little is left for a batch of pages."""
        about = os.statvfs(self.path)
        return about.f_bavail * about.f_bsize < 512 << 10

    def wait_until_full(self, process):
        def full():
            assert process.poll() is None, process.communicate()
            return self.full()

        wait_for(full)

    def close(self):
        subprocess.run(["umount", "-l", self.path], check=True)


@pytest.fixture
def disk(tmp_path):
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.mark.parametrize(
    ("store", "transport"),
    [
        ("lmdb", "inproc"),
        pytest.param("file", "mpi", marks=pytest.mark.mpi),
        pytest.param("file", "zmq", marks=pytest.mark.soak),
    ],
)
def test_full_disk_is_waited_for(working, tmp_path, disk, store, transport):
    run = working(
        "--transport", transport, "--store", store, "--path", disk.path, "--local-memory", "5M",
        *(("-o", "store.file.segment=1M") if store == "file" else ("-o", "store.lmdb.map_size=2M")),
        "--report", tmp_path / "r.json", megabytes=24,
    )  # fmt: skip
    disk.wait_until_full(run.process)
    time.sleep(1)
    assert run.process.poll() is None
    assert not run.sign.exists()  # it has not yet done what it was to
    disk.grow()
    out, err = run.finish()
    assert (run.process.returncode, out) == (0, run.alone()), err.decode()
    counters = json.loads((tmp_path / "r.json").read_text())["counters"]
    assert counters["write_failures"] > 0
    assert counters["internal_errors"] == counters["lost"] == 0
    told(err)


def told(err):
    """Once when it begins and once when there is room again, however often it was tried in between."""
    lines = err.decode().splitlines()
    begins = [i for i, line in enumerate(lines) if "the memory server cannot store pages (" in line]
    ends = [i for i, line in enumerate(lines) if "the memory server stores pages again, after " in line]
    assert len(begins) == len(ends) >= 1
    assert all(begin < end for begin, end in zip(begins, ends, strict=True))
    assert len(begins) < 5


@pytest.mark.parametrize(("store", "limit"), [("memory", "28M"), pytest.param("lmdb", "40M", marks=pytest.mark.soak)])
def test_limit_is_waited_for_until_another_program_lets_go(edm, working, tmp_path, store, limit):
    """One memory server with room for one program's pages: the second waits until the first has ended."""
    endpoint = f"ipc://{tmp_path}/s.sock"
    server = edm.start("dms", "--listen", endpoint, "--path", tmp_path / "dms", "--store", store,
                       "-o", f"store.{store}.limit={limit}")  # fmt: skip
    held = tmp_path / "held"
    os.mkfifo(held)
    hold = f"""
import mmap
m = mmap.mmap(-1, 24 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for i in range(0, len(m), 4096): m[i:i+8] = i.to_bytes(8, 'big')
open({str(held)!r}).read()
print(all(m[i:i+8] == i.to_bytes(8, 'big') for i in range(0, len(m), 4096)))
"""
    first = edm.start("run", "--dms", endpoint, "--local-memory", "12M", "--", sys.executable, "-c", hold)
    wait_for(lambda: figures(tmp_path / "dms")[0] > 2000)
    second = working("--dms", endpoint, "--local-memory", "5M", "--report", tmp_path / "r.json", megabytes=24)
    wait_for(lambda: figures(tmp_path / "dms")[1] > 0)
    time.sleep(1)
    assert second.process.poll() is None
    held.write_text("go on")
    out, err = first.communicate(timeout=WAIT_S)
    assert (first.returncode, out) == (0, b"True\n"), err.decode()
    out, err = second.finish()
    assert (second.process.returncode, out) == (0, second.alone()), err.decode()
    assert json.loads((tmp_path / "r.json").read_text())["counters"]["lost"] == 0
    told(err)
    edm.end(server)


def figures(directory):
    """Pages that the server in `directory` holds, and how many it had to refuse."""
    try:
        store = ask_status(directory)["store"]
    except UsageError:
        return 0, 0
    return store["pages"]["pages"], store["server"]["failed"]
