"""The transport zmq against real sockets: restarts, resends, several clients, keys."""

import logging
import threading
import time

import numpy as np
import pytest
import zmq

from edm.dms.guard import GuardedServer
from edm.errors import TransportError, TransportTimeout, UsageError
from edm.plugins.transport_zmq import ZmqOptions, open_transport, plan
from edm.plugins.transport_zmq import serving as serving_module
from edm.plugins.transport_zmq.keys import new_keys, read_list, read_public, read_secret
from edm.testing.pages import DictServer, batch_of
from edm.testing.transport_cases import wanted
from edm.types import PAGE_BYTES, GetStatus, RunContext
from edm.wire import Frame, Kind


class Serving:
    """A memory server in a thread, that can be stopped and started again."""

    def __init__(self, options, run_dir, server=None):
        self.options, self.run_dir, self.server = options, run_dir, server or DictServer()
        self.start()

    def start(self):
        self.stop_event = threading.Event()
        self.transport = open_transport(self.options, RunContext(self.run_dir, self.run_dir, "dms"))
        self.thread = threading.Thread(target=self.transport.serve, args=(self.server, self.stop_event))
        self.thread.start()

    def stop(self):
        self.stop_event.set()
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.transport.close()


@pytest.fixture
def meet(tmp_path, free_port):
    """Call it for a server and a client's transport: `meet(server_options, client_options, deadline_s, server)`."""
    opened = []

    def make(options=None, client=None, deadline_s=60.0, server=None):
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        serving = Serving(ZmqOptions(listen=(endpoint,), **(options or {})), tmp_path, server)
        opened.append(serving.stop)
        transport = open_transport(
            ZmqOptions(dms=(endpoint,), resend_s=0.2, **(client or {})),
            RunContext(tmp_path, tmp_path, "dm-handler", deadline_s),
        )
        opened.append(transport.close)
        return serving, transport

    yield make
    for close in reversed(opened):
        close()


def hello(transport):
    channel = transport.connect()
    return channel, channel.control({"op": "hello", "client": "test", "protocol": 1})["instance"]


def test_a_restarted_server_is_waited_for_and_nothing_is_lost(meet):
    serving, transport = meet()
    channel, instance = hello(transport)
    refs, pages = batch_of(instance << 32, np.arange(100), version=1)
    assert channel.evict(refs, memoryview(pages)) == ""
    serving.stop()
    threading.Timer(0.7, serving.start).start()
    asked, into = wanted(instance << 32, np.arange(100)), bytearray(100 * PAGE_BYTES)
    channel.fetch(asked, memoryview(into))
    assert into == pages


def test_a_server_that_is_not_there_is_a_timeout_that_names_it(tmp_path, free_port):
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    context = RunContext(tmp_path, tmp_path, "dm-handler", 0.3)
    transport = open_transport(ZmqOptions(dms=(endpoint,)), context)
    with pytest.raises(TransportTimeout, match=endpoint):
        hello(transport)
    transport.close()


def test_a_slow_server_gets_repeats_and_applies_them_once(meet):
    serving, transport = meet()
    channel, instance = hello(transport)
    for version in range(1, 20):  # a client that stood still meanwhile has repeated nothing
        channel.control({"op": "test_delay", "seconds": 0.9, "requests": 1})
        refs, pages = batch_of(instance << 32, np.arange(3), version)
        assert channel.evict(refs, memoryview(pages)) == ""
        for index in range(20):
            asked, into = wanted(instance << 32, [index % 3]), bytearray(PAGE_BYTES)
            channel.fetch(asked, memoryview(into))
            assert into == pages[index % 3 * PAGE_BYTES : (index % 3 + 1) * PAGE_BYTES]
        figures = serving.transport.figures()
        if figures["repeats"] >= 2:
            break
    assert figures["repeats"] >= 2
    assert figures["evicts"] >= 3
    assert channel.control({"op": "stat"})["pages"] == 3


def test_clients_that_never_say_goodbye_are_not_remembered_for_ever(meet, monkeypatch):
    monkeypatch.setattr(serving_module, "MOST_SEEN", 5)
    serving, transport = meet()
    channel, _ = hello(transport)
    context = zmq.Context()
    frame = Frame()
    ping = bytes(frame.view[: frame.seal(Kind.PING, 0, 0, 0, 1)])
    for number in range(20):
        killed = context.socket(zmq.DEALER)
        killed.setsockopt(zmq.IDENTITY, b"E%011d%04d" % (number, 1))
        killed.connect(serving.options.listen[0])
        killed.send(ping)
        killed.recv()
        killed.close()
        assert channel.control({"op": "stat"})["ok"]
        assert serving.transport.peers() <= 5
    context.term()
    assert serving.transport.peers() == 5


