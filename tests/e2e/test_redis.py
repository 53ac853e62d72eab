"""A Redis server in a quarter of its need, under load, saving in the background: every digest is the plain server's.

`make soak` goes round for EDM_SOAK_S seconds (600), over the transports and stores in turn, two larger servers first.
"""

import itertools
import json
import os
import shutil
import subprocess
import time

import pytest
import redis
from watching import anonymous_bytes, wait_for

pytestmark = [
    pytest.mark.uffd,
    pytest.mark.redis,
    pytest.mark.timeout(150),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server here (make programs)"),
]

SOAK_S = float(os.environ.get("EDM_SOAK_S", "600"))
WAYS = [("mpi", "file"), ("zmq", "lmdb"), ("inproc", "memory"), ("zmq", "file"), ("inproc", "file")]


def server_command(directory):
    directory.mkdir(exist_ok=True)
    quiet = [
        "--port",
        "0",
        "--save",
        "",
        "--appendonly",
        "no",
        "--loglevel",
        "warning",
        "--enable-debug-command",
        "yes",
    ]
    # Freed pages go back by chance and time (a background thread) otherwise; the need should be the same each run.
    return ["redis-server", *quiet, "--unixsocket", directory / "s", "--dir", directory, "--dbfilename", "dump.rdb"]


def client_of(directory):
    client = redis.Redis(unix_socket_path=str(directory / "s"), socket_timeout=60)

    def answers():
        try:
            return client.ping()
        except (redis.ConnectionError, redis.BusyLoadingError):
            return False

    wait_for(answers)
    return client


def digest(client):
    return client.execute_command("DEBUG", "DIGEST")


def load(client, seed, count, most=400):
    """Strings (up to `most` bytes or so), hashes, lists, sorted sets: made, changed, removed; the same for a seed."""
    for start in range(0, count, 500):
        pipe = client.pipeline(transaction=False)
        for i in range(start, min(start + 500, count)):
            n = (i * 7919 + seed) % (count * 2)
            pipe.set(f"s{n}", f"{seed}:{i:06}" * (n % (most // 8)))
            pipe.hset(f"h{n % 500}", f"f{i % 64}", f"{seed}{i}" * 3)
            pipe.rpush(f"l{n % 300}", f"{seed}-{i}")
            pipe.zadd(f"z{n % 200}", {f"m{i % 128}": i})
            if i % 3 == 0:
                pipe.delete(f"s{(n * 31) % (count * 2)}")
            if i % 5 == 0:
                pipe.lpop(f"l{(n + 1) % 300}")
        pipe.execute()


def talk(client, directory, count):
    """Load, save in the background while loading on; returns the digests at the save and at the end."""
    load(client, 1, count)
    pipe = client.pipeline(transaction=False)  # one connection, in order: nothing comes between the two
    pipe.execute_command("DEBUG", "DIGEST")
    pipe.execute_command("BGSAVE")
    at_save = pipe.execute()[0]
    load(client, 2, count)
    wait_for(lambda: not client.info("persistence")["rdb_bgsave_in_progress"], within_s=60)
    assert client.info("persistence")["rdb_last_bgsave_status"] == "ok"
    return at_save, digest(client)


def plain_talk(directory, count):
    """The digests of a server without EDM, and the memory it needed."""
    process = subprocess.Popen(list(map(str, server_command(directory))), stdout=subprocess.DEVNULL)
    try:
        client = client_of(directory)
        digests = talk(client, directory, count)
        need = anonymous_bytes(process.pid)
        client.shutdown(nosave=True)
        assert process.wait(30) == 0
    finally:
        process.kill()
    return digests, need


def reloaded_digest(directory):
    """The digest of a plain server that has read the dump in `directory`."""
    process = subprocess.Popen(list(map(str, server_command(directory))), stdout=subprocess.DEVNULL)
    try:
        client = client_of(directory)
        return digest(client)
    finally:
        process.kill()
        process.wait()


def check_server(edm, directory, count, transport, store):
    expected, need = plain_talk(directory / "plain", count)
    here = directory / "edm"
    arguments = ("--transport", transport, "--store", store, "--local-memory", need // 4)
    process = edm.start("run", *arguments, "--report", directory / "r.json", "--", *server_command(here))
    client = client_of(here)
    assert talk(client, here, count) == expected
    client.shutdown(nosave=True)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, b"edm:" in err) == (0, False), err
    assert reloaded_digest(here) == expected[0]
    counters = json.loads((directory / "r.json").read_text())["counters"]
    assert counters["events_fork"] >= 1
    assert counters["internal_errors"] == counters["lost"] == 0
    assert counters["evictions"] * 4096 > need


@pytest.mark.parametrize(("transport", "store"), [("inproc", "memory")])
def test_bgsave_reloads_to_the_digest_at_the_fork(edm, tmp_path, transport, store):
    check_server(edm, tmp_path, 2000, transport, store)
    assert edm.left_behind() == ({}, [])


@pytest.mark.soak
@pytest.mark.timeout(SOAK_S + 900)
def test_bgsave_for_as_long_as_one_likes(edm, tmp_path):
    end, counts = time.monotonic() + SOAK_S, itertools.chain([40_000, 40_000], itertools.repeat(6000))
    for number, ((transport, store), count) in enumerate(zip(itertools.cycle(WAYS), counts)):
        if number > 1 and time.monotonic() > end:
            print(f"{number} servers")
            return
        directory = tmp_path / str(number)
        directory.mkdir()
        check_server(edm, directory, count, transport, store)
        shutil.rmtree(directory)
