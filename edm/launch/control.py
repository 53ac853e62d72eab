"""The launcher's end of control.sock: events from the DM-Handler and the DMS, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import attrs

from edm.peers import peer_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RETRY_S: Final = 0.1
JOIN_S: Final = 5.0


@attrs.frozen
class Event:
    """One line: who says it, what, and the rest. `event` "gone": the process's line has ended."""

    role: str
    event: str
    details: Mapping[str, Any]


class Control:
    """Listens for the run's processes; events arrive in `events` in the order each process sent them."""

    def __init__(self, path: Path) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self._peers: dict[str, socket.socket] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._closing = False
        self._accepting = threading.Thread(target=self._accept, name="edm-control", daemon=True)
        self._accepting.start()

    def send(self, role: str, command: str, **details: str) -> bool:
        """Send a command to a process; False if it is not there."""
        peer = self._peers.get(role)
        if peer is None:
            return False
        try:
            peer.sendall(json.dumps({"command": command, **details}).encode() + b"\n")
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Hang up on everybody."""
        self._closing = True
        with contextlib.suppress(OSError):  # closed already
            # close(2) leaves a thread in accept(2), and a signal begins that again: on whatever has the number by then.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(JOIN_S)
        self._listener.close()
        for peer in list(self._peers.values()):
            try:
                peer.shutdown(socket.SHUT_RDWR)
            except OSError:  # it hung up first
                continue

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                if self._closing:
                    return
                time.sleep(RETRY_S)  # no descriptor or memory for it: who has connected waits, and so do we
                continue
            if not peer_of(peer).trusted:
                peer.close()
                continue
            threading.Thread(target=self._read, args=(peer,), name="edm-control-peer", daemon=True).start()

    def _read(self, peer: socket.socket) -> None:
        role, pid = "unknown", 0
        # A peer that dies with something unread resets the connection, and its last word may be half a one.
        with peer:
            try:
                with contextlib.suppress(ConnectionError), peer.makefile("r") as lines:
                    for line in lines:
                        if not line.endswith("\n"):
                            break
                        details = json.loads(line)
                        role, pid = str(details.pop("role")), int(details.get("pid", 0))
                        self._peers[role] = peer
                        self.events.put(Event(role, str(details.pop("event")), details))
            except (ValueError, KeyError) as error:
                self.events.put(Event(role, "error", {"message": f"its messages cannot be read: {error}"}))
            if self._peers.get(role) is peer:
                self._peers.pop(role)
        self.events.put(Event(role, "gone", {"pid": pid}))
