"""The systemd unit in examples/, under a systemd that is the first process of namespaces of its own."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edm.dms.status import ask_status
from edm.plugins.transport_zmq.keys import new_keys

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
UNIT = CHECKOUT / "examples" / "edm-dms.service"
SHORT = ("-o", "transport.zmq.heartbeat_s=0.5", "-o", "transport.zmq.silence_s=1.5", "-o", "transport.zmq.resend_s=0.5")
SOON_S = 60


def test_systemd_has_nothing_to_say_about_the_unit(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze (Debian: systemd)")
    # It looks for the program too: another stands for it here.
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/edm/bin/edm ", "/bin/true "))
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", unit],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    # What it would say of a mistake is what makes the line above mean something.
    unit.write_text(unit.read_text().replace("Type=notify", "Type=notice"))
    wrong = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", unit],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "notice" in wrong.stderr


def wait_until(done, what):
    end = time.monotonic() + SOON_S
    while not (found := done()):
        assert time.monotonic() < end, what()
        time.sleep(0.05)
    return found


class Box:
    """A running systemd with the unit, EDM and keys; its commands are called inside."""

    def __init__(self, directory):
        self.log = directory / "box.log"
        scratch = directory / "box"
        scratch.mkdir()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["sh", HERE / "systemd_box.sh", CHECKOUT, sys.base_prefix, UNIT, scratch],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_until(lambda: self.process.poll() is not None or self._init(), self.log.read_text)

    def __call__(self, *command):
        """Run a command of the box's; its output."""
        done = subprocess.run(
            [*self.entry("-a"), "env", "-C", "/", *command], cwd="/", capture_output=True, text=True, timeout=SOON_S
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.journal()}"
        return done.stdout.strip()

    def entry(self, *namespaces):
        """What a command begins with that is to run in these namespaces of the box."""
        return ("nsenter", "-t", str(self.pid), *namespaces)

    def show(self, *properties):
        """Properties of the service, in this order."""
        lines = self("systemctl", "show", "-p", ",".join(properties), "edm-dms").splitlines()
        found = dict(line.split("=", 1) for line in lines)
        return [found[name] for name in properties]

    def file(self, name):
        """A file of the box's, as seen from outside."""
        return Path(f"/proc/{self.pid}/root/{name}")

    def journal(self):
        """What the service and systemd have said, for a message."""
        words = ["env", "-C", "/", "journalctl", "--no-pager", "-n", "30"]
        return subprocess.run([*self.entry("-a"), *words], cwd="/", capture_output=True, text=True).stdout

    def close(self):
        groups = list(Path("/sys/fs/cgroup").glob(f"**/edm-box-{self.process.pid}"))
        if self.process.poll() is None:
            # unshare ends its child with itself, and with the first process of the namespace all others end.
            self.process.kill()
        self.process.wait()
        for group in groups:
            wait_until(lambda group=group: "populated 0" in (group / "cgroup.events").read_text(), lambda: "alive")
            for path in sorted(group.rglob("*/"), reverse=True):
                path.rmdir()
            group.rmdir()

    def _init(self):
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        if not children or "systemd" not in Path(f"/proc/{children[0]}/comm").read_text():
            return False
        self.pid = int(children[0])
        state = [*self.entry("-a"), "env", "-C", "/", "systemctl", "is-system-running"]
        return subprocess.run(state, cwd="/", capture_output=True, text=True).stdout.strip() in {"running", "degraded"}


@pytest.fixture
def box(tmp_path):
    if os.geteuid() != 0 or not Path("/lib/systemd/systemd").exists():
        pytest.skip("needs root and systemd (Debian: systemd)")
    made = Box(tmp_path)
    if made.process.poll() is not None:
        pytest.skip(f"systemd cannot be the first process of a namespace here: {made.log.read_text().strip()}")
    yield made
    made.close()


@pytest.mark.uffd
def test_the_service_serves_a_program_reloads_is_restarted_and_stops(box, working, tmp_path):
    keys = box.file("etc/edm")
    keys.mkdir(mode=0o755)
    _, server_key = new_keys(keys, "server")
    mine, public = new_keys(tmp_path / "mine", "a client")
    (keys / "clients").write_text(public.read_text())
    box("systemctl", "start", "edm-dms")
    # Type=notify: the start was over when the server had said that it is ready.
    assert box.show("ActiveState", "SubState", "StatusText") == ["active", "running", "serving at tcp://0.0.0.0:7070"]
    assert box("ps", "-o", "user=", "-p", box.show("MainPID")[0]) == "edm-dms"
    data = box.file("var/lib/private/edm")
    run = working(
        "--dms", "tcp://127.0.0.1:7070", *SHORT, "-o", f"transport.zmq.key={mine}",
        "-o", f"transport.zmq.server_key={server_key}", "--local-memory", "4M", wrapper=box.entry("-n"),
    )  # fmt: skip
    run.at_work()
    wait_until(lambda: ask_status(data)["store"]["server"]["stored"] > 300, box.journal)
    (data / "dms.toml").write_text('quota = "1G"\n')
    box("systemctl", "reload", "edm-dms")
    wait_until(lambda: ask_status(data)["quota_pages"] == 2**30 // 4096, box.journal)
    box("systemctl", "kill", "-s", "KILL", "edm-dms")
    wait_until(lambda: box.show("NRestarts", "ActiveState") == ["1", "active"], box.journal)
    out, err = run.finish()
    assert (run.process.returncode, out, err) == (0, run.alone(), b""), box.journal()
    box("systemctl", "stop", "edm-dms")
    assert box.show("ActiveState", "Result", "ExecMainStatus") == ["inactive", "success", "0"]
