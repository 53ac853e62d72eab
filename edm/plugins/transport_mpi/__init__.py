"""The transport `mpi` (the default): DM-Handlers and memory servers are ranks of one MPI job.

Place on the path: carries [5] and [11]. mpi4py is imported when the transport opens, never before: it initialises MPI,
which the launcher and the app must not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from edm import hookimpl
from edm.hookspecs import TransportSpec
from edm.plugins.transport_mpi.launch import check, end_job, join_job, plan, strip_mpi_environment, under_mpi
from edm.privileges import Capability

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edm.interfaces import Transport
    from edm.types import RunContext

__all__ = ["MpiOptions", "end_job", "join_job", "open_transport", "strip_mpi_environment", "under_mpi"]


def _option(default: Any, text: str) -> Any:
    return attrs.field(default=default, metadata={"help": text})


@attrs.frozen(kw_only=True)
class MpiOptions:
    """How long to poll before sleeping, and which mpiexec starts the job."""

    spin_us: float = _option(500.0, "poll this long after the last message, or for a reply, before sleeping")
    sleep_us: float = _option(50.0, "the first sleeps between polls last this long")
    sleep_max_us: float = _option(1500.0, "sleeps grow to this while nothing happens")
    mpiexec: str = _option("", "the mpiexec of a one-command run (default: the one of mpi4py's MPI)")


def open_transport(options: MpiOptions, context: RunContext, server: Any = None) -> Transport:  # noqa: ARG001
    """Initialise MPI and agree with all ranks on who is what; raises `UsageError` where that cannot work."""
    from edm.plugins.transport_mpi.transport import MpiTransport  # noqa: PLC0415

    return MpiTransport(options, context)


@hookimpl
def edm_transports() -> Iterable[TransportSpec]:
    """Offer `mpi`."""
    yield TransportSpec(
        name="mpi",
        summary="ranks of one MPI job (mpi4py; MPICH, Open MPI or another)",
        options=MpiOptions,
        open=open_transport,
        plan=plan,
        check=check,
        # Ranks on one machine read each other's memory; network cards are given memory that may not be swapped.
        capabilities=(Capability.SYS_PTRACE, Capability.IPC_LOCK),
    )
