"""A store's directory: who has it open, which format it is in, whether the machine went down since.

Place on the path: opened first, and closed last, by every store that keeps something on disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edm._native import ffi, lib
from edm.errors import Corrupt, StoreError, StoreFull, StoreLocked, UsageError
from edm.stores.damage import Damage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

log = logging.getLogger(__name__)

LOCK: Final = "LOCK"
FORMAT: Final = "FORMAT"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_NEW: Final = "new"
_CLEAN: Final = "clean"
_UNKNOWN: Final = "unknown"
_DAMAGED: Final = "damaged"
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
    is_new: no store was ever whole here, so what a store keeps need not be there yet. was_clean: whoever had it open
    last closed it. lost_power: the machine went down while it was open, so what was not synced may be gone. damage:
    what is damaged and can be done without. That is `LOCK`: then neither was_clean nor lost_power is set, so that
    nothing is left out for a loss of power that may never have been.
    """

    def __init__(self, path: Path, name: str, version: int, figures: Mapping[str, int] | None = None) -> None:
        self.path = path
        self.damage: list[Damage] = []
        with saying(path):
            self._open(name, version, dict(figures or {}))
        self._begun = self._closed = False

    def _open(self, name: str, version: int, figures: dict[str, int]) -> None:
        path = self.path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _lock(path)
        try:
            found = _read_whole(self._lock)
            made = (path / FORMAT).exists()
            if not made:
                left = sorted(entry.name for entry in path.iterdir() if entry.stem not in {LOCK, FORMAT})
                if left:
                    raise Corrupt(f"{path / FORMAT} is missing, and {left[0]} is there")
                self._write(_NEW)
                # Where there is a FORMAT, LOCK says whether there was ever more.
                os.fsync(self._lock)
            self.figures = self._check_format(name, version, figures)
            self._state = _state_in(found) if made else _NEW
            if self._state == _DAMAGED:
                reason = "its checksum does not match: how the store was last closed is not known"
                self.damage.append(Damage(file=path / LOCK, offset=0, reason=reason))
                log.warning("%s: %s", path / LOCK, reason)
            self.is_new = self._state == _NEW
            self.was_clean = self._state == _CLEAN
            self.lost_power = self._state not in {_NEW, _CLEAN, _DAMAGED, _UNKNOWN, _boot()}
            if self._state == _DAMAGED:
                self._state = _UNKNOWN
            # Whose it is, for whoever comes next; how it was left stays until `begin`.
            self._write(self._state)
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._lock)
            raise

    def begin(self) -> None:
        """What a former server left is in order: from here on LOCK speaks of this one. Raises `StoreError`.

        An opening that fails before this is made again from the same state: it has not forgotten a loss of power.
        """
        with saying(self.path / LOCK):
            self._write(_boot())
            # Else a loss of power could leave "clean" from the time before.
            os.fsync(self._lock)
        self._begun = True

    def close(self, *, clean: bool) -> None:
        """Let go of the directory, in any case; clean: everything in it is synced. Raises `StoreError`."""
        if self._closed:
            return
        self._closed = True
        try:
            if clean and self._begun:
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
        record = lock_record(state)
        if os.pwrite(self._lock, record, 0) != len(record):
            raise OSError(errno.EIO, "only a part was written")

    def _check_format(self, name: str, version: int, figures: dict[str, int]) -> dict[str, int]:
        path = self.path / FORMAT
        if not path.exists():
            lines = [f"{name} {version}", *(f"{key} {value}" for key, value in figures.items())]
            text = "\n".join([*lines, ""])
            _write_whole(path, f"{text}checksum {_sum_of(text.encode()):08x}\n")
            return figures
        damaged = Corrupt(f"{path}: damaged, or not of a store that EDM made ('{name} {version}')")
        data = path.read_bytes()
        body, mark, found_sum = data.rpartition(b"checksum ")
        if data.startswith(f"{name} 1\n".encode()) and not mark:
            body = data
        elif not mark or found_sum != f"{_sum_of(body):08x}\n".encode():
            raise damaged
        first, *rest = body.decode(errors="replace").splitlines()
        found_name, _, found_version = first.rpartition(" ")
        if found_name != name:
            raise damaged
        if found_version != str(version):
            raise UsageError(f"{self.path} has format {found_version}, this EDM reads and writes format {version}")
        return {key: int(value) for key, value in (line.split(" ") for line in rest)}


def lock_record(state: str, pid: int | None = None) -> bytes:
    """What LOCK holds: the process, the boot it runs in (or how it was closed), and the checksum of both."""
    text = f"{pid or os.getpid()} {state}"
    # Always as long, so that nothing of what stood here before is left.
    return f"{text} {_sum_of(text.encode()):08x}\n".rjust(_STATE_BYTES).encode()


def _state_in(found: bytes) -> str:
    words = found.decode(errors="replace").split()
    if len(words) == 3 and words[0].isdecimal() and found == lock_record(words[1], int(words[0])):
        return words[1]
    return _DAMAGED


def _read_whole(file: int) -> bytes:
    data = b""
    while len(data) <= _STATE_BYTES and (part := os.pread(file, 2 * _STATE_BYTES, len(data))):
        data += part
    return data


def _sum_of(data: bytes) -> int:
    return int(lib.edm_crc32c(ffi.from_buffer(data), len(data)))


def _lock(path: Path) -> int:
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _read_whole(lock).decode(errors="replace").split()
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
