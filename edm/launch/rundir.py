"""The run's directory: sockets, settings, logs, and (unless --path says otherwise) the page files."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from edm.errors import UsageError

if TYPE_CHECKING:
    from edm.config import Config

DISK_DIRECTORIES: Final = ("/var/tmp",)  # noqa: S108
"""Where page files go by default: /tmp may be memory, and pages kept there would not leave it."""


@attrs.frozen
class RunDir:
    """sockets: short-named private directory (a unix socket's path has 107 bytes). files: store and logs."""

    sockets: Path
    files: Path

    @property
    def store(self) -> Path:
        """The stores' directory."""
        return self.files / "store"

    def log(self, role: str) -> Path:
        """The log file of one of the run's processes."""
        return self.files / f"{role}.log"

    def remove(self) -> None:
        """Remove everything; a directory that is gone already is fine."""
        shutil.rmtree(self.sockets, ignore_errors=True)
        shutil.rmtree(self.files, ignore_errors=True)

    def keep(self) -> None:
        """Keep the files, remove the sockets."""
        shutil.rmtree(self.sockets, ignore_errors=True)


def make_run_dir(config: Config) -> RunDir:
    """Make both directories, private; raises `UsageError`."""
    base = config.path or _disk_directory()
    try:
        files = Path(tempfile.mkdtemp(prefix="edm-run-", dir=base))
        sockets = Path(tempfile.mkdtemp(prefix="edm-", dir=_socket_directory()))
    except OSError as error:
        raise UsageError(f"cannot make the run's directory: {error.strerror}: {error.filename}") from error
    (files / "store").mkdir()
    if os.geteuid() == 0:
        sockets.chmod(0o711)  # a program of root's may become somebody else, and its children must find the way
    return RunDir(sockets=sockets, files=files)


def _disk_directory() -> str:
    given = os.environ.get("TMPDIR")
    for directory in (given,) if given else DISK_DIRECTORIES:
        if Path(directory).is_dir() and os.access(directory, os.W_OK | os.X_OK):
            return directory
    return tempfile.gettempdir()


def _socket_directory() -> str:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and len(runtime) < 60 and os.access(runtime, os.W_OK | os.X_OK):
        closed = not stat.S_IMODE(Path(runtime).stat().st_mode) & stat.S_IXOTH
        if os.geteuid() != 0 or not closed:
            return runtime
    return "/tmp"  # noqa: S108 (the directory made in it is private)
