"""What a program gives back the store gives back too: its slots, its page table's entries, and room on the disk."""

import subprocess
import sys
from pathlib import Path

import pytest
from watching import wait_for

from edm.dms.status import ask_status

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(120)]

PROGRAM = Path(__file__).parent / "programs" / "giving_back.py"
MIB, BUDGET_MIB = 8, 2
PAGES = MIB * 256
SMALL = ("store.file.segment=1M", "store.file.group=1M", "store.file.sync=batch")


class Server:
    """A memory server of its own, and what it says of its store."""

    def __init__(self, edm, store):
        self.directory = edm.directory / "dms"
        self.directory.mkdir()
        self.endpoint = f"ipc://{edm.sockets}/dms"
        options = [word for option in SMALL if store == "file" for word in ("-o", option)]
        self.process = edm.start(
            *("dms", "--listen", self.endpoint, "--path", self.directory, "--store", store, *options)
        )
        wait_for((edm.sockets / "dms").exists)

    def figures(self):
        return ask_status(self.directory)["store"]

    def settles(self, least, most):
        """Wait until the table and the store hold so many pages; bytes on the disk then."""

        def settled():
            figures = self.figures()
            held = figures["spt"]["pages"], figures["pages"]["pages"] - figures["server"]["slots_waiting"]
            return all(least <= pages <= most for pages in held)

        wait_for(settled)
        return sum(file.stat().st_blocks * 512 for file in self.directory.rglob("*.pages"))


@pytest.fixture
def program(edm):
    """`do(step, name)` of a program under a small budget, and `end()`."""
    started = []

    class Program:
        def __init__(self, server):
            self.run = edm.start(
                *("run", "--dms", server.endpoint, "--local-memory", f"{BUDGET_MIB}M", "--"),
                *(sys.executable, PROGRAM, MIB),
                stdin=subprocess.PIPE,
            )
            started.append(self.run)

        def do(self, step, name):
            self.run.stdin.write(f"{step} {name}\n".encode())
            self.run.stdin.flush()
            assert self.run.stdout.readline() == f"{step} {name}\n".encode()

        def end(self):
            self.run.stdin.close()
            assert self.run.wait(30) == 0

    yield Program
    for run in started:
        run.stdin.close()


@pytest.mark.parametrize(
    "store", ["file", *(pytest.param(name, marks=pytest.mark.soak) for name in ("lmdb", "memory"))]
)
def test_what_is_given_back_leaves_the_table_the_store_and_the_disk(edm, program, store):
    server = Server(edm, store)
    app = program(server)
    local = BUDGET_MIB * 256
    for name in "abc":
        app.do("fill", name)
    full = server.settles(3 * PAGES - local, 5 * PAGES)
    app.do("munmap", "a")
    server.settles(2 * PAGES - local, 4 * PAGES - local)
    app.do("check", "b")
    app.do("dontneed", "b")
    server.settles(PAGES - local, 3 * PAGES - local)
    app.do("mremap", "b")
    app.do("munmap", "c")
    left = server.settles(0, PAGES)
    app.do("fill", "d")
    app.do("check", "d")
    app.end()
    gone = server.settles(0, 0)
    assert server.figures()["spt"]["regions"] == 0
    if store == "file":
        assert full > (3 * PAGES - local) * 4096
        assert left < full / 2
        assert gone < full / 8
