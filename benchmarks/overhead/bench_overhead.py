"""What it costs to be captured and never evicted: programs under `edm run` with more memory than they need, as ratios
to plain runs that take turns with them. Prints a table, writes build/bench-overhead.json.

    python benchmarks/overhead/bench_overhead.py [--quick] [--rounds N] [PROGRAM ...]

Each program times its steps of about a millisecond, which are the same in every run. `ratio`: of each step the fastest
of all rounds, added up, captured over plain; little of what other jobs on the machine take is in these. `runs`: the
shortest whole runs, from exec to exit. CPU-bound programs are to stay within 1.02, those that live in malloc within
1.3.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TARGETS = {"cpu": 1.02, "malloc": 1.3}
PYTHON = [sys.executable, str(HERE / "heavy.py")]
ENOUGH = "4G"
TIMEOUT_S = 120


def programs(directory):
    """Name → (kind, command without its scale, scale)."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    heavy = directory / "heavy"
    subprocess.run([compiler, "-O2", "-o", heavy, HERE / "heavy.c"], check=True)
    return {
        "C loop": ("cpu", [heavy, "loop"], 80),
        "python loops": ("cpu", [*PYTHON, "loops"], 6),
        "numpy matmul": ("cpu", [*PYTHON, "matmul"], 6),
        "sqlite": ("cpu", [*PYTHON, "sqlite"], 8),
        "C malloc": ("malloc", [heavy, "malloc"], 8),
        "C blocks": ("malloc", [heavy, "blocks"], 20),
        "python lists, dicts": ("malloc", [*PYTHON, "containers"], 4),
        "numpy temporaries": ("malloc", [*PYTHON, "arrays"], 6),
    }


def plain(command, steps):
    """(seconds, its output, no counters)."""
    began = time.monotonic()
    ran = subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT_S, env=environment(steps))
    return time.monotonic() - began, ran.stdout, None


def captured(command, steps, options):
    """(seconds, its output, EDM's counters)."""
    with tempfile.NamedTemporaryFile() as report:
        edm = [sys.executable, "-m", "edm", "run", "--transport", "inproc", "--store", "memory", "--no-summary"]
        edm += ["--local-memory", ENOUGH, "--report", report.name, *options, "--"]
        ran = subprocess.run(
            [*edm, *command], capture_output=True, check=True, timeout=TIMEOUT_S, env=environment(steps)
        )
        document = json.loads(Path(report.name).read_text())
    if document["counters"]["evictions"] or not document["counters"]["processes"]:
        sys.exit(f"{command}: it was evicted, or not captured at all")
    return document["seconds"], ran.stdout, document["counters"]


def environment(steps):
    return {**os.environ, "STEPS": steps, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def measure(kind, command, rounds, options):
    """One row: both ways, one after the other, `rounds` times."""
    seconds, steps, outputs = {"plain": [], "captured": []}, {"plain": [], "captured": []}, set()
    for number in range(rounds):
        for way in ("plain", "captured") if number % 2 else ("captured", "plain"):
            with tempfile.NamedTemporaryFile() as file:
                if way == "plain":
                    took, out, _ = plain(command, file.name)
                else:
                    took, out, counters = captured(command, file.name, options)
                steps[way].append(np.fromfile(file.name, np.int64))
            seconds[way].append(took)
            outputs.add(out)
    if len(outputs) > 1:
        sys.exit(f"{command}: another output than the plain run's")
    fastest = {way: np.min(each, axis=0).sum() for way, each in steps.items()}
    return {
        "kind": kind,
        "target": TARGETS[kind],
        "steps": len(steps["plain"][0]),
        "plain_s": seconds["plain"],
        "captured_s": seconds["captured"],
        "ratio": fastest["captured"] / fastest["plain"],
        "runs_ratio": min(seconds["captured"]) / min(seconds["plain"]),
        "faults": counters["faults"],
        "zero_fills": counters["zero_fills"],
        "events": sum(counters[f"events_{name}"] for name in ("fork", "remap", "remove", "unmap")),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=HERE.parents[1] / "build" / "bench-overhead.json")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, two rounds")
    parser.add_argument("--option", action="append", default=[], help="for edm run, as --option=--sweep-ms=20")
    parser.add_argument("programs", nargs="*", help="some of the table's [all]")
    parser.add_argument("--cpu", action="store_true", help="steps in the program's CPU time: on a machine that is busy")
    arguments = parser.parse_args()
    if arguments.cpu:
        os.environ["STEPS_CPU"] = "1"
    results = {}
    with tempfile.TemporaryDirectory(prefix="edm-bench-") as name:
        every = programs(Path(name))
        if unknown := set(arguments.programs) - set(every):
            sys.exit(f"no program {', '.join(sorted(unknown))}: there are {', '.join(every)}")
        print(f"{'program':21}{'kind':8}{'plain':>8}{'ratio':>8}{'runs':>9}{'target':>8}{'faults':>10}{'events':>9}")
        for program, (kind, command, scale) in every.items():
            if arguments.programs and program not in arguments.programs:
                continue
            words = [*map(str, command), str(max(1, scale // 10) if arguments.quick else scale)]
            row = measure(kind, words, 2 if arguments.quick else arguments.rounds, arguments.option)
            results[program] = row
            print(
                f"{program:21}{kind:8}{min(row['plain_s']):6.2f} s{row['ratio']:8.3f}{row['runs_ratio']:9.3f}"
                f"{row['target']:8.2f}{row['faults']:10}{row['events']:9}",
                flush=True,
            )
    document = {"when": datetime.now(UTC).isoformat(), "cpus": os.cpu_count(), "results": results}
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
