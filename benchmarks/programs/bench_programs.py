"""Whole programs in 75, 50 and 25 % of the memory they need: slowdown against the plain run, under EDM and under the
kernel's own swapping (to a file, to zram) in a memory cgroup of the same size. Every output is compared with the plain
run's. Prints a table, writes build/bench-programs.json. Swap and cgroups need root; without, those columns say why not.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
WORKLOADS = [sys.executable, str(HERE / "workloads.py")]
SHARES = (75, 50, 25)
TIMEOUT_S = 120


class Skipped(Exception):
    """Why a column cannot be had here."""


def commands(names, mib, directory):
    """Name → command of each program that is installed."""
    text = directory / "text"
    sql = f"""
        CREATE TABLE t(a INTEGER, b TEXT);
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {mib * 6000})
          INSERT INTO t SELECT (i * 2654435761) % 1000003, hex(i * 7919) || '-' || hex(i) FROM n;
        CREATE INDEX ta ON t(a);
        SELECT count(*), sum(length(b)) FROM t WHERE a BETWEEN 1000 AND 90000;
        SELECT a, count(*) FROM t GROUP BY a ORDER BY 2 DESC, 1 LIMIT 5;
    """
    every = {
        "numpy sort": [*WORKLOADS, "numpy-sort", str(mib)],
        "sort(1)": ["sort", "--parallel=1", "-S", "2G", str(text)],
        "sqlite3": ["sqlite3", ":memory:", sql],
        "redis": [*WORKLOADS, "redis", str(mib)],
        "graph": [*WORKLOADS, "graph", str(mib)],
    }
    if not names or "sort(1)" in names:
        numbers = np.random.default_rng(4).integers(0, 1 << 62, mib * 12_000)
        text.write_text("\n".join(map(str, numbers.tolist())) + "\n")
    needs = {"sqlite3": "sqlite3", "redis": "redis-server"}
    for name, command in every.items():
        if names and name not in names:
            continue
        if name in needs and not shutil.which(needs[name]):
            print(f"{name}: skipped: {needs[name]} is not installed", file=sys.stderr)
            continue
        yield name, command


def run(command, prepare=None):
    """(seconds, digest of the output, peak resident bytes of its largest process); raises on failure."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, preexec_fn=prepare,
            start_new_session=True, env={**os.environ, "LC_ALL": "C", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            _, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise Skipped(f"not done after {TIMEOUT_S} s") from None
        seconds = time.monotonic() - began
        if process.returncode:
            raise Skipped(f"exit status {process.returncode} {err.decode(errors='replace').strip()[-80:]}")
        out.seek(0)
        return seconds, hashlib.file_digest(out, "sha256").hexdigest()


def peak_of(command):
    """Peak resident bytes of the largest process of a plain run. Source: time(1)'s way, getrusage(RUSAGE_CHILDREN)."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    return int(subprocess.run([sys.executable, "-c", code, *command], capture_output=True, check=True).stdout) << 10


def under_edm(store):
    def measured(command, limit):
        with tempfile.NamedTemporaryFile() as report:
            edm = [sys.executable, "-m", "edm", "run", "--transport", "inproc", "--store", store, "--no-summary"]
            _, digest = run([*edm, "--local-memory", str(limit), "--report", report.name, "--", *command])
            return json.loads(Path(report.name).read_text())["seconds"], digest

    return measured


@contextlib.contextmanager
def memory_cgroup(limit):
    """A cgroup whose memory, page cache included, is limited; yields the file a process enters it by."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    name = f"edm-bench-{os.getpid()}"
    if (first / "memory.limit_in_bytes").exists():
        group, file = first / name, "memory.limit_in_bytes"
    elif "memory" in _text(second / "cgroup.subtree_control"):
        group, file = second / name, "memory.max"
    else:
        raise Skipped("there is no memory cgroup")
    try:
        group.mkdir()
    except OSError as error:
        raise Skipped(f"cannot make a cgroup: {error.strerror}") from None
    try:
        (group / file).write_text(str(limit))
        yield group / "cgroup.procs"
    finally:
        for _ in range(100):
            try:
                group.rmdir()
                break
            except OSError:  # its last process is not yet gone
                time.sleep(0.1)


def _text(path):
    try:
        return path.read_text()
    except OSError:
        return ""


def under_swap(command, limit):
    with memory_cgroup(limit) as procs:
        entry = str(procs)
        return run(command, lambda: Path(entry).write_text(str(os.getpid())))


@contextlib.contextmanager
def swap_file(directory, size):
    path = directory / "swap"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    path.chmod(0o600)
    with swapped_on(path):
        yield


@contextlib.contextmanager
def zram(size):
    control = Path("/sys/class/zram-control/hot_add")
    if not control.exists():
        raise Skipped("the kernel has no zram")
    try:
        number = control.read_text().strip()
    except OSError as error:
        raise Skipped(f"cannot add a zram device: {error.strerror}") from None
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size))
        with swapped_on(Path(f"/dev/zram{number}")):
            yield
    finally:
        Path(f"/sys/block/zram{number}/reset").write_text("1")
        Path("/sys/class/zram-control/hot_remove").write_text(number)


