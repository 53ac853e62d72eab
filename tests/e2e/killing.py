"""Deaths at fault points: which there are, how a run with one goes, and what is right afterwards."""

import os
import signal
import subprocess
import time
from pathlib import Path

import attrs

from edm.faultpoints import VARIABLE, points

POINTS = {point.name: point for point in points()}
ADOPTING = [name for name in POINTS if name.startswith("adopt_")]
SERVING = [name for name in POINTS if name.startswith(("pages_", "change_"))]
GIVING = [name for name in POINTS if name.startswith("give_")]
LIVING = [name for name in POINTS if name not in (*ADOPTING, *SERVING, *GIVING)]
TIMES = {
    "new_page": 200,
    "new_page_filled": 250,
    "swept": 2,
    "hello": 1,
    "admitted": 1,
    "answered_hello": 1,
    "captured": 1,
}
"""How often a point is passed first: the program is at work by then; 5 where nothing is said."""
OPS = 2500


VICTIMS = {"dm-handler": "edm: dm-handler", "dms": "edm: dms", "sidecar": "edm: sidecar", "app": "stamped"}
WAIT_S = 100.0
"""On a machine that does much else besides."""


@attrs.frozen
class Death:
    """What came of one: whether the point was reached, and the program's and EDM's last words.

    status: None when it hung; then the last words end with who waited where.
    """

    reached: bool
    status: int | None
    out: bytes
    err: str


def standing(edm):
    """Where each process of a run stands, a line each."""
    lines = []
    for pid in edm.pids(VICTIMS.values()):
        try:
            tasks = [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
            for task in tasks:
                where = Path(f"/proc/{pid}/task/{task}")
                name, rest = (where / "stat").read_text().rsplit(")", 1)
                lines.append(f"{name}) of {pid}: {rest.split()[0]} {(where / 'wchan').read_text()}")
        except OSError:
            lines.append(f"{pid} has gone")
    return "\n".join(lines)


def victims_of(edm, names, wait_s=5.0):
    """Pids of EDM's processes and programs by name, once one of `names` is there."""
    end = time.monotonic() + wait_s
    while time.monotonic() < end:
        pids = edm.pids(names)
        if pids:
            return pids
        time.sleep(0.01)
    return []


def acted(flag, process):
    """Wait until a process has acted at its point; whether one has."""
    end = time.monotonic() + WAIT_S
    while flag.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    return not flag.exists()


def strike(edm, victim):
    """Kill every process of a run that is called so."""
    for pid in victims_of(edm, (VICTIMS[victim],)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def run_with_death(
    edm,
    program,
    point,
    *,
    role="dm-handler",
    victim=None,
    transport="inproc",
    times=None,
    action="kill",
    arguments=(OPS,),
    after_takeover=False,
    for_s=0.0,
):
    """Run the stamped program with one action at `point` of `role`, or with a death of `victim` while that holds still.

    victim: one of VICTIMS, or several, one after the other: "app, dm-handler". For a point of taking over, or
    `after_takeover`, a DM-Handler is killed at work before, so that it is another one that comes to the point.
    for_s: so long it goes on holding still after the death.
    """
    flag = edm.directory / "point"
    takeover = after_takeover or point in ADOPTING
    times = TIMES.get(point, 0 if takeover else 5) if times is None else times
    line = f"{role} {point} {'hold' if victim else action} {times}\n"
    flag.write_text("dm-handler batch_committed kill 5\n" if takeover else line)
    edm.environment[VARIABLE] = str(flag)
    options = ("--transport", transport, "--store", "file", "--local-memory", "1M", "--write-back", "256K")
    process = edm.start("run", *options, "--", program, *arguments)
    if takeover:
        assert acted(flag, process)
        flag.write_text(line)  # before the next one has started
    reached = bool(victim) and acted(flag, process)
    if reached:
        for one in victim.split(", "):
            strike(edm, one)
        time.sleep(for_s)
        flag.write_text("")
    try:
        out, err = process.communicate(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        where = standing(edm)
        edm.end(process)
        out, err = process.communicate()
        return Death(reached or not flag.exists(), None, out, err.decode(errors="replace") + where)
    return Death(reached or not flag.exists(), process.returncode, out, err.decode(errors="replace"))


__all__ = ["ADOPTING", "GIVING", "LIVING", "POINTS", "SERVING", "Death", "run_with_death"]
