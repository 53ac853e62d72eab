"""Stores against the bare library or system calls doing the same work, in one run; writes build/bench-stores.json.

    python benchmarks/stores/bench_stores.py [--quick] [--pages-only | --spt-only]

Compared are page files with pwrite and pread of the same pages, LMDB with py-lmdb putting and getting 4080-byte values,
memory with copying into a buffer; each through the page store alone, and through the whole memory server. Then ten
million pages in the SPT: memory, and the time to open it.
"""

import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import lmdb
import numpy as np

from edm.dms.server import MemoryServer
from edm.dms.table import page_checksums
from edm.testing.pages import batch_of
from edm.testing.stores import open_store
from edm.types import PAGE_BYTES, PAGE_REF

QUICK = "--quick" in sys.argv
ROUNDS = 5
PAGES = 2048 if QUICK else 16384
SPT_PAGES = 200_000 if QUICK else 10_000_000
OPTIONS = {"file": {"sync": "none"}, "lmdb": {"sync": "none", "map_size": "4G"}, "memory": {}}


def best(work, pages):
    """Microseconds of CPU a page, the best of several rounds: the others had company.

    Not of the clock: nothing here waits for a disk, and other work on the machine is no part of what is compared.
    """
    times = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times) / pages * 1e6


def batches(size):
    data = np.random.default_rng(1).bytes(size * PAGE_BYTES)
    return memoryview(bytearray(data)), PAGES // size // (8 if size == 1 else 1)


def bare_file(path, size):
    data, count = batches(size)
    fd = os.open(path / "bare", os.O_RDWR | os.O_CREAT)
    into = bytearray(size * PAGE_BYTES)

    def put():
        for i in range(count):
            os.pwrite(fd, data, i * len(data))

    def get():
        for i in range(count):
            os.preadv(fd, [into], i * len(data))

    result = best(put, count * size), best(get, count * size)
    os.close(fd)
    return result


def bare_memory(_path, size):
    data, count = batches(size)
    room = bytearray(count * len(data))
    into = bytearray(len(data))
    target, view = memoryview(room), memoryview(into)

    def put():
        for i in range(count):
            target[i * len(data) : (i + 1) * len(data)] = data

    def get():
        for i in range(count):
            view[:] = target[i * len(data) : (i + 1) * len(data)]

    return best(put, count * size), best(get, count * size)


def bare_lmdb(path, size):
    data, count = batches(size)
    values = [data[at : at + 4080] for at in range(0, len(data), PAGE_BYTES)]
    env = lmdb.open(str(path / "bare-lmdb"), map_size=4 << 30, sync=False, lock=False)
    into = bytearray(len(data))
    table = env.open_db(None)

    def put():
        # The same keys each round, as the stores replace the same pages each round.
        for i in range(count):
            keys = [k.to_bytes(8, "big") for k in range(i * size, (i + 1) * size)]
            with env.begin(write=True) as txn, txn.cursor(table) as cursor:
                cursor.putmulti(zip(keys, values, strict=True))

    def get():
        for i in range(count):
            with env.begin(buffers=True) as txn:
                for k in range(size):
                    into[k * PAGE_BYTES : k * PAGE_BYTES + 4080] = txn.get((i * size + k).to_bytes(8, "big"))

    result = best(put, count * size), best(get, count * size)
    env.close()
    return result


def page_store(name, path, size):
    data, count = batches(size)
    store = open_store("page_store", name, path, OPTIONS[name])
    store.live(np.empty(0, np.uint64))
    sums = page_checksums(data)
    into = memoryview(bytearray(len(data)))
    slots = []

    def put():
        # Each batch takes the place of an older one, as in a server: the store keeps its size.
        for i in range(count):
            new = store.put(data, sums)
            if len(slots) == count:
                store.free(slots[i])
                slots[i] = new
            else:
                slots.append(new)

    def get():
        for some in slots:
            store.get(some, into)

    result = best(put, count * size), best(get, count * size)
    store.close()
    return result


