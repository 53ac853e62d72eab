"""Control requests: hello, the life of regions, flush, stat.

Place on the path: the DM-Handler's address-space events (fork, mremap, munmap, exit) arrive here, in the order in which
they happened among the evictions, and change the SPT. See docs/protocol.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from edm.dms.table import NO_SLOTS
from edm.errors import EdmError, UsageError
from edm.faultpoints import reached

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edm.interfaces import SptStore
    from edm.types import Slots

PROTOCOL: Final = 1
INSTANCE_SHIFT: Final = 32
_LAST_INSTANCE: Final = 0
"""The note that holds the last instance number given; an instance's own note holds its last sequence number."""


class _Server(Protocol):
    spt: SptStore

    def changed(self, let_go: Slots = ...) -> None: ...
    def save(self) -> None: ...
    def flush(self) -> None: ...
    def stat(self) -> dict[str, Any]: ...


class Control:
    """Answers control requests for one server."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._spt = server.spt
        notes = self._spt.notes()
        self._sequences = {key: value for key, value in notes.items() if key != _LAST_INSTANCE}
        highest = max((region >> INSTANCE_SHIFT for region in self._spt.regions()), default=0)
        self._last_instance = max(notes.get(_LAST_INSTANCE, 0), highest)
        self._changes: dict[str, Callable[[int, Mapping[str, Any]], Slots]] = {
            "create_region": self._create_region,
            "clone_region": self._clone_region,
            "move_pages": self._move_pages,
            "drop_pages": self._drop_pages,
            "drop_region": self._drop_region,
        }
        self._others: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "hello": self._hello,
            "resume": self._resume,
            "flush": self._flush,
            "stat": self._stat,
            "bye": self._flush,
        }

    def answer(self, instance: int, request: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out one request; whatever is wrong with it, or with the store, is in the answer."""
        op = request.get("op")
        try:
            if op in self._changes:
                self._change(instance, str(op), request)
                return {"ok": True}
            if op in self._others:
                return {"ok": True, **self._others[str(op)](request)}
        except (EdmError, OSError, MemoryError) as error:
            answer = {"ok": False, "error": " ".join(str(error).split()) or type(error).__name__}
            # The store is at fault, not the request: that may be made again.
            return answer if isinstance(error, UsageError) else {**answer, "again": True}
        return {"ok": False, "error": f"unknown request {op!r}"}

    def _hello(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request.get("protocol", PROTOCOL) != PROTOCOL:
            raise UsageError(f"this memory server speaks protocol {PROTOCOL}, not {request['protocol']!r}")
        # Counted here before it is saved: a number is lost rather than given twice.
        self._last_instance += 1
        instance = self._last_instance
        self._spt.note(_LAST_INSTANCE, instance)
        self._server.changed()
        self._server.save()
        return {"instance": instance, "protocol": PROTOCOL}

    def _resume(self, request: Mapping[str, Any]) -> dict[str, Any]:
        instance = _number(request, "instance")
        if not 0 < instance <= self._last_instance:
            raise UsageError(f"this memory server has nothing of instance {instance}: its pages are gone")
        return {"instance": instance, "protocol": PROTOCOL}

    def _flush(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        self._server.flush()
        return {}

    def _stat(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        return self._server.stat()

    def _change(self, instance: int, op: str, request: Mapping[str, Any]) -> None:
        """Apply a change once: a repeat is only made to last, where that failed the first time."""
        sequence = _number(request, "sequence") if "sequence" in request else None
        if sequence is None or sequence > self._sequences.get(instance, 0):
            reached("change_begun")
            let_go = self._changes[op](instance, request)
            reached("change_made")
            if sequence is not None:
                self._sequences[instance] = sequence
                self._spt.note(instance, sequence)
            self._server.changed(let_go)
        self._server.save()
        reached("change_committed")

    def _create_region(self, instance: int, request: Mapping[str, Any]) -> Slots:
        self._spt.create(_region(instance, request, "region"))
        return NO_SLOTS

    def _clone_region(self, instance: int, request: Mapping[str, Any]) -> Slots:
        return self._spt.clone(_region(instance, request, "region"), _region(instance, request, "into"))

    def _move_pages(self, instance: int, request: Mapping[str, Any]) -> Slots:
        region = _region(instance, request, "region")
        return self._spt.move(region, *(_number(request, key) for key in ("start", "to", "count")))

    def _drop_pages(self, instance: int, request: Mapping[str, Any]) -> Slots:
        ranges = request.get("ranges")
        if not isinstance(ranges, list | tuple) or not all(isinstance(r, list | tuple) and len(r) == 3 for r in ranges):
            raise UsageError("drop_pages: 'ranges' must be a list of [region, start, count]")
        named = [dict(zip(("region", "start", "count"), triple, strict=True)) for triple in ranges]
        # All are looked at before the first is dropped.
        wanted = [(_region(instance, r, "region"), _number(r, "start"), _number(r, "count")) for r in named]
        let_go = NO_SLOTS
        for region, start, count in wanted:
            gone = self._spt.drop(region, start, count)
            if len(gone):
                self._server.changed(gone)
        return let_go

    def _drop_region(self, instance: int, request: Mapping[str, Any]) -> Slots:
        return self._spt.drop_region(_region(instance, request, "region"))


def _number(request: Mapping[str, Any], key: str) -> int:
    value = request.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise UsageError(f"{request.get('op', 'drop_pages')}: '{key}' must be a number from 0 to 2^64-1, not {value!r}")
    return value


def _region(instance: int, request: Mapping[str, Any], key: str) -> int:
    region = _number(request, key)
    if region >> INSTANCE_SHIFT != instance:
        raise UsageError(f"region {region:#x} is not a region of instance {instance}")
    return region
