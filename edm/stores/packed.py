"""Compression and zero-page elision around any page store.

Place on the path: between the memory server and a page store, on step [7] and at the end of an eviction.

Pages that shrink are packed into containers, each one page of the store behind: a head (magic, count), for each member
its codec, start and length, then the bytes. A page that does not shrink goes as it is. What a slot means is in its
upper bits: 2^63 a page of zeros, 2^62 a member of a container (its number in the lowest eight bits), else the store's
own slot. So a store may change its options between runs, and everything in it stays readable.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from edm._native import ffi, lib
from edm.errors import Corrupt, MissingExtra, StoreError
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edm.interfaces import PageStore
    from edm.types import Slots

_ZERO: Final = 1 << 63
_MEMBER: Final = 1 << 62
_MEMBER_BITS: Final = 8
_MEMBERS: Final = 1 << _MEMBER_BITS
_ZERO_PAGE: Final = bytes(PAGE_BYTES)
_HEAD: Final = struct.Struct("<4sHH")
_ENTRY: Final = struct.Struct("<BBHHH")
_MAGIC: Final = b"EDMC"
_WORTH_BYTES: Final = PAGE_BYTES * 3 // 4
"""A page must shrink to this, or it is stored as it is."""


class _Codec(Protocol):
    def compress(self, page: bytes) -> bytes: ...
    def decompress(self, packed: bytes) -> bytes: ...


class _Zstd:
    def __init__(self) -> None:
        try:
            import zstandard  # noqa: PLC0415
        except ImportError:
            raise MissingExtra("compress = zstd needs zstandard: pip install 'edm[compress]'") from None
        self.compress = zstandard.ZstdCompressor(level=1).compress
        self._decompressor = zstandard.ZstdDecompressor()
        self._error = zstandard.ZstdError

    def decompress(self, packed: bytes) -> bytes:
        try:
            return self._decompressor.decompress(packed, max_output_size=PAGE_BYTES)
        except self._error as error:
            raise ValueError(str(error)) from None


class _Lz4:
    def __init__(self) -> None:
        try:
            import lz4.block  # noqa: PLC0415
        except ImportError:
            raise MissingExtra("compress = lz4 needs lz4: pip install 'edm[compress]'") from None
        self._block = lz4.block

    def compress(self, page: bytes) -> bytes:
        return bytes(self._block.compress(page, store_size=False))

    def decompress(self, packed: bytes) -> bytes:
        try:
            return bytes(self._block.decompress(packed, uncompressed_size=PAGE_BYTES))
        except self._block.LZ4BlockError as error:
            raise ValueError(str(error)) from None


_CODECS: Final[dict[str, tuple[int, type[_Codec]]]] = {"zstd": (1, _Zstd), "lz4": (2, _Lz4)}


class PackedPages:
    """A `PageStore` around another, which it closes. compress: "none", "zstd" or "lz4"."""

    def __init__(self, inner: PageStore, compress: str, *, elide_zeros: bool) -> None:
        self._inner = inner
        self._elide_zeros = elide_zeros
        self._codecs: dict[int, _Codec] = {}
        self._codec = 0
        if compress != "none":
            self._codec = _CODECS[compress][0]
            self._codec_of(self._codec)
        self._members: dict[int, int] = {}
        self._zeros = 0
        self._packed = 0

    @property
    def inner(self) -> PageStore:
        """The store behind."""
        return self._inner

    @property
    def wants_flush(self) -> bool:
        """As the store behind."""
        return bool(getattr(self._inner, "wants_flush", False))

    def put(self, pages: memoryview, checksums: Any) -> Slots:
        """See `PageStore`."""
        count = len(pages) // PAGE_BYTES
        slots = np.empty(count, np.uint64)
        raw: list[int] = []
        containers: list[_Container] = []
        zeros = 0
        for i in range(count):
            page = bytes(pages[i * PAGE_BYTES : (i + 1) * PAGE_BYTES])
            if self._elide_zeros and page == _ZERO_PAGE:
                slots[i] = _ZERO
                zeros += 1
                continue
            packed = self._codecs[self._codec].compress(page) if self._codec else page
            if len(packed) > _WORTH_BYTES:
                raw.append(i)
                continue
            if not containers or not containers[-1].fits(packed):
                containers.append(_Container(self._codec))
            containers[-1].add(i, packed)
        self._put_behind(pages, checksums, raw, containers, slots)
        self._zeros += zeros
        return slots

    def _put_behind(
        self, pages: memoryview, checksums: Any, raw: list[int], containers: list[_Container], slots: Slots
    ) -> None:
        behind = b"".join(
            [*(pages[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] for i in raw), *(c.page() for c in containers)]
        )
        if not behind:
            return
        sums = np.empty(len(raw) + len(containers), np.uint32)
        lib.edm_crc32c_pages(ffi.from_buffer(behind), len(sums), ffi.from_buffer("uint32_t[]", sums))
        # Not the checksums given: what they do not fit must be found out when it is read, as in any page store.
        sums[: len(raw)] = np.asarray(checksums)[raw]
        inner_slots = self._inner.put(memoryview(behind), sums)
        for i, slot in zip(raw, inner_slots[: len(raw)].tolist(), strict=True):
            slots[i] = slot
        for container, slot in zip(containers, inner_slots[len(raw) :].tolist(), strict=True):
            if slot >= _MEMBER >> _MEMBER_BITS:
                raise StoreError("the page store behind gives slots too large to pack pages into")
            self._members[slot] = len(container.members)
            self._packed += len(container.members)
            for at, i in enumerate(container.members):
                slots[i] = _MEMBER | slot << _MEMBER_BITS | at

    def get(self, slots: Slots, into: memoryview) -> None:
        """See `PageStore`."""
        highest = int(slots.max()) if len(slots) else 0
        if highest < _MEMBER:
            self._inner.get(slots, into)
            return
        raw: list[int] = []
        members: dict[int, list[tuple[int, int]]] = {}
        for i, slot in enumerate(slots.tolist()):
            if slot == _ZERO:
                into[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] = _ZERO_PAGE
            elif slot & _MEMBER:
                members.setdefault((slot ^ _MEMBER) >> _MEMBER_BITS, []).append((i, slot % _MEMBERS))
            else:
                raw.append(i)
        wanted = np.array([*(int(slots[i]) for i in raw), *members], np.uint64)
        if not len(wanted):
            return
        behind = memoryview(bytearray(len(wanted) * PAGE_BYTES))
        self._inner.get(wanted, behind)
        for at, i in enumerate(raw):
            into[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] = behind[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
        for at, (slot, places) in enumerate(members.items(), len(raw)):
            container = behind[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
            for i, member in places:
                into[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] = self._unpack(container, member, slot)

    def _unpack(self, container: memoryview, member: int, slot: int) -> bytes:
        magic, count, _ = _HEAD.unpack_from(container)
        if magic != _MAGIC or member >= count:
            raise Corrupt(f"slot {slot}: not a container of {member + 1} packed pages")
        codec, _, start, length, _ = _ENTRY.unpack_from(container, _HEAD.size + member * _ENTRY.size)
        try:
            page = self._codec_of(codec).decompress(bytes(container[start : start + length]))
        except (ValueError, KeyError) as error:
            raise Corrupt(f"slot {slot}: packed page {member} cannot be unpacked: {error}") from None
        if len(page) != PAGE_BYTES:
            raise Corrupt(f"slot {slot}: packed page {member} is {len(page)} bytes long")
        return page

    def free(self, slots: Slots) -> None:
        """See `PageStore`; a container is freed with its last member."""
        gone: list[int] = []
        for slot in slots.tolist():
            if slot == _ZERO:
                self._zeros -= 1
            elif slot & _MEMBER:
                container = (slot ^ _MEMBER) >> _MEMBER_BITS
                self._packed -= 1
                self._members[container] -= 1
                if not self._members[container]:
                    del self._members[container]
                    gone.append(container)
            else:
                gone.append(slot)
        if gone:
            self._inner.free(np.array(gone, np.uint64))

    def live(self, slots: Slots) -> None:
        """See `PageStore`."""
        self._inner.live(self._behind(slots))

    def look(self, slots: Slots) -> None:
        """As the store behind, where it has to be told."""
        look, behind = getattr(self._inner, "look", None), self._behind(slots)
        if look:
            look(behind)

    def _behind(self, slots: Slots) -> Slots:
        """Count what is in use, and give the slots that hold it in the store behind."""
        # Clones share a slot: each counts once here, except zeros, which are counted by reference and cost nothing.
        unique = np.unique(slots)
        member = (unique & np.uint64(_MEMBER)) != 0
        zero = unique == np.uint64(_ZERO)
        containers = (unique[member] ^ np.uint64(_MEMBER)) >> np.uint64(_MEMBER_BITS)
        numbers, counts = np.unique(containers, return_counts=True)
        self._members = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        self._packed = int(member.sum())
        self._zeros = int((slots == np.uint64(_ZERO)).sum())
        return np.concatenate([unique[~member & ~zero], numbers])

    def sync(self) -> None:
        """As the store behind."""
        self._inner.sync()

    def flush(self) -> None:
        """As the store behind."""
        getattr(self._inner, "flush", self._inner.sync)()

    def where(self, slot: int) -> Any:
        """The file that holds a slot, as the store behind says."""
        if slot & _ZERO:
            return "no file: a page of zeros"
        where = getattr(self._inner, "where", None)
        return where(_slot_behind(slot)) if where else "the page store"

    def offset(self, slot: int) -> int | None:
        """Where in its file a slot's page, or the page it is packed into, begins; None: not known."""
        offset = getattr(self._inner, "offset", None)
        return None if slot & _ZERO or offset is None else offset(_slot_behind(slot))

    def stat(self) -> dict[str, Any]:
        """The figures of the store behind, and how many pages take less than a page."""
        behind = self._inner.stat()
        raw = int(behind.get("pages", 0)) - len(self._members)
        return {
            **behind,
            "pages": raw + self._packed + self._zeros,
            "pages_packed": self._packed,
            "pages_zero": self._zeros,
            "pages_behind": behind.get("pages", 0),
        }

    def close(self) -> None:
        """Close the store behind."""
        self._inner.close()

    def _codec_of(self, number: int) -> _Codec:
        if number not in self._codecs:
            makers: Iterable[tuple[int, type[_Codec]]] = _CODECS.values()
            self._codecs[number] = dict(makers)[number]()
        return self._codecs[number]


def _slot_behind(slot: int) -> int:
    return (slot ^ _MEMBER) >> _MEMBER_BITS if slot & _MEMBER else slot


class _Container:
    """Packed pages on their way into one page of the store behind."""

    def __init__(self, codec: int) -> None:
        self.members: list[int] = []
        self._codec = codec
        self._parts: list[bytes] = []
        self._bytes = _HEAD.size

    def fits(self, packed: bytes) -> bool:
        return self._bytes + _ENTRY.size + len(packed) <= PAGE_BYTES and len(self.members) < _MEMBERS

    def add(self, i: int, packed: bytes) -> None:
        self.members.append(i)
        self._parts.append(packed)
        self._bytes += _ENTRY.size + len(packed)

    def page(self) -> bytes:
        start = _HEAD.size + len(self._parts) * _ENTRY.size
        entries = []
        for part in self._parts:
            entries.append(_ENTRY.pack(self._codec, 0, start, len(part), 0))
            start += len(part)
        return b"".join([_HEAD.pack(_MAGIC, len(entries), 0), *entries, *self._parts]).ljust(PAGE_BYTES, b"\0")
