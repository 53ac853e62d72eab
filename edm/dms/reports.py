"""Whom the DMS tells that it is ready, or why it is not: the launcher, systemd, or a person reading a line.

The launcher listens on RUN_DIR/control.sock and reads JSON lines: {"role", "pid", "event": "started"}, then "ready", or
the event "error" with a "message" and whether it is a "mistake" of the user's. The connection's end is how the DMS
learns that the launcher is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from edm.plugins.transport_mpi import under_mpi

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONTROL_SOCKET = "control.sock"


class Forwarding(logging.Handler):
    """Errors of the memory server, as damaged pages are, that the user of a run should see: `say` gets each."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.ERROR)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        self._say(f"memory server: {record.getMessage()}")

    def start(self) -> None:
        """From now on, in this process."""
        logging.getLogger("edm.dms.server").addHandler(self)


class Reports(Protocol):
    """Where readiness and errors go."""

    launched: bool

    def ready(self, where: str) -> None:
        """Requests are answered now, at `where`."""

    def error(self, message: str, *, mistake: bool = False, internal: bool = False) -> None:
        """The DMS cannot run, for the reason on this one line; mistake: it is the user's; internal: it is ours."""

    def stopping(self) -> None:
        """The DMS drains and ends."""

    def close(self) -> None:
        """Nothing more will be reported."""


class LauncherReports:
    """Reports to the launcher of a one-command run."""

    launched = True

    def __init__(self, path: Path, role: str) -> None:
        self._role = role
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.connect(str(path))
        self._send({"event": "started"})

    def ready(self, where: str) -> None:
        """See `Reports`."""
        self._send({"event": "ready", "where": where})

    def error(self, message: str, *, mistake: bool = False, internal: bool = False) -> None:
        """See `Reports`."""
        self._send({"event": "error", "message": message, "mistake": mistake, "internal": internal})

    def warning(self, message: str) -> None:
        """Say one line to the user, who goes on."""
        self._send({"event": "warning", "message": message})

    def stopping(self) -> None:
        """The launcher has asked for it, or is gone: nothing to tell."""

    def close(self) -> None:
        """See `Reports`."""
        self._socket.close()

    def when_gone(self, call: Callable[[], None]) -> None:
        """Call `call` in a thread when the launcher has closed its end or died."""

        def wait() -> None:
            # A connection that is reset is gone as well.
            with contextlib.suppress(ConnectionResetError):
                while self._socket.recv(4096):
                    """The launcher says nothing; only the end counts."""
            call()

        threading.Thread(target=wait, name="edm-launcher", daemon=True).start()

    def _send(self, event: dict[str, Any]) -> None:
        line = json.dumps({"role": self._role, "pid": os.getpid(), **event}) + "\n"
        # A launcher that is gone is what `when_gone` acts on.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(line.encode())


class ServiceReports:
    """Reports of a DMS that stands alone: to systemd where it listens, on standard output else."""

    launched = False

    def ready(self, where: str) -> None:
        """See `Reports`."""
        told = notify(f"READY=1\nSTATUS=serving at {where}\nMAINPID={os.getpid()}")
        # As a rank of an MPI job its output is mixed with the app's, which is nobody else's.
        if not told and not under_mpi():
            print(f"edm: dms ready at {where}", flush=True)

    def error(self, message: str, *, mistake: bool = False, internal: bool = False) -> None:  # noqa: ARG002
        """See `Reports`."""
        notify(f"STATUS={message}")
        print(f"edm: {message}", file=sys.stderr, flush=True)

    def stopping(self) -> None:
        """See `Reports`."""
        notify("STOPPING=1")

    def close(self) -> None:
        """Nothing to release."""


def notify(state: str) -> bool:
    """Tell systemd (sd_notify's protocol) if it listens; whether it does. Source: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError as error:
            print(f"edm: cannot notify {os.environ['NOTIFY_SOCKET']}: {error}", file=sys.stderr)
            return False
    return True


def notify_reloading() -> None:
    """Tell systemd that a reload has begun; `ServiceReports.ready`'s READY=1 ends it. Source: sd_notify(3)."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def open_reports(run_dir: Path, role: str) -> LauncherReports | ServiceReports:
    """The launcher's end if this run has a launcher; raises `OSError` if it has one that does not answer."""
    path = run_dir / CONTROL_SOCKET
    return LauncherReports(path, role) if path.exists() else ServiceReports()
