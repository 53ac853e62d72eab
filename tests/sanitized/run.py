"""`python tests/sanitized/run.py address|thread PYTEST_ARGUMENTS`: tests with a sanitized DM-Handler and memory server.

Ends with an error where a test fails, where the sanitizer has anything to say, or where no process ran with it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from edm._native import lib

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # What Python itself leaks at its end is not ours.
    "address": "ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=66:log_path={reports}/report",
    "thread": "TSAN_OPTIONS=exitcode=66:die_after_fork=0:suppressions={here}/thread.txt:log_path={reports}/report",
}


def main(kind, arguments):
    """Run pytest so; its exit status, or 1."""
    if result := lib.edm_uffd_check():
        print(f"userfaultfd is not permitted here: {os.strerror(-result)}")
        return 0
    compiler = os.environ.get("CC", "cc")
    found = subprocess.run(
        [compiler, f"-print-file-name={LIBRARIES[kind]}"], capture_output=True, text=True, check=True
    )
    library = Path(found.stdout.strip()).resolve()
    if not library.is_absolute() or not library.exists():
        print(f"{compiler} has no {LIBRARIES[kind]}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="edm-sanitized-") as reports:
        name, value = OPTIONS[kind].format(reports=reports, here=HERE).split("=", 1)
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE / "site"),
            "EDM_TEST_SANITIZER": str(library),
            "EDM_TEST_EXTENSION": str(ROOT / "build" / f"extension-{kind}" / "_native.abi3.so"),
            "EDM_TEST_REPORTS": reports,
            name: value,
        }
        status = subprocess.run([sys.executable, "-m", "pytest", *arguments], env=environment, check=False).returncode
        said = sorted(Path(reports).glob("report.*"))
        for report in said:
            print(report.read_text(errors="replace"), file=sys.stderr)
        ran = len(list(Path(reports).glob("ran.*")))
    print(f"{ran} processes ran with the {kind} sanitizer, which had {len(said)} things to say")
    return status or int(bool(said) or not ran)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
