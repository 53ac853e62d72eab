"""A memory server that believes nothing: it notes every breach of the protocol a fault source commits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from edm._native import ffi, lib
from edm.types import PAGE_BYTES, EvictStatus, GetStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edm.types import PageRefs


@attrs.frozen(slots=True)
class StoredPage:
    """A page as it was evicted."""

    version: int
    checksum: int
    data: bytes


class WatchfulServer:
    """A `PageServer` in dicts.

    breaches: one line for each thing that must not be. refuse_every, fail_every: every so many eviction or fetch
    batches is refused, or answered with errors; 0: none.
    """

    def __init__(self, *, refuse_every: int = 0, fail_every: int = 0) -> None:
        self.breaches: list[str] = []
        self.regions: dict[int, dict[int, StoredPage]] = {}
        self.evicted = self.fetched = self.refused = self.failed = 0
        self._refuse_every = refuse_every
        self._fail_every = fail_every
        self._batches = {"get": 0, "evict": 0}
        self._sequence = 0

    def get(self, instance: int, refs: PageRefs, into: memoryview) -> None:
        """See `PageServer`."""
        if self._is_nth("get", self._fail_every):
            refs["status"] = GetStatus.ERROR
            self.failed += len(refs)
            return
        for number, ref in enumerate(refs):
            self._owned(instance, int(ref["region"]), "get")
            # A program may have ended since it asked: then its region is gone.
            page = self.regions.get(int(ref["region"]), {}).get(int(ref["index"]))
            ref["status"] = GetStatus.NEW_PAGE if page is None else GetStatus.EXISTING_PAGE
            ref["version"] = page.version if page else 0
            ref["checksum"] = page.checksum if page else 0
            if page:
                into[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = page.data
                self.fetched += 1

    def evict(self, instance: int, refs: PageRefs, pages: memoryview) -> str:
        """See `PageServer`."""
        if self._is_nth("evict", self._refuse_every):
            refs["status"] = EvictStatus.FAIL
            self.refused += len(refs)
            return "refused, to see what happens"
        for number, ref in enumerate(refs):
            data = bytes(pages[number * PAGE_BYTES : (number + 1) * PAGE_BYTES])
            region, index, version = int(ref["region"]), int(ref["index"]), int(ref["version"])
            where = f"evicted page {region:#x}:{index:#x}"
            self._owned(instance, region, where)
            stored = self._region(region, where).get(index)
            if lib.edm_crc32c(ffi.from_buffer(data), PAGE_BYTES) != int(ref["checksum"]):
                self.breaches.append(f"{where}: its checksum does not match")
            if version == 0 or (stored and version < stored.version):
                self.breaches.append(f"{where}: version {version} after {stored.version if stored else 0}")
            if stored and version == stored.version and data != stored.data:
                self.breaches.append(f"{where}: version {version} twice, with different bytes")
            self._region(region, where)[index] = StoredPage(version, int(ref["checksum"]), data)
            ref["status"] = EvictStatus.SUCCESS
            self.evicted += 1
        return ""

    def control(self, instance: int, request: Mapping[str, Any]) -> dict[str, Any]:
        """See `PageServer`."""
        op = str(request["op"])
        if op == "hello":
            return {"ok": True, "instance": 1}
        if op == "bye":
            return {"ok": True}
        if int(request["sequence"]) <= self._sequence:
            self.breaches.append(f"{op}: sequence {request['sequence']} after {self._sequence}")
        self._sequence = int(request["sequence"])
        change = getattr(self, f"_{op}", None)
        if change is None:
            self.breaches.append(f"unknown request: {op}")
            return {"ok": False, "error": f"unknown request: {op}"}
        for name in ("region", "into"):
            if name in request:
                self._owned(instance, int(request[name]), op)
        change(request)
        return {"ok": True}

    def _create_region(self, request: Mapping[str, Any]) -> None:
        self._make(int(request["region"]), {}, "create_region")

    def _clone_region(self, request: Mapping[str, Any]) -> None:
        self._make(int(request["into"]), dict(self._region(int(request["region"]), "clone_region")), "clone_region")

    def _move_pages(self, request: Mapping[str, Any]) -> None:
        pages = self._region(int(request["region"]), "move_pages")
        start, target, count = int(request["start"]), int(request["to"]), int(request["count"])
        moved = {index - start + target: page for index, page in pages.items() if start <= index < start + count}
        for index in [i for i in pages if start <= i < start + count or target <= i < target + count]:
            del pages[index]
        pages.update(moved)

    def _drop_pages(self, request: Mapping[str, Any]) -> None:
        for region, start, count in request["ranges"]:
            pages = self._region(int(region), "drop_pages")
            for index in [index for index in pages if start <= index < start + count]:
                del pages[index]

    def _drop_region(self, request: Mapping[str, Any]) -> None:
        self._region(int(request["region"]), "drop_region")
        self.regions.pop(int(request["region"]), None)

    def _make(self, region: int, pages: dict[int, StoredPage], op: str) -> None:
        if region in self.regions:
            self.breaches.append(f"{op}: region {region:#x} is there already")
        self.regions[region] = pages

    def _region(self, region: int, where: str) -> dict[int, StoredPage]:
        if region not in self.regions:
            self.breaches.append(f"{where}: region {region:#x} is not there")
        return self.regions.get(region, {})

    def _owned(self, instance: int, region: int, where: str) -> None:
        if region >> 32 != instance:
            self.breaches.append(f"{where}: region {region:#x} is not instance {instance}'s")

    def _is_nth(self, kind: str, every: int) -> bool:
        self._batches[kind] += 1
        return bool(every) and self._batches[kind] % every == 0
