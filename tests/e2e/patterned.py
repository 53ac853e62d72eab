"""programs/patterned.c, run: memory of which every word is known."""

import subprocess
from pathlib import Path

import attrs
import numpy as np

MIB = 4
MAGIC = 0x5041545445524E31
BUDGET = ("--local-memory", "1M")


@attrs.frozen
class Patterned:
    """programs/patterned.c, running. edm: `edm run`, or the program itself. pid: the program's. place: of its own."""

    edm: subprocess.Popen
    pid: int
    place: int

    def end(self):
        """Have it check all of its memory; its standard output and error."""
        return self.edm.communicate(timeout=40)


def start(command, starter):
    process = starter(command)
    line = process.stdout.readline().split()
    assert line[0] == b"ready", line
    pid = int(line[2])
    return Patterned(process, pid, int(line[1], 16))


def start_captured(edm, program, *options, **keywords):
    """Start it under EDM, as a child of a shell."""
    command = ("run", *BUDGET, *options, "--", "sh", "-c", f"{program('patterned')} {MIB}; exit $?")
    return start(command, lambda words: edm.start(*words, stdin=subprocess.PIPE, **keywords))


def pattern(pages):
    with np.errstate(over="ignore"):
        return np.arange(1, pages * 512 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def states(pid):
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found.add((task / "stat").read_text().rpartition(") ")[2][0])
    return found
