"""A store's directory: who has it open, which format it is in, whether the machine went down since.

Place on the path: opened first, and closed last, by every store that keeps something on disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edm.errors import StoreError, StoreFull, StoreLocked, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LOCK: Final = "LOCK"
FORMAT: Final = "FORMAT"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_CLEAN: Final = "clean"
_STATE_BYTES: Final = 128
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says when there is no room."""


@contextlib.contextmanager
def saying(path: Path) -> Iterator[None]:
    """Raise `StoreError`, or `StoreFull` for want of room, instead of `OSError`; path: where that names no file."""
    try:
        yield
    except OSError as error:
        kind = StoreFull if error.errno in FULL else StoreError
        raise kind(f"{error.filename or path}: {error.strerror or error}") from None


class StoreDirectory:
    """One store's own directory, locked for as long as this object is open.

    name, version: what FORMAT must say; figures: numbers that are fixed when the store is made, e.g. a segment's size.
    was_clean: whoever had it open last closed it. lost_power: the machine went down while it was open, so what was not
    synced may be gone.
    """

    def __init__(self, path: Path, name: str, version: int, figures: Mapping[str, int] | None = None) -> None:
        self.path = path
        with saying(path):
            self._open(name, version, dict(figures or {}))
        self._closed = False

    def _open(self, name: str, version: int, figures: dict[str, int]) -> None:
        path = self.path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock(path)
        try:
            last = os.pread(self._lock, 256, 0).decode(errors="replace").split()
            self.was_clean = bool(last) and last[-1] == _CLEAN
            self.lost_power = bool(last) and last[-1] not in {_CLEAN, _boot()}
            self._write(_boot())
            # Else a loss of power could leave "clean" from the time before.
            os.fsync(self._lock)
            self.figures = self._check_format(name, version, figures)
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._lock)
            raise

    def close(self, *, clean: bool) -> None:
        """Let go of the directory, in any case; clean: everything in it is synced. Raises `StoreError`."""
        if self._closed:
            return
        self._closed = True
        try:
            if clean:
                with saying(self.path / LOCK):
                    self._write(_CLEAN)
                    os.fsync(self._lock)
        finally:
            os.close(self.fd)
            os.close(self._lock)

    def sync(self) -> None:
        """Make created, renamed and removed files survive a loss of power; raises `StoreError`."""
        with saying(self.path):
            os.fsync(self.fd)

    def _write(self, state: str) -> None:
        # Always as long, so that nothing of what stood here before is left.
        text = f"{os.getpid()} {state}\n".rjust(_STATE_BYTES).encode()
        if os.pwrite(self._lock, text, 0) != len(text):
            raise OSError(errno.EIO, "only a part was written")

    def _check_format(self, name: str, version: int, figures: dict[str, int]) -> dict[str, int]:
        path = self.path / FORMAT
        if not path.exists():
            lines = [f"{name} {version}", *(f"{key} {value}" for key, value in figures.items())]
            _write_whole(path, "\n".join([*lines, ""]))
            return figures
        try:
            first, *rest = path.read_text().splitlines()
            found_name, found_version = first.rsplit(" ", 1)
            found = {key: int(value) for key, value in (line.split(" ") for line in rest)}
            if found_name != name or set(found) != set(figures):
                raise ValueError
        except ValueError:
            raise StoreError(f"{path}: damaged, or not of a store that EDM made ('{name} {version}')") from None
        if found_version != str(version):
            raise UsageError(f"{self.path} has format {found_version}, this EDM reads and writes format {version}")
        return found


def _lock(path: Path) -> int:
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 256, 0).decode(errors="replace").split()
        os.close(lock)
        raise StoreLocked(f"{path} is in use by process {owner[0] if owner else '?'}: one server at a time") from None
    except OSError:
        os.close(lock)
        raise
    return lock


def _write_whole(path: Path, text: str) -> None:
    """A file that is there with all of its text, or not there."""
    beside = path.with_suffix(".new")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


def _boot() -> str:
    # Where the machine cannot say which boot this is, each is taken for another one.
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return f"unknown-{os.getpid()}-{os.urandom(8).hex()}"
