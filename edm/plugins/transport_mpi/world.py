"""The MPI job this process is a rank of: who is a memory server, who a DM-Handler."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edm.errors import MissingExtra, UsageError
from edm.plugins.transport_mpi.launch import join_job
from edm.plugins.transport_mpi.library import find_library

if TYPE_CHECKING:
    from edm.types import RunContext

_DEAD: Final = ("Z", "X")
"""States of a process that runs no more. Source: proc_pid_stat(5)."""
_BY_HAND: Final = "mpiexec -n 1 edm dms --transport mpi … : -n 1 edm run --transport mpi … -- PROGRAM"


def load_mpi() -> Any:
    """The module `mpi4py.MPI`, with MPI not yet initialised by it; raises `MissingExtra` without mpi4py or MPI."""
    try:
        import mpi4py  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("the transport 'mpi' needs mpi4py: pip install 'edm[mpich]'") from error
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI  # noqa: PLC0415
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise MissingExtra(f"mpi4py finds no MPI library ({reason}): pip install 'edm[mpich]'") from error
    return MPI


class World:
    """This rank's view of the job. Made once in a process.

    comm: EDM's own communicator. library: MPI's functions, for messages over it from C. servers, handlers: ranks of
    each role, in order. kept: buffers that the library may still read.
    """

    def __init__(self, context: RunContext) -> None:
        self.mpi = load_mpi()
        join_job()
        if self.mpi.Query_thread() < self.mpi.THREAD_MULTIPLE:
            raise UsageError("this MPI library has no THREAD_MULTIPLE, which the transport 'mpi' needs")
        self.mpi.COMM_WORLD.Set_errhandler(self.mpi.ERRORS_RETURN)
        try:
            self._check_size()
        except UsageError:
            self.mpi.Finalize()
            raise
        self.comm = self.mpi.COMM_WORLD.Dup()
        self.rank = self.comm.Get_rank()
        self.kept: list[Any] = []
        self.members = self.comm.allgather((context.role, socket.gethostname(), os.getpid()))
        self.servers = self._ranks("dms")
        self.handlers = self._ranks("dm-handler")
        try:
            self._check_roles()
            self.library = find_library(self.mpi, self.comm)
        except UsageError:
            # Every rank finds the same: one that left without this would have the launcher kill the others, unheard.
            self.finalize()
            raise

    def alive(self, rank: int) -> bool:
        """Whether a rank's process is there, as far as it can be seen from this machine."""
        _, host, pid = self.members[rank]
        if host != socket.gethostname():
            return True
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        # The launcher may leave a process that was killed unburied for as long as the job runs.
        return state not in _DEAD

    def finalize(self) -> None:
        """Leave the job; waits for the other ranks. For the thread that made the world."""
        if not self.mpi.Is_finalized():
            self.comm.Free()
            self.mpi.Finalize()

    def _ranks(self, role: str) -> list[int]:
        return [rank for rank, (named, _, _) in enumerate(self.members) if named == role]

    def _check_size(self) -> None:
        if self.mpi.COMM_WORLD.Get_size() > 1:
            return
        vendor, version = self.mpi.get_vendor()
        name = f"{vendor} {'.'.join(map(str, version))}"
        raise UsageError(
            f"the transport 'mpi' needs a DMS and a DM-Handler in one MPI job, and this one has a single process: "
            f"start it as {_BY_HAND}, with the mpiexec of {name}, which mpi4py uses"
        )

    def _check_roles(self) -> None:
        if not self.servers or not self.handlers:
            missing = "memory server (edm dms)" if not self.servers else "DM-Handler (edm run)"
            raise UsageError(f"this MPI job of {len(self.members)} processes has no {missing}: start it as {_BY_HAND}")
