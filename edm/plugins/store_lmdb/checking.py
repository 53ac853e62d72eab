"""What is wrong with an LMDB file, found without LMDB (native/lmdb_check.c).

Place on the path: before the environment is opened, since liblmdb may crash over a damaged tree or write over pages in
use; and by `edm store verify`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from edm._native import ffi, lib
from edm.errors import Corrupt, StoreError
from edm.stores.damage import Damage
from edm.stores.directory import saying
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from pathlib import Path

_TABLES: Final = {"turns": False, "spt": False, "spt regions and notes": False, "heads": True, "tails": True}
"""Every table there may be, and whether its keys are numbers."""
_VALUE_BYTES: Final = {"heads": 4080, "tails": 24, "spt": 32, "turns": 0}
_TURN: Final = b"turn"


def missing(path: Path) -> str:
    """What there is in place of a file that LMDB would begin anew, or ""."""
    if not path.exists():
        return "is missing"
    return "" if path.stat().st_size else "is empty"


def check(path: Path, *, lost_power: bool) -> list[Damage]:
    """Raise `Corrupt` where a tree is damaged; else what is damaged and can be done without."""
    damage, harmless = examine(path, lost_power=lost_power, deep=False)
    if damage:
        raise Corrupt(f"{path}: at byte {damage[0].offset}: {damage[0].reason}")
    return harmless


def examine(path: Path, *, lost_power: bool, deep: bool) -> tuple[list[Damage], list[Damage]]:
    """What of a file is damaged, and what of that can be done without.

    deep: the header of every page's value, too: a read for each.
    """
    report = ffi.new("struct edm_lmdb_report *")
    with saying(path):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        failed = lib.edm_lmdb_check(file, lost_power, deep, report)
    finally:
        os.close(file)
    if failed:
        raise StoreError(f"reading {path}: {os.strerror(-failed)}")
    damage = [
        Damage(file=path, offset=int(bad.page) * PAGE_BYTES, reason=f"{_text(bad.table)}: {_text(bad.what)}")
        for bad in list(report.bad)[: report.bad_count]
    ]
    damage = damage or [Damage(file=path, reason=reason) for reason in _odd(report)]
    if deep and report.unaccounted:
        damage.append(Damage(file=path, reason=f"{report.unaccounted} LMDB pages are neither in use nor free"))
    harmless = [
        Damage(file=path, offset=i * PAGE_BYTES + 2048, reason="the guard of a meta page is damaged")
        for i in range(2)
        if report.guards_damaged >> i & 1
    ]
    if report.older_meta_damaged:
        older = 1 - int(report.transaction) % 2
        harmless.append(Damage(file=path, offset=older * PAGE_BYTES, reason="the meta page not in use is damaged"))
    return damage, harmless


def _odd(report: Any) -> list[str]:
    """What cannot be seen from one page: tables that do not fit each other."""
    tables = {_text(table.name): table for table in list(report.tables)[: report.table_count]}
    odd = [
        f"there is a table '{name}'"
        for name, table in tables.items()
        if name not in _TABLES or bool(table.integer_key) != _TABLES[name]
    ]
    heads, tails = tables.get("heads"), tables.get("tails")
    if heads and tails and (heads.entries, heads.key_sum) != (tails.entries, tails.key_sum):
        odd.append("the tables 'heads' and 'tails' are not of the same pages")
    odd += [
        f"the table '{name}' has values of another size"
        for name, bytes_ in _VALUE_BYTES.items()
        if name in tables
        and tables[name].entries
        and (tables[name].least_bytes, tables[name].most_bytes) != (bytes_, bytes_)
    ]
    turns = tables.get("turns")
    if turns and turns.entries and turns.key_sum != lib.edm_crc32c(_TURN, len(_TURN)):
        odd.append("the table 'turns' is damaged")
    return odd


def _text(chars: Any) -> str:
    return str(ffi.string(chars).decode(errors="replace"))
