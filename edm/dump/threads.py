"""The threads of a process, stopped while it is dumped. EDM's sidecar is none of them: it must go on evicting."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from edm._native import ffi, lib
from edm.errors import EdmError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

STOP_MS: Final = 10_000
REGISTER_BYTES: Final = 64 * 1024


@attrs.frozen
class Thread:
    """A thread that stands still. signal: was on its way to it, and goes on its way when the thread does."""

    tid: int
    signal: int

    def registers(self, note: int) -> bytes:
        """One set of its registers by its ELF note's type; b"" where the machine has no such set."""
        room = ffi.new("uint8_t[]", REGISTER_BYTES)
        size = lib.edm_thread_registers(self.tid, note, room, REGISTER_BYTES)
        return bytes(ffi.buffer(room, size)) if size > 0 else b""


class Stopped:
    """All threads of `pid`, stopped until this is left; raises `EdmError`. To be used by one thread."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.threads: list[Thread] = []

    def __enter__(self) -> Self:
        try:
            while fresh := self._living() - {thread.tid for thread in self.threads}:
                for tid in sorted(fresh):
                    self._stop(tid)
                if fresh <= self._ended:
                    break
        except BaseException:
            self._let_go()
            raise
        if not self.threads:
            raise EdmError(f"process {self._pid} has ended")
        self.threads.sort(key=lambda thread: (thread.tid != self._pid, thread.tid))
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _where: TracebackType | None
    ) -> None:
        self._let_go()

    def _living(self) -> set[int]:
        self._ended: set[int] = set()
        found = set()
        for task in Path(f"/proc/{self._pid}/task").glob("[0-9]*"):
            try:
                state = (task / "stat").read_text().rpartition(") ")[2][:1]
            except OSError:  # it has just ended
                continue
            if state not in "ZX":
                found.add(int(task.name))
        return found

    def _stop(self, tid: int) -> None:
        result = lib.edm_thread_stop(tid, STOP_MS)
        if result >= 0:
            self.threads.append(Thread(tid, result))
        elif -result == errno.ESRCH:
            self._ended.add(tid)
        elif -result == errno.ETIMEDOUT:
            raise EdmError(f"thread {tid} of process {self._pid} does not stop: it waits in the kernel ({_where(tid)})")
        else:
            raise EdmError(self._refusal(tid))

    def _refusal(self, tid: int) -> str:
        tracer = _status(tid, "TracerPid")
        if tracer not in {"", "0"}:
            name = _status(int(tracer), "Name")
            return (
                f"process {self._pid} is traced by {name} (process {tracer}), and can have one tracer: detach it first"
            )
        return f"no permission to stop process {self._pid}: be its user, with kernel.yama.ptrace_scope=0, or root"

    def _let_go(self) -> None:
        for thread in self.threads:
            lib.edm_thread_let_go(thread.tid, thread.signal)  # -ESRCH: it was killed meanwhile
        self.threads = []


def _status(pid: int, key: str) -> str:
    """One line of proc_pid_status(5), "" where it cannot be had."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(f"{key}:")), "")


def _where(tid: int) -> str:
    try:
        return Path(f"/proc/{tid}/wchan").read_text() or "?"
    except OSError:
        return "?"
