"""The systemd unit in examples/."""

import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "examples" / "edm-dms.service"


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
