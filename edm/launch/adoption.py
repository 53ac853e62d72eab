"""`edm adopt`: a program whose DM-Handler has died, and for which none is started by itself, gets another.

Where the launcher lives it is asked, and does what it would have done by itself. Else what it would have started is
started here; like after a launcher's death, that goes on until the programs have ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from edm.config import Config
from edm.dms import status
from edm.dump.asking import capture_of
from edm.errors import EdmError, NativeError, UsageError
from edm.handler.inheritance import alive, ending, started_at
from edm.launch.run import make_plan, planned_roles
from edm.launch.rundir import RunDir
from edm.launch.session import READY_S, RunFailed, Session
from edm.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

ANSWER_S: Final = 10.0
"""A launcher that lives says at once that it has begun."""
DMS_END_S: Final = 30.0


class NotAdopted(EdmError):
    """The program waits still, or has ended; the text says why."""


@attrs.frozen
class Adopted:
    """Who serves the program now. by: "launcher", or "edm adopt" itself."""

    pid: int
    handler_pid: int
    by: str
    seconds: float


def adopt(pid: int) -> Adopted:
    """Have process `pid` served again; raises `UsageError` where there is nothing to do, or `NotAdopted`."""
    began = time.monotonic()
    run_dir = _run_dir_of(pid)
    with _alone(run_dir):
        by = "launcher" if _asked_launcher(pid, run_dir) else "edm adopt"
        if by != "launcher":
            _start_here(pid, run_dir)
    return Adopted(pid, alive(run_dir, "handler"), by, round(time.monotonic() - began, 3))


def _run_dir_of(pid: int) -> Path:
    """The directory of the run that captured a process; what the process says is not trusted."""
    if not started_at(pid):
        raise UsageError(f"there is no process {pid}")
    try:
        capture = capture_of(pid)
    except NativeError as error:
        if error.errno in {errno.EPERM, errno.EACCES}:
            raise UsageError(f"process {pid} may not be looked at: run this as root, or as its user") from error
        raise NotAdopted(f"process {pid}: {os.strerror(error.errno)}") from error
    if capture is None:
        raise UsageError(f"process {pid} was not captured by EDM")
    run_dir = Path(capture.path).parent
    try:
        facts = [(run_dir / name).lstat() for name in (".", "config.json")]
    except OSError as error:
        raise NotAdopted(f"process {pid}: the directory of its run is gone ({run_dir}: {error.strerror})") from error
    for fact in facts:
        if fact.st_uid != os.geteuid():
            raise UsageError(f"the run of process {pid} belongs to user {fact.st_uid}: run this as that user")
        if fact.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UsageError(f"process {pid} names {run_dir}, which others may write to")
    return run_dir


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    with (run_dir / "adopt.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("another 'edm adopt' is at it") from None
        yield


# ---- where the launcher lives


def _asked_launcher(pid: int, run_dir: Path) -> bool:
    """Whether there was one, and it has seen to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(ANSWER_S)
        try:
            line.connect(str(run_dir / "control.sock"))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        question = {"role": f"adopt-{os.getpid()}", "pid": os.getpid(), "event": "adopt"}
        line.sendall(json.dumps(question).encode() + b"\n")
        with line.makefile("r") as answers:
            try:
                answer = _answer(answers)
                if answer["command"] == "starting":
                    line.settimeout(2 * READY_S)
                    answer = _answer(answers)
            except TimeoutError:
                raise NotAdopted(f"the launcher of process {pid} does not answer (is it stopped?)") from None
    if answer["command"] == "failed":
        raise NotAdopted(f"the launcher could not start another: {answer.get('message', '')}")
    if answer["command"] != "served":
        raise UsageError(f"process {pid} is served: {answer['command']}")
    return True


def _answer(lines: Any) -> dict[str, str]:
    line = lines.readline()
    if not line:
        raise NotAdopted("the launcher has ended meanwhile, and the program with it")
    answer: dict[str, str] = json.loads(line)
    return answer


# ---- where it does not


def _start_here(pid: int, run_dir: Path) -> None:
    end = time.monotonic() + ANSWER_S
    while (handler := alive(run_dir, "handler")) and ending(handler) and time.monotonic() < end:
        time.sleep(0.02)
    if handler:
        raise UsageError(f"process {pid} is served by process {handler}: nothing has died")
    if not alive(run_dir, "holder"):
        raise NotAdopted(f"the holder of process {pid} has died too: nothing has its pages any more")
    config = Config.read(run_dir / "config.json")
    if config.path is None or not config.path.is_dir():
        raise NotAdopted(f"the files of its run are gone: {config.path}")
    _end_dms(run_dir)
    (run_dir / "control.sock").unlink(missing_ok=True)  # the launcher's, which is gone
    directories = RunDir(sockets=run_dir, files=config.path)
    plan = make_plan(config, Registry(), directories)
    session = Session(config, directories, planned_roles(plan))
    try:
        session.start(plan)
    except (RunFailed, UsageError) as error:
        session.close(programs_too=False)
        raise NotAdopted(f"another could not be started: {error}") from error
    except BaseException:
        session.close(programs_too=False)
        raise
    session.leave()


def _end_dms(run_dir: Path) -> None:
    """A memory server of the run that lives still has the stores open, and is nobody's any more."""
    pid = status.listening_pid(run_dir)
    if not pid:
        return
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if not select.select([pidfd], [], [], DMS_END_S)[0]:
            raise NotAdopted(f"the memory server of the run (process {pid}) does not end")
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)
