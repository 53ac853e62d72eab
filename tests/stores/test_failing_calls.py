"""Each system call of a store that can fail fails, wherever it is made: in Python, in py-lmdb, in EDM's own C code.

tests/stores/failing_calls.c stands before libc; tests/stores/failing_run.py says what must hold. Every N is tried by
the long form; the short one takes steps.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHORT = [
    ("file", "write", "ENOSPC", "lasting", "batch", 7),
    ("file", "truncate", "EIO", "once", "always", 1),
    ("file", "dirsync", "EIO", "lasting", "batch", 1),
    ("file", "unlink", "EACCES", "lasting", "batch", 1),
    ("file", "punch", "EIO", "once", "batch", 2),
    ("file", "rename", "ENOSPC", "lasting", "always", 1),
    ("file-packed", "write", "short", "once", "batch", 9),
    ("lmdb", "write", "ENOSPC", "lasting", "batch", 13),
    ("lmdb", "write", "short", "once", "always", 29),
    ("lmdb", "sync", "EIO", "once", "batch", 3),
    ("file", "read", "EIO", "lasting", "batch", 5),
    ("file", "read", "short", "once", "batch", 11),
    ("lmdb", "read", "EIO", "once", "batch", 2),
    ("lmdb", "unlink", "EIO", "lasting", "batch", 1),
]
ERRORS = {
    "write": ["EIO", "ENOSPC", "short"],
    "sync": ["EIO", "ENOSPC"],
    "dirsync": ["EIO", "ENOSPC"],
    "open": ["EIO", "ENOSPC"],
    "truncate": ["EIO", "ENOSPC"],
    "punch": ["EIO", "ENOSPC"],
    "rename": ["EIO", "ENOSPC"],
    "unlink": ["EIO", "EACCES"],
    "read": ["EIO", "short"],
}
NEVER_CALLED = {
    "punch": {"lmdb", "lmdb-packed", "file-lmdb", "file-memory", "lmdb-memory", "memory-lmdb"},
    "truncate": {"lmdb", "lmdb-packed", "lmdb-memory", "memory-lmdb"},
    "rename": {"memory-file"},
    "read": {"file-memory"},
}
MIXED = ["lmdb-file", "file-lmdb", "file-memory", "lmdb-memory", "memory-file", "memory-lmdb"]
LONG = [
    pytest.param(store, kind, error, lasting, sync, 1, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])
    for store in ["file", "file-direct", "file-packed", "lmdb", "lmdb-packed", *MIXED]
    for kind in ERRORS
    for error in ERRORS[kind]
    for lasting in ["once", "lasting"]
    for sync in ["batch", "always"]
    if store not in NEVER_CALLED.get(kind, ())
]


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    target = tmp_path_factory.mktemp("shim") / "failing_calls.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", target, HERE / "failing_calls.c", "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return target


@pytest.mark.parametrize(("store", "kind", "error", "lasting", "sync", "step"), [*SHORT, *LONG])
def test_every_nth_call_failing(shim, in_memory, store, kind, error, lasting, sync, step):
    ran = subprocess.run(
        [sys.executable, HERE / "failing_run.py", store, kind, error, lasting, sync, str(step), in_memory],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    tried, refused = map(int, ran.stdout.split())
    print(f"{store} {kind} {error} {lasting} {sync}: {tried} calls, {refused} refused")
    assert tried
    # Holes and removed files are for later: nobody waits for them. Else it is told, unless it ends well, as a short
    # write of EDM's own does by going on, and one from C that Python tries again.
    made_good = store in {"file-memory", "memory-file"} or (error == "short" and store != "lmdb")
    if kind in {"write", "sync", "rename"} and not made_good:
        assert refused
