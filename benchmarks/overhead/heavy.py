"""The Python programs of bench_overhead.py: `python heavy.py NAME SCALE`.

Each yields after every step of about a millisecond, returns a checksum, which is printed, and has the nanoseconds of
each step written to the file $STEPS.
"""

import os
import sys
import time
from array import array
from pathlib import Path


def loops(scale):
    """Arithmetic on small integers and floats, function calls, a small list: nothing grows."""
    total, weights = 0, [0.5 + i for i in range(64)]

    def step(x):
        return (x * 1103515245 + 12345) & 0x7FFFFFFF

    x = 1
    for _ in range(scale * 100):
        for i in range(3000):
            x = step(x)
            total += int(weights[x % 64]) ^ (i & 7)
        yield
    return total


def matmul(scale):
    """Products of matrices of 300 by 300, on one thread."""
    import numpy as np

    a = np.random.default_rng(1).random((300, 300))
    b = a.copy()
    for _ in range(scale * 100):
        b = a @ b
        b /= b.max()
        yield
    return f"{b.sum():.6f}"


def sqlite(scale):
    """Queries over a table of 50,000 rows in memory."""
    import sqlite3

    link = sqlite3.connect(":memory:")
    link.execute("CREATE TABLE t(a INTEGER, b TEXT)")
    link.executemany("INSERT INTO t VALUES(?, ?)", ((i * 2654435761 % 100003, f"row {i}") for i in range(50_000)))
    link.execute("CREATE INDEX i ON t(a)")
    total = 0
    for k in range(scale * 100):
        query = "SELECT sum(length(b)), count(*) FROM t WHERE a BETWEEN ? AND ?"
        total += link.execute(query, (k * 7, k * 7 + 3_000)).fetchone()[0]
        yield
    return total


def containers(scale):
    """Lists and dicts of strings built up and thrown away, about 40 MiB at a time."""
    total = 0
    for k in range(scale):
        lists, table = [], {}
        for first in range(0, 100_000, 1000):
            lists += [[j, str(j), (j, k)] for j in range(first, first + 1000)]
            yield
        for first in range(0, 100_000, 1000):
            table.update({f"key {j}": [j] for j in range(first, first + 1000)})
            yield
        total += len(lists) + len(table) + table["key 77"][0]
        while lists:
            del lists[-1000:]
            yield
        table.clear()
        yield
    return total


def arrays(scale):
    """Arrays of 8 MiB, each the result of an expression with temporaries of the same size."""
    import numpy as np

    a = np.arange(1 << 20, dtype=np.float64)
    total = 0.0
    for k in range(scale * 10):
        b = (a * 2 + k) / (a + 1) - a
        total += float(b[12345])
        yield
    return f"{total:.3f}"


def timed(steps):
    """Run it through; (what it returns, nanoseconds of each step)."""
    took, last = array("q"), time.perf_counter_ns()
    try:
        while True:
            next(steps)
            now = time.perf_counter_ns()
            took.append(now - last)
            last = now
    except StopIteration as end:
        return end.value, took


if __name__ == "__main__":
    programs = {"loops": loops, "matmul": matmul, "sqlite": sqlite, "containers": containers, "arrays": arrays}
    result, nanoseconds = timed(programs[sys.argv[1]](int(sys.argv[2])))
    print(result)
    if "STEPS" in os.environ:
        Path(os.environ["STEPS"]).write_bytes(nanoseconds.tobytes())
