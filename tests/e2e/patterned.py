"""programs/patterned.c, run: memory of which every word is known."""

import json
import mmap
import subprocess
from pathlib import Path

import attrs
import numpy as np
from elftools.elf.elffile import ELFFile
from watching import anonymous_bytes, wait_for

MIB, CLOSED_PAGES, UNTOUCHED_PAGES = 4, 64, 1 << 14
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
        return self.edm.communicate(timeout=90)


def start(command, starter):
    process = starter(command)
    line = process.stdout.readline().split()
    assert line[0] == b"ready", line
    pid = int(line[2])
    return Patterned(process, pid, int(line[1], 16))


def start_captured(edm, program, *options, **keywords):
    """Start it under EDM, as a child of a shell."""
    command = ("run", *BUDGET, *options, "--", "sh", "-c", f"{program('patterned')} {MIB}; exit $?")
    running = start(command, lambda words: edm.start(*words, stdin=subprocess.PIPE, **keywords))
    # What was written before it was captured is above the budget, and leaves now.
    wait_for(lambda: anonymous_bytes(running.pid) <= MIB << 19)
    return running


def pattern(pages):
    with np.errstate(over="ignore"):
        return np.arange(1, pages * 512 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def states(pid):
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found.add((task / "stat").read_text().rpartition(") ")[2][0])
    return found


class Core:
    """Memory as a core file has it."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            elf = ELFFile(file)
            segments = list(elf.iter_segments())
            self.notes = [note for s in segments if s["p_type"] == "PT_NOTE" for note in s.iter_notes()]
            self._loads = [(s["p_vaddr"], s["p_filesz"], s["p_offset"]) for s in segments if s["p_type"] == "PT_LOAD"]

    def words(self, address, count):
        """Words that may lie in several mappings, one behind the other here as there."""
        at, (first, _, place) = address, next(load for load in self._loads if 0 <= address - load[0] < load[1])
        while at < address + 8 * count:
            start_, size, offset = next(load for load in self._loads if 0 <= at - load[0] < load[1])
            assert offset - start_ == place - first
            at = start_ + size
        return np.frombuffer(self._map, np.uint64, count, place + address - first)


class Raw(Core):
    """The same of a raw dump."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        index = json.loads(Path(f"{path}.json").read_text())
        self._loads = [(entry["address"], entry["bytes"], entry["offset"]) for entry in index]


def check_contents(core, place):
    magic, pages, first, closed, untouched = core.words(place, 5).tolist()
    assert (magic, pages) == (MAGIC, MIB << 8)
    # Two threads write what is there already: a page is caught in the middle of that at most.
    assert (core.words(first, pages * 512) == pattern(pages)).all()
    assert (core.words(closed, CLOSED_PAGES * 512) == pattern(CLOSED_PAGES)).all()
    empty = core.words(untouched, UNTOUCHED_PAGES * 512)[:: 1 << 9]
    assert np.flatnonzero(empty).tolist() == [0, 1 << 13]
