"""The transport zmq where C carries its messages, and where it cannot."""

import logging
import threading

import numpy as np
import pytest

from edm.dms.server import MemoryServer
from edm.errors import TransportError
from edm.ops import ATTRIBUTE
from edm.plugins.store_memory.pages import MemoryPages
from edm.plugins.store_memory.spt import MemorySpt
from edm.plugins.transport_zmq import ZmqOptions, library, open_transport
from edm.plugins.transport_zmq.keys import new_keys
from edm.plugins.transport_zmq.link import CarryingZmqLink, ZmqLink
from edm.testing.pages import DictServer, batch_of
from edm.testing.transport_cases import wanted
from edm.types import PAGE_BYTES, GetStatus, RunContext


class CountingServer:
    """A `PageServer` around another, with its C table, that counts the gets Python makes."""

    def __init__(self, server):
        self.server, self.gets = server, 0
        setattr(self, ATTRIBUTE, getattr(server, ATTRIBUTE))

    def get(self, instance, refs, into):
        self.gets += 1
        self.server.get(instance, refs, into)

    def evict(self, instance, refs, pages):
        return self.server.evict(instance, refs, pages)

    def control(self, instance, request):
        return self.server.control(instance, request)


@pytest.fixture
def serving(tmp_path):
    """Call it with a server and its options: opens a transport that serves it."""
    opened = []

    def start(server, **options):
        stop = threading.Event()
        listen = (f"ipc://{tmp_path}/pages.sock",)
        transport = open_transport(ZmqOptions(listen=listen, **options), RunContext(tmp_path, tmp_path, "dms"))
        thread = threading.Thread(target=transport.serve, args=(server, stop))
        thread.start()
        opened.append((stop, thread, transport))
        return transport

    yield start
    for stop, thread, transport in opened:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()
        transport.close()


@pytest.fixture
def client(tmp_path):
    """Call it with options: a channel of a client of its own, and its instance."""
    opened = []

    def connect(**options):
        dms = (f"ipc://{tmp_path}/pages.sock",)
        opened.append(open_transport(ZmqOptions(dms=dms, **options), RunContext(tmp_path, tmp_path, "dm-handler", 10)))
        channel = opened[-1].connect()
        return channel, channel.control({"op": "hello", "client": "test", "protocol": 1})["instance"], opened[-1]

    yield connect
    for transport in opened:
        transport.close()


@pytest.fixture
def server():
    server = MemoryServer(MemorySpt(), MemoryPages())
    yield CountingServer(server)
    server.close()


def get(channel, region, indices):
    refs, into = wanted(region, indices), bytearray(len(indices) * PAGE_BYTES)
    channel.fetch(refs, memoryview(into))
    return refs["status"].tolist(), into


def test_gets_of_stored_and_new_pages_need_no_python(serving, client, server):
    transport = serving(server)
    channel, instance, _ = client()
    assert isinstance(channel._conversation.link, CarryingZmqLink)
    refs, pages = batch_of(instance << 32, np.arange(64), version=1)
    assert channel.evict(refs, memoryview(pages)) == ""
    for count in (1, 3, 4, 64):
        statuses, into = get(channel, instance << 32, np.arange(count))
        assert set(statuses) == {GetStatus.EXISTING_PAGE}
        assert into == pages[: count * PAGE_BYTES]
    statuses, into = get(channel, instance << 32, np.arange(63, 65))
    assert statuses == [GetStatus.EXISTING_PAGE, GetStatus.NEW_PAGE]
    assert into[:PAGE_BYTES] == pages[63 * PAGE_BYTES :]
    assert server.gets == 0
    assert transport.figures()["gets"] == 5
    assert transport.figures()["pages_sent"] == 73


def test_many_large_replies_at_once_are_not_mixed_up(serving, client, server):
    serving(server)
    failures = []
    _, _, transport = client()

    def work(number, channel, instance):
        try:
            region = (instance << 32) + number
            refs, pages = batch_of(region, np.arange(256), version=1, seed=number)
            channel.evict(refs, memoryview(pages))
            for start in range(0, 192, 8):
                assert (
                    get(channel, region, np.arange(start, start + 64))[1] == pages[start * 4096 : (start + 64) * 4096]
                )
            channel.close()
        except BaseException as error:
            failures.append(error)
            raise

    instance = transport._session.instances[0]
    threads = [threading.Thread(target=work, args=(n, transport.connect(), instance)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_c_answers_nobody_for_anothers_instance(serving, client, server, tmp_path):
    made = {name: new_keys(tmp_path / name, name) for name in ("server", "alice", "mallory")}
    allowed = tmp_path / "clients"
    allowed.write_text(made["alice"][1].read_text() + made["mallory"][1].read_text())
    serving(server, key=made["server"][0], clients=allowed)
    alice, mallory = (client(key=made[name][0], server_key=str(made["server"][1])) for name in ("alice", "mallory"))
    channel, instance, _ = alice
    refs, pages = batch_of(instance << 32, [1], version=1)
    assert channel.evict(refs, memoryview(pages)) == ""
    for _ in range(3):
        assert get(channel, instance << 32, [1])[1] == pages
    # Python is asked once whose it is.
    assert server.gets == 1
    theirs, own, transport = mallory
    assert get(theirs, own << 32, [1])[0] == [GetStatus.NEW_PAGE]
    transport._session.instances[0] = instance
    for _ in range(3):
        with pytest.raises(TransportError, match="not yours"):
            get(theirs, instance << 32, [1])
        assert get(channel, instance << 32, [1])[1] == pages


def test_without_a_libzmq_to_call_all_goes_through_python(serving, client, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(library, "_MODULE", "zmq.backend.nowhere")
    library._library.cache_clear()
    try:
        transport = serving(DictServer())
        channel, instance, _ = client()
        assert type(channel._conversation.link) is ZmqLink
        refs, pages = batch_of(instance << 32, np.arange(64), version=1)
        assert channel.evict(refs, memoryview(pages)) == ""
        assert get(channel, instance << 32, np.arange(64))[1] == pages
        assert transport.figures()["gets"] == 1
    finally:
        library._library.cache_clear()
    said = [record.getMessage() for record in caplog.records if "libzmq cannot be called" in record.getMessage()]
    assert len(said) == 1
    assert "zmq.backend.nowhere" in said[0]
