"""What can be read of a damaged LMDB file, for `edm store verify`; nothing is changed.

Place on the path: none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lmdb
import numpy as np

from edm.dms.table import PageTable
from edm.plugins.store_lmdb.checking import examine, missing
from edm.plugins.store_lmdb.environment import FORMAT_VERSION
from edm.plugins.store_lmdb.spt import KEY, ROW, rows_of
from edm.stores.damage import Damage
from edm.stores.directory import StoreDirectory
from edm.types import PAGE_REF, PageId

if TYPE_CHECKING:
    from pathlib import Path


def inspect(path: Path) -> tuple[PageTable, list[Damage]]:
    """The pages whose rows are sound, if LMDB's own trees are, and all that is damaged."""
    directory = StoreDirectory(path, "edm LMDB", FORMAT_VERSION)
    table, file = PageTable(), path / "data.mdb"
    try:
        if gone := missing(file):
            return table, [*directory.damage, Damage(file=file, reason=gone)]
        damage, harmless = examine(file, lost_power=directory.lost_power, deep=True)
        rows = [] if damage else _read_rows(file, table)
        return table, [*directory.damage, *damage, *harmless, *rows]
    finally:
        directory.close(clean=False)


def _read_rows(file: Path, table: PageTable) -> list[Damage]:
    damage = []
    environment = lmdb.open(str(file.parent), readonly=True, lock=False, max_dbs=8)
    try:
        with environment.begin() as transaction:
            spt = environment.open_db(b"spt", transaction, create=False)
            for key, value in transaction.cursor(spt):
                page = _read_row(key, value, table)
                if page:
                    damage.append(Damage(file=file, page=page, reason="its row in the page table is damaged"))
    except lmdb.Error as error:
        damage.append(Damage(file=file, reason=" ".join(str(error).split())))
    finally:
        environment.close()
    return damage


def _read_row(key: bytes, value: bytes, table: PageTable) -> str:
    """Put a page into the table; its name instead, as far as that is known, if its row is damaged."""
    if (len(key), len(value)) != (KEY.itemsize, ROW.itemsize):
        return f"key {key.hex()}"
    keys, rows, refs = np.frombuffer(key, KEY), np.frombuffer(value, ROW), np.zeros(1, PAGE_REF)
    refs["region"], refs["index"] = keys["region"], keys["index"]
    refs["version"], refs["checksum"] = rows["version"], rows["checksum"].astype(np.uint32)
    slots = np.ascontiguousarray(rows["slot"])
    if not np.array_equal(rows_of(refs, slots)[1], rows):
        return str(PageId(int(refs["region"][0]), int(refs["index"][0])))
    table.record(refs, slots)
    return ""
