"""Stores against the bare library or system calls doing the same work, in one run; writes build/bench-stores.json.

    python benchmarks/stores/bench_stores.py [--quick] [--batches-only] [--pages-only | --spt-only]

Compared are page files with pwrite and pread of the same pages, LMDB with py-lmdb putting and getting 4080-byte values,
memory with copying into a buffer; each through the page store alone, and through the whole memory server. Beside it
the same calls with what a server owes its pages and they leave out: a checksum of each page, and a record of it. Then
ten million pages in the SPT: memory, and the time to open it.
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

from edm._native import lib
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
    """Microseconds of CPU a page, the best of several rounds: the others had company. One goes before, uncounted: it
    fills what is empty, and a server's pages mostly take the place of older ones.

    Not of the clock: nothing here waits for a disk, and other work on the machine is no part of what is compared.
    """
    work()
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


def owing_file(path, size):
    """A checksum and a place for it, and a record in a journal, with each page."""
    data, count = batches(size)
    pages, sums, journal = (os.open(path / name, os.O_RDWR | os.O_CREAT) for name in ("pages", "sums", "journal"))
    into = bytearray(size * PAGE_BYTES)
    record = bytes(40 + size * (PAGE_REF.itemsize + 8))
    end = [0]

    def put():
        for i in range(count):
            checksums = page_checksums(data)
            os.pwrite(pages, data, i * len(data))
            os.pwrite(sums, checksums, i * size * 4)
            lib.edm_crc32c(record, len(record))
            end[0] += os.pwrite(journal, record, end[0])

    def get():
        for i in range(count):
            os.preadv(pages, [into], i * len(data))
            page_checksums(into)

    result = best(put, count * size), best(get, count * size)
    for file in (pages, sums, journal):
        os.close(file)
    return result


def owing_memory(_path, size):
    """A checksum of each page, in and out."""
    data, count = batches(size)
    target, into = memoryview(bytearray(count * len(data))), memoryview(bytearray(len(data)))

    def put():
        for i in range(count):
            page_checksums(data)
            target[i * len(data) : (i + 1) * len(data)] = data

    def get():
        for i in range(count):
            into[:] = target[i * len(data) : (i + 1) * len(data)]
            page_checksums(into)

    return best(put, count * size), best(get, count * size)


def owing_lmdb(path, size):
    """A checksum and the page's last bytes in one table, and a row of the page table in another, in one transaction."""
    data, count = batches(size)
    values = [data[at : at + 4080] for at in range(0, len(data), PAGE_BYTES)]
    env = lmdb.open(str(path / "owing-lmdb"), map_size=4 << 30, sync=False, lock=False, max_dbs=3)
    heads, tails, rows = (env.open_db(name) for name in (b"heads", b"tails", b"rows"))
    into = bytearray(len(data))

    def put():
        for i in range(count):
            page_checksums(data)
            keys = [k.to_bytes(8, "big") for k in range(i * size, (i + 1) * size)]
            with env.begin(write=True) as txn:
                for table, parts in ((heads, values), (tails, [bytes(24)] * size), (rows, [bytes(32)] * size)):
                    with txn.cursor(table) as cursor:
                        cursor.putmulti(zip(keys, parts, strict=True))

    def get():
        for i in range(count):
            with env.begin(buffers=True) as txn:
                for k in range(size):
                    key, at = (i * size + k).to_bytes(8, "big"), k * PAGE_BYTES
                    into[at : at + 4080] = txn.get(key, db=heads)
                    into[at + 4080 : at + PAGE_BYTES] = txn.get(key, db=tails)[:16]
            page_checksums(into)

    result = best(put, count * size), best(get, count * size)
    env.close()
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
    bare = {
        "file": (bare_file, owing_file),
        "lmdb": (bare_lmdb, owing_lmdb),
        "memory": (bare_memory, owing_memory),
    }
    results = {"machine": platform.platform(), "cpus": os.cpu_count(), "us_per_page": [], "spt": {}}
    print(
        f"{'store':8} {'batch':>5} {'':6} {'bare':>8} {'store':>8} {'ratio':>6} {'server':>8} {'ratio':>6} "
        f"{'owing':>8} {'ratio':>6}  µs a page"
    )
    for name, (bare_work, owing_work) in bare.items() if "--spt-only" not in sys.argv else ():
        for size in (64,) if "--batches-only" in sys.argv else (1, 64):
            with tempfile.TemporaryDirectory() as scratch:
                parts = [Path(scratch) / part for part in ("bare", "store", "server")]
                for part in parts:
                    part.mkdir()
                measured = [
                    bare_work(parts[0], size),
                    page_store(name, parts[1], size),
                    server(name, parts[2], size),
                    owing_work(parts[0], size),
                ]
            for way, what in enumerate(("put", "get")):
                library, store, whole, owing = (row[way] for row in measured)
                row = {
                    "store": name,
                    "batch": size,
                    "what": what,
                    "bare": library,
                    "page_store": store,
                    "server": whole,
                    "owing": owing,
                }
                results["us_per_page"].append(row)
                print(
                    f"{name:8} {size:5} {what:6} {library:8.2f} {store:8.2f} {store / library:6.2f} {whole:8.2f} "
                    f"{whole / library:6.2f} {owing:8.2f} {whole / owing:6.2f}"
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
