"""programs/working_set.c under EDM, at work for as long as a test wants: never over before something was done to it."""

import subprocess
from pathlib import Path

import attrs
from watching import anonymous_bytes, wait_for

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
        return self._progress()[0]

    def evicted(self, passes=2):
        """Wait until it has had no room for a quarter of its memory at least, and has then worked on; its pid."""
        pid, _ = self._progress()
        most = int(self.command[1]) * (3 << 18)
        wait_for(lambda: anonymous_bytes(pid) < most, WAIT_S)
        _, done = self._progress()
        wait_for(lambda: self._progress()[1] >= done + passes, WAIT_S)
        return pid

    def _progress(self):
        """Its pid, and how many passes it has done more than it was to."""

        def said():
            words = self.sign.read_text().split() if self.sign.exists() else []
            assert len(words) == 2 or self.process.poll() is None, self.process.communicate()
            return words if len(words) == 2 else None

        pid, done = map(int, wait_for(said, WAIT_S))
        return pid, done

    def let_end(self):
        """Let it come to its end, once it is at work."""
        self.at_work()
        self.sign.unlink()

    def finish(self):
        """Let it come to its end, and wait for that; what `edm run` gave on its standard output and error."""
        self.let_end()
        return self.process.communicate(timeout=WAIT_S)

    def alone(self):
        """What it gives without EDM."""
        return subprocess.run([*map(str, self.command)], capture_output=True, check=True, timeout=60).stdout