def server(name, path, size):
    spt = open_store("spt_store", name, path, {k: v for k, v in OPTIONS[name].items() if name != "memory"})
    made = MemoryServer(spt, open_store("page_store", name, path, OPTIONS[name]))
    refs, pages = batch_of(1 << 32, range(size), 0)
    data, count = memoryview(pages), PAGES // size // (8 if size == 1 else 1)
    into = memoryview(bytearray(len(data)))
    version = [0]

    def evict():
        version[0] += 1
        refs["version"] = version[0]
        refs["index"] = np.arange(size)
        for _ in range(count):
            made.evict(1, refs, data)
            refs["index"] += np.uint64(size)

    def get():
        refs["index"] = np.arange(size)
        for _ in range(count):
            made.get(1, refs, into)
            refs["index"] += np.uint64(size)
            refs["checksum"] = 0

    evicted = best(evict, count * size)
    # batch_of gives page i the bytes of index i; the checksum is what is evicted, so this stays right.
    result = evicted, best(get, count * size)
    made.close()
    return result


def ten_million(name, path):
    code = f"""
import json, resource, sys, time
import numpy as np
from pathlib import Path
from edm.testing.stores import open_store
from edm.types import PAGE_REF
path = Path({str(path)!r})
options = {OPTIONS[name]!r} if {name!r} != "memory" else {{}}
def rss(): return int(open("/proc/self/statm").read().split()[1]) * 4096
if sys.argv[1] == "make":
    spt = open_store("spt_store", {name!r}, path, options)
    for at in range(0, {SPT_PAGES}, 65536):
        refs = np.zeros(min(65536, {SPT_PAGES} - at), PAGE_REF)
        refs["region"] = (1 << 32) + at // 1_000_000
        refs["index"] = np.arange(at, at + len(refs))
        refs["version"] = 1
        spt.record(refs, np.arange(at, at + len(refs), dtype=np.uint64))
        spt.commit()
    figures = spt.stat()
    spt.close()
    print(json.dumps(figures))
else:
    before, start = rss(), time.perf_counter()
    spt = open_store("spt_store", {name!r}, path, options)
    print(json.dumps({{"open_s": time.perf_counter() - start, "rss_bytes": rss() - before}}))
"""
    import subprocess

    def run(what):
        return json.loads(subprocess.run([sys.executable, "-c", code, what], check=True, capture_output=True).stdout)

    figures = run("make")
    opened = run("open") if name != "memory" else {}
    disk = sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
    return {"pages": SPT_PAGES, "table_bytes": figures["memory_bytes"], "disk_bytes": disk, **opened}


def main():
    bare = {"file": bare_file, "lmdb": bare_lmdb, "memory": bare_memory}
    results = {"machine": platform.platform(), "cpus": os.cpu_count(), "us_per_page": [], "spt": {}}
    print(
        f"{'store':8} {'batch':>5} {'':6} {'bare':>8} {'store':>8} {'ratio':>6} {'server':>8} {'ratio':>6}  µs a page"
    )
    for name, bare_work in bare.items() if "--spt-only" not in sys.argv else ():
        for size in (1, 64):
            with tempfile.TemporaryDirectory() as scratch:
                parts = [Path(scratch) / part for part in ("bare", "store", "server")]
                for part in parts:
                    part.mkdir()
                measured = [bare_work(parts[0], size), page_store(name, parts[1], size), server(name, parts[2], size)]
            for way, what in enumerate(("put", "get")):
                library, store, whole = (row[way] for row in measured)
                row = {
                    "store": name,
                    "batch": size,
                    "what": what,
                    "bare": library,
                    "page_store": store,
                    "server": whole,
                }
                results["us_per_page"].append(row)
                print(
                    f"{name:8} {size:5} {what:6} {library:8.2f} {store:8.2f} {store / library:6.2f} {whole:8.2f} "
                    f"{whole / library:6.2f}"
                )
    for name in ("memory", "file", "lmdb") if "--pages-only" not in sys.argv else ():
        with tempfile.TemporaryDirectory() as scratch:
            figures = results["spt"][name] = ten_million(name, Path(scratch))
        print(f"SPT {name}: {', '.join(f'{key} {value:,.2f}' for key, value in figures.items())}")
    results["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    file = Path(__file__).parents[2] / "build" / "bench-stores.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    assert PAGE_REF.itemsize == 32
    main()
