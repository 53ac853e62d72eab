"""The user's program: started with its own standard streams, its signals passed on, its end made ours."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Final

import attrs

from edm.launch.checks import CommandError
from edm.launch.limits import impose_limits
from edm.launch.signals import wait_signal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from edm.launch.user import User

FORWARDED: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
WATCHED: Final = (*FORWARDED, signal.SIGCHLD)
SI_KERNEL: Final = 0x80
"""A signal's code when the terminal driver sent it: the program has had it too. Source: sigaction(2)."""
GRACE_S: Final = 10.0
INSIST: Final = 3
"""So many Ctrl-C or SIGTERM, and the program is killed."""


@attrs.define
class Ending:
    """How the program ended: a wait status, and whether the user asked for the end."""

    status: int
    asked: bool = False

    @property
    def signal(self) -> int:
        """The signal it died of, 0 if none."""
        return os.WTERMSIG(self.status) if os.WIFSIGNALED(self.status) else 0

    @property
    def code(self) -> int:
        """Its exit status; 128 + signal if it died of one."""
        return 128 + self.signal if self.signal else os.WEXITSTATUS(self.status)


def block_signals() -> set[signal.Signals]:
    """Hold back the watched signals from now on; returns the mask before, which the program gets."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED))  # type: ignore[arg-type]


class Program:
    """One program, started at once."""

    def __init__(
        self,
        path: str,
        arguments: list[str],
        environment: Mapping[str, str],
        mask: Iterable[signal.Signals],
        user: User | None = None,
        limits: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if user is None and not limits:
            # Python ignores these two; a program expects the default.
            defaults = (signal.SIGPIPE, signal.SIGXFSZ)
            self.pid = os.posix_spawn(path, arguments, environment, setsigmask=mask, setsigdef=defaults)
        else:
            self._process = _start_as(user, limits or {}, path, arguments, environment, set(mask))
            self.pid = self._process.pid
        self.started = time.monotonic()
        self._interrupts = 0
        self._kill_at = float("inf")
        self.asked = False

    def wait(self, timeout_s: float) -> Ending | None:
        """Pass signals on until the program ends or the time is over."""
        end = time.monotonic() + timeout_s
        while (left := end - time.monotonic()) > 0:
            info = wait_signal(WATCHED, left)
            if info is not None and info.si_signo != signal.SIGCHLD:
                self._forward(info)
            if time.monotonic() > self._kill_at:
                self.kill()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                if self._process is not None:
                    self._process.returncode = status  # or its end is missed
                return Ending(status, self.asked)
            self._reap_orphans()
        return None

    def kill(self) -> None:
        """End it now."""
        os.kill(self.pid, signal.SIGKILL)

    def _forward(self, info: signal.struct_siginfo) -> None:
        number = info.si_signo
        if info.si_code != SI_KERNEL:
            os.kill(self.pid, number)
        if number in {signal.SIGINT, signal.SIGTERM}:
            self._interrupts += 1
            self.asked = True
            if number == signal.SIGTERM:
                self._kill_at = min(self._kill_at, time.monotonic() + GRACE_S)
            if self._interrupts >= INSIST:
                self.kill()

    def _reap_orphans(self) -> None:
        """Sidecars, and programs whose parent has gone, come to us (we are their subreaper)."""
        try:
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if info is not None and info.si_pid not in {0, self.pid} and info.si_pid not in KEPT:
            os.waitpid(info.si_pid, os.WNOHANG)


def _start_as(
    user: User | None,
    limits: Mapping[int, tuple[int, int]],
    path: str,
    arguments: list[str],
    environment: Mapping[str, str],
    mask: set[signal.Signals],
) -> subprocess.Popen[bytes]:
    def become_program() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        impose_limits(limits)

    try:
        return subprocess.Popen(
            arguments,
            executable=path,
            env=user.environment(environment) if user else environment,
            close_fds=False,
            user=user.uid if user else None,
            group=user.gid if user else None,
            extra_groups=user.groups if user else None,
            preexec_fn=become_program,  # noqa: PLW1509 (as in Session._start)
        )
    except OSError as error:
        whose = f" for user '{user.name}'" if user else ""
        raise CommandError(f"{path}: {(error.strerror or '').lower()}{whose}", 126) from None


KEPT: Final[set[int]] = set()
"""Children of ours that somebody else waits for."""


def die_like(ending: Ending) -> int:
    """Exit status for ours; or, if the program died of a signal, die of the same one (without a core file)."""
    if ending.signal:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if ending.signal not in {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(ending.signal, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {ending.signal})
        os.kill(os.getpid(), ending.signal)
    return ending.code
