"""A memory server that is killed at any point has lost and torn nothing that it acknowledged."""

import pytest
from stores_crashing import Client, Killed, open_server

POLICIES = ["none", "batch", "always"]
STORES = {
    "file": ("file", "file", {"segment": "256K"}),
    "file-direct": ("file", "file", {"segment": "1M", "direct": True}),
    "file-zstd": ("file", "file", {"segment": "256K", "compress": "zstd", "elide_zeros": True}),
    "lmdb": ("lmdb", "lmdb", {"map_size": "1M"}),
    "lmdb-file": ("lmdb", "file", {"segment": "256K"}),
    "file-lmdb": ("file", "lmdb", {"map_size": "1M"}),
}


def kill_often(name, path, kills, seed):
    spt, pages, options = STORES[name]
    policy = ["none"]

    def make_server():
        spt_options = {"sync": policy[0], **({"group": "512K"} if spt == "file" else {"map_size": "1M"})}
        page_options = {**options, "sync": policy[0]}
        if spt == pages == "lmdb":
            page_options = spt_options = {**options, "sync": policy[0]}
        return open_server(path, spt, pages, spt_options, page_options)

    client = Client(make_server, seed)
    killed = busy = 0
    while killed < kills:
        policy[0] = client.random.choice(POLICIES)
        with client.server():
            client.hello()
            client.settle()
            client.check()
            timer = client.kill_after(client.random.uniform(0, 0.12))
            try:
                while True:
                    client.work()
            except Killed:
                killed += 1
                busy += client.doubt is not None
            finally:
                timer.join()
    with client.server():
        client.hello()
        client.settle()
        client.check()
    assert client.status == 0
    return killed, busy, client.acknowledged


@pytest.mark.parametrize("name", STORES)
def test_kill_9_loses_nothing_acknowledged(name, tmp_path):
    killed, busy, acknowledged = kill_often(name, tmp_path, 8, seed=1)
    assert acknowledged > killed
    assert busy


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", STORES)
def test_kill_9_two_hundred_times(name, tmp_path, record_property):
    figures = kill_often(name, tmp_path, 200, seed=2)
    record_property("killed, while busy, pages acknowledged", figures)
    print(f"{name}: killed {figures[0]}, while busy {figures[1]}, pages acknowledged {figures[2]}")
