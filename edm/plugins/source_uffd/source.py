"""Real programs' faults: the engine, and what a program must be started with so that its faults come here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from edm._native import lib
from edm.engine import Engine
from edm.errors import NativeError

if TYPE_CHECKING:
    from edm.config.settings import HandlerSettings
    from edm.plugins.source_uffd import UffdOptions
    from edm.types import RunContext

APP_LIBRARY: Final = Path(__file__).resolve().parents[2] / "libedm_app.so"
SOCKET_NAME: Final = "capture.sock"
SOCKET_VARIABLE: Final = "EDM_INTERNAL_SOCK"
MALLOC: Final = (
    "glibc.malloc.top_pad=67108864:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=83886080"
)
"""glibc's heap grows in steps of 64 MiB: beside a registered mapping each growth is a mapping of its own, and small
steps would shatter the heap into hundreds (measured: sqlite3 58 mappings instead of 650).

Where any of these is set glibc no longer learns which blocks a program frees and allocates again, and would map and
unmap each block of more than 128 KiB: so it is told what it would have learnt at most. It gives back what is free at
the top beyond 80 MiB, and not the top_pad again with every block. Source: mallopt(3), M_MMAP_THRESHOLD."""


def app_environment(environment: dict[str, str], socket: Path) -> dict[str, str]:
    """`environment` for a program whose faults come to the DM-Handler that listens on `socket`."""
    preload = environment.get("LD_PRELOAD", "")
    tunables = environment.get("GLIBC_TUNABLES", "")
    return {
        **environment,
        "LD_PRELOAD": f"{APP_LIBRARY}:{preload}" if preload else str(APP_LIBRARY),
        SOCKET_VARIABLE: str(socket),
        "GLIBC_TUNABLES": tunables
        if "glibc.malloc.top_pad" in tunables
        else ":".join(filter(None, (tunables, MALLOC))),
    }


class UffdSource(Engine):
    """The fault engine over userfaultfd."""

    def __init__(self, options: UffdOptions, settings: HandlerSettings, context: RunContext) -> None:
        super().__init__(settings, context.inheritance, user_mode=options.user_mode)
        self._socket = context.run_dir / SOCKET_NAME

    def prepare(self, environment: dict[str, str]) -> dict[str, str]:
        """The environment of a captured program."""
        return app_environment(environment, self._socket)

    def admit_below(self, pid: int) -> None:
        """Take programs of other users too, if they descend from process `pid`; before `start`."""
        lib.edm_engine_admit_below(self.native, pid)

    def start(self, instance: int) -> None:
        """Accept programs on the run directory's socket; raises `NativeError`."""
        result = lib.edm_engine_listen(self.native, str(self._socket).encode(), instance)
        if result:
            raise NativeError(-result, f"listening on {self._socket}")
