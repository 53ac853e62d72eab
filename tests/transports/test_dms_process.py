"""The DMS as a process: readiness, status, signals, the launcher's line, MPI ranks that go wrong."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edm.config import resolve
from edm.plugins.transport_mpi import strip_mpi_environment, under_mpi
from edm.plugins.transport_mpi.launch import find_mpiexec
from edm.plugins.transport_zmq import ZmqOptions, open_transport
from edm.testing.pages import batch_of
from edm.testing.transport_cases import wanted
from edm.types import PAGE_BYTES, RunContext

EDM = (sys.executable, "-m", "edm")
SOON_S = 60


def wait_for(done, what):
    end = time.monotonic() + SOON_S
    while not (found := done()):
        assert time.monotonic() < end, what
        time.sleep(0.02)
    return found


class Dms:
    """`edm dms` in a process of its own."""

    def __init__(self, path, *arguments, environment=None, store="memory"):
        self.path = path
        self.log = path / "log"
        path.mkdir(exist_ok=True)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*EDM, "dms", "--path", str(path), "--store", store, *arguments],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}, start_new_session=True,
            )  # fmt: skip

    def wait_ready(self):
        found = wait_for(lambda: re.search(r"edm: dms ready at (\S+)", self.log.read_text()), "no line of readiness")
        return found[1]

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(SOON_S)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def dms(tmp_path):
    """Call it to start `edm dms` with more arguments."""
    started = []

    def start(*arguments, **settings):
        made = Dms(tmp_path / "dms", *arguments, **settings)
        started.append(made)
        return made

    yield start
    for made in started:
        made.close()


def meet(endpoint, tmp_path, **options):
    transport = open_transport(
        ZmqOptions(dms=(endpoint,), **options), RunContext(tmp_path, tmp_path, "dm-handler", 30.0)
    )
    channel = transport.connect()
    return transport, channel, channel.control({"op": "hello", "client": "test", "protocol": 1})["instance"]


def edm(*arguments):
    return subprocess.run([*EDM, *arguments], capture_output=True, text=True, timeout=SOON_S, check=False)


def test_it_says_when_it_is_ready_shows_its_title_and_stops_at_sigterm(dms):
    server = dms("--listen", "tcp://127.0.0.1:*")
    assert server.wait_ready().startswith("tcp://127.0.0.1:")
    assert Path(f"/proc/{server.process.pid}/cmdline").read_bytes().startswith(b"edm: dms")
    assert server.stop() == 0
    assert not (server.path / "dms.sock").exists()


def test_what_was_acknowledged_is_there_after_a_stop(dms, tmp_path):
    server = dms("--listen", f"ipc://{tmp_path}/s", store="file")
    transport, channel, instance = meet(server.wait_ready(), tmp_path)
    refs, pages = batch_of(instance << 32, np.arange(500), version=1)
    assert channel.evict(refs, memoryview(pages)) == ""
    assert server.stop() == 0
    again = dms("--listen", f"ipc://{tmp_path}/s", store="file")
    asked, into = wanted(instance << 32, np.arange(500)), bytearray(500 * PAGE_BYTES)
    channel.fetch(asked, memoryview(into))
    assert into == pages
    transport.close()
    assert again.stop() == 0


def test_status_shows_clients_and_figures(dms, tmp_path):
    server = dms("--listen", f"ipc://{tmp_path}/s", "--quota", "1M")
    transport, channel, instance = meet(server.wait_ready(), tmp_path)
    refs, pages = batch_of(instance << 32, np.arange(40), version=1)
    channel.evict(refs, memoryview(pages))
    figures = json.loads(edm("dms", "status", "--path", str(server.path), "--json").stdout)
    assert figures["peers"] == 1
    assert figures["quota_pages"] == 256
    assert figures["usage_pages"] == {str(instance): 40}
    assert figures["requests"]["pages_received"] == 40
    assert "quota: 1M" in edm("dms", "status", "--path", str(server.path)).stdout
    transport.close()


def test_status_of_nothing_is_one_line(tmp_path):
    result = edm("dms", "status", "--path", str(tmp_path))
    assert (result.returncode, result.stderr) == (2, f"edm: no DMS is running in {tmp_path}\n")


def test_sighup_reads_the_quota_again(dms, tmp_path):
    server = dms("--listen", f"ipc://{tmp_path}/s")
    transport, channel, instance = meet(server.wait_ready(), tmp_path)
    refs, pages = batch_of(instance << 32, np.arange(40), version=1)
    assert channel.evict(refs, memoryview(pages)) == ""
    (server.path / "dms.toml").write_text('quota = "80K"\n')
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: server.log.read_text().count("ready at") == 2, "no second line of readiness")
    refs, pages = batch_of(instance << 32, np.arange(100, 140), version=2)
    assert "quota" in channel.evict(refs, memoryview(pages))
    (server.path / "dms.toml").write_text('quota = "many"\n')
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "not reloaded" in server.log.read_text(), "a bad file is not complained about")
    assert "quota" in channel.evict(refs, memoryview(pages))
    transport.close()


def test_systemd_is_told_of_readiness_reload_and_stop(dms, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(SOON_S)
        server = dms("--listen", f"ipc://{tmp_path}/s", environment={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert listener.recv(1000).startswith(b"READY=1")
        server.process.send_signal(signal.SIGHUP)
        assert b"RELOADING=1\nMONOTONIC_USEC=" in listener.recv(1000)
        assert listener.recv(1000).startswith(b"READY=1")
        server.process.terminate()
        assert listener.recv(1000) == b"STOPPING=1"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--listen", "tcp://0.0.0.0:7070"), "edm keys new"),
        (("--listen", "nonsense"), "bad address"),
        (("--listen", "tcp://127.0.0.1:*", "--quota", "3X"), "bad size '3X'"),
        (("--transport", "inproc"), "needs mpi or zmq"),
        (("--transport", "mpi"), "in one MPI job"),
        (("--listen", "tcp://127.0.0.1:*", "-o", "transport.zmq.key=/nowhere"), "cannot read /nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, arguments, text):
    result = edm("dms", "--path", str(tmp_path), "--store", "memory", *arguments)
    assert result.returncode == 2
    assert text in result.stderr
    assert result.stderr.startswith("edm: ")
    assert result.stderr.count("\n") == 1


def test_keys_are_made_and_named(tmp_path):
    result = edm("keys", "new", str(tmp_path / "k"), "--name", "alice")
    assert result.returncode == 0
    assert (tmp_path / "k/edm.pub").read_text().split()[1] == "alice"
    assert edm("keys", "new", str(tmp_path / "k")).returncode == 2


class Launcher:
    """The launcher's end of control.sock, and a DMS started as it starts one."""

    def __init__(self, run_dir, **settings):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(run_dir / "control.sock"))
        self.listener.listen()
        self.listener.settimeout(SOON_S)
        resolve({"store": "memory", "transport": "zmq", "path": str(run_dir), **settings}).write(
            run_dir / "config.json"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edm.dms.process", str(run_dir / "config.json"), str(run_dir)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.line, _ = self.listener.accept()
        self.line.settimeout(SOON_S)
        self.lines = self.line.makefile("r")

    def event(self):
        """The next one that is not of the process's start."""
        while (event := json.loads(self.lines.readline()))["event"] == "started":
            """So that the launcher knows whom to watch."""
        return event

    def hang_up(self):
        self.lines.close()
        self.line.close()

    def close(self):
        self.hang_up()
        self.listener.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def launcher(tmp_path):
    """Call it for a launcher with a DMS."""
    started = []

    def start(**settings):
        made = Launcher(tmp_path, **settings)
        started.append(made)
        return made

    yield start
    for made in started:
        made.close()


def test_a_launched_dms_reports_readiness_ignores_ctrl_c_and_ends_after_the_goodbye(launcher, tmp_path):
    made = launcher()
    event = made.event()
    assert (event["role"], event["event"], event["pid"]) == ("dms", "ready", made.process.pid)
    transport, _, _ = meet(event["where"], tmp_path)
    made.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert made.process.poll() is None
    transport.close()
    assert made.process.wait(SOON_S) == 0
    assert made.process.stdout.read() == b""


def test_a_launched_dms_reports_why_it_cannot_run(launcher, tmp_path):
    (tmp_path / "pages.sock").mkdir()
    made = launcher()
    event = made.event()
    assert event["event"] == "error"
    assert "cannot listen" in event["message"]
    assert made.process.wait(SOON_S) == 2


def test_a_launched_dms_outlives_its_launcher_only_while_it_has_clients(launcher, tmp_path):
    made = launcher()
    transport, channel, instance = meet(made.event()["where"], tmp_path)
    made.hang_up()
    time.sleep(1.2)
    refs, pages = batch_of(instance << 32, [1], version=1)
    assert channel.evict(refs, memoryview(pages)) == ""
    transport.close()
    assert made.process.wait(SOON_S) == 0


def test_a_launched_dms_without_clients_ends_with_its_launcher(launcher):
    made = launcher()
    made.event()
    made.hang_up()
    assert made.process.wait(SOON_S) == 0


RANK = """
import sys
from pathlib import Path
from edm.types import RunContext
from edm.plugins.transport_mpi import MpiOptions, open_transport
from edm.errors import UsageError
try:
    open_transport(MpiOptions(), RunContext(Path("."), Path("."), sys.argv[1]))
except UsageError as error:
    sys.stdout.write(f"{error}\\n")
"""


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        (["-n", "2", "dm-handler"], "has no memory server"),
        (["-n", "2", "dms"], "has no DM-Handler"),
        (["-n", "1", "dms"], "has a single process"),
    ],
)
def test_a_job_of_the_wrong_ranks_is_one_clear_line(ranks, text):
    *count, role = ranks
    result = subprocess.run(
        [find_mpiexec(), *count, sys.executable, "-c", RANK, role], capture_output=True, text=True, timeout=60
    )
    lines = result.stdout.splitlines()
    assert len(lines) == int(count[1])
    assert all(text in line and "mpiexec -n 1 edm dms" in line for line in lines)


