"""Starting an MPI job, and knowing about being in one, without importing MPI."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edm.errors import MissingExtra, UsageError
from edm.types import LaunchPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edm.plugins.transport_mpi import MpiOptions

_PREFIXES: Final = (
    "PMI_",
    "PMIX",
    "OMPI_",
    "PRTE_",
    "OPAL_",
    "OPA_",
    "ORTE_",
    "HYDRA_",
    "HYDI_",
    "MPI_",
    "MPIR_",
    "MPICH",
    "IPATH_",
    "HWLOC_XMLFILE",
)
_NAMES: Final = ("GFORTRAN_UNBUFFERED_PRECONNECTED",)
_RANK_VARIABLES: Final = ("PMI_RANK", "PMI_FD", "PMI_SIZE", "PMIX_RANK", "PMIX_NAMESPACE", "OMPI_COMM_WORLD_RANK")

ABORT_S: Final = 5.0
"""How long the launcher may take to end this process."""

_NO_MPIEXEC: Final = (
    "the transport 'mpi' finds no mpiexec: pip install 'edm[mpich]', or put your MPI's on PATH, "
    "or say -o transport.mpi.mpiexec=FILE"
)


def under_mpi(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process was started as a rank of an MPI job (mpiexec, mpirun, srun)."""
    return any(name in environment for name in _RANK_VARIABLES)


def strip_mpi_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy without what an MPI launcher put there: an app that is itself an MPI program would take it for its own."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(_PREFIXES) and name not in _NAMES
    }  # fmt: skip


def find_mpiexec(option: str = "") -> str:
    """The mpiexec to start a job with: the option's, the one beside this Python, the one on PATH.

    The one beside this Python comes with the wheel whose library mpi4py loads; another MPI's would start singletons.
    Raises `UsageError`.
    """
    if option:
        found = shutil.which(option)
        if found is None:
            raise UsageError(f"transport.mpi.mpiexec: cannot run '{option}'")
        return found
    beside = Path(sys.executable).parent
    for name in ("mpiexec", "mpirun"):
        found = shutil.which(name, path=str(beside)) or shutil.which(name)
        if found is not None:
            return found
    raise UsageError(_NO_MPIEXEC)


def end_job(status: int) -> None:
    """End the MPI job this process is a rank of, which cannot take part in it; else the other ranks wait for it.

    Does nothing outside a job, or in one that all ranks have left. Does not return inside one, unless MPI cannot be
    reached.
    """
    if not under_mpi():
        return
    if "PMI_FD" in os.environ and not _initialized():
        # MPICH's launcher, asked directly: at once, and without a word on the user's terminal. Source: PMI-1, as in
        # MPICH's src/pmi; the launcher answers init before it takes an abort.
        channel = int(os.environ["PMI_FD"])
        os.write(channel, b"cmd=init pmi_version=1 pmi_subversion=1\n")
        os.read(channel, 1024)
        os.write(channel, f"cmd=abort exitcode={status}\n".encode())
        time.sleep(ABORT_S)
        return
    from mpi4py import MPI  # noqa: PLC0415

    if MPI.Is_finalized() or wrong_launcher(MPI):
        return  # all ranks agreed to leave, or none can join: each ends with its own status
    if not MPI.Is_initialized():
        MPI.Init()
    MPI.COMM_WORLD.Abort(status)


def join_job() -> None:
    """Initialise MPI, which waits for all ranks of the job to do so; raises `MissingExtra`, `UsageError`."""
    from edm.plugins.transport_mpi.world import load_mpi  # noqa: PLC0415

    mpi = load_mpi()
    if not mpi.Is_initialized():
        if wrong := wrong_launcher(mpi):
            raise UsageError(wrong)
        mpi.Init_thread(mpi.THREAD_MULTIPLE)


def wrong_launcher(mpi: Any, environment: Mapping[str, str] = os.environ) -> str:
    """What is wrong with the launcher of this rank, or "": MPI itself would end the process in many words.

    The other way round, and without a common job at all, every rank is alone, which `World` tells of.
    """
    vendor, version = mpi.get_vendor()
    if "OMPI_COMM_WORLD_RANK" not in environment or vendor != "MPICH":
        return ""
    if "pmix" in mpi.Get_library_version().lower():
        return ""  # built to be started by others
    name = f"{vendor} {'.'.join(map(str, version))}"
    return (
        f"this rank was started by Open MPI's launcher, and mpi4py uses {name}: start the job with {vendor}'s mpiexec"
    )


def _initialized() -> bool:
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and bool(mpi.Is_initialized())


def check(options: MpiOptions) -> None:
    """Raise `UsageError` where a job could not be started."""
    if importlib.util.find_spec("mpi4py") is None:
        raise MissingExtra("the transport 'mpi' needs mpi4py: pip install 'edm[mpich]'")
    if not under_mpi():
        find_mpiexec(options.mpiexec)


def plan(options: MpiOptions, dms: tuple[str, ...], dm_handler: tuple[str, ...]) -> LaunchPlan:
    """One job of two programs: rank 0 is the DMS, rank 1 the DM-Handler."""
    check(options)
    command = (find_mpiexec(options.mpiexec), "-n", "1", *dms, ":", "-n", "1", *dm_handler)
    return LaunchPlan((command,), _environment())


def _environment() -> dict[str, str]:
    # For Open MPI, which refuses root and more ranks than cores unless told; MPICH does not look at them.
    environment = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return environment
