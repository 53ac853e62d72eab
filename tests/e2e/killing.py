"""Deaths at fault points: which there are, how a run with one goes, and what is right afterwards."""

import os
import signal
import time

import attrs

from edm.faultpoints import SERVER_POINTS, VARIABLE, native_points

ADOPTING = [name for name in native_points() if name.startswith("adopt_")]
LIVING = [name for name in native_points() if not name.startswith("adopt_")]
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


@attrs.frozen
class Death:
    """What came of one: whether the point was reached, and the program's and EDM's last words."""

    reached: bool
    status: int
    out: bytes
    err: str


def victims_of(edm, names, wait_s=5.0):
    """Pids of EDM's processes and programs by name, once one of `names` is there."""
    end = time.monotonic() + wait_s
    while time.monotonic() < end:
        pids = edm.pids(names)
        if pids:
            return pids
        time.sleep(0.01)
    return []


def run_with_death(
    edm, program, point, *, role="dm-handler", victim=None, transport="inproc", times=None, first_death=False
):
    """Run the stamped program with one death at `point` of `role`: its own, or another's while it holds still there.

    first_death: the DM-Handler is killed before, so that the point of another one's start is reached.
    """
    flag = edm.directory / "point"
    times = TIMES.get(point, 5) if times is None else times
    flag.write_text(f"{role} {point} {'hold' if victim else 'kill'} {times}\n")
    edm.environment[VARIABLE] = str(flag)
    arguments = ["run", "--transport", transport, "--local-memory", "1M", "--write-back", "256K"]
    process = edm.start(*arguments, "--", program, OPS)
    if first_death:
        victims_of(edm, ("edm: sidecar",), 40.0)
        for pid in victims_of(edm, ("edm: dm-handler",)):
            os.kill(pid, signal.SIGKILL)
    reached = False
    if victim:
        while flag.exists() and process.poll() is None:
            time.sleep(0.002)
        reached = not flag.exists()
        if reached:
            for pid in victims_of(edm, victim):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            flag.write_text("")
    out, err = process.communicate(timeout=60)
    return Death(reached if victim else not flag.exists(), process.returncode, out, err.decode(errors="replace"))


__all__ = ["ADOPTING", "LIVING", "SERVER_POINTS", "Death", "run_with_death"]
