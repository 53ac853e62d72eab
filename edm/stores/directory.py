"""A store's directory: who has it open, which format it is in, whether the machine went down since.

Place on the path: opened first, and closed last, by every store that keeps something on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edm.errors import StoreError, StoreLocked, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

LOCK: Final = "LOCK"
FORMAT: Final = "FORMAT"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_CLEAN: Final = "clean"


class StoreDirectory:
    """One store's own directory, locked for as long as this object is open.

    name, version: what FORMAT must say; figures: numbers that are fixed when the store is made, e.g. a segment's size.
    was_clean: whoever had it open last closed it. lost_power: the machine went down while it was open, so what was not
    synced may be gone.
    """

    def __init__(self, path: Path, name: str, version: int, figures: Mapping[str, int] | None = None) -> None:
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock(path)
        try:
            last = os.pread(self._lock, 256, 0).decode(errors="replace").split()
            self.was_clean = bool(last) and last[-1] == _CLEAN
            self.lost_power = bool(last) and last[-1] not in {_CLEAN, _boot()}
            self._write(_boot())
            self.figures = self._check_format(name, version, dict(figures or {}))
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._lock)
            raise
        self._closed = False

    def close(self, *, clean: bool) -> None:
        """Let go of the directory; clean: everything in it is synced."""
        if self._closed:
            return
        self._closed = True
        if clean:
            self._write(_CLEAN)
            os.fsync(self._lock)
        os.close(self.fd)
        os.close(self._lock)

    def sync(self) -> None:
        """Make created, renamed and removed files survive a loss of power."""
        os.fsync(self.fd)

    def _write(self, state: str) -> None:
        text = f"{os.getpid()} {state}\n".encode()
        os.pwrite(self._lock, text, 0)
        os.ftruncate(self._lock, len(text))

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
