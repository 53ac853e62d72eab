"""One run, from the first process to the last file: start, watch, finish."""

from __future__ import annotations

import ctypes
import os
import queue
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from edm.errors import EdmError, UsageError
from edm.launch.control import Control, Event
from edm.launch.program import KEPT, Ending, Program, block_signals
from edm.launch.revival import Revival, roles_of
from edm.launch.signals import wait_signal
from edm.launch.strays import Strays

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edm.config import Config
    from edm.launch.rundir import RunDir
    from edm.launch.user import User
    from edm.types import LaunchPlan

READY_S: Final = 60.0
TICK_S: Final = 0.1
END_S: Final = 20.0
TITLES: Final = {"dm-handler": "DM-Handler", "dms": "memory server"}
PR_SET_CHILD_SUBREAPER: Final = 36
LISTS: Final = ("LD_PRELOAD", "GLIBC_TUNABLES")
"""Variables that are colon-separated lists: ours goes first, the user's stays."""


@attrs.define
class Outcome:
    """How a run went.

    counters: the engine's last. peak_bytes: largest anonymous resident memory sampled outside. uncaptured: a process's
    shared memory by kind, in bytes, when it had most.
    """

    ending: Ending
    seconds: float
    counters: dict[str, int]
    peak_bytes: int
    warnings: list[str]
    startup_s: float
    uncaptured: dict[str, int]


class RunFailed(EdmError):
    """EDM itself could not go on; the program was ended rather than shown wrong bytes."""