@contextlib.contextmanager
def swapped_on(path):
    for tool in (["mkswap", str(path)], ["swapon", "-p", "10", str(path)]):
        try:
            subprocess.run(tool, capture_output=True, check=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", "") or str(error)
            raise Skipped(f"{tool[0]}: {why.strip().splitlines()[-1]}") from None
    try:
        yield
    finally:
        subprocess.run(["swapoff", str(path)], check=True)


def columns(directory, size):
    """Name → (how to prepare it, how to run a command with a limit)."""
    return {
        "edm, memory": (contextlib.nullcontext, under_edm("memory")),
        "zram": (lambda: zram(size), under_swap),
        "edm, page files": (contextlib.nullcontext, under_edm("file")),
        "swap file": (lambda: swap_file(directory, size), under_swap),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=HERE.parents[1] / "build" / "bench-programs.json")
    parser.add_argument("--mib", type=int, default=128, help="about how much memory each program needs [128]")
    parser.add_argument("--share", type=int, action="append", help="percent of it that is local [75, 50, 25]")
    parser.add_argument("programs", nargs="*", help="numpy sort, sort(1), sqlite3, redis, graph [all]")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="edm-bench-") as name:
        directory = Path(name)
        every = columns(directory, 2 << 30)
        print(f"{'program':12}{'plain':>8}{'needs':>8}{'local':>7}" + "".join(f"{column:>17}" for column in every))
        for program, command in commands(arguments.programs, arguments.mib, directory):
            plain_s, digest = run(command)
            peak = peak_of(command)
            for share in arguments.share or SHARES:
                row = {"program": program, "plain_s": plain_s, "peak_bytes": peak, "share": share, "slowdown": {}}
                for column, (prepared, measured) in every.items():
                    try:
                        with prepared():
                            seconds, got = measured(command, peak * share // 100)
                        if got != digest:
                            sys.exit(f"{program}, {column}, {share} %: another output than the plain run's")
                        row["slowdown"][column] = seconds / plain_s
                    except Skipped as why:
                        row.setdefault("skipped", {})[column] = str(why)
                results.append(row)
                cells = (f"{row['slowdown'][c]:.2f}" if c in row["slowdown"] else "–" for c in every)
                print(
                    f"{program:12}{plain_s:6.2f} s{peak >> 20:6} M{share:5} %"
                    + "".join(f"{cell:>17}" for cell in cells),
                    flush=True,
                )
                for column, why in row.get("skipped", {}).items():
                    print(f"  {column}: {why}", file=sys.stderr)
    document = {"when": datetime.now(UTC).isoformat(), "cpus": os.cpu_count(), "results": results}
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
