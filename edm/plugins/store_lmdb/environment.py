"""The LMDB environment that both halves of the store `lmdb` share: transactions, growth, errors.

Place on the path: under the SPT store and the page store `lmdb` [6, 7, 9].

Sync policies: `always` syncs data and meta page at each commit. `batch` leaves out the sync of the meta page
(MDB_NOMETASYNC): a loss of power may undo the last transaction, and never harms an older one. `none` syncs nothing
(MDB_NOSYNC): the server's death loses nothing, a loss of power may lose the store.
Source: the LMDB API documentation, mdb_env_open.

The map is grown between transactions, since LMDB allows it only then; every read has a transaction of its own, so none
is open across a growth.

What LMDB itself cannot find out is found by `edm.plugins.store_lmdb.checking`, before the file is opened.

A commit that fails leaves the environment as it was, and where LMDB cannot be sure of that it refuses all further work
(MDB_PANIC): then the environment is opened anew. What a failed sync may have marked clean without its being on the disk
is written again before the next flush.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import attrs
import lmdb

from edm._native import ffi, lib
from edm.dms.table import words_at
from edm.errors import Corrupt, StoreError, StoreFull, StoreLocked
from edm.plugins.store_lmdb.checking import check, examine, missing
from edm.stores.directory import FULL, StoreDirectory, saying

if TYPE_CHECKING:
    from collections.abc import Callable

    from edm.stores.damage import Damage
    from edm.types import Slots

log = logging.getLogger(__name__)

FORMAT_VERSION: Final = 2
_RESERVE_BYTES: Final = 64 << 20
"""Beyond the limit, for what must not fail for want of room: the SPT's rows, and deleting."""
_LARGEST_BYTES: Final = 1 << 46
_REWRITE_BYTES: Final = 1 << 20
_COPY: Final = "copy"
_DATA: Final = "data.mdb"


@attrs.define(eq=False)
class Table:
    """A named database: `handle` for py-lmdb, another one after the environment was opened anew."""

    name: str
    integer_key: bool
    handle: Any = None


