"""What can be refused before anything is started: commands, directories, budgets."""

from __future__ import annotations

import os
import shutil
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edm.errors import EdmError, UsageError
from edm.sizes import format_size
from edm.types import PAGE_BYTES

if TYPE_CHECKING:
    from edm.config import Config
    from edm.launch.user import User
    from edm.registry import Registry

MIN_LOCAL_PAGES: Final = 64
"""The least local memory: an instruction may need a few pages at once, each thread's control pages never leave."""
MAX_SHEBANGS: Final = 4
_PT_INTERP: Final = 3
_ELF: Final = b"\x7fELF"


class CommandError(EdmError):
    """The program cannot be started; status is the exit status a shell would give (126 or 127)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def find_program(name: str) -> Path:
    """The file that `name` starts, as a shell finds it; raises `CommandError`."""
    found = shutil.which(name)
    if found:
        return Path(found)
    path = Path(name)
    if "/" not in name or not path.exists():
        raise CommandError(f"{name}: command not found", 127)
    if path.is_dir():
        raise CommandError(f"{name}: is a directory", 126)
    raise CommandError(f"{name}: permission denied (not executable)", 126)


def check_capturable(program: Path, user: User | None = None) -> None:
    """Raise `UsageError` for a program into which the dynamic linker will not load `libedm_app.so`.

    user: who will run it, if not we ourselves.
    """
    for _ in range(MAX_SHEBANGS):
        with program.open("rb") as file:
            head = file.read(4096)
        if not head.startswith(b"#!"):
            break
        words = head[2:].split(b"\n", 1)[0].split()
        interpreter = Path(os.fsdecode(words[0])) if words else None
        if interpreter is None or not interpreter.exists():
            return
        if interpreter.name == "env" and len(words) > 1:
            named = shutil.which(os.fsdecode(words[1]))
            interpreter = Path(named) if named else interpreter
        program = interpreter
    if head.startswith(_ELF) and not _has_interpreter(head):
        raise UsageError(
            f"{program} is statically linked: EDM reaches a program through the dynamic linker, "
            "so it cannot be captured (--uncaptured runs it all the same, with its memory all local)"
        )
    gains = _gains(program, os.geteuid() if user is None else user.uid, os.getegid() if user is None else user.gid)
    if gains:
        raise UsageError(
            f"{program} is {gains}: the dynamic linker ignores LD_PRELOAD for it, so it cannot be captured "
            "(--uncaptured runs it all the same, with its memory all local)"
        )


def _gains(program: Path, uid: int, gid: int) -> str:
    """What makes a user more than it is by running the program, "" if nothing. Source: ld.so(8), AT_SECURE."""
    status = program.stat()
    if status.st_mode & stat.S_ISUID and uid != status.st_uid:
        return "set-uid"
    if status.st_mode & stat.S_ISGID and status.st_mode & stat.S_IXGRP and gid != status.st_gid:
        return "set-gid"
    try:
        return "" if uid == 0 else "given capabilities" if os.getxattr(program, "security.capability") else ""
    except OSError:  # it has none
        return ""


def _has_interpreter(head: bytes) -> bool:
    """Whether a 64-bit ELF file names a dynamic linker. Source: elf(5), PT_INTERP."""
    if head[4] != 2:
        raise UsageError("a 32-bit program cannot be captured: EDM's library is 64-bit")
    order = "<" if head[5] == 1 else ">"
    offset, size, count = (
        struct.unpack_from(f"{order}Q", head, 32)[0],
        struct.unpack_from(f"{order}H", head, 54)[0],
        struct.unpack_from(f"{order}H", head, 56)[0],
    )
    starts = [offset + size * i for i in range(count)]
    return any(
        struct.unpack_from(f"{order}I", head, start)[0] == _PT_INTERP for start in starts if start + 4 <= len(head)
    )


def check_user(user: User, program: Path, config: Config) -> None:
    """Raise `CommandError` if that user may not run the program, `UsageError` if it cannot be captured then."""
    from edm.plugins.source_uffd.source import APP_LIBRARY  # noqa: PLC0415 (it loads the C core)

    if not user.may("-x", program):
        raise CommandError(f"{program}: permission denied for user '{user.name}'", 126)
    if config.fault_source == "uffd" and not user.may("-r", APP_LIBRARY):
        raise UsageError(f"--user {user.name}: that user cannot read {APP_LIBRARY}, which its programs must load")


def check_budget(config: Config) -> None:
    """Raise `UsageError` for a budget smaller than the machinery needs."""
    if config.local_memory is not None and config.local_memory < MIN_LOCAL_PAGES * PAGE_BYTES:
        raise UsageError(
            f"--local-memory {format_size(config.local_memory)} is too small: "
            f"EDM needs at least {format_size(MIN_LOCAL_PAGES * PAGE_BYTES)}"
        )


def check_directory(path: Path) -> None:
    """Raise `UsageError` if files cannot be made in `path`."""
    if not path.is_dir():
        raise UsageError(f"--path {path}: no such directory")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"--path {path}: permission denied (cannot create files there)")


def check_plugins(config: Config, registry: Registry) -> list[str]:
    """Have the chosen fault source, transport and policy say whether they can work here; returns warnings.

    Raises `UsageError`.
    """
    source = registry.fault_source(config.fault_source)
    warnings = source.check(config.plugin_options("fault_source", source.name, source)) or ()
    transport = registry.transport(config.transport)
    more = transport.check(config.plugin_options("transport", transport.name, transport)) or ()
    policy = registry.policy(config.policy)
    if policy.open is None:
        raise UsageError(f"policy {policy.name!r} is a model only: edm simulate plays it, edm run cannot evict by it")
    config.plugin_options("policy", policy.name, policy)
    return [*warnings, *more]
