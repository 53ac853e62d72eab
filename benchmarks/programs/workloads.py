"""The programs of bench_programs.py that are not simply a command: `python workloads.py NAME MIB`.

Each prints a checksum of what it computed, the same whenever it is right.
"""

import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def numpy_sort(mib):
    numbers = np.random.default_rng(1).random(mib << 17)
    numbers.sort()
    assert (np.diff(numbers[::4099]) >= 0).all()
    print(numbers[:: len(numbers) // 7].sum())


def graph(mib):
    """BFS and PageRank over a random graph of out-degree 16, as arrays (CSR with a fixed row length)."""
    nodes = (mib << 20) // (16 * 4 + 8 + 16)
    random = np.random.default_rng(2)
    edges = random.integers(0, nodes, (nodes, 16), np.int32)
    distance = np.full(nodes, -1, np.int8)
    frontier, level = np.array([0], np.int32), 0
    while len(frontier):
        distance[frontier] = level
        reached = np.unique(edges[frontier])
        frontier, level = reached[distance[reached] < 0], level + 1
    rank = np.full(nodes, 1 / nodes)
    for _ in range(3):
        share = np.zeros(nodes)
        for column in range(16):
            share += np.bincount(edges[:, column], rank, nodes)
        rank = 0.15 / nodes + 0.85 * share / 16
    print(level, int(distance.sum()), f"{rank.max() * nodes:.6f}")


def redis(mib):
    """A server of `mib` MiB of 1 KiB values; 40,000 GET and SET whose keys follow a Zipf distribution."""
    keys = mib * 800
    random = np.random.default_rng(3)
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "sock")
        server = subprocess.Popen(
            [
                "redis-server",
                "--port",
                "0",
                "--unixsocket",
                path,
                "--save",
                "",
                "--appendonly",
                "no",
                "--dir",
                directory,
            ],
            stdout=subprocess.DEVNULL,
        )
        try:
            print(drive(connect(path), keys, random))
        finally:
            server.terminate()
            server.wait()


def connect(path):
    for _ in range(500):
        try:
            link = socket.socket(socket.AF_UNIX)
            link.connect(path)
        except OSError:
            time.sleep(0.02)
        else:
            return link
    sys.exit("redis-server did not come up")


def drive(link, keys, random):
    answers = link.makefile("rb")

    def exchange(requests):
        link.sendall(b"".join(requests))
        total = 0
        for _ in requests:
            line = answers.readline()
            if line.startswith(b"$"):
                total += answers.read(int(line[1:]) + 2)[0]
            elif line != b"+OK\r\n":
                sys.exit(f"redis-server answered {line!r}")
        return total

    def set_(key):
        value = bytes([65 + key % 26]) * 1024
        return b"*3\r\n$3\r\nSET\r\n$%d\r\n%d\r\n$1024\r\n%b\r\n" % (len(str(key)), key, value)

    for first in range(0, keys, 100):
        exchange([set_(key) for key in range(first, min(first + 100, keys))])
    order = random.permutation(keys)
    total = 0
    for round_ in range(2000):
        wanted = order[(random.zipf(1.1, 20) - 1) % keys].tolist()
        gets = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%d\r\n" % (len(str(key)), key) for key in wanted]
        total += exchange([set_(wanted[0]), *gets] if round_ % 2 else gets)
    return total


if __name__ == "__main__":
    {"numpy-sort": numpy_sort, "graph": graph, "redis": redis}[sys.argv[1]](int(sys.argv[2]))
