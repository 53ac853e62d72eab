"""What it costs to be captured and never evicted: programs under `edm run` with more memory than they need, as ratios
to plain runs that take turns with them. Prints a table, writes build/bench-overhead.json.

    python benchmarks/overhead/bench_overhead.py [--quick] [--rounds N] [PROGRAM ...]

Each program times its steps of about a millisecond; a run is their sum: from exec to capture, and the exit, are not in
it. Two runs of one program differ by several percent, by where its memory happens to lie, so there are many short ones:
`ratio` is the median captured run over the median plain one, with the range that holds 95 of 100 such ratios when runs
are drawn from those measured (bootstrap). `control` is the same of every other plain run over the rest: what of a ratio
is chance. `whole`: from exec to exit, shortest run over shortest. CPU-bound programs are to stay within 1.02, those
that live in malloc within 1.3.
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
        "C loop": ("cpu", [heavy, "loop"], 60),
        "python loops": ("cpu", [*PYTHON, "loops"], 3),
        "numpy matmul": ("cpu", [*PYTHON, "matmul"], 2),
        "sqlite": ("cpu", [*PYTHON, "sqlite"], 3),
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
    """One row: plain, captured and plain again, `rounds` times, in changing order."""
    runs, whole, outputs = {"plain": [], "captured": [], "again": []}, {"plain": [], "captured": [], "again": []}, set()
    for number in range(rounds):
        for way in ("plain", "captured", "again")[:: 1 if number % 2 else -1]:
            with tempfile.NamedTemporaryFile() as file:
                if way == "captured":
                    took, out, counters = captured(command, file.name, options)
                else:
                    took, out, _ = plain(command, file.name)
                steps = np.fromfile(file.name, np.int64)
            runs[way].append(int(steps.sum()))
            whole[way].append(took)
            outputs.add(out)
    if len(outputs) > 1:
        sys.exit(f"{command}: another output than the plain run's")
    all_plain = runs["plain"] + runs["again"]
    return {
        "kind": kind,
        "target": TARGETS[kind],
        "steps": len(steps),
        "runs_ns": runs,
        "plain_s": float(np.median(all_plain)) / 1e9,
        "ratio": ratio(runs["captured"], all_plain),
        "control": ratio(runs["plain"], runs["again"]),
        "whole_ratio": min(whole["captured"]) / min(whole["plain"] + whole["again"]),
        "faults": counters["faults"],
        "zero_fills": counters["zero_fills"],
        "events": sum(counters[f"events_{name}"] for name in ("fork", "remap", "remove", "unmap")),
    }


def ratio(these, others):
    """Median over median, and the range of 95 of 100 drawn again: (ratio, low, high)."""
    chance = np.random.default_rng(1)
    drawn = [np.median(chance.choice(runs, (4000, len(runs))), axis=1) for runs in (these, others)]
    return (float(np.median(these) / np.median(others)), *map(float, np.percentile(drawn[0] / drawn[1], (2.5, 97.5))))


def shown(ratio):
    return f"{ratio[0]:.3f} ({ratio[1]:.3f}-{ratio[2]:.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=HERE.parents[1] / "build" / "bench-overhead.json")
    parser.add_argument("--rounds", type=int, default=25)
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
        print(
            f"{'program':21}{'kind':8}{'plain':>8}{'ratio':>21}{'control':>21}{'target':>8}{'whole':>8}{'faults':>8}"
            f"{'events':>8}"
        )
        for program, (kind, command, scale) in every.items():
            if arguments.programs and program not in arguments.programs:
                continue
            words = [*map(str, command), str(max(1, scale // 10) if arguments.quick else scale)]
            row = measure(kind, words, 2 if arguments.quick else arguments.rounds, arguments.option)
            results[program] = row
            print(
                f"{program:21}{kind:8}{row['plain_s']:6.2f} s{shown(row['ratio']):>21}{shown(row['control']):>21}"
                f"{row['target']:8.2f}{row['whole_ratio']:8.2f}{row['faults']:8}{row['events']:8}",
                flush=True,
            )
    document = {"when": datetime.now(UTC).isoformat(), "cpus": os.cpu_count(), "results": results}
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
