"""What it costs to be captured and never evicted: programs under `edm run` with more memory than they need, as ratios
to plain runs that take turns with them. Prints a table, writes build/bench-overhead.json.

    python benchmarks/overhead/bench_overhead.py [--quick] [--groups N] [--more] [PROGRAM ...]

Two runs of one program differ by several percent, by where its memory happens to lie and by what else the machine's
owner has it do. So the runs come in groups of four, plain, captured, captured, plain, and the other way round in every
second one: what changes slowly falls out of a group's ratio, of its captured runs over its plain ones. Shown is the
median of all groups' ratios, and the range where it lies in 95 of 100 cases when groups are drawn from those measured
(bootstrap). `--more` adds groups to those in the file.

`time` is that of the program's steps of about a millisecond, of those that have some: the way from exec to capture is
not in it, nor the exit; of others it is from exec to exit. `CPU` is user and system time from exec to exit. `control`
is the time of one plain run of a group over the other, each first in every second group: what of `time` is chance.
`small pages`: the time of plain runs without transparent huge pages, which captured programs have not, over that of
plain runs with them, in the same way. CPU-bound programs are to stay within 1.02, those that live in malloc within
1.3; `no` and `yes` say where the whole range is on one side.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import attrs
import numpy as np

HERE = Path(__file__).parent
TARGETS = {"cpu": 1.02, "huge": None, "malloc": 1.3}
PYTHON = [sys.executable, str(HERE / "heavy.py")]
ENOUGH = "4G"
TIMEOUT_S = 120
ORDERS = (("plain", "captured", "captured", "plain"), ("captured", "plain", "plain", "captured"))


@attrs.frozen
class Program:
    """small_pages: whether plain runs without huge pages are measured, too."""

    kind: str
    command: list
    scale: int | None = None
    small_pages: bool = False

    def words(self, *, quick):
        """Its command line, with a tenth of the work if `quick`."""
        scale = [] if self.scale is None else [max(1, self.scale // 10) if quick else self.scale]
        return [*map(str, self.command), *map(str, scale)]


def build(directory, name):
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    subprocess.run([compiler, "-O2", "-o", directory / name, HERE / f"{name}.c"], check=True)
    return directory / name


def text(directory):
    numbers = random.Random(1)
    lines = (f"{numbers.getrandbits(40):x} {i} {'abcdefgh'[: i % 9]}\n" for i in range(200_000))
    (directory / "text").write_text("".join(lines))
    return directory / "text"


def programs(directory):
    heavy = build(directory, "heavy")
    every = {
        "C loop": Program("cpu", [heavy, "loop"], 250),
        "C memory": Program("cpu", [heavy, "memory"], 400, small_pages=True),
        "python loops": Program("cpu", [*PYTHON, "loops"], 9),
        "numpy matmul": Program("cpu", [*PYTHON, "matmul"], 8),
        "sqlite": Program("cpu", [*PYTHON, "sqlite"], 9),
        "xz": Program("cpu", ["xz", "-T1", "-3", "-k", "-c", text(directory)]),
        "C huge pages": Program("huge", [heavy, "huge"], 400, small_pages=True),
        "C malloc": Program("malloc", [heavy, "malloc"], 8),
        "C blocks": Program("malloc", [heavy, "blocks"], 20),
        "python lists, dicts": Program("malloc", [*PYTHON, "containers"], 4),
        "numpy temporaries": Program("malloc", [*PYTHON, "arrays"], 6, small_pages=True),
    }
    return {name: one for name, one in every.items() if shutil.which(one.command[0])}


def run(timed, command, way, options):
    """One run: (what it measured, the program's output, EDM's counters or None)."""
    with tempfile.TemporaryDirectory(prefix="edm-bench-") as name:
        steps, times, report = (Path(name) / part for part in ("steps", "times", "report"))
        environment = {**os.environ, "STEPS": str(steps), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        if way == "small pages":
            environment["SMALL_PAGES"] = "1"
        edm = [sys.executable, "-m", "edm", "run", "--transport", "inproc", "--store", "memory", "--no-summary"]
        edm += ["--local-memory", ENOUGH, "--report", report, *options, "--"]
        words = [*(edm if way == "captured" else ()), timed, times, *command]
        ran = subprocess.run(words, capture_output=True, check=True, timeout=TIMEOUT_S, env=environment)
        whole_s, user_s, system_s = map(float, times.read_text().split())
        took = {"time": whole_s, "cpu": user_s + system_s, "whole": whole_s}
        if steps.exists():
            took["time"] = float(np.fromfile(steps, np.int64).sum() / 1e9)
        counters = json.loads(report.read_text())["counters"] if way == "captured" else None
    if counters and (counters["evictions"] or counters["processes"] < 2):
        sys.exit(f"{command}: it was evicted, or not captured at all")
    return took, ran.stdout, counters


def measure(timed, program, command, groups, options):
    """Groups of runs, each {way: [what was measured, …]}, and the last captured run's counters."""
    measured, outputs, counters = [], set(), None
    for number in range(groups):
        runs = {"plain": [], "captured": [], "small pages": []}
        order = ORDERS[number % 2]
        for way in [*order[:2], *(["small pages"] if program.small_pages else ()), *order[2:]]:
            took, out, seen = run(timed, command, way, options)
            runs[way].append(took)
            outputs.add(out)
            counters = seen or counters
        measured.append(runs)
    if len(outputs) > 1:
        sys.exit(f"{command}: another output than the plain run's")
    return measured, counters


