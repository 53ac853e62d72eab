"""A memory server that nobody asks anything takes next to no CPU, over each transport that has a server of its own."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edm.plugins.transport_mpi.launch import find_mpiexec
from edm.plugins.transport_zmq import ZmqOptions, open_transport
from edm.types import RunContext

EDM = (sys.executable, "-m", "edm")
MEASURED_S = 1.5
LATELY_BUSY_S = 0.7
"""Until a server has its longest sleeps."""


def cpu_share(pid):
    """Of one CPU, what all threads of a process take, in percent."""

    def used():
        return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))

    before, began = used(), time.monotonic()
    time.sleep(MEASURED_S)
    return (used() - before) / 1e7 / (time.monotonic() - began)


def test_a_server_over_zmq_idles_at_nothing_alone_and_with_a_client(tmp_path):
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*EDM, "dms", "--listen", f"ipc://{tmp_path}/s", "--path", tmp_path / "dms"], stdout=out, stderr=out
        )
    end = time.monotonic() + 60
    while not re.search("ready at", log.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(LATELY_BUSY_S)
    alone = cpu_share(server.pid)
    transport = open_transport(ZmqOptions(dms=(f"ipc://{tmp_path}/s",)), RunContext(tmp_path, tmp_path, "dm-handler"))
    assert transport.connect().control({"op": "hello", "client": "test", "protocol": 1})["ok"]
    time.sleep(LATELY_BUSY_S)
    with_a_client = cpu_share(server.pid)
    transport.close()
    server.terminate()
    assert server.wait(60) == 0
    assert alone < 1
    assert with_a_client < 2


HANDLER = """
import sys, time
from pathlib import Path
from edm.plugins.transport_mpi import MpiOptions, open_transport
from edm.types import RunContext
transport = open_transport(MpiOptions(), RunContext(Path(), Path(), "dm-handler"))
assert transport.connect().control({"op": "hello", "client": "test", "protocol": 1})["ok"]
sys.stdout.write(f"{transport._world.members[transport._world.servers[0]][2]}\\n")
sys.stdout.flush()
Path(sys.argv[1]).read_text()
transport.close()
"""


@pytest.mark.mpi
def test_a_server_over_mpi_takes_less_than_a_twentieth_of_a_core(tmp_path):
    fifo = tmp_path / "goodbye"
    subprocess.run(["mkfifo", fifo], check=True)
    job = subprocess.Popen(
        [find_mpiexec(), "-n", "1", *EDM, "dms", "--transport", "mpi", "--path", tmp_path / "dms",
         ":", "-n", "1", sys.executable, "-c", HANDLER, fifo],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    pid = int(job.stdout.readline())
    time.sleep(LATELY_BUSY_S)
    share = cpu_share(pid)
    fifo.write_text("")
    _, said = job.communicate(timeout=60)
    assert job.returncode == 0, said
    assert share < 5
