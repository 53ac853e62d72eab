"""How long a program waits when a process of EDM is killed: from the SIGKILL until its next fault is answered.

    python benchmarks/recovery/bench_recovery.py [--quick] [--deaths N] [--json FILE] [CASE ...]

A program reads pages of four times its budget in no order, and tells of each read that took milliseconds. Every few
seconds a process is killed; the wait is from there to the end of the read that was under way, or began after it.
`starts` is the same in units of what any new process needs here: a Python that imports the DM-Handler. Prints a table,
writes build/bench-recovery.json.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
CASES = {
    "DM-Handler, inproc": ("inproc", "edm: dm-handler", 64),
    "DM-Handler, inproc, 1 GiB": ("inproc", "edm: dm-handler", 1024),
    "DM-Handler, zmq": ("zmq", "edm: dm-handler", 64),
    "memory server, zmq": ("zmq", "edm: dms", 64),
    "DM-Handler, mpi": ("mpi", "edm: dm-handler", 64),
    "memory server, mpi": ("mpi", "edm: dms", 64),
}
"""Name → (transport, who is killed, MiB of the program)."""
LATER_S = 2.0
BEGINS_NS = 500_000_000
"""Until then after a death, at the latest, the program comes to a page that is away."""


def below(root):
    """Title → pid of the processes below `root`."""
    parents, titles = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue
    found = {}
    for pid in parents:
        at = pid
        while at and at != root:
            at = parents.get(at, 0)
        if at:
            found[titles[pid]] = pid
    return found


def there(root, victim):
    """The pid of the process of that title, once there is one that is at work."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if victim in (found := below(root)):
            return found[victim]
        time.sleep(0.05)
    return sys.exit(f"no {victim} came")


def one_start():
    """Seconds until a Python has imported the DM-Handler, the shortest of some."""
    command = [sys.executable, "-c", "import edm.handler.process"]
    times = []
    for _ in range(5):
        began = time.monotonic()
        subprocess.run(command, check=True, timeout=60)
        times.append(time.monotonic() - began)
    return min(times)


def waits(program, transport, victim, mebibytes, deaths):
    """Seconds from each death to the first fault answered after it."""
    options = ("--transport", transport, "--local-memory", f"{mebibytes // 4}M", "--restarts", "1000", "--no-summary")
    command = [sys.executable, "-m", "edm", "run", *options, "--", program, str(mebibytes)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes, text=True) as process:
        if process.stdout.readline() != "ready\n":
            sys.exit(f"{command}: it did not begin")
        kills = []
        for _ in range(deaths):
            time.sleep(LATER_S)
            pid = there(process.pid, victim)
            kills.append(time.monotonic_ns())
            os.kill(pid, signal.SIGKILL)
            time.sleep(LATER_S)
        there(process.pid, victim)
        time.sleep(LATER_S)
        out, _ = process.communicate(timeout=120)
    if process.returncode or not out.endswith("done\n"):
        sys.exit(f"{command}: it ended with {process.returncode}")
    reads = [tuple(map(int, line.split())) for line in out.splitlines()[:-1]]
    return [max(end - kill for began, end in reads if began < kill + BEGINS_NS and end > kill) / 1e9 for kill in kills]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=HERE.parents[1] / "build" / "bench-recovery.json")
    parser.add_argument("--deaths", type=int, default=5, help="in each case [5]")
    parser.add_argument("--quick", action="store_true", help="one death in each, and none of 1 GiB")
    parser.add_argument("cases", nargs="*", help="some of the table's [all]")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        sys.exit(f"no case {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    results, start = {}, one_start()
    print(f"one start: {start:.2f} s\n{'killed':28}{'median':>9}{'longest':>9}{'starts':>8}")
    with tempfile.TemporaryDirectory(prefix="edm-bench-") as name:
        program = Path(name) / "touching"
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        subprocess.run([compiler, "-O2", "-o", program, HERE / "touching.c"], check=True)
        for case, (transport, victim, mebibytes) in CASES.items():
            if (arguments.cases and case not in arguments.cases) or (arguments.quick and mebibytes > 64):
                continue
            times = waits(program, transport, victim, mebibytes, 1 if arguments.quick else arguments.deaths)
            median = statistics.median(times)
            results[case] = {"waits_s": times, "median_s": median, "starts": median / start}
            print(f"{case:28}{median:7.2f} s{max(times):7.2f} s{median / start:8.1f}", flush=True)
    document = {"when": datetime.now(UTC).isoformat(), "cpus": os.cpu_count(), "start_s": start, "results": results}
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
