"""Who is at the other end of a socket of this machine.

Place on the path: whoever listens in the run's directory (the launcher, the DMS's figures) lets only its own user in,
and root; native/capture.c does so for programs.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

import attrs

_UCRED: Final = struct.Struct("3i")


@attrs.frozen
class Peer:
    """A process, as the kernel knows it: the one that connected, or began to listen."""

    pid: int
    uid: int
    gid: int

    @property
    def trusted(self) -> bool:
        """Whether it is our own user's, or root's."""
        return self.uid in {0, os.geteuid()}


def peer_of(line: socket.socket) -> Peer:
    """The other end of a connected socket. Source: unix(7), SO_PEERCRED."""
    return Peer(*_UCRED.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