class Session:
    """The processes of one run."""

    def __init__(self, config: Config, run_dir: RunDir, roles: Sequence[str]) -> None:
        self._config = config
        self._run_dir = run_dir
        self._waiting_for = set(roles)
        # Before any thread: one that does not block SIGCHLD would swallow it.
        self._mask = block_signals()
        self._ready_once = False
        self._control = Control(run_dir.sockets / "control.sock")
        self._plan: LaunchPlan | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._revival = Revival(run_dir, config.restarts)
        self._additions: Mapping[str, str] = {}
        self._alive: dict[str, tuple[int, int]] = {}
        self._finished = self._finishing = False
        self._failure: str | None = None
        self._mistake = False
        self.counters: dict[str, int] = {}
        self.uncaptured: dict[str, int] = {}
        self._captured_now: list[int] | None = None
        self._capturing = config.fault_source == "uffd"
        self.warnings: list[str] = []
        self._pids: list[int] | None = None
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def start(self, plan: LaunchPlan) -> None:
        """Start the plan's processes and wait until each has reported ready; raises `RunFailed`."""
        self._plan = plan
        for command in plan.commands:
            self._processes.append(self._start(command))
        self.wait_ready()

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        assert self._plan is not None
        with self._run_dir.log("edm").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._plan.environment},
                start_new_session=True,  # a terminal's keys are for the program
                preexec_fn=_unblock_signals,  # noqa: PLW1509 (one async-signal-safe call)
            )
        KEPT.add(process.pid)
        return process

    def wait_ready(self) -> None:
        """Wait until every role has reported ready; raises `RunFailed`, or `UsageError` for a user's mistake."""
        end = time.monotonic() + READY_S
        while self._waiting_for:
            self._take_events(TICK_S)
            if self._failure:
                # Nothing has run yet: what was asked for cannot be had.
                raise (UsageError if self._mistake else RunFailed)(self._failure)
            if wait_signal((signal.SIGINT, signal.SIGTERM), 0):
                raise KeyboardInterrupt
            dead = [p for p in self._processes if p.poll() is not None]
            if dead and self._waiting_for:
                self._take_events(TICK_S)
                raise RunFailed(self._failure or f"a process of the run ended while starting: {self._log_tail()}")
            if time.monotonic() > end:
                missing = " and ".join(sorted(self._waiting_for))
                raise RunFailed(f"no sign of the {missing} after {READY_S:.0f} s: {self._log_tail()}")
        self._ready_once = True

    def run(
        self, path: str, command: Sequence[str], tick: Callable[[Session], None], user: User | None = None
    ) -> Outcome:
        """Run the program to its end, as `user` if one is given. `tick` is called ten times a second."""
        program = Program(path, list(command), self._environment(), self._mask, user)
        strays = Strays(program.pid)
        peak = 0
        ending = None
        while ending is None:
            ending = program.wait(TICK_S)
            self._take_events(0)
            peak = max(peak, resident_bytes(program.pid))
            if self._failure and ending is None:
                self.end_programs([program.pid])
                program.wait(END_S)
                raise RunFailed(self._failure)
            if self._captured_now is not None and self._capturing and not self._revival.under_way:
                for text in strays.look(self._captured_now):
                    self._warn(text)
            tick(self)
        self._wait_revived()
        seconds = time.monotonic() - program.started
        self._wait_for_descendants(ending)
        self.finish()
        return Outcome(ending, seconds, self.counters, peak, self.warnings, 0.0, self.uncaptured)

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        for key, value in self._additions.items():
            theirs = environment.get(key) if key in LISTS else None
            environment[key] = f"{value}:{theirs}" if theirs else value
        return environment

    def _take_events(self, timeout_s: float) -> None:
        for role, (pid, pidfd) in list(self._alive.items()):
            # Not by its socket's end: the holder has a copy of it.
            if select.select([pidfd], [], [], 0)[0]:
                self._take(Event(role, "gone", {"pid": pid}))
        self._drain_events(timeout_s)
        self._revive()  # with all that was said before the end

    def _drain_events(self, timeout_s: float) -> None:
        try:
            self._take(self._control.events.get(timeout=timeout_s) if timeout_s else self._control.events.get_nowait())
            while True:
                self._take(self._control.events.get_nowait())
        except queue.Empty:
            return

    def _take(self, event: Event) -> None:
        details = event.details
        match event.event:
            case "ready":
                self._ready(event.role, details)
            case "holder":
                self._revival.held(int(details["holder"]), int(details["segment"]))
            case "counters" | "finished":
                self.counters = details["counters"]
                self.uncaptured = details.get("uncaptured", self.uncaptured)
                self._captured_now = details.get("pids", self._captured_now)
                self._finished |= event.event == "finished"
                if details.get("error"):
                    self._warn(f"internal: {details['error']}")
            case "warning":
                self._warn(details["message"])
            case "pids":
                self._pids = details["pids"]
            case "error" if details.get("lost") and self._plan is not None and "dms" in self._alive:
                self._gone("dms", self._alive["dms"][0])  # another comes, and another DM-Handler with it
            case "error":
                self._failure = self._failure or str(details["message"])
                self._mistake = bool(details.get("mistake"))
            case "gone":
                self._gone(event.role, int(details["pid"]))

    def _ready(self, role: str, details: Mapping[str, Any]) -> None:
        self._waiting_for.discard(role)
        self._watch(role, int(details["pid"]))
        self._additions = details.get("environment", self._additions)
        self._revival.instances = details.get("instances", self._revival.instances)
        if not self._waiting_for and self._revival.done():
            self._warn_each(f"the {TITLES[role]} is there again; the program goes on")
        if self._finishing and role == "dm-handler":
            self._control.send("dm-handler", "finish")  # the one that was told has died of it

    def _gone(self, role: str, pid: int) -> None:
        if role in self._alive:
            if self._alive[role][0] != pid:
                return  # the last that is heard of one that died before
            os.close(self._alive.pop(role)[1])
        elif role not in self._waiting_for or self._revival.under_way:
            return
        if self._finished or role not in self._needed():
            return
        why = f"the {TITLES[role]} has died"
        if self._plan is None:
            self._failure = self._failure or f"{why}: {self._log_tail()}"
            return
        together = {
            other for command in self._plan.commands if role in roles_of(command) for other in roles_of(command)
        }
        if not self._ready_once or not self._revival.begin(with_handler="dm-handler" in together):
            self._failure = self._failure or f"{why}: {self._revival.why_not or self._log_tail()}"
            return
        self._waiting_for.add(role)
        self._warn_each(f"{why}; starting another, the program waits meanwhile")

    def _revive(self) -> None:
        """Start again what died, once the rest of what was started with it has ended too."""
        if not self._revival.under_way or self._failure or self._plan is None:
            return
        for number, command in enumerate(self._plan.commands):
            process, roles = self._processes[number], set(roles_of(command))
            if not roles & self._waiting_for:
                continue
            if process.poll() is None:
                # Started and not ready yet; or an MPI job of which a rank has died, and which ends in a moment.
                if self._revival.started.get(number) is not process and self._revival.overdue():
                    _send_group(process.pid, signal.SIGKILL)
                if self._revival.late():
                    self._failure = f"no sign of the {' and '.join(sorted(self._waiting_for))} after {READY_S:.0f} s"
                continue
            if self._revival.bereaved():
                continue  # perhaps its last word, which names another holder, is on its way
            if self._revival.started.get(number) is process and not self._revival.again():
                self._failure = f"what died could not be started again: {self._log_tail()}"
                return
            for role in roles & set(self._alive):
                os.close(self._alive.pop(role)[1])
            self._waiting_for |= roles
            self._processes[number] = self._revival.started[number] = self._start(command)

    def _watch(self, role: str, pid: int) -> None:
        try:
            self._alive[role] = (pid, os.pidfd_open(pid))
        except ProcessLookupError:
            self._take(Event(role, "gone", {"pid": pid}))

    def _needed(self) -> set[str]:
        """Whose end is a failure: at the end of a run the DMS leaves first."""
        return {"dm-handler"} if self._finishing else {"dm-handler", "dms"}

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self._warn_each(text)

    def _warn_each(self, text: str) -> None:
        self.warnings.append(text)
        print(f"edm: warning: {text}", file=sys.stderr, flush=True)

    def _wait_for_descendants(self, ending: Ending) -> None:
        """Processes the program left behind have their pages here: we stay as long as they do."""
        said, since, asked = False, time.monotonic(), ending.asked
        while True:
            # The DM-Handler does not know a program between its exec and its hand-over; its environment tells.
            pids = self._captured() or self._captured_last()
            if not pids:
                return
            if asked:
                for pid in pids:
                    _send(pid, signal.SIGTERM if time.monotonic() - since < END_S / 4 else signal.SIGKILL)
            elif time.monotonic() - since > 1 and not said:
                said = True
                print(
                    f"edm: the program has ended; still serving {len(pids)} process(es) it started "
                    f"({', '.join(map(str, pids[:5]))}); Ctrl-C ends them",
                    file=sys.stderr,
                )
            info = wait_signal((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD), TICK_S)
            if info is not None and info.si_signo != signal.SIGCHLD:
                asked, since = True, time.monotonic()
            _reap()
            if self._failure:
                self.end_programs([])
                return

    def _captured(self) -> list[int]:
        self._pids = None
        self._wait_revived()
        end = time.monotonic() + END_S
        if not self._control.send("dm-handler", "pids"):
            return []
        while self._pids is None and not self._failure and time.monotonic() < end:
            self._take_events(TICK_S)
        return self._pids or []

    def finish(self) -> None:
        """Ask the DM-Handler to finish and wait for every process; raises `RunFailed`."""
        self._wait_revived()
        self._finishing = True
        self._control.send("dm-handler", "finish")
        end = time.monotonic() + 2 * END_S
        while not self._finished and not self._failure and time.monotonic() < end:
            self._take_events(TICK_S)
        if self._failure:
            raise RunFailed(self._failure)
        self._finished = True
        for process in self._processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._warn(f"process {process.pid} did not end by itself; ended")
                break

    def _wait_revived(self) -> None:
        while self._revival.under_way and not self._failure:
            self._take_events(TICK_S)

    def end_programs(self, pids: Sequence[int]) -> None:
        """Kill every captured process: without their pages they must not go on."""
        for pid in {*pids, *self._captured_last()}:
            _send(pid, signal.SIGKILL)

    def _captured_last(self) -> list[int]:
        """Every process below us that carries our library, found without the DM-Handler's help."""
        socket = self._additions.get("EDM_INTERNAL_SOCK", "")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if socket and f"EDM_INTERNAL_SOCK={socket}\0".encode() in (entry / "environ").read_bytes() + b"\0":
                    found.append(int(entry.name))
            except OSError:
                continue  # it has just ended, or is not ours
        return found

    def close(self) -> None:
        """Leave no process behind, whatever happened."""
        if not self._finished:
            self.end_programs([])
        self._control.close()
        for _, pidfd in self._alive.values():
            os.close(pidfd)
        self._alive.clear()
        if not self._finished:
            self._revival.end_holder()
        for process in self._processes:
            try:
                process.wait(5.0 if self._finished else 0.5)
                continue
            except subprocess.TimeoutExpired:
                _send_group(process.pid, signal.SIGTERM)
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                _send_group(process.pid, signal.SIGKILL)
                process.wait()
        _reap()

    def _log_tail(self) -> str:
        try:
            lines = self._run_dir.log("edm").read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "nothing in its log"


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


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _send_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _reap() -> None:
    while True:
        try:
            info: Any = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if info is None or info.si_pid == 0 or info.si_pid in KEPT:
            return
        os.waitpid(info.si_pid, os.WNOHANG)