@pytest.mark.mpi
def test_memory_servers_without_a_dm_handler_say_so_and_end():
    result = subprocess.run(
        [find_mpiexec(), "-n", "2", *EDM, "dms", "--transport", "mpi"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    # One line at least: the launcher may end the other rank before it has said the same.
    lines = [line for line in result.stderr.splitlines() if line.startswith("edm: ")]
    assert lines
    assert all("has no DM-Handler" in line for line in lines)
    assert "MPI routine" not in result.stderr + result.stdout


@pytest.mark.mpi
def test_a_rank_with_a_mistake_ends_the_job_at_once(tmp_path):
    began = time.monotonic()
    result = subprocess.run(
        [find_mpiexec(), "-n", "1", *EDM, "dms", "--path", str(tmp_path), "--store", "nosuch",
         ":", "-n", "1", sys.executable, "-c", RANK, "dm-handler"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2
    assert "unknown store 'nosuch'" in result.stderr
    assert time.monotonic() - began < 30


@pytest.mark.mpi
def test_a_memory_server_leaves_nothing_when_the_other_rank_does_not_come(tmp_path):
    result = subprocess.run(
        [find_mpiexec(), "-n", "1", *EDM, "dms", "--transport", "mpi",
         ":", "-n", "1", *EDM, "run", "--local-memory", "4M", "--store", "nosuch", "--", "true"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 2
    assert "unknown" in result.stderr
    assert not list(tmp_path.glob("edm-*"))


@pytest.mark.mpi
def test_dm_handlers_without_a_memory_server_say_so_and_exit_2():
    result = subprocess.run(
        [find_mpiexec(), "-n", "2", *EDM, "run", "--local-memory", "4M", "--", "true"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = [line for line in result.stderr.splitlines() if line.startswith("edm: ")]
    assert lines
    assert all("has no memory server" in line for line in lines)
    assert "Traceback" not in result.stderr
    assert result.returncode == 2


def test_an_mpi_program_under_edm_sees_no_job_of_edms():
    job = {
        "PMI_RANK": "0",
        "PMIX_RANK": "1",
        "OMPI_COMM_WORLD_RANK": "2",
        "HYDI_CONTROL_FD": "7",
        "MPI_LOCALRANKID": "0",
    }
    mine = {"PATH": "/bin", "OPAL": "a stone", "HOME": "/"}
    assert strip_mpi_environment(job | mine) == mine
    assert under_mpi(job)
    assert not under_mpi(mine)


HANDLER = """
import sys
from pathlib import Path
import numpy as np
from edm.plugins.transport_mpi import MpiOptions, open_transport
from edm.testing.pages import batch_of
from edm.testing.transport_cases import wanted
from edm.types import RunContext
transport = open_transport(MpiOptions(), RunContext(Path("."), Path("."), "dm-handler"))
channel = transport.connect()
instance = channel.control({"op": "hello", "client": "test", "protocol": 1})["instance"]
for version in range(1, 30):
    refs, pages = batch_of(instance << 32, np.arange(200), version, seed=instance)
    assert channel.evict(refs, memoryview(pages)) == ""
    asked, into = wanted(instance << 32, np.arange(200)), bytearray(len(pages))
    channel.fetch(asked, memoryview(into))
    assert into == pages
transport.close()
sys.stdout.write(f"{instance}\\n")
"""


@pytest.mark.mpi
@pytest.mark.parametrize("servers", ["1", "2"])
def test_several_handlers_share_the_memory_servers_of_a_job(tmp_path, servers):
    result = subprocess.run(
        [find_mpiexec(), "-n", servers, *EDM, "dms", "--store", "memory",
         ":", "-n", "3", sys.executable, "-c", HANDLER],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split()) == ["1", "2", "3"]


SHARING = """
import sys, time
from pathlib import Path
import numpy as np
from edm.config.options import build_options
from edm.registry import Registry
from edm.testing.pages import batch_of
from edm.testing.transport_cases import wanted
from edm.types import PAGE_BYTES, RunContext
name, *dms = sys.argv[1:]
spec, here = Registry().transport(name), Path()
transport = spec.open(build_options(spec.options, {"dms": dms} if dms else {}, {"dms": "test"}, name),
                      RunContext(here, here, "dm-handler", 30.0))
channel = transport.connect()
instance = channel.control({"op": "hello", "client": "test", "protocol": 1})["instance"]
# Half of them ask for large batches, half for single pages.
size = 64 if instance % 2 else 1
refs, pages = batch_of(instance << 32, np.arange(size), version=1, seed=instance)
assert channel.evict(refs, memoryview(pages)) == ""
Path(f"ready-{instance}").touch()
while len(list(here.glob("ready-*"))) < 8:
    time.sleep(0.01)
count, end = 0, time.monotonic() + 2
while time.monotonic() < end:
    asked, into = wanted(instance << 32, np.arange(size)), bytearray(len(pages))
    channel.fetch(asked, memoryview(into))
    assert into == pages
    count += 1
Path(f"count-{instance}").write_text(str(count))
while len(list(here.glob("count-*"))) < 8:
    time.sleep(0.01)
transport.close()
"""


@pytest.mark.parametrize("transport", [pytest.param("mpi", marks=pytest.mark.mpi), "zmq"])
def test_every_one_of_eight_clients_in_processes_of_their_own_gets_its_share(tmp_path, dms, transport):
    client = [sys.executable, "-c", SHARING, transport]
    if transport == "mpi":
        server = [find_mpiexec(), "-n", "1", *EDM, "dms", "--store", "memory"]
        commands = [[*server, ":", "-n", "8", *client]]
    else:
        endpoint = dms("--listen", f"ipc://{tmp_path}/s").wait_ready()
        commands = [[*client, endpoint]] * 8
    running = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in running:
        assert (process.communicate(timeout=90)[1], process.returncode) == ("", 0)
    counts = [int(path.read_text()) for path in tmp_path.glob("count-*")]
    assert len(counts) == 8
    assert min(counts) > max(counts) / 8, counts
