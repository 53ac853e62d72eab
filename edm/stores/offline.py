"""A store's directory without a server: what `edm store` looks into.

Place on the path: none; it opens what a memory server would, under the same lock.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edm.dms.control import INSTANCE_SHIFT
from edm.dms.table import NO_SLOTS, PageTable, page_checksums
from edm.errors import Corrupt, EdmError, UsageError
from edm.registry import Registry
from edm.stores.damage import Damage
from edm.stores.directory import saying
from edm.types import PAGE_BYTES, PageId, RunContext

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Self

    from edm.types import PageRefs, Slots

_BATCH: Final = 256


class OfflineStore:
    """The two halves of a store, found by what is in the directory. Raises `UsageError` where there is none.

    damaged_too: where the page table is damaged, what can be read of it is looked at, and nothing may be changed;
    damage: what was found so far. spt: an `SptStore`, or the `PageTable` that could be read; pages: a `PageStore`, or
    None where it does not open.
    """

    spt: Any
    pages: Any = None

    def __init__(self, directory: Path, *, damaged_too: bool = False) -> None:
        self.directory = _found(directory)
        self.halves = {
            "spt_store": "file" if (self.directory / "spt").is_dir() else "lmdb",
            "page_store": "file" if (self.directory / "pages").is_dir() else "lmdb",
        }
        if "lmdb" in self.halves.values() and not (self.directory / "lmdb").is_dir():
            kind = "page table" if self.halves["spt_store"] == "lmdb" else "pages"
            raise UsageError(f"{self.directory} has no {kind} on disk: nothing to look at")
        self.damage: list[Damage] = []
        with ExitStack() as opened:
            whole = self._open(opened, damaged_too=damaged_too)
            if self.pages is not None:
                slots = np.concatenate([slots for _, slots in self._regions()] or [NO_SLOTS])
                see = self.pages.live if whole else getattr(self.pages, "look", None)
                if see:
                    see(slots)
            self._opened = opened.pop_all()

    def _open(self, opened: ExitStack, *, damaged_too: bool) -> bool:
        """Open both halves; whether the page table is whole."""
        context, registry = RunContext(self.directory, self.directory, "store"), Registry()
        spt_spec = registry.spt_store(self.halves["spt_store"])
        page_spec = registry.page_store(self.halves["page_store"])
        whole = True
        try:
            self.spt = spt_spec.open(spt_spec.options(), context)
            opened.callback(self.spt.close)
            self.damage += getattr(self.spt, "damage", [])
        except Corrupt as error:
            if not damaged_too or spt_spec.inspect is None:
                raise
            whole = False
            self.spt, self.damage = _inspected(spt_spec.inspect, context, error)
        try:
            self.pages = page_spec.open(page_spec.options(), context)
            opened.callback(self.pages.close)
            self.damage += [one for one in getattr(_innermost(self.pages), "damage", []) if one not in self.damage]
        except Corrupt as error:
            if not damaged_too:
                raise
            if not any(str(one.file) in str(error) for one in self.damage):
                self.damage.append(Damage(file=self.directory, reason=str(error)))
        return whole

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def page_count(self) -> int:
        """Pages in all regions."""
        return int(sum(self.spt.regions().values()))

    def pages_of(self, region: int) -> int:
        """Pages of one region; raises `UsageError` for one that is not there."""
        regions: dict[int, int] = self.spt.regions()
        if region not in regions:
            raise UsageError(f"{self.directory} has no region {region:#x} (see 'edm store list {self.directory}')")
        return regions[region]

    def stat(self) -> dict[str, Any]:
        """Figures of both halves."""
        return {
            "directory": str(self.directory),
            f"page table ({self.halves['spt_store']})": self.spt.stat(),
            f"pages ({self.halves['page_store']})": self.pages.stat(),
        }

    def regions(self) -> list[dict[str, int]]:
        """Every region with its instance, pages and bytes."""
        return [
            {"instance": region >> INSTANCE_SHIFT, "region": region, "pages": pages, "bytes": pages * PAGE_BYTES}
            for region, pages in self.spt.regions().items()
        ]

    def verify(self, advance: Callable[[int], None]) -> list[Damage]:
        """Read every page; all that is damaged."""
        damaged = list(self.damage)
        for store in (self.spt, _innermost(self.pages)):
            damaged += [one for one in getattr(store, "verify", list)() if one not in damaged]
        if self.pages is None:
            return damaged
        into = memoryview(bytearray(_BATCH * PAGE_BYTES))
        for refs, slots in self._regions():
            for at in range(0, len(refs), _BATCH):
                part, part_slots = refs[at : at + _BATCH], slots[at : at + _BATCH]
                damaged += [self._entry(part, part_slots, i, why) for i, why in self._bad(part, part_slots, into)]
                advance(len(part))
        return damaged

    def collect(self) -> dict[str, int]:
        """Compact and trim; bytes before and after."""
        before = self._disk_bytes()
        self.pages.flush()
        for store in (self.spt, _innermost(self.pages)):
            for name in ("compact", "trim"):
                if hasattr(store, name):
                    getattr(store, name)()
        self.spt.flush()
        return {"before_bytes": before, "after_bytes": self._disk_bytes()}

    def export(self, region: int, output: Path, advance: Callable[[int], None]) -> list[Damage]:
        """Write a region to a sparse file, and what it holds to another beside it; returns what is damaged."""
        refs, slots = self.spt.pages(region)
        first = int(refs["index"][0]) if len(refs) else 0
        into = memoryview(bytearray(_BATCH * PAGE_BYTES))
        damaged, written = [], []
        with saying(output), output.open("wb") as file:
            for at in range(0, len(refs), _BATCH):
                part, part_slots = refs[at : at + _BATCH], slots[at : at + _BATCH]
                bad = dict(self._bad(part, part_slots, into))
                damaged += [self._entry(part, part_slots, i, why) for i, why in bad.items()]
                for i, index in enumerate(part["index"].tolist()):
                    if i not in bad:
                        file.seek((index - first) * PAGE_BYTES)
                        file.write(into[i * PAGE_BYTES : (i + 1) * PAGE_BYTES])
                        written.append(index)
                advance(len(part))
        about = {"region": region, "first_page": first, "page_bytes": PAGE_BYTES, "pages": _ranges(written)}
        beside = output.with_name(output.name + ".json")
        with saying(beside):
            beside.write_text(json.dumps(about) + "\n")
        return damaged

    def _bad(self, refs: PageRefs, slots: Slots, into: memoryview) -> list[tuple[int, str]]:
        """Fill `into` with pages; which of them are damaged, and why."""
        pages = into[: len(refs) * PAGE_BYTES]
        with suppress(Corrupt, EdmError, OSError):
            self.pages.get(slots, pages)
            if np.array_equal(page_checksums(pages), refs["checksum"]):
                return []
        bad = []
        for i in range(len(refs)):
            page = pages[i * PAGE_BYTES : (i + 1) * PAGE_BYTES]
            try:
                self.pages.get(slots[i : i + 1], page)
                if page_checksums(page)[0] != refs["checksum"][i]:
                    bad.append((i, "not the page that was stored"))
            except (EdmError, OSError) as error:
                bad.append((i, str(error)))
        return bad

    def _entry(self, refs: PageRefs, slots: Slots, at: int, reason: str) -> Damage:
        where, offset = getattr(self.pages, "where", None), getattr(self.pages, "offset", None)
        slot = int(slots[at])
        file = where(slot) if where else self.directory
        return Damage(
            file=file,
            offset=offset(slot) if offset else None,
            page=str(PageId(int(refs["region"][at]), int(refs["index"][at]))),
            reason=reason.removeprefix(f"{file}: "),
        )

    def _regions(self) -> Iterator[tuple[PageRefs, Slots]]:
        for region in self.spt.regions():
            yield self.spt.pages(region)

    def _disk_bytes(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in self.directory.rglob("*") if path.is_file())


def _inspected(inspect: Any, context: RunContext, error: Corrupt) -> tuple[PageTable, list[Damage]]:
    try:
        table, damage = inspect(context)
    except Corrupt as again:
        table, damage, error = PageTable(), [], again
    # Whatever `inspect` takes for sound, the store does not open.
    return table, damage or [Damage(file=context.store_dir, reason=str(error))]


def _found(directory: Path) -> Path:
    if not directory.exists():
        raise UsageError(f"{directory}: no such directory")
    with saying(directory):
        for path in (directory, directory / "store"):
            # Not an empty one: looking must not make a store.
            if any((path / half).is_dir() and any((path / half).iterdir()) for half in ("spt", "pages", "lmdb")):
                return path
    raise UsageError(f"{directory} holds no store (no spt, pages or lmdb with anything in it)")


def _innermost(store: Any) -> Any:
    return getattr(store, "inner", store)


def _ranges(indices: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, how many)."""
    ranges: list[tuple[int, int]] = []
    for index in indices:
        if ranges and sum(ranges[-1]) == index:
            ranges[-1] = ranges[-1][0], ranges[-1][1] + 1
        else:
            ranges.append((index, 1))
    return ranges
