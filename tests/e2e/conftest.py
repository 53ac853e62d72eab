"""`edm run` as a user calls it: real userfaultfd, real MPI ranks, real programs."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest

from edm._native import lib

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"
sys.path.insert(0, str(HERE))  # what the tests of this folder share


def pytest_collection_modifyitems(items):
    result = lib.edm_uffd_check()
    if result:
        reason = f"userfaultfd is not permitted here: {os.strerror(-result)}"
        for item in items:
            if "uffd" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@attrs.frozen
class Ran:
    """What a finished `edm run` left: exit status as subprocess gives it (-N: died of signal N)."""

    status: int
    out: bytes
    err: str


def marked(mark):
    """Pid → (name, command line) of the processes whose environment holds `mark`."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes():
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found[int(entry.name)] = (entry / "comm").read_text().strip(), line
        except OSError:
            continue
    return found


def edm_processes(mark):
    """Pid → title of the processes of EDM, sidecars included, whose environment holds `mark`."""
    found = {pid: line if line.startswith("edm: ") else name for pid, (name, line) in marked(mark).items()}
    return {pid: title for pid, title in found.items() if title.startswith("edm: ")}


class Edm:
    """Starts `edm run …` with its directories under `directory`, and looks after what it leaves."""

    def __init__(self, directory):
        self.directory = directory
        self.sockets = directory / "run"
        self.files = directory / "files"
        for path in (self.sockets, self.files):
            path.mkdir()
        # SPT_NOENV: titles must not overwrite the environment, by which we know our processes.
        self.environment = {
            **os.environ,
            "SPT_NOENV": "1",
            "XDG_RUNTIME_DIR": str(self.sockets),
            "TMPDIR": str(self.files),
        }
        self.environment.pop("LD_PRELOAD", None)
        self._mark = f"XDG_RUNTIME_DIR={self.sockets}".encode()
        self.python = sys.executable
        self._started = []

    def start(self, *arguments, wrapper=(), **keywords):
        """Start `edm ARGUMENTS` in a session of its own, by the command `wrapper` if one is given."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        keywords = {**streams, "env": self.environment, **keywords}
        process = subprocess.Popen(
            [*wrapper, self.python, "-m", "edm", *map(str, arguments)],
            start_new_session=True,
            # Whoever started the tests may ignore it (a shell's background job does), and programs inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **keywords,
        )
        self._started.append(process)
        return process

    def __call__(self, *arguments, timeout=90, **keywords):
        """Run `edm ARGUMENTS` to its end."""
        process = self.start(*arguments, **keywords)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.end(process)
            out, err = process.communicate()
            pytest.fail(f"edm {' '.join(map(str, arguments))} hung; stderr: {err.decode(errors='replace')[-2000:]}")
        return Ran(process.returncode, out, err.decode(errors="replace"))

    def run(self, *arguments, **keywords):
        """Run `edm run ARGUMENTS`."""
        return self("run", *arguments, **keywords)

    def left_behind(self, within_s=60.0):
        """Processes and files of ours that are still there; empty if all is tidy within the time."""
        end = time.monotonic() + within_s
        while True:
            processes = edm_processes(self._mark)
            files = [str(path) for base in (self.sockets, self.files) for path in base.iterdir()]
            if (not processes and not files) or time.monotonic() > end:
                return processes, files
            time.sleep(0.05)

    def pids(self, names):
        """Pids of processes of this runner's that are called one of `names`: EDM's titles, or programs."""
        return [pid for pid, said in marked(self._mark).items() if not set(names).isdisjoint(said)]

    def end(self, process):
        """Kill the session of a process started here."""
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)

    def close(self):
        for process in self._started:
            self.end(process)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()
        for pid in marked(self._mark):  # programs too, that have outlived their launcher
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def make_edm():
    """`Edm` itself, for tests that start many, one after the other."""
    return Edm


@pytest.fixture
def edm(tmp_path):
    runner = Edm(tmp_path)
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Compile one of tests/e2e/programs, once: `program("working_set")`, `program("signals", "musl-gcc")`."""
    directory = tmp_path_factory.mktemp("programs")

    def build(name, compiler=None):
        target = directory / f"{compiler or ''}{name}"
        if not target.exists():
            compiler = compiler or os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
            subprocess.run(
                [compiler, "-O2", "-g", "-pthread", "-o", target, PROGRAMS / f"{name}.c"], check=True, timeout=60
            )
        return target

    return build


@pytest.fixture
def working(edm, program):
    """Start working_set under EDM, at work until it is let end: `working(*options, megabytes=8, …)`; see working.py."""
    from working import Working

    def start(*options, megabytes=8, rounds=1, by=edm, path=None, **keywords):
        command = (path or program("working_set"), megabytes, rounds)
        sign = by.directory / "at-work"
        return Working(by.start("run", *options, "--", *command, sign, **keywords), command, sign)

    return start
