"""The LMDB environment that both halves of the store `lmdb` share: transactions, growth, errors.

Place on the path: under the SPT store and the page store `lmdb` [6, 7, 9].

Sync policies: `always` syncs data and meta page at each commit. `batch` leaves out the sync of the meta page
(MDB_NOMETASYNC): a loss of power may undo the last transaction, and never harms an older one. `none` syncs nothing
(MDB_NOSYNC): the server's death loses nothing, a loss of power may lose the store.
Source: the LMDB API documentation, mdb_env_open.

The map is grown between transactions, since LMDB allows it only then; every read has a transaction of its own, so none
is open across a growth.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar, Final

import lmdb

from edm.errors import Corrupt, StoreError, StoreFull, StoreLocked
from edm.stores.directory import StoreDirectory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FORMAT_VERSION: Final = 1
_RESERVE_BYTES: Final = 64 << 20
"""Beyond the limit, for what must not fail for want of room: the SPT's rows, and deleting."""
_LARGEST_BYTES: Final = 1 << 46


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
        try:
            self._open_map(min(map_bytes, self._limit_bytes))
            self._turns = self.table("turns", integer_key=False)
        except BaseException:
            self._directory.close(clean=False)
            raise

    @classmethod
    def open(cls, path: Path, half: str, sync: str, map_bytes: int, limit_bytes: int) -> Environment:
        """The environment of a directory, opened if the other half of the store has not; half: "spt" or "pages"."""
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
            self._env.close()
            self._directory.close(clean=clean)

    def read(self, work: Callable[[Any], Any], *, buffers: bool = True) -> Any:
        """Run `work(transaction)`; buffers it gets are valid inside only. buffers False: bytes, for small rows."""
        try:
            begun: Any = self._env.begin(buffers=True) if buffers else self._env.begin()
            with begun as transaction:
                return work(transaction)
        except lmdb.Error as error:
            raise self._failed(error) from None

    def write(self, work: Callable[[Any], Any], *, may_fill: bool) -> Any:
        """Run `work(transaction)` and commit, all of it or nothing; the map grows as needed.

        may_fill: up to the limit; else a little beyond it, so that what frees room never fails for want of it.
        """
        most = self._limit_bytes + (0 if may_fill else _RESERVE_BYTES)
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    return work(transaction)
            except lmdb.MapFullError:
                size = self._env.info()["map_size"]
                # A limit that was lowered, or the reserve in use: what is there stays usable.
                if size >= most:
                    raise StoreFull(f"{self._path}: its limit of {self._limit_bytes} bytes is reached") from None
                self._env.set_mapsize(min(2 * size, most))
            except lmdb.Error as error:
                raise self._failed(error) from None

    def turn(self) -> None:
        """Let what was deleted be used: LMDB gives a transaction's free pages to the next but one."""
        for _ in range(2):
            self.write(lambda transaction: transaction.put(b"turn", b"", db=self._turns), may_fill=False)

    def flush(self) -> None:
        """To the disk, whatever the policy."""
        try:
            self._env.sync(True)
        except lmdb.Error as error:
            raise self._failed(error) from None

    def table(self, name: str, *, integer_key: bool) -> Any:
        """A named database in the environment, made if it is not there."""
        try:
            return self._env.open_db(name.encode(), integerkey=integer_key)
        except lmdb.Error as error:
            raise self._failed(error) from None

    @property
    def path(self) -> Path:
        """The file that everything is in."""
        return self._path / "data.mdb"

    def stat(self) -> dict[str, Any]:
        """The file's size on disk, and the map's."""
        status = self.path.stat()
        return {
            "bytes": status.st_blocks * 512,
            "map_bytes": self._env.info()["map_size"],
            "limit_bytes": 0 if self._limit_bytes == _LARGEST_BYTES else self._limit_bytes,
        }

    def copy_compact(self, target: Path) -> None:
        """Write a copy without free pages to a directory."""
        self._env.copy(str(target), compact=True)

    def _open_map(self, map_bytes: int) -> None:
        try:
            self._env = lmdb.open(
                str(self._path),
                map_size=max(map_bytes, 1 << 20),
                max_dbs=8,
                max_readers=16,
                mode=0o600,
                lock=False,
                **self._flags,
            )
        except lmdb.Error as error:
            raise self._failed(error) from None

    def _failed(self, error: lmdb.Error) -> StoreError:
        text = " ".join(str(error).split())
        if isinstance(
            error, lmdb.CorruptedError | lmdb.PageNotFoundError | lmdb.InvalidError | lmdb.VersionMismatchError
        ):
            return Corrupt(f"{self.path}: {text}")
        if _no_space(error):
            return StoreFull(f"{self.path}: {text}")
        return StoreError(f"{self.path}: {text}")


def _no_space(error: lmdb.Error) -> bool:
    return isinstance(error, lmdb.DiskError) or getattr(error, "code", None) in {errno.ENOSPC, errno.EDQUOT}
