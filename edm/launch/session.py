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
from typing import TYPE_CHECKING, Any, Final

import attrs

from edm.errors import EdmError, UsageError
from edm.launch import processes
from edm.launch.control import Control, Event
from edm.launch.limits import lifted_limits
from edm.launch.program import Ending, Program, block_signals
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
FIRST_TICK_S: Final = 0.005
"""Between the first two looks for what a program left behind: mostly the DM-Handler has not noticed its end yet."""
END_S: Final = 20.0
LAST_WORD_S: Final = 2.0
LEFT_BEHIND_S: Final = 3.0
"""So long what a program leaves behind is not told of: helpers end in a moment, once they see that it has gone."""
TITLES: Final = {"dm-handler": "DM-Handler", "dms": "memory server"}
PR_SET_CHILD_SUBREAPER: Final = 36
LISTS: Final = ("LD_PRELOAD",)
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
        self._revival = Revival(config.restarts)
        # Roles that died, are not started again, and that the program waits for; who has asked for them meanwhile.
        self._left: set[str] = set()
        self._adopters: list[str] = []
        self._program_pid = 0
        self._additions: Mapping[str, str] = {}
        self._alive: dict[str, tuple[int, int]] = {}
        self._finished = False
        # What the DM-Handler is to answer: another one is asked again, where the one that was asked has died of it.
        self._question: str | None = None
        self._failure: str | None = None
        self._mistake = False
        self._why = ""  # what was started again could not be, as it has said itself
        self.counters: dict[str, int] = {}
        self.uncaptured: dict[str, int] = {}
        self._captured_now: tuple[list[int], float] | None = None
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
        return processes.start(command, self._run_dir.log("edm"), self._plan.environment)

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
        program = Program(path, list(command), self._environment(), self._mask, user, lifted_limits())
        self._program_pid = program.pid
        strays = Strays(program.pid)
        peak = 0
        ending = None
        while ending is None:
            ending = program.wait(TICK_S)
            self._take_events(0)
            peak = max(peak, processes.resident_bytes(program.pid))
            if self._failure and ending is None:
                self.end_programs([program.pid])
                program.wait(END_S)
                raise RunFailed(self._failure)
            if self._captured_now is not None and self._capturing and not self._revival.under_way and not self._left:
                for text in strays.look(*self._captured_now):
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
                self._hear_out(role)
                self._take(Event(role, "gone", {"pid": pid}))
        self._drain_events(timeout_s)
        self._revive()  # with all that was said before the end

    def _hear_out(self, role: str) -> None:
        """A DM-Handler that has said "finished" ends its holder and itself: that may be seen before it is read."""
        end = time.monotonic() + LAST_WORD_S
        while role == "dm-handler" and self._finishing and not self._revival.holder_lives:
            if self._finished or time.monotonic() > end:
                return
            self._drain_events(TICK_S)

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
            case "started" if self._revival.under_way:
                self._watch(event.role, int(details["pid"]))
            case "ready":
                self._ready(event.role, details)
            case "holder":
                self._revival.held(int(details["holder"]), int(details["segment"]))
            case "counters" | "finished":
                self._take_counters(details)
                self._finished |= event.event == "finished"
            case "warning":
                self._warn(details["message"])
            case "pids":
                self._pids = details["pids"]
            case "error":
                self._take_error(event.role, str(details["message"]), details)
            case "adopt":
                self._adopt(event.role)
            case "gone":
                self._gone(event.role, int(details["pid"]))

    def _take_counters(self, details: Mapping[str, Any]) -> None:
        self.counters = details["counters"]
        self.uncaptured = details.get("uncaptured", self.uncaptured)
        if "pids" in details:
            self._captured_now = details["pids"], float(details["at"])
        if details.get("error"):
            self._warn(f"internal: {details['error']}")

    def _take_error(self, role: str, message: str, details: Mapping[str, Any]) -> None:
        if details.get("lost") and self._plan is not None and "dms" in self._alive:
            self._gone("dms", self._alive["dms"][0])  # another comes, and another DM-Handler with it
        elif details.get("internal") and self._ready_once and self._plan is not None:
            self._warn_each(message)  # its end comes next, and is like any other
        elif self._revival.under_way and role in self._waiting_for and not details.get("mistake"):
            self._warn_each(message)
            self._why = message  # its end comes next, and it is tried again: this may pass
        elif self._revival.under_way and self._waits:
            self._leave_waiting(message)
        else:
            self._failure = self._failure or message
            self._mistake = bool(details.get("mistake"))

    def _ready(self, role: str, details: Mapping[str, Any]) -> None:
        self._waiting_for.discard(role)
        self._watch(role, int(details["pid"]))
        self._additions = details.get("environment", self._additions)
        self._revival.instances = details.get("instances", self._revival.instances)
        if not self._waiting_for and self._revival.done():
            self._why = ""
            self._warn_each(f"the {TITLES[role]} is there again; the program goes on")
            self._answer_adopters("served")
        if self._question and role == "dm-handler":
            self._control.send("dm-handler", self._question)

    def _gone(self, role: str, pid: int, *, latest: bool = False) -> None:
        """latest: it is not one that was before the one which is waited for."""
        if role in self._alive:
            if self._alive[role][0] != pid:
                return  # the last that is heard of one that died before
            os.close(self._alive.pop(role)[1])
        elif not latest and (role not in self._waiting_for or self._revival.under_way):
            return
        if role in self._left or self._finished or role not in self._needed():
            return
        why = f"the {TITLES[role]} has died"
        if self._plan is None:
            self._failure = self._failure or f"{why}: {self._log_tail()}"
            return
        numbers = [number for number, command in enumerate(self._plan.commands) if role in roles_of(command)]
        together = {other for number in numbers for other in roles_of(self._plan.commands[number])}
        with_handler = "dm-handler" in together
        if self._ready_once and self._revival.begin(with_handler=with_handler):
            for number in self._revival.started.keys() & numbers:
                self._revival.lost(number)
            self._waiting_for.add(role)
            self._warn_each(f"{why}; starting another, the program waits meanwhile")
        elif self._ready_once and self._waits and self._revival.possible(with_handler=with_handler):
            self._waiting_for |= together
            self._leave_waiting(f"{why}: {self._revival.why_not or self._log_tail()}")
        else:
            self._failure = self._failure or f"{why}: {self._revival.why_not or self._log_tail()}"

    @property
    def _finishing(self) -> bool:
        return self._question == "finish"

    @property
    def _waits(self) -> bool:
        """Whether the program waits for what is not started again, and is not ended."""
        return self._config.on_death == "wait" and not self._finishing

    def _leave_waiting(self, why: str) -> None:
        """Start nothing again before somebody asks for it."""
        self._left |= self._waiting_for
        self._waiting_for.clear()
        self._revival.stop()
        self._warn_each(f"{why}; the program waits: 'edm adopt {self._program_pid}' starts another")
        self._answer_adopters("failed", message=why)

    def _adopt(self, adopter: str) -> None:
        """Somebody asks for what was not started again."""
        with_handler = "dm-handler" in self._left
        if self._revival.under_way:
            self._adopters.append(adopter)
            self._control.send(adopter, "starting")
        elif not self._left:
            self._control.send(adopter, "nothing has died")
        elif not self._revival.begin(with_handler=with_handler, asked=True):
            self._control.send(adopter, "failed", message=self._revival.why_not)
        else:
            self._adopters.append(adopter)
            self._waiting_for, self._left = self._left, set()
            self._control.send(adopter, "starting")

    def _answer_adopters(self, answer: str, **details: str) -> None:
        for adopter in self._adopters:
            self._control.send(adopter, answer, **details)
        self._adopters.clear()

    def _give_up(self, why: str) -> None:
        """What died could not be started again."""
        if self._waits:
            self._leave_waiting(why)
        else:
            self._failure = why

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
                if self._revival.overdue(number, process):
                    processes.send_group(process.pid, signal.SIGKILL)
                if self._revival.late():
                    processes.send_group(process.pid, signal.SIGKILL)
                    missing = " and ".join(sorted(self._waiting_for))
                    self._give_up(f"no sign of the {missing} after {READY_S:.0f} s: {self._log_tail()}")
                    return
                continue
            if self._revival.bereaved():
                continue  # perhaps its last word, which names another holder, is on its way
            if self._revival.started.get(number) is process and not self._revival.again():
                self._give_up(f"what died could not be started again: {self._why or self._log_tail()}")
                return
            for role in roles & set(self._alive):
                os.close(self._alive.pop(role)[1])
            self._waiting_for |= roles
            self._processes[number] = self._start(command)
            self._revival.restarted(number, self._processes[number])

    def _watch(self, role: str, pid: int) -> None:
        if role in self._alive:
            os.close(self._alive.pop(role)[1])
        try:
            self._alive[role] = (pid, os.pidfd_open(pid))
        except ProcessLookupError:
            self._gone(role, pid, latest=True)

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
        said, since, asked, tick_s = False, time.monotonic(), ending.asked, FIRST_TICK_S
        while True:
            # The DM-Handler does not know a program between its exec and its hand-over; its environment tells.
            pids = self._captured() or self._captured_last()
            if not pids:
                return
            if asked:
                for pid in pids:
                    processes.send(pid, signal.SIGTERM if time.monotonic() - since < END_S / 4 else signal.SIGKILL)
            elif time.monotonic() - since > LEFT_BEHIND_S and not said:
                said = True
                print(
                    f"edm: the program has ended; still serving {len(pids)} process(es) it started "
                    f"({', '.join(map(str, pids[:5]))}); Ctrl-C ends them",
                    file=sys.stderr,
                )
            info = wait_signal((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD), tick_s)
            tick_s = min(2 * tick_s, TICK_S)
            if info is not None and info.si_signo != signal.SIGCHLD:
                asked, since = True, time.monotonic()
            processes.reap()
            if self._failure:
                self.end_programs([])
                return

    def _captured(self) -> list[int]:
        self._pids = None
        self._wait_revived()
        end = time.monotonic() + END_S
        if self._left or not self._control.send("dm-handler", "pids"):
            self._take_events(0)
            return []
        # It may have died unnoticed: its holder has its end of the line too, and nothing there answers.
        self._question = "pids"
        while self._pids is None and not self._failure and not self._left:
            if time.monotonic() > end and not self._revival.under_way:
                break
            self._take_events(TICK_S)
        self._question = None
        return self._pids or []

    def finish(self) -> None:
        """Ask the DM-Handler to finish and wait for every process; raises `RunFailed`."""
        self._wait_revived()
        if self._left:
            return  # nobody is there to be asked, and no program to need them: `close` ends what is left
        self._question = "finish"
        self._control.send("dm-handler", self._question)
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
            processes.send(pid, signal.SIGKILL)

    def _captured_last(self) -> list[int]:
        """Every process below us that carries our library, found without the DM-Handler's help."""
        socket = self._additions.get("EDM_INTERNAL_SOCK", "")
        return processes.carrying(f"EDM_INTERNAL_SOCK={socket}") if socket else []

    def close(self, *, programs_too: bool = True) -> None:
        """Leave no process behind, whatever happened; but the programs and their holder if not `programs_too`."""
        if not self._finished and programs_too:
            self.end_programs([])
        self.leave()
        if not self._finished and programs_too:
            self._revival.end_holder()
        processes.end(self._processes, 5.0 if self._finished else 0.5)
        processes.reap()

    def leave(self) -> None:
        """Leave all to itself: it ends when the programs have ended."""
        self._control.close()
        for _, pidfd in self._alive.values():
            os.close(pidfd)
        self._alive.clear()

    def _log_tail(self) -> str:
        return processes.last_line(self._run_dir.log("edm"))
