"""The figures of a running DMS, for `edm dms status`: a socket in its directory that answers every connection once."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, Final, Self

from edm.errors import UsageError
from edm.peers import peer_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAME: Final = "dms.sock"
TIMEOUT_S: Final = 10.0


class StatusSocket:
    """Answers on RUN_DIR/dms.sock, for this user only, with what `status` returns."""

    def __init__(self, run_dir: Path, status: Callable[[], dict[str, Any]]) -> None:
        self._path = run_dir / NAME
        self._status = status
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="edm-status", daemon=True)

    def __enter__(self) -> Self:
        # Left behind by a DMS that was killed: the stores' own lock says that no other one is running here.
        self._path.unlink(missing_ok=True)
        with _within(self._path) as address:
            self._listener.bind(address)
        self._path.chmod(0o600)
        self._listener.listen(4)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Wakes the thread, where close alone would leave it in accept.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(TIMEOUT_S)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
                if not peer_of(connection).trusted:
                    continue
                connection.settimeout(TIMEOUT_S)
                connection.sendall(json.dumps(self._status(), default=str).encode())


def ask_status(run_dir: Path) -> dict[str, Any]:
    """The figures of the DMS running in `run_dir`; raises `UsageError` if there is none."""
    path = run_dir / NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT_S)
        try:
            with _within(path) as address:
                connection.connect(address)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        except (FileNotFoundError, ConnectionRefusedError):
            raise UsageError(f"no DMS is running in {run_dir}") from None
        except OSError as error:
            raise UsageError(f"the DMS in {run_dir} does not answer: {error}") from error
    status: dict[str, Any] = json.loads(answer)
    return status


def listening_pid(run_dir: Path) -> int:
    """The DMS that runs in `run_dir`, 0 if there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            with _within(run_dir / NAME) as address:
                connection.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            return 0
        return peer_of(connection).pid


@contextlib.contextmanager
def _within(path: Path) -> Any:
    """An address for a socket at `path`, however long that is: bind and connect take 107 bytes."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
