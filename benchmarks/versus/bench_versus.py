"""This tree against another, run by run in turns: whether a change made faults dearer. Prints a table, writes
build/bench-versus.json.

    python benchmarks/versus/bench_versus.py [TREE] [--rounds N] [--transport NAME] [--json FILE]

TREE: another checkout of EDM that is set up (`make setup native`) [this one: then the table tells the noise]. A program
of four times its budget touches pages, new ones, and evicted ones to read and to write, on one CPU. `best`: the best
round here over the best there; `median` likewise; `quartiles` of the ratios of the rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
KINDS = ("new pages", "reads", "writes")
MEBIBYTES, TOUCHES = 64, 30_000


def touches(tree, program, transport):
    """Nanoseconds of a touch, of each kind."""
    store = "memory" if transport == "inproc" else "file"
    options = ("--transport", transport, "--store", store, "--local-memory", f"{MEBIBYTES // 4}M", "--no-summary")
    command = [tree / ".venv" / "bin" / "edm", "run", *options, "--", program, str(MEBIBYTES), str(TOUCHES)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if ran.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {ran.stderr}")
    return [int(word) for word in ran.stdout.split()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=HERE.parents[1] / "build" / "bench-versus.json")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--transport", default="inproc")
    parser.add_argument("tree", nargs="?", type=Path, default=HERE.parents[1])
    arguments = parser.parse_args()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # and with us all that is started
    trees = {"this": HERE.parents[1], "other": arguments.tree.resolve()}
    rounds = {name: [] for name in trees}
    with tempfile.TemporaryDirectory(prefix="edm-bench-") as name:
        program = Path(name) / "faults"
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
        subprocess.run([compiler, "-O2", "-o", program, HERE / "faults.c"], check=True)
        for number in range(arguments.rounds):
            for which in ("this", "other") if number % 2 else ("other", "this"):
                rounds[which].append(touches(trees[which], program, arguments.transport))
    results = {}
    print(f"{'touches':12}{'this':>9}{'other':>9}{'best':>8}{'median':>8}   quartiles")
    for at, kind in enumerate(KINDS):
        this, other = ([taken[at] for taken in rounds[which]] for which in ("this", "other"))
        low, _, high = statistics.quantiles([a / b for a, b in zip(this, other, strict=True)], n=4)
        row = {
            "this_ns": this,
            "other_ns": other,
            "best_ratio": min(this) / min(other),
            "median_ratio": statistics.median(this) / statistics.median(other),
            "quartiles": [low, high],
        }
        results[kind] = row
        print(
            f"{kind:12}{min(this) / 1000:6.2f} us{min(other) / 1000:6.2f} us{row['best_ratio']:8.3f}"
            f"{row['median_ratio']:8.3f}   {low:.3f} {high:.3f}",
            flush=True,
        )
    document = {"when": datetime.now(UTC).isoformat(), "trees": list(map(str, trees.values())), "results": results}
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
