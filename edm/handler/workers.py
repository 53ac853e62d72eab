"""The DM-Handler's threads between the fault source and the DMS.

Place on the path: a fault worker pulls faults [3-5], fetches over its channel [5-11] and resolves [12-15]; the
write-back thread carries evictions and structural requests, in order. Both wait out a DMS that does not answer. Past
the run's patience they do as `on_loss` says: wait on, end the run and the programs with it, or (a fault worker) give up
the pages asked for, which the program then gets a SIGBUS for. It never goes on with other bytes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from edm.errors import EdmError, PeerLost, TransportError, TransportTimeout
from edm.interfaces import TakesTables
from edm.ops import CHANNEL, address_of
from edm.types import GetStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edm.interfaces import Channel, FaultSource, OutboxItem, Transport
    from edm.types import PageRefs

T = TypeVar("T")
log = logging.getLogger(__name__)

POLL_US: Final = 200_000
RETRY_S: Final = (0.0, 0.01, 0.05, 0.2, 0.5)
WARN_EVERY_S: Final = 5.0
CHANNEL_BYTES: Final = 32
"""sizeof(struct edm_channel_ops)."""


class Workers:
    """All threads of one DM-Handler.

    on_loss: "wait", "poison" or "kill". failed: called once, from the thread that failed, with the error that ends the
    run. warn: called now and then with one line about what is being waited for.
    """

    def __init__(
        self,
        source: FaultSource,
        transport: Transport,
        *,
        fault_threads: int,
        patience_s: float,
        on_loss: str = "wait",
        cpus: Sequence[int] = (),
        failed: Callable[[BaseException], None],
        warn: Callable[[str], None],
    ) -> None:
        self._source = source
        self._transport = transport
        self._patience_s = patience_s
        self._on_loss = on_loss
        self._cpus = cpus
        self._failed = failed
        self._warn = warn
        self._warned_at = float("-inf")
        # Since when the DMS refuses for want of room, or whatever ails its store; None: it does not.
        self._refusing_since: float | None = None
        self._refusal_told, self._refusal_told_at = False, float("-inf")
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._guard, args=(self._serve_faults, worker), name=f"edm-fault-{worker}", daemon=True
            )
            for worker in range(fault_threads)
        ]
        self._write_back = threading.Thread(
            target=self._guard, args=(self._carry_outbox,), name="edm-write-back", daemon=True
        )

    def start(self) -> None:
        """Start every thread."""
        for thread in (*self._threads, self._write_back):
            thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads after the source was stopped; False if one is still busy after `timeout_s`."""
        self._stopping.set()
        end = time.monotonic() + timeout_s
        for thread in (*self._threads, self._write_back):
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in (*self._threads, self._write_back))

    def _guard(self, body: Callable[..., None], *arguments: int) -> None:
        try:
            body(*arguments)
        except BaseException as error:
            log.debug("a worker failed", exc_info=True)
            self._failed(error)

    def _serve_faults(self, worker: int) -> None:
        if self._cpus:
            os.sched_setaffinity(0, self._cpus)
        source, channel = self._source, self._transport.connect()
        poll, resolve, batch, fetch = source.poll_faults, source.resolve, source.fault_batch, channel.fetch
        if isinstance(source, TakesTables) and (table := address_of(channel, CHANNEL, CHANNEL_BYTES)):
            source.use_channel(worker, table)
        while (count := poll(worker, POLL_US)) >= 0:
            if count == 0:
                continue
            refs, pages = batch(worker, count)
            try:
                fetch(refs, pages)
            except TransportError as error:
                try:
                    self._again(error, partial(fetch, refs, pages), gives_up=True)
                except TransportError as last:
                    # One that is known to be gone may be started again: that is the launcher's to say.
                    if self._on_loss != "poison" or isinstance(last, PeerLost):
                        raise
                    refs["status"] = GetStatus.LOST
            resolve(worker, count)
        channel.close()

    def _carry_outbox(self) -> None:
        channel = self._transport.connect()
        source = self._source
        if isinstance(source, TakesTables) and (table := address_of(channel, CHANNEL, CHANNEL_BYTES)):
            source.use_write_back_channel(table)
        refused = 0
        while True:
            try:
                item = self._source.poll_outbox(POLL_US)
            except EOFError:
                break
            if item is None:
                # What was refused goes out again at once, perhaps in C: nothing waits any more.
                refused = self._accepted()
                continue
            if item.refs is None:
                self._control(channel, item)
                self._accepted()
            else:
                refused = self._evict(channel, item.refs, item, refused)
            self._source.outbox_done(item)
        channel.close()

    def _control(self, channel: Channel, item: OutboxItem) -> None:
        assert item.request is not None
        request = item.request
        try:
            answer = channel.control(request)
        except TransportError as error:
            answer = self._again(error, lambda: channel.control(request))
        refused = 0
        while answer.get("again") and not self._stopping.is_set():
            # The store, not the request, is at fault; the sequence number makes the repeat safe.
            refused = self._refused(answer.get("error", ""), refused)
            try:
                answer = channel.control(request)
            except TransportError as error:
                answer = self._again(error, lambda: channel.control(request))
        if not answer.get("ok"):
            raise EdmError(f"the memory server refused {request['op']}: {answer.get('error', 'no reason given')}")

    def _evict(self, channel: Channel, refs: PageRefs, item: OutboxItem, refused: int) -> int:
        """Carry an eviction batch; returns how many times in a row the DMS has refused."""
        assert item.pages is not None
        pages = item.pages
        try:
            why = channel.evict(refs, pages)
        except TransportError as error:
            why = self._again(error, lambda: channel.evict(refs, pages))
        if not refs["status"].any():
            return self._accepted()
        # The pages stay in the write-back buffer and go out again; programs wait when it is full. Nothing is lost.
        return self._refused(why, refused)

    def _refused(self, why: str, times: int) -> int:
        """Say so once, and wait a little; returns how many times in a row it was."""
        now = time.monotonic()
        if self._refusing_since is None:
            self._refusing_since = now
        # Where it comes and goes, as on a disk that is nearly full, not each time.
        if not self._refusal_told and now - self._refusal_told_at >= WARN_EVERY_S:
            self._refusal_told, self._refusal_told_at = True, now
            self._warn(f"the memory server cannot store pages ({why or 'no reason given'}); waiting for room")
        self._stopping.wait(min(0.01 * 2**times, 1.0))
        return min(times + 1, 7)

    def _accepted(self) -> int:
        if self._refusal_told and self._refusing_since is not None:
            waited_s = time.monotonic() - self._refusing_since
            self._warn(f"the memory server stores pages again, after {waited_s:.1f} s")
        self._refusing_since, self._refusal_told = None, False
        return 0

    def _again(self, first: TransportError, call: Callable[[], T], *, gives_up: bool = False) -> T:
        """Repeat a call the DMS did not answer, until it does.

        Raises past the patience, where on_loss says so, and at once where the DMS is known not to come back. gives_up:
        the call may be given up without ending the run.
        """
        error, began = first, time.monotonic()
        ends = self._on_loss == "kill" or (self._on_loss == "poison" and gives_up)
        attempt, told = 0, False
        while not self._stopping.is_set() and not isinstance(error, PeerLost):
            if ends and time.monotonic() - began >= self._patience_s:
                break
            told |= self._say(f"the memory server does not answer ({error}); {self._what_next(began, ends=ends)}")
            if not isinstance(error, TransportTimeout):
                time.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
            attempt += 1
            try:
                answer = call()
            except TransportError as again:
                error = again
                continue
            if told:
                self._warn(f"the memory server answers again, after {time.monotonic() - began:.1f} s")
            return answer
        raise error

    def _what_next(self, began: float, *, ends: bool) -> str:
        waited_s = time.monotonic() - began
        if ends:
            what = "the program is ended" if self._on_loss == "kill" else "its pages are given up"
            return f"after {self._patience_s:g} s {what}"
        return "waiting" if waited_s < 1 else f"waiting since {waited_s:.0f} s"

    def _say(self, text: str) -> bool:
        """Warn, unless somebody has just now; whether it did."""
        now = time.monotonic()
        if now - self._warned_at < WARN_EVERY_S:
            return False
        self._warned_at = now
        self._warn(text)
        return True