def test_a_client_that_says_goodbye_is_no_peer_any_more(meet):
    serving, transport = meet()
    hello(transport)
    assert serving.transport.peers() == 1
    transport.close()
    end = time.monotonic() + 60
    while serving.transport.peers() and time.monotonic() < end:
        time.sleep(0.01)
    assert serving.transport.peers() == 0


@pytest.mark.parametrize(
    "parts",
    [[b"hello"], [b"", b"x"], [b"a", b"b", b"c"], [b"E" * 5_000_000], [b"EDMw" + bytes(40)], [b""]],
    ids=["short", "two parts", "three parts", "too large", "bad header", "empty"],
)
def test_garbage_from_the_network_harms_nobody(meet, parts):
    serving, transport = meet()
    channel, instance = hello(transport)
    context = zmq.Context()
    attacker = context.socket(zmq.DEALER)
    attacker.linger = 200
    attacker.connect(serving.options.listen[0])
    for _ in range(50):
        attacker.send_multipart(parts)
    attacker.close()
    context.term()
    for index in range(20):
        asked = wanted(instance << 32, [index])
        channel.fetch(asked, memoryview(bytearray(PAGE_BYTES)))
        assert asked["status"][0] == GetStatus.NEW_PAGE


@pytest.fixture
def keys(tmp_path):
    """Key files: server, alice, mallory, and an allow-list with alice."""
    made = {name: new_keys(tmp_path / name, name) for name in ("server", "alice", "mallory")}
    allowed = tmp_path / "clients"
    allowed.write_text("# who may come\n\n" + made["alice"][1].read_text())
    return made, allowed


def options_of(keys, client):
    made, allowed = keys
    return (
        {"key": made["server"][0], "clients": allowed},
        {"key": made[client][0], "server_key": str(made["server"][1])},
    )


def test_a_client_on_the_list_comes_in(meet, keys):
    _, transport = meet(*options_of(keys, "alice"))
    channel, instance = hello(transport)
    refs, pages = batch_of(instance << 32, [1], version=1)
    assert channel.evict(refs, memoryview(pages)) == ""


def test_a_client_not_on_the_list_stays_outside_until_it_is_added(meet, keys, caplog):
    caplog.set_level(logging.WARNING)
    made, allowed = keys
    serving, transport = meet(*options_of(keys, "mallory"), deadline_s=1.0)
    with pytest.raises(TransportTimeout):
        hello(transport)
    assert read_public(str(made["mallory"][1])).decode() in caplog.text
    allowed.write_text(allowed.read_text() + made["mallory"][1].read_text())
    serving.transport.reload(serving.options)
    end = time.monotonic() + 60
    while True:
        try:
            hello(transport)
            break
        except TransportTimeout:
            assert time.monotonic() < end


def test_a_list_that_cannot_be_read_is_not_taken_over(meet, keys):
    _, allowed = keys
    serving, transport = meet(*options_of(keys, "alice"))
    allowed.write_text("nonsense\n")
    with pytest.raises(UsageError, match="clients:1: not a public key"):
        serving.transport.reload(serving.options)
    hello(transport)


def test_a_client_without_keys_is_not_heard_by_a_server_with_keys(meet, keys):
    _, transport = meet(options_of(keys, "alice")[0], {}, deadline_s=0.8)
    with pytest.raises(TransportTimeout):
        hello(transport)


def test_one_client_cannot_use_anothers_instance_even_after_a_restart(meet, keys, tmp_path):
    made, allowed = keys
    allowed.write_text(made["alice"][1].read_text() + made["mallory"][1].read_text())
    serving, alice = meet(*options_of(keys, "alice"))
    channel, instance = hello(alice)
    refs, pages = batch_of(instance << 32, [1], version=1)
    channel.evict(refs, memoryview(pages))
    mallory = open_transport(
        ZmqOptions(dms=serving.options.listen, **options_of(keys, "mallory")[1]),
        RunContext(tmp_path, tmp_path, "dm-handler"),
    )
    theirs, _ = hello(mallory)
    mallory._session.instances[0] = instance
    for _ in range(2):
        with pytest.raises(TransportError, match="not yours"):
            theirs.fetch(wanted(instance << 32, [1]), memoryview(bytearray(PAGE_BYTES)))
        serving.stop()
        serving.start()
    into = bytearray(PAGE_BYTES)
    channel.fetch(wanted(instance << 32, [1]), memoryview(into))
    assert into == pages
    mallory.close()


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:7070", "tcp://*:7070", "tcp://10.1.2.3:7070", "tcp://[::]:7070"])
def test_listening_to_a_network_wants_keys(endpoint, tmp_path):
    with pytest.raises(UsageError, match="edm keys new"):
        plan(ZmqOptions(listen=(endpoint,)), ("dms",), ("handler",))
    assert plan(ZmqOptions(listen=(endpoint,), insecure=True), ("dms",), ("handler",)).commands


