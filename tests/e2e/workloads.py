"""Real programs that say what they computed, and how much they need: the table that the end-to-end tests run over."""

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs

PROGRAMS = Path(__file__).parent / "programs"


@attrs.frozen
class Built:
    """A workload made ready: its command, and the files whose contents are a result besides standard output."""

    command: list[str]
    results: tuple[Path, ...] = ()


@attrs.frozen
class Workload:
    """build(directory, compile_, size) makes it ready; size: one of `sizes` (evicted, coverage).

    same_output: its output does not depend on time or chance; if not, it verifies itself and its exit status tells.
    same_need: nor does how much memory it takes. beside_bytes: what it writes to its private mappings of files, which
    are not captured.
    """

    name: str
    build: Callable
    sizes: tuple[int, int]
    needs: tuple[str, ...] = ()
    same_output: bool = True
    same_need: bool = True
    beside_bytes: int = 0
    transport: str = "inproc"
    store: str = "memory"
    slow_to_cover: bool = False

    @property
    def missing(self):
        """The reason to skip, "" if there is none."""
        absent = [name for name in self.needs if shutil.which(name) is None]
        return f"not installed here: {', '.join(absent)} (make programs)" if absent else ""


def _script(interpreter, name):
    return lambda directory, compile_, size: Built([interpreter, str(PROGRAMS / name), str(size)])


def _compiled(name, *before):
    return lambda directory, compile_, size: Built([str(compile_(name)), *before, str(size)])


def _sort(directory, compile_, size):
    text = directory / f"{size}.txt"
    if not text.exists():
        numbers = random.Random(1)
        text.write_text("".join(f"{numbers.getrandbits(96):x} {i}\n" for i in range(size * 1000)))
    return Built(["sort", "-S", "400M", str(text)])


def _sqlite(directory, compile_, size):
    sql = f"""pragma cache_size = 100000; create table t(a, b);
with recursive c(x) as (select 1 union all select x + 1 from c where x < {size * 1000})
insert into t select x, hex(x * 7919) from c;
create index i on t(b); update t set b = b || 'x' where a % 5 = 0; delete from t where a % 7 = 0;
select count(*), sum(a), max(b) from t where b like '3%'; select b from t order by b desc limit 5;
pragma integrity_check;"""
    return Built(["sqlite3", ":memory:", sql])


def _gcc(directory, compile_, size):
    source, result = directory / f"large{size}.c", directory / f"large{size}.o"
    if not source.exists():
        with source.open("w") as file:
            subprocess.run([sys.executable, PROGRAMS / "large_source.py", str(size)], stdout=file, check=True)
    return Built(["gcc", "-O1", "-c", "-o", str(result), str(source)], (result,))


def _java(directory, compile_, size):
    if not (directory / "Objects.class").exists():
        subprocess.run(["javac", "-d", directory, PROGRAMS / "Objects.java"], check=True, capture_output=True)
    # The serial collector: how much the others take depends on the time, and so on the machine.
    return Built(
        [
            "java",
            "-Xmx2g" if size > 1000 else "-Xmx512m",
            "-XX:+UseSerialGC",
            "-cp",
            str(directory),
            "Objects",
            str(size),
        ]
    )


def _stress(directory, compile_, size):
    arguments = [
        "--vm",
        "2",
        "--vm-bytes",
        f"{size}M",
        "--vm-method",
        "all",
        "--verify",
        "--vm-ops",
        str(200 * size),
        "--oomable",
    ]
    return Built(["stress-ng", *arguments, "--temp-path", str(directory), "--timeout", "60"])


def _malloc(directory, compile_, size):
    """With much memory many times as many operations: so it stays near its most for as long as one takes to look."""
    return Built([str(compile_("malloc_stress")), "4", str(size), "3000" if size < 50 else "40000"])


def _plain_python():
    """A Python of the machine's own: a virtual environment's is a link to it."""
    return shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable


WORKLOADS = [
    Workload("python", _script(_plain_python(), "lists.py"), (25, 400)),
    Workload("numpy", _script(sys.executable, "arrays.py"), (6, 24)),
    Workload("sort", _sort, (80, 1000), store="file", transport="mpi"),
    Workload("sqlite3", _sqlite, (60, 500), needs=("sqlite3",), store="file"),
    Workload("gcc", _gcc, (100, 500), needs=("gcc",)),
    Workload("malloc", _malloc, (24, 96)),
    Workload("threads", _compiled("thread_storm", "1200"), (12, 96)),
    Workload("node", _script("node", "objects.js"), (40, 250), needs=("node",)),
    # The 10 MiB are of its class archive: with a small heap that is much.
    Workload(
        "java",
        _java,
        (30, 4000),
        needs=("java", "javac"),
        same_need=False,
        beside_bytes=10 << 20,
        slow_to_cover=True,
    ),
    Workload("stress-ng", _stress, (12, 96), needs=("stress-ng",), same_output=False),
]
