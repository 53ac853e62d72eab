"""The fault engine as Python sees it: thin over `edm._native`.

Place on the path: what a `FaultSource` over the C core does [3-5, 12-15]; called by the DM-Handler's threads. Buffers
belong to the engine and live as long as it does.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np

from edm._native import ffi, lib
from edm.errors import NativeError
from edm.idle_cpus import idle_cpus
from edm.types import PAGE_BYTES, PAGE_REF

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edm.config.settings import HandlerSettings
    from edm.interfaces import OutboxItem
    from edm.types import Inheritance, PageRefs

FETCH_PAGES: Final = 64
MAX_PIDS: Final = 65536
IDLE_BITS: Final = b"/sys/kernel/mm/page_idle/bitmap"
"""What the kernel knows of frames that were not touched; there with CONFIG_IDLE_PAGE_TRACKING only."""
_REQUESTS: Final[dict[int, Callable[[Any], dict[str, Any]]]] = {
    lib.EDM_OUT_CREATE: lambda o: {"op": "create_region", "region": o.region},
    lib.EDM_OUT_CLONE: lambda o: {"op": "clone_region", "region": o.a, "into": o.region},
    lib.EDM_OUT_MOVE: lambda o: {"op": "move_pages", "region": o.region, "start": o.a, "to": o.b, "count": o.c},
    lib.EDM_OUT_DROP: lambda o: {"op": "drop_pages", "ranges": [[o.region, o.a, o.b]]},
    lib.EDM_OUT_DROP_REGION: lambda o: {"op": "drop_region", "region": o.region},
}


@attrs.frozen(slots=True)
class Outgoing:
    """One outbox message: an eviction batch (refs and pages), or a control request."""

    refs: PageRefs | None = None
    pages: memoryview | None = None
    request: Mapping[str, Any] | None = None


class Engine:
    """LSPT, LPET, write-back buffer and fault resolution; see native/edm_abi.h for every call's terms."""

    def __init__(
        self, settings: HandlerSettings, inheritance: Inheritance | None = None, *, user_mode: bool = False
    ) -> None:
        idle = idle_cpus(settings.idle_cpus, placed=bool(settings.cpus))
        config = ffi.new(
            "struct edm_engine_config *",
            {
                "local_pages": settings.local_pages,
                "high_pages": settings.high_pages,
                "low_pages": settings.low_pages,
                "write_back_pages": settings.write_back_pages,
                "sweep_us": int(settings.sweep_ms * 1000),
                "spin_us": settings.spin_us,
                "ahead_pages": settings.ahead_pages,
                "track_writes": settings.track_writes,
                "ask": settings.ask,
                "user_mode": user_mode,
                "record_pfn": settings.record_pfn,
                "follow": not settings.cpus,
                "idle": idle.way,
                "idle_us": idle.latency_us,
            },
        )
        if inheritance is None:
            self.native = lib.edm_engine_new(config)
        else:
            self.native = lib.edm_engine_adopt(config, inheritance.holder, inheritance.segment)
        if not self.native:
            raise NativeError(ffi.errno, "edm_engine_new" if inheritance is None else "adopting the programs")
        workers = range(settings.fault_threads)
        self._refs = [
            np.frombuffer(
                ffi.buffer(lib.edm_worker_refs(self.native, w), FETCH_PAGES * PAGE_REF.itemsize), PAGE_REF, FETCH_PAGES
            )
            for w in workers
        ]
        self._pages = [
            memoryview(ffi.buffer(lib.edm_worker_pages(self.native, w), FETCH_PAGES * PAGE_BYTES)) for w in workers
        ]
        self._out = ffi.new("struct edm_outbox *")
        self._counters = ffi.new("struct edm_counters *")
        self._counter_names = [name for name, _ in ffi.typeof("struct edm_counters").fields]
        self._closed = False

    def poll_faults(self, worker: int, timeout_us: int) -> int:
        """Serve faults until pages must be fetched (their number), the time is over (0), or the end (-1)."""
        count: int = lib.edm_poll(self.native, worker, timeout_us)
        if count >= 0:
            return count
        if count == -errno.ESHUTDOWN:
            return -1
        raise NativeError(-count, "edm_poll")

    def held_by(self, holder: int) -> int:
        """Note the process that keeps our descriptors; the number there from which another engine goes on."""
        lib.edm_engine_holder(self.native, holder)
        return int(lib.edm_engine_segment(self.native))

    def release(self) -> None:
        """End the holders of the DM-Handlers before us: what they hold is held by our own."""
        lib.edm_engine_release(self.native)

    def use_channel(self, worker: int, table: int) -> None:
        """Let a worker fetch by itself through the C table "edm.channel_ops" at that address; before its first poll."""
        lib.edm_worker_channel(self.native, worker, ffi.cast("void *", table))

    def use_write_back_channel(self, table: int) -> None:
        """Let evictions go through the C table at that address; before the first `poll_outbox`."""
        lib.edm_outbox_channel(self.native, ffi.cast("void *", table))

    def use_policy(self, table: int) -> int:
        """Evict in the order of the C table at that address; before `start`. 0, or the errno of the idle bits."""
        result: int = lib.edm_engine_policy(self.native, ffi.cast("void *", table), IDLE_BITS)
        if result < 0:
            raise NativeError(-result, "edm_engine_policy")
        return result

    def fault_batch(self, worker: int, count: int) -> tuple[PageRefs, memoryview]:
        """Views of the worker's first `count` refs and pages."""
        return self._refs[worker][:count], self._pages[worker][: count * PAGE_BYTES]

    def resolve(self, worker: int, count: int) -> None:
        """Install the worker's fetched pages and wake who waits for them."""
        result = lib.edm_resolve(self.native, worker, count)
        if result:
            raise NativeError(-result, "edm_resolve")

    def poll_outbox(self, timeout_us: int) -> Outgoing | None:
        """The next message for the DMS, None after the timeout; raises EOFError at the end."""
        out = self._out
        result = lib.edm_outbox_poll(self.native, out, timeout_us)
        if result == 0:
            return None
        if result < 0:
            raise EOFError
        if out.kind == lib.EDM_OUT_EVICT:
            refs = np.frombuffer(ffi.buffer(out.refs, out.n * PAGE_REF.itemsize), PAGE_REF, out.n)
            return Outgoing(refs=refs, pages=memoryview(ffi.buffer(out.pages, out.n * PAGE_BYTES)))
        return Outgoing(request={**_REQUESTS[out.kind](out), "sequence": out.sequence})

    def outbox_done(self, item: OutboxItem) -> None:
        """Note that the message polled last, which is `item`, has been carried out."""
        del item  # there is one message at a time; the engine has its refs
        lib.edm_outbox_done(self.native, self._out)

    def counters(self) -> dict[str, int]:
        """All counters of `struct edm_counters`, by name."""
        lib.edm_engine_counters(self.native, self._counters)
        return {name: getattr(self._counters, name) for name in self._counter_names}

    def trace_start(self, records: int) -> None:
        """Record every fault from now on; the records wait for `trace_take`, at most so many of them."""
        result = lib.edm_trace_start(self.native, records)
        if result:
            raise NativeError(-result, "edm_trace_start")

    def trace_take(self, most: int) -> tuple[bytes, int]:
        """Up to `most` records (`edm.trace.RECORD`), and how many faults went unrecorded since the start."""
        records = ffi.new("struct edm_trace_record[]", most)
        dropped = ffi.new("uint64_t *")
        count = lib.edm_trace_take(self.native, records, most, dropped)
        return bytes(ffi.buffer(records, count * ffi.sizeof("struct edm_trace_record"))), dropped[0]

    def error(self) -> str:
        """The first internal error, "" if there was none."""
        return str(ffi.string(lib.edm_engine_error(self.native)).decode(errors="replace"))

    def pids(self) -> list[int]:
        """Processes captured and alive."""
        out = ffi.new("int32_t[]", MAX_PIDS)
        return list(out[0 : lib.edm_engine_pids(self.native, out, MAX_PIDS)])

    def page_state(self, pid: int, page: int) -> dict[str, int]:
        """What the LSPT says of page number `page` of process `pid`: state, clean, version, pfn."""
        out = ffi.new("struct edm_page_state *")
        result = lib.edm_engine_page(self.native, pid, page, out)
        if result:
            raise NativeError(-result, f"page of process {pid}")
        return {name: getattr(out, name) for name, _ in ffi.typeof("struct edm_page_state").fields}

    def stop(self) -> None:
        """End all polls; the outbox still hands out what is queued."""
        lib.edm_engine_stop(self.native)

    def close(self) -> None:
        """Free everything; no thread may be inside a call. A second call does nothing."""
        if not self._closed:
            self._closed = True
            lib.edm_engine_free(self.native)
