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


def app_environment(environment: dict[str, str], socket: Path) -> dict[str, str]:
    """`environment` for a program whose faults come to the DM-Handler that listens on `socket`."""
    preload = environment.get("LD_PRELOAD", "")
    return {
        **environment,
        "LD_PRELOAD": f"{APP_LIBRARY}:{preload}" if preload else str(APP_LIBRARY),
        SOCKET_VARIABLE: str(socket),
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
