"""One channel over several memory servers: each page has its server, by its number.

Place on the path: between a worker's `fetch`/`evict`/`control` and one `Conversation` for each server [5, 11].

The server of a page is the one that wins a hash of server and extent (rendezvous hashing), an extent being 64
neighbouring pages: what is fetched together mostly comes from one server, and a change in the number of servers leaves
most pages where they are. The region has no part in it, so that a clone's pages are where the original's are.

Each server names the instance itself, so regions are translated on the way. A rename of pages may change their server:
the channel then carries them over.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edm.channel import Conversation, WireChannel, ask, evict, fetch, receive_ack, receive_answer, receive_pages
from edm.errors import TransportError
from edm.types import MAX_BATCH_PAGES, PAGE_BYTES, PAGE_REF, EvictStatus, GetStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edm.channel import Link, Session
    from edm.interfaces import Channel
    from edm.types import PageRefs

EXTENT_PAGES: Final = 64
_LOW: Final = np.uint64(0xFFFF_FFFF)
_HIGH_BITS: Final = np.uint64(32)
_NOBODY: Final = np.uint64(0xFFFF_FFFF << 32)
_REGION_KEYS: Final = ("region", "into")
_STEPS: Final = 4
"""Sequence numbers that one structural request may become on a server."""


def server_of(indices: NDArray[np.uint64], servers: int) -> NDArray[np.intp]:
    """For each page number, which of `servers` memory servers keeps it."""
    extents = indices // np.uint64(EXTENT_PAGES)
    scores = np.stack(
        [_mix(extents + np.uint64(0x9E3779B97F4A7C15 * (server + 1) % 2**64)) for server in range(servers)]
    )
    winners: NDArray[np.intp] = np.argmax(scores, axis=0)
    return winners


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # splitmix64's finaliser: every input bit reaches every output bit.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class SpreadChannel:
    """A `Channel` to several memory servers. Threads, blocking and errors as the interface says."""

    def __init__(
        self, links: Sequence[Link], session: Session, number: int, deadline_s: float, resend_s: float | None = None
    ) -> None:
        self._session = session
        self._deadline_s = deadline_s
        self._conversations = [
            Conversation(link, session, server, number, resend_s) for server, link in enumerate(links)
        ]

    def fetch(self, refs: PageRefs, into: memoryview) -> None:
        """Ask all servers concerned at once, then gather their answers in the order of the batch."""
        deadline = self._deadline()
        parts = self._parts(refs)
        for server, _, part in parts:
            fetch(self._conversations[server], part, deadline)
        for server, at, part in parts:
            pages = bytearray(len(part) * PAGE_BYTES)
            receive_pages(self._conversations[server], part, memoryview(pages))
            self._take(refs, at, part)
            for number, to in enumerate(at.tolist()):
                if part["status"][number] == GetStatus.EXISTING_PAGE:
                    page = memoryview(pages)[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
                    into[to * PAGE_BYTES : (to + 1) * PAGE_BYTES] = page

    def evict(self, refs: PageRefs, pages: memoryview) -> str:
        """Send each server its pages, then gather the acknowledgements; the first error text is returned."""
        deadline = self._deadline()
        parts = self._parts(refs)
        for server, at, part in parts:
            its_pages = b"".join(pages[to * PAGE_BYTES : (to + 1) * PAGE_BYTES] for to in at.tolist())
            evict(self._conversations[server], part, memoryview(its_pages), deadline)
        error = ""
        for server, at, part in parts:
            text = receive_ack(self._conversations[server], part)
            self._take(refs, at, part)
            error = error or text
        return error

    def control(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask every server; the answer is the first server's, or the first that is not ok."""
        if request.get("op") == "move_pages":
            return self._move(request)
        if request.get("op") == "resume":
            return self._resume(request)
        if "sequence" in request:
            request = {**request, "sequence": int(request["sequence"]) * _STEPS}
        answers = self._ask_all(request)
        if request.get("op") == "hello":
            for server, answer in enumerate(answers):
                if answer.get("ok"):
                    self._session.instances[server] = int(answer["instance"])
            answers[0] = {**answers[0], "instances": list(self._session.instances)}
        return self._joined(request, answers)

    def close(self) -> None:
        """Release all links; a second call does nothing."""
        for conversation in self._conversations:
            conversation.link.close()

    def _resume(self, request: Mapping[str, Any]) -> dict[str, Any]:
        deadline = self._deadline()
        for conversation, its_own in zip(self._conversations, self._session.resumed(request), strict=True):
            ask(conversation, its_own, deadline)
        return self._joined(request, [receive_answer(conversation) for conversation in self._conversations])

    def _deadline(self) -> float:
        return time.monotonic() + self._deadline_s

    def _parts(self, refs: PageRefs) -> list[tuple[int, NDArray[np.intp], PageRefs]]:
        """For each server concerned: its number, the places of its pages in the batch, and its references."""
        servers = server_of(refs["index"], len(self._conversations))
        parts = []
        for server in np.unique(servers).tolist():
            at = np.flatnonzero(servers == server)
            part = refs[at]
            part["region"] = self._theirs(part["region"], server)
            parts.append((server, at, part))
        return parts

    def _take(self, refs: PageRefs, at: NDArray[np.intp], part: PageRefs) -> None:
        for name in ("version", "checksum", "status"):
            refs[name][at] = part[name]

    def _theirs(self, regions: Any, server: int) -> Any:
        """Regions of this instance as `server` calls them; another's become nobody's, which every server refuses."""
        ours, theirs = self._session.instances[0], self._session.instances[server]
        regions = np.asarray(regions, np.uint64)
        mine = (regions >> _HIGH_BITS) == np.uint64(ours)
        return np.where(mine, (regions & _LOW) | np.uint64(theirs << 32), regions | _NOBODY)

    def _ask_all(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        deadline = self._deadline()
        for server, conversation in enumerate(self._conversations):
            ask(conversation, self._translated(request, server), deadline)
        return [receive_answer(conversation) for conversation in self._conversations]

    def _translated(self, request: Mapping[str, Any], server: int) -> dict[str, Any]:
        request = dict(request)
        for key in _REGION_KEYS:
            if key in request:
                request[key] = int(self._theirs(request[key], server))
        if "ranges" in request:
            regions = self._theirs([region for region, _, _ in request["ranges"]], server).tolist()
            request["ranges"] = [
                [region, start, count] for region, (_, start, count) in zip(regions, request["ranges"], strict=True)
            ]
        return request

    def _joined(self, request: Mapping[str, Any], answers: list[dict[str, Any]]) -> dict[str, Any]:
        for server, answer in enumerate(answers):
            if not answer.get("ok"):
                return {**answer, "error": f"memory server {server}: {answer.get('error')}"}
        if request.get("op") == "stat":
            return {**answers[0], "servers": answers}
        return answers[0]

    def _move(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Rename pages whose servers may differ afterwards: empty the target, carry over, empty the source.

        Every step may be repeated, so the whole may: a drop by its sequence number, and a page carried over has its
        version.
        """
        region, start, to, count = (int(request[key]) for key in ("region", "start", "to", "count"))
        sequence = int(request["sequence"]) * _STEPS
        drop = {"op": "drop_pages", "ranges": [[region, to, count]], "sequence": sequence}
        answer = self._joined(request, self._ask_all(drop))
        if not answer.get("ok"):
            return answer
        for at in range(0, count, MAX_BATCH_PAGES):
            self._carry_over(region, start + at, to + at, min(MAX_BATCH_PAGES, count - at))
        drop = {"op": "drop_pages", "ranges": [[region, start, count]], "sequence": sequence + 1}
        return self._joined(request, self._ask_all(drop))

    def _carry_over(self, region: int, start: int, to: int, count: int) -> None:
        refs = np.zeros(count, PAGE_REF)
        refs["region"], refs["index"] = region, np.arange(start, start + count, dtype=np.uint64)
        pages = bytearray(count * PAGE_BYTES)
        self.fetch(refs, memoryview(pages))
        found = np.flatnonzero(refs["status"] == GetStatus.EXISTING_PAGE)
        if (refs["status"] == GetStatus.ERROR).any():
            raise TransportError("a memory server cannot read pages that are to be renamed")
        if not len(found):
            return
        moved = refs[found]
        moved["index"] += np.uint64(to) - np.uint64(start) if to >= start else np.uint64(2**64 - (start - to))
        moved_pages = np.frombuffer(pages, np.uint8).reshape(count, PAGE_BYTES)[found].tobytes()
        error = self.evict(moved, memoryview(moved_pages))
        if (moved["status"] != EvictStatus.SUCCESS).any():
            raise TransportError(f"a memory server did not take renamed pages: {error}")


def open_channel(
    links: Sequence[Link], session: Session, number: int, deadline_s: float, resend_s: float | None = None
) -> Channel:
    """The channel over these links, one for each memory server."""
    if len(links) == 1:
        return WireChannel(links[0], session, number, deadline_s, resend_s)
    return SpreadChannel(links, session, number, deadline_s, resend_s)