def row(program, measured, counters):
    target = TARGETS[program.kind]
    time_ratio = ratio(measured, "captured", "time")
    return {
        "kind": program.kind,
        "target": target,
        "plain_s": float(np.median([one["time"] for runs in measured for one in runs["plain"]])),
        "time": time_ratio,
        "cpu": ratio(measured, "captured", "cpu"),
        "whole": ratio(measured, "captured", "whole"),
        "control": control(measured),
        "small_pages": ratio(measured, "small pages", "time") if program.small_pages else None,
        "within": verdict(time_ratio, target),
        "faults": counters["faults"],
        "events": sum(counters[f"events_{name}"] for name in ("fork", "remap", "remove", "unmap")),
        "groups": measured,
    }


def ratio(measured, way, what):
    """Of each group's mean of `way` over that of its plain runs: median and range."""
    return median(
        [np.mean([one[what] for one in g[way]]) / np.mean([one[what] for one in g["plain"]]) for g in measured]
    )


def control(measured):
    pairs = [[one["time"] for one in g["plain"]][:: 1 if number % 2 else -1] for number, g in enumerate(measured)]
    return median([first / last for first, last in pairs])


def median(ratios):
    """(median, and the range that holds that of 95 of 100 samples drawn anew)."""
    drawn = np.median(np.random.default_rng(1).choice(ratios, (4000, len(ratios))), axis=1)
    return (float(np.median(ratios)), *map(float, np.percentile(drawn, (2.5, 97.5))))


def verdict(ratio, target):
    if target is None:
        return ""
    _, low, high = ratio
    return "yes" if high <= target else "no" if low > target else "?"


def shown(ratio):
    return f"{ratio[0]:.3f} ({ratio[1]:.3f}-{ratio[2]:.3f})" if ratio else "-"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE.parents[1] / "build" / "bench-overhead.json")
    parser.add_argument("--groups", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, two groups")
    parser.add_argument("--more", action="store_true", help="add to the groups in the file")
    parser.add_argument("--option", action="append", default=[], help="for edm run, as --option=--sweep-ms=20")
    parser.add_argument("programs", nargs="*", help="some of the table's [all]")
    arguments = parser.parse_args()
    former = json.loads(arguments.json.read_text())["results"] if arguments.more and arguments.json.exists() else {}
    results = dict(former)
    with tempfile.TemporaryDirectory(prefix="edm-bench-") as name:
        every, timed = programs(Path(name)), build(Path(name), "timed")
        if unknown := set(arguments.programs) - set(every):
            sys.exit(f"no program {', '.join(sorted(unknown))}: there are {', '.join(every)}")
        print(
            f"{'program':20}{'plain':>7}{'time':>21}{'CPU':>21}{'control':>21}{'small pages':>21}{'target':>7}"
            f"{'within':>7}{'faults':>7}{'events':>7}"
        )
        for program_name, program in every.items():
            if arguments.programs and program_name not in arguments.programs:
                continue
            words = program.words(quick=arguments.quick)
            groups = 2 if arguments.quick else arguments.groups
            began = time.monotonic()
            measured, counters = measure(timed, program, words, groups, arguments.option)
            before = former.get(program_name, {"groups": [], "measuring_s": 0.0})
            result = row(program, before["groups"] + measured, counters)
            result["measuring_s"] = before["measuring_s"] + time.monotonic() - began
            results[program_name] = result
            print(
                f"{program_name:20}{result['plain_s']:5.2f} s{shown(result['time']):>21}{shown(result['cpu']):>21}"
                f"{shown(result['control']):>21}{shown(result['small_pages']):>21}{result['target'] or '':>7}"
                f"{result['within']:>7}{result['faults']:7}{result['events']:7}",
                flush=True,
            )
    document = {"when": datetime.now(UTC).isoformat(), "cpus": os.cpu_count(), "results": results}
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