class Environment:
    """One environment per directory and process, closed when its last user closes."""

    _open: ClassVar[dict[Path, Environment]] = {}

    def __init__(self, path: Path, sync: str, map_bytes: int, limit_bytes: int) -> None:
        self._directory = StoreDirectory(path, "edm LMDB", FORMAT_VERSION)
        self._path = path
        self._key = path.resolve()
        self._halves: set[str] = set()
        self._limit_bytes = limit_bytes or _LARGEST_BYTES
        self.sync = sync
        self._flags = {"sync": sync != "none", "metasync": sync == "always"}
        self._tables: list[Table] = []
        self._env: Any = None
        self.damage = self._directory.damage
        # What ends the process when LMDB crashes over what it reads, where the check before opening found nothing.
        self._crash_line = ffi.new("char[]", f"edm: {self.path}: damaged while it was in use: LMDB crashed\n".encode())
        # The file itself, for the guards of its meta pages; behind: a commit has none yet.
        self._file = -1
        self._guard_behind = False
        self._map = 0, 0
        self._map_bytes = min(map_bytes, self._limit_bytes)
        # Some of what was written may be marked clean and not be on the disk; so may the directory's entry.
        self._suspect = self._renamed = False
        self._compacted_at = -1
        try:
            # Left by a death while a copy was made.
            shutil.rmtree(path / _COPY, ignore_errors=True)
            self._open_map()
            self._turns = self.table("turns", integer_key=False)
            if self._directory.is_new:
                self._directory.sync()
            self._directory.begin()
        except BaseException:
            self._drop(None)
            self._directory.close(clean=False)
            raise

    @classmethod
    def open(cls, path: Path, half: str, sync: str, map_bytes: int, limit_bytes: int) -> Environment:
        """The environment of a directory, opened if the other half of the store has not; half: "spt" or "pages"."""
        with saying(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = cls._open.get(path.resolve())
        if found is None:
            found = cls(path, sync, map_bytes, limit_bytes)
            cls._open[found._key] = found
        if half in found._halves:
            raise StoreLocked(f"{path} is in use by this process: one server at a time")
        found._halves.add(half)
        return found

    def close(self, half: str) -> None:
        """Let go of it for one half of the store; the last one's call syncs and closes."""
        self._halves.discard(half)
        if self._halves:
            return
        del self._open[self._key]
        clean = False
        try:
            self.flush()
            clean = True
        finally:
            self._close_map()
            self._directory.close(clean=clean)

    def read(self, work: Callable[[Any], Any], *, buffers: bool = True) -> Any:
        """Run `work(transaction)`; buffers it gets are valid inside only. buffers False: bytes, for small rows."""
        for last_try in (False, True):
            try:
                environment = self._live()
                lib.edm_crash_guard_enter(self._crash_line)
                with environment.begin(buffers=buffers) as transaction:
                    return work(transaction)
            except lmdb.PanicError as error:
                self._drop(error if last_try else None)
            except lmdb.Error as error:
                raise self._failed(error) from None
            finally:
                lib.edm_crash_guard_leave()
        raise AssertionError("unreachable: the last try returns or raises")

    def write(self, work: Callable[[Any], Any], *, may_fill: bool) -> Any:
        """Run `work(transaction)` and commit, all of it or nothing; the map grows as needed.

        may_fill: up to the limit; else a little beyond it, so that what frees room never fails for want of it.
        """
        most = self._limit_bytes + (0 if may_fill else _RESERVE_BYTES)
        panicked = False
        while True:
            try:
                environment = self._live()
                # No two commits without a guard: a death may leave the last one without.
                self._guard()
                self._guard_behind = True
                lib.edm_crash_guard_enter(self._crash_line)
                with environment.begin(write=True, buffers=True) as transaction:
                    result = work(transaction)
                self._guard()
            except lmdb.PanicError as error:
                self._drop(error if panicked else None)
                panicked = True
            except lmdb.MapFullError:
                size = self._env.info()["map_size"]
                # A limit that was lowered, or the reserve in use: what is there stays usable.
                if size >= most:
                    raise StoreFull(f"{self._path}: its limit of {self._limit_bytes} bytes is reached") from None
                self._map_bytes = min(2 * size, most)
                self._env.set_mapsize(self._map_bytes)
                self._map = _mapped(self.path)
            except lmdb.Error as error:
                self._suspect = True
                raise self._failed(error) from None
            else:
                return result
            finally:
                lib.edm_crash_guard_leave()

    def turn(self) -> None:
        """Let what was deleted be used: LMDB gives a transaction's free pages to the next but one."""
        for _ in range(2):
            self.write(lambda transaction: transaction.put(b"turn", b"", db=self._turns.handle), may_fill=False)

    def flush(self) -> None:
        """To the disk, whatever the policy; raises `StoreError`."""
        environment = self._live()
        if self._renamed:
            self._directory.sync()
            self._renamed = False
        if self._suspect:
            self._write_again()
        try:
            environment.sync(True)
        except lmdb.Error as error:
            self._suspect = True
            raise self._failed(error) from None
        self._suspect = False

    def table(self, name: str, *, integer_key: bool) -> Table:
        """A named database in the environment, made if it is not there."""
        table = Table(name, integer_key)
        self._open_table(table)
        self._tables.append(table)
        return table

    @property
    def path(self) -> Path:
        """The file that everything is in."""
        return self._path / _DATA

    def stat(self) -> dict[str, Any]:
        """The file's size on disk, and the map's."""
        status = self.path.stat()
        return {
            "bytes": status.st_blocks * 512,
            "map_bytes": self._live().info()["map_size"],
            "limit_bytes": 0 if self._limit_bytes == _LARGEST_BYTES else self._limit_bytes,
        }

    def unsound(self, table: Table, keys: Slots) -> int:
        """The first of some keys whose large value may not be deleted; how many keys there are, if all may be."""
        self._live()
        lib.edm_crash_guard_enter(self._crash_line)
        try:
            return int(lib.edm_lmdb_unsound(table.name.encode(), words_at(keys), len(keys), *self._map))
        finally:
            lib.edm_crash_guard_leave()

    def verify(self) -> list[Damage]:
        """Look at every page of every tree, and at the head of every large value; what is damaged."""
        damage, harmless = examine(self.path, lost_power=False, deep=True)
        return [*damage, *harmless]

    def compact(self) -> int:
        """Put a copy without free pages in the file's place; returns by how many bytes it is smaller.

        A death on the way leaves the file, or the whole copy. Raises `StoreError`, and the file is then as it was.
        """
        if self._live().info()["last_txnid"] == self._compacted_at:
            return 0
        beside = self._path / _COPY
        before = self.path.stat().st_blocks * 512
        try:
            with saying(beside):
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(mode=0o700)
                self._live().copy(str(beside), compact=True)
                _sync_file(beside / _DATA)
                (beside / _DATA).rename(self.path)
        except lmdb.Error as error:
            raise self._failed(error) from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        # The open environment is the old file, which has no name any more.
        self._renamed = True
        self._drop(None)
        self.flush()
        self._compacted_at = self._live().info()["last_txnid"]
        return int(before - self.path.stat().st_blocks * 512)

    def _live(self) -> Any:
        """The environment, opened anew where it had to be given up; raises `StoreError`."""
        if self._env is None:
            self._open_map()
            for table in self._tables:
                self._open_table(table)
        return self._env

    def _drop(self, error: lmdb.Error | None) -> None:
        """Close it; the next use opens it anew. error: what to raise, if that has been tried."""
        self._close_map()
        if error is not None:
            raise self._failed(error)

    def _close_map(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _guard(self, *, must: bool = True) -> None:
        """Write down what the last commit has put into its meta page, later if it need not be now; `StoreError`."""
        if self._guard_behind:
            failed = lib.edm_lmdb_guard(self._file)
            if failed and must:
                raise StoreError(f"writing {self.path}: {os.strerror(-failed)}")
            self._guard_behind = bool(failed)

    def _open_table(self, table: Table) -> None:
        try:
            table.handle = self._env.open_db(table.name.encode(), integerkey=table.integer_key)
        except lmdb.Error as error:
            self._close_map()
            raise self._failed(error) from None
        self._guard_behind = True
        self._guard(must=False)

    def _write_again(self) -> None:
        """Write the file's own bytes back, which marks them as not yet on the disk."""
        with saying(self.path):
            file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                at = 0
                while part := os.pread(file, _REWRITE_BYTES, at):
                    at += os.pwrite(file, part, at)
            finally:
                os.close(file)

    def _open_map(self) -> None:
        first = self._file < 0 and not self._tables
        gone = missing(self.path)
        if not gone:
            harmless = check(self.path, lost_power=self._directory.lost_power or not first)
            for one in harmless if first else []:
                log.warning("%s: %s", one.file, one.reason)
                self.damage.append(one)
        elif not (first and self._directory.is_new):
            # LMDB would begin anew, and every page would be gone without a word.
            raise Corrupt(f"{self.path} {gone}")
        try:
            self._env = lmdb.open(
                str(self._path),
                map_size=max(self._map_bytes, 1 << 20),
                max_dbs=8,
                max_readers=16,
                mode=0o600,
                lock=False,
                **self._flags,
            )
        except lmdb.Error as error:
            raise self._failed(error) from None
        try:
            with saying(self.path):
                self._file = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except StoreError:
            self._close_map()
            raise
        self._map = _mapped(self.path)
        self._guard_behind = True
        self._guard(must=False)

    def _failed(self, error: lmdb.Error) -> StoreError:
        text = " ".join(str(error).split())
        if isinstance(
            error, lmdb.CorruptedError | lmdb.PageNotFoundError | lmdb.InvalidError | lmdb.VersionMismatchError
        ):
            return Corrupt(f"{self.path}: {text}")
        if _no_space(error):
            return StoreFull(f"{self.path}: {text}")
        return StoreError(f"{self.path}: {text}")


def _mapped(path: Path) -> tuple[int, int]:
    """Where this process has a file mapped, and how many bytes of it; 0, 0 where that cannot be seen."""
    inode, name = str(path.stat().st_ino), str(path.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, offset, _, found, *named = line.split(maxsplit=5)
        # An overlay's files have another inode there than they say themselves.
        if (found == inode or named == [name]) and not int(offset, 16):
            start, end = (int(address, 16) for address in addresses.split("-"))
            return start, end - start
    return 0, 0


def _no_space(error: lmdb.Error) -> bool:
    return isinstance(error, lmdb.DiskError) or getattr(error, "code", None) in FULL


def _sync_file(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
