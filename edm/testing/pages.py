"""A memory server in a dict, plain enough to be right at sight: what transports are tested against."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edm._native import ffi, lib
from edm.types import PAGE_BYTES, PAGE_REF, EvictStatus, GetStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edm.types import PageRefs

HELD_S: Final = 60.0
"""The longest, should nobody make the file."""


class DictServer:
    """A `PageServer` that keeps pages in a dict, with two operations more for tests.

    test_delay {seconds or until, requests}: be that slow for the next so many gets and evicts, or carry them out only
    when there is a file of that name. test_calls {}: how often each instance's gets and evicts were carried out.
    """

    def __init__(self) -> None:
        self._pages: dict[tuple[int, int], tuple[int, int, bytes]] = {}
        self._instances = 0
        self._sequences: dict[int, int] = {}
        self._delay: tuple[float | str, int] = (0.0, 0)
        self._calls: dict[int, int] = {}

    def get(self, instance: int, refs: PageRefs, into: memoryview) -> None:
        """See `PageServer`."""
        self._called(instance)
        for at, ref in enumerate(refs):
            found = self._pages.get((int(ref["region"]), int(ref["index"])))
            if int(ref["region"]) >> 32 != instance:
                ref["status"] = GetStatus.ERROR
            elif found is None:
                ref["status"] = GetStatus.NEW_PAGE
            else:
                ref["version"], ref["checksum"], page = found
                into[at * PAGE_BYTES : (at + 1) * PAGE_BYTES] = page
                ref["status"] = GetStatus.EXISTING_PAGE

    def evict(self, instance: int, refs: PageRefs, pages: memoryview) -> str:
        """See `PageServer`."""
        self._called(instance)
        error = ""
        for at, ref in enumerate(refs):
            name = int(ref["region"]), int(ref["index"])
            page = bytes(pages[at * PAGE_BYTES : (at + 1) * PAGE_BYTES])
            reason = self._refusal(instance, name, ref, page)
            ref["status"] = EvictStatus.FAIL if reason else EvictStatus.SUCCESS
            error = error or reason
            if not reason:
                self._pages[name] = int(ref["version"]), int(ref["checksum"]), page
        return error

    def control(self, instance: int, request: Mapping[str, Any]) -> dict[str, Any]:
        """See `PageServer`."""
        match request.get("op"):
            case "hello":
                self._instances += 1
                return {"ok": True, "instance": self._instances}
            case "drop_pages" | "drop_region" | "move_pages":
                if int(request["sequence"]) > self._sequences.get(instance, 0):
                    self._sequences[instance] = int(request["sequence"])
                    getattr(self, f"_{request['op']}")(request)
                return {"ok": True}
            case "test_delay":
                self._delay = request.get("until") or float(request["seconds"]), int(request["requests"])
                return {"ok": True}
            case "test_calls":
                return {"ok": True, "calls": {str(key): calls for key, calls in self._calls.items()}}
            case "flush" | "bye" | "stat":
                return {"ok": True, "pages": len(self._pages)}
        return {"ok": False, "error": f"unknown request {request.get('op')!r}"}

    def _drop_pages(self, request: Mapping[str, Any]) -> None:
        for region, start, count in request["ranges"]:
            for index in range(start, start + count):
                self._pages.pop((region, index), None)

    def _drop_region(self, request: Mapping[str, Any]) -> None:
        for name in [name for name in self._pages if name[0] == request["region"]]:
            del self._pages[name]

    def _move_pages(self, request: Mapping[str, Any]) -> None:
        region, start, to, count = (int(request[key]) for key in ("region", "start", "to", "count"))
        for offset in range(count):
            self._pages.pop((region, to + offset), None)
            page = self._pages.pop((region, start + offset), None)
            if page is not None:
                self._pages[region, to + offset] = page

    def _refusal(self, instance: int, name: tuple[int, int], ref: Any, page: bytes) -> str:
        if name[0] >> 32 != instance:
            return f"region {name[0]:#x} is not of instance {instance}"
        if int(ref["version"]) < self._pages.get(name, (0, 0, b""))[0]:
            return f"page {name[0]:#x}:{name[1]:#x}: version {ref['version']} is older than the stored one"
        if crc32c(page) != int(ref["checksum"]):
            return f"page {name[0]:#x}:{name[1]:#x}: the checksum does not match"
        return ""

    def _called(self, instance: int) -> None:
        self._calls[instance] = self._calls.get(instance, 0) + 1
        slow, requests = self._delay
        if not requests:
            return
        self._delay = slow, requests - 1
        if isinstance(slow, float):
            time.sleep(slow)
            return
        end = time.monotonic() + HELD_S
        while not Path(slow).exists() and time.monotonic() < end:
            time.sleep(0.01)


def crc32c(page: bytes | memoryview) -> int:
    """CRC-32C of one page."""
    return int(lib.edm_crc32c(ffi.from_buffer(page), len(page)))


def batch_of(region: int, indices: Any, version: int, seed: int = 1) -> tuple[PageRefs, bytearray]:
    """A batch ready to evict: references, and pages whose bytes follow from seed, version and index."""
    indices = np.asarray(indices, np.uint64)
    refs = np.zeros(len(indices), PAGE_REF)
    refs["region"], refs["index"], refs["version"] = region, indices, version
    pages = np.empty((len(indices), PAGE_BYTES // 8), np.uint64)
    pages[:] = (indices * np.uint64(0x9E3779B97F4A7C15) + np.uint64(version * 1_000_003 + seed))[:, None]
    pages += np.arange(PAGE_BYTES // 8, dtype=np.uint64)
    buffer = bytearray(pages.tobytes())
    lib.edm_crc32c_pages(ffi.from_buffer(buffer), len(refs), ffi.from_buffer("uint32_t[]", checksums := _u4(refs)))
    refs["checksum"] = checksums
    return refs, buffer


def _u4(refs: PageRefs) -> Any:
    return np.zeros(len(refs), np.uint32)
