"""What the launcher does to processes, its own and the programs."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edm.launch.program import KEPT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


NO_THREADS: Final = {"OPENBLAS_NUM_THREADS": "1"}
"""numpy's would start with it, before a process of EDM's gives its privileges up, and keep them."""


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start one of the run's processes; what it says goes to `log`, `environment` is set beside ours."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **NO_THREADS, **environment},
            start_new_session=True,  # a terminal's keys are for the program
            preexec_fn=_unblock_signals,  # noqa: PLW1509 (one async-signal-safe call)
        )
    KEPT.add(process.pid)
    return process


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def end(processes: Iterable[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Wait for processes to end by themselves; then have them, and what they started, end."""
    for process in processes:
        try:
            process.wait(grace_s)
            continue
        except subprocess.TimeoutExpired:
            send_group(process.pid, signal.SIGTERM)
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            send_group(process.pid, signal.SIGKILL)
            process.wait()


def carrying(variable: str) -> list[int]:
    """Every process whose environment has NAME=VALUE."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{variable}\0".encode() in (entry / "environ").read_bytes() + b"\0":
                found.append(int(entry.name))
        except OSError:
            continue  # it has just ended, or is not ours
    return found


def resident_bytes(pid: int) -> int:
    """Anonymous resident memory of a process, 0 when it has gone. Source: proc_pid_status(5), RssAnon."""
    try:
        with Path(f"/proc/{pid}/status").open() as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


def last_line(log: Path) -> str:
    """The last words of a log."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "nothing in its log"


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def send_group(pid: int, number: int) -> None:
    """Send a signal to a process group that may have ended."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def reap() -> None:
    """Wait for all that has ended and that nobody else waits for."""
    while True:
        try:
            info: Any = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if info is None or info.si_pid == 0 or info.si_pid in KEPT:
            return
        os.waitpid(info.si_pid, os.WNOHANG)
