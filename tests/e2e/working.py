"""programs/working_set.c under EDM, at work for as long as a test wants: never over before something was done to it."""

import subprocess
from pathlib import Path

import attrs
from watching import wait_for

WAIT_S = 90.0
"""On a machine that stands still now and then."""

CAPTURED = """
def wait_until_captured(least):
    # One that is over before EDM has looked at it is not evicted: a machine may stand still just then.
    import time
    def captured():
        size = 0
        with open("/proc/self/smaps") as file:
            for line in file:
                if line.startswith("Size:"):
                    size = int(line.split()[1]) << 10
                elif line.startswith("VmFlags:") and size >= least and "um" in line.split():
                    return True
    while not captured():
        time.sleep(0.001)
"""
"""For programs in Python: waits until a mapping of so many bytes is registered. As programs/captured.h."""


@attrs.frozen
class Working:
    """process: `edm run`. command: the program as it runs alone. sign: what it makes when it is at work."""

    process: subprocess.Popen
    command: tuple
    sign: Path

    def at_work(self):
        """Wait until it has filled its memory and is working on it; its pid."""

        def said():
            words = self.sign.read_text() if self.sign.exists() else ""
            assert words.endswith("\n") or self.process.poll() is None, self.process.communicate()
            return words if words.endswith("\n") else ""

        return int(wait_for(said, WAIT_S).split()[0])

    def finish(self):
        """Let it come to its end, once it is at work; what `edm run` has given on its standard output and error."""
        self.at_work()
        self.sign.unlink()
        return self.process.communicate(timeout=WAIT_S)

    def alone(self):
        """What it gives without EDM."""
        return subprocess.run([*map(str, self.command)], capture_output=True, check=True, timeout=60).stdout
