"""Sort 124 MB of text with `sort`, once as it is and once by `edm run` in a quarter of the memory, and compare.

What `make demo` runs. The input is real: the Python sources on this machine, a record of three kilobytes or so a line.
Needs 500 MB of disk in --dir, and what `edm run` needs (userfaultfd).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from edm.sizes import format_size, parse_size

RECORD_BYTES = 3000


def main() -> int:
    arguments = parse_arguments()
    directory = arguments.dir
    directory.mkdir(parents=True, exist_ok=True)
    source = directory / "input.txt"
    size = parse_size(arguments.size)
    if not source.exists() or source.stat().st_size < size:
        say(f"writing {format_size(size)} of records to {source}")
        write_records(source, size)

    say("sorting them without EDM")
    plain = run_plain(sort_command(source, directory / "plain.txt", size), directory)
    say(f"  {plain['seconds']:.1f} s, {format_size(plain['peak_bytes'])} of memory")

    say(f"sorting them with EDM, in {arguments.local_memory} of local memory")
    status, report = run_edm(sort_command(source, directory / "edm.txt", size), arguments)
    if status:
        say(f"edm run ended with status {status}")
        return status
    return compare(plain, report, directory)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="124M", help="bytes to sort")
    parser.add_argument("--local-memory", default="32M", help="what sort may keep here")
    parser.add_argument("--transport", default="mpi")
    parser.add_argument("--store", default="file")
    parser.add_argument("--dir", type=Path, default=Path(".demo"), help="where the files go")
    return parser.parse_args()


def write_records(path: Path, size: int) -> None:
    """Paragraphs of the Python sources of this machine, joined to records of a line each, over and over."""
    library = Path(sysconfig.get_path("stdlib"))
    made = [record for source in sorted(library.rglob("*.py")) for record in records(source.read_bytes())]
    turn, part = 0, path.with_suffix(".part")
    with part.open("wb") as out:
        while out.tell() < size:
            turn += 1
            out.writelines(b"%s\t%d\n" % (record, turn) for record in made[: size // RECORD_BYTES])
        out.truncate(size)
    part.rename(path)


def records(text: bytes) -> list[bytes]:
    """The paragraphs of a text, newlines made tabs, joined until they are long enough."""
    made, record = [], b""
    for paragraph in text.split(b"\n\n"):
        record += paragraph.replace(b"\n", b"\t").replace(b"\0", b" ")
        if len(record) >= RECORD_BYTES:
            made.append(record)
            record = b""
    return made


def sort_command(source: Path, target: Path, size: int) -> list[str]:
    # A buffer larger than the input, so that sort keeps all of it in memory; one thread, one order for all locales.
    return ["sort", "-S", f"{2 * size >> 20}M", "--parallel=1", "-o", str(target), str(source)]


def run_plain(command: list[str], directory: Path) -> dict[str, float]:
    began = time.monotonic()
    child = subprocess.Popen(command, env=environment(directory))
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"demo: {command[0]} ended with status {child.returncode}")
    return {"seconds": time.monotonic() - began, "peak_bytes": usage.ru_maxrss * 1024}


def run_edm(command: list[str], arguments: argparse.Namespace) -> tuple[int, dict]:
    report = arguments.dir / "report.json"
    report.unlink(missing_ok=True)
    edm = [sys.executable, "-m", "edm", "run", "--progress", "--summary", "--report", str(report)]
    edm += ["--local-memory", arguments.local_memory, "--transport", arguments.transport, "--store", arguments.store]
    status = subprocess.run([*edm, "--", *command], env=environment(arguments.dir), check=False).returncode
    return status, json.loads(report.read_text()) if report.exists() else {}


def environment(directory: Path) -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "TMPDIR": str(directory.absolute())}


def compare(plain: dict[str, float], report: dict, directory: Path) -> int:
    same = digest(directory / "plain.txt") == digest(directory / "edm.txt")
    counters = report["counters"]
    say("")
    peak, budget = format_size(report["peak_resident_bytes"]), format_size(report["local_memory_bytes"])
    say(f"output         {'the same, byte for byte' if same else 'DIFFERENT'}")
    say(f"memory here    {format_size(plain['peak_bytes'])} without EDM, {peak} of {budget} with")
    say(f"time           {plain['seconds']:.1f} s without EDM, {report['seconds']:.1f} s with")
    say(f"pages          {counters['evictions']:,} evicted, {counters['fetches']:,} fetched back")
    if same:
        for name in ("plain.txt", "edm.txt"):
            (directory / name).unlink()
    return 0 if same else 1


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(text: str) -> None:
    sys.stderr.write(f"demo: {text}\n" if text else "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    if shutil.which("sort") is None:
        raise SystemExit("demo: there is no sort on this machine: install coreutils")
    sys.exit(main())
