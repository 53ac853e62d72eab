"""Gets that never enter Python: the C table of a memory server, as the engine calls it."""

import ctypes
import threading

import numpy as np
import pytest

from edm._native import ffi, lib
from edm.dms.server import MemoryServer
from edm.dms.table import PageTable, page_checksums
from edm.ops import CHANNEL, address_of
from edm.plugins.store_file.pages import FilePages
from edm.plugins.store_memory.pages import MemoryPages
from edm.plugins.transport_inproc.transport import InprocTransport
from edm.types import PAGE_BYTES, PAGE_REF

FETCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
EAGAIN = 11


class Table(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32),
        ("bytes", ctypes.c_uint32),
        ("self", ctypes.c_void_p),
        ("fetch", FETCH),
        ("evict", FETCH),
    )


class Spt(PageTable):
    def commit(self):
        pass

    flush = close = commit


@pytest.fixture(params=["memory", "file"])
def pages(request, tmp_path):
    return MemoryPages() if request.param == "memory" else FilePages(tmp_path / "pages")


@pytest.fixture
def served(pages):
    server = MemoryServer(Spt(), pages)
    transport = InprocTransport(server, 5.0)
    control = transport.connect()
    instance = control.control({"op": "hello", "client": "test", "protocol": 1})["instance"]
    control.control({"op": "create_region", "region": instance << 32, "sequence": 1})
    yield server, transport, instance
    transport.close()
    server.close()


def refs_for(region, indexes, version=0):
    refs = np.zeros(len(indexes), PAGE_REF)
    refs["region"], refs["index"], refs["version"], refs["status"] = region, indexes, version, 2
    return refs


def stored(transport, region, count, version=1):
    data = np.random.default_rng(version).integers(0, 256, (count, PAGE_BYTES), np.uint8)
    refs = refs_for(region, range(count), version)
    refs["checksum"] = page_checksums(memoryview(data).cast("B"))
    assert transport.connect().evict(refs, memoryview(data).cast("B")) == ""
    return data


def fetch(channel, refs):
    table = Table.from_address(address_of(channel, CHANNEL, ctypes.sizeof(Table)))
    into = np.zeros((len(refs), PAGE_BYTES), np.uint8)
    return table.fetch(table.self, refs.ctypes.data, len(refs), into.ctypes.data), into


def test_stored_pages_come_without_python(served):
    server, transport, instance = served
    data = stored(transport, instance << 32, 64)
    refs = refs_for(instance << 32, range(64))
    result, into = fetch(transport.connect(), refs)
    assert result == 0
    assert (refs["status"] == 1).all()
    assert (refs["version"] == 1).all()
    assert np.array_equal(into, data)
    figures = server.stat()["server"]
    assert (figures["gets"], figures["found"], figures["new"]) == (64, 64, 0)


def test_new_pages_among_stored_ones_are_told_apart(served):
    server, transport, instance = served
    data = stored(transport, instance << 32, 3)
    refs = refs_for(instance << 32, [7, 1, 9, 2])
    result, into = fetch(transport.connect(), refs)
    assert result == 0
    assert refs["status"].tolist() == [0, 1, 0, 1]
    assert np.array_equal(into[1], data[1])
    assert np.array_equal(into[3], data[2])
    assert server.stat()["server"]["new"] == 2


def test_pages_of_another_instance_are_left_to_python(served):
    _, transport, instance = served
    stored(transport, instance << 32, 1)
    assert fetch(transport.connect(), refs_for((instance + 1) << 32, [0]))[0] == -EAGAIN


def test_a_damaged_page_is_left_to_python_and_never_served(served, pages, tmp_path):
    _, transport, instance = served
    data = stored(transport, instance << 32, 2)
    damage(pages, tmp_path, data[1])
    channel = transport.connect()
    assert fetch(channel, refs_for(instance << 32, [1]))[0] == -EAGAIN
    refs, into = refs_for(instance << 32, [0, 1]), memoryview(bytearray(2 * PAGE_BYTES))
    channel.fetch(refs, into)
    assert refs["status"].tolist() == [1, 2]


def damage(pages, path, page):
    if isinstance(pages, MemoryPages):
        slot = next(s for s in range(4) if bytes(ffi.buffer(memory_of(pages, s), PAGE_BYTES)) == page.tobytes())
        memory_of(pages, slot)[100] ^= 1
        return
    file = next((path / "pages").glob("*.pages"))
    content = bytearray(file.read_bytes())
    at = content.index(page.tobytes())
    content[at + 100] ^= 1
    file.write_bytes(content)


def memory_of(pages, slot):
    return ffi.cast("uint8_t *", lib.edm_slabs_page(pages.native, slot))


def test_a_channel_made_before_the_hello_has_no_table(pages):
    server = MemoryServer(Spt(), pages)
    transport = InprocTransport(server, 5.0)
    assert address_of(transport.connect(), CHANNEL) == 0
    transport.close()
    server.close()


def test_gets_from_c_and_evictions_from_python_keep_apart(served):
    _, transport, instance = served
    versions = {1: stored(transport, instance << 32, 16)}
    wrong = []

    def read():
        channel = transport.connect()
        for _ in range(3000):
            refs = refs_for(instance << 32, range(16))
            result, into = fetch(channel, refs)
            if result or not (page_checksums(memoryview(into).cast("B")) == refs["checksum"]).all():
                wrong.append(result)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    version = 1
    while any(thread.is_alive() for thread in readers):
        version += 1
        versions[version] = stored(transport, instance << 32, 16, version)
    for thread in readers:
        thread.join()
    assert not wrong
    assert version > 10
    refs = refs_for(instance << 32, range(16))
    assert np.array_equal(fetch(transport.connect(), refs)[1], versions[version])