@pytest.mark.parametrize("endpoint", ["tcp://example.org:7070", "tcp://192.0.2.7:1"])
def test_a_server_on_a_network_wants_keys(endpoint):
    with pytest.raises(UsageError, match="server_key"):
        plan(ZmqOptions(dms=(endpoint,)), ("dms",), ("handler",))


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:7070", "tcp://localhost:1", "tcp://[::1]:7070", "ipc:///run/edm"]
)
def test_this_machine_needs_no_keys(endpoint):
    assert plan(ZmqOptions(dms=(endpoint,)), ("dms",), ("handler",)).commands == (("handler",),)


@pytest.mark.parametrize(
    "endpoint", ["host:7070", "tcp://host", "tcp://host:70700", "udp://h:1", "ipc://", "ipc://" + "x" * 108]
)
def test_a_bad_address_is_refused(endpoint):
    with pytest.raises(UsageError, match="bad address"):
        plan(ZmqOptions(dms=(endpoint,)), ("dms",), ("handler",))


def test_without_a_server_named_a_private_one_is_started():
    assert plan(ZmqOptions(), ("dms",), ("handler",)).commands == (("dms",), ("handler",))


def test_an_address_in_use_is_one_clear_line(meet, tmp_path):
    serving, _ = meet()
    with pytest.raises(UsageError, match=r"cannot listen at tcp://127\.0\.0\.1:.*in use"):
        open_transport(serving.options, RunContext(tmp_path, tmp_path, "dms"))


def test_keys_are_not_overwritten_and_only_their_owner_reads_them(tmp_path):
    secret, public = new_keys(tmp_path, "me")
    assert secret.stat().st_mode & 0o777 == 0o600
    assert read_secret(secret)[0] == read_public(str(public))
    assert list(read_list(public).values()) == ["me"]
    with pytest.raises(UsageError, match="not overwritten"):
        new_keys(tmp_path, "me")
    secret.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        read_secret(secret)


class Table:
    """What `GuardedServer` asks of an SPT store, over a `DictServer`."""

    def __init__(self, server):
        self.server = server

    def regions(self):
        regions = [region for region, _ in self.server._pages]
        return {region: regions.count(region) for region in set(regions)}

    def lookup(self, refs):
        class Rows:
            found = np.array([(int(ref["region"]), int(ref["index"])) in self.server._pages for ref in refs])

        return Rows


def test_a_client_at_its_quota_may_replace_and_drop_but_not_add(meet, tmp_path):
    server = DictServer()
    guarded = GuardedServer(server, Table(server), quota_pages=100)
    instance = guarded.control(0, {"op": "hello"})["instance"]
    other = guarded.control(0, {"op": "hello"})["instance"]

    def evict(instance, indices, version):
        refs, pages = batch_of(instance << 32, indices, version)
        return guarded.evict(instance, refs, memoryview(pages))

    assert evict(instance, range(100), 1) == ""
    assert "quota of 100 pages" in evict(instance, [100], 2)
    assert evict(instance, range(100), 3) == ""
    assert evict(other, range(100), 1) == ""
    guarded.control(instance, {"op": "drop_pages", "ranges": [[instance << 32, 0, 10]], "sequence": 1})
    assert evict(instance, range(200, 210), 4) == ""
    assert "quota" in evict(instance, [300], 5)
    guarded.quota_pages = 0
    assert evict(instance, range(300, 600), 6) == ""
    assert guarded.usage() == {instance: 400, other: 100}


def test_a_quota_is_a_clients_whatever_number_of_instances_it_has(meet, keys, tmp_path):
    made, allowed = keys
    allowed.write_text(made["alice"][1].read_text() + made["mallory"][1].read_text())
    server = DictServer()
    guarded = GuardedServer(server, Table(server), quota_pages=100)
    serving, alice = meet(*options_of(keys, "alice"), server=guarded)
    guarded.owner_of = serving.transport.owner_of
    mallory = open_transport(
        ZmqOptions(dms=serving.options.listen, **options_of(keys, "mallory")[1]),
        RunContext(tmp_path, tmp_path, "dm-handler"),
    )

    def evict(transport, count):
        channel, instance = hello(transport)
        refs, pages = batch_of(instance << 32, np.arange(count), version=1)
        return channel.evict(refs, memoryview(pages))

    assert evict(alice, 60) == ""
    assert "quota of 100 pages" in evict(alice, 60)
    assert evict(alice, 40) == ""
    assert evict(mallory, 100) == ""
    mallory.close()
