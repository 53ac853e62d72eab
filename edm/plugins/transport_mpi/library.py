"""MPI's own functions, as mpi4py has loaded them: what native/mpi_link.c and native/mpi_serving.c call.

EDM is built against no MPI: which one there is, the user's machine decides. mpi4py's extension module is linked to it,
so its functions are looked up there, and what else differs between MPIs is looked at: the size of a handle (MPICH's are
ints, Open MPI's pointers) and where a status has its fields.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any, Final

from edm._native import ffi
from edm.errors import UsageError

if TYPE_CHECKING:
    from edm.plugins.transport_mpi import MpiOptions

_FUNCTIONS: Final = {
    "isend": "MPI_Isend",
    "irecv": "MPI_Irecv",
    "recv_init": "MPI_Recv_init",
    "start": "MPI_Start",
    "test": "MPI_Test",
    "get_count": "MPI_Get_count",
    "cancel": "MPI_Cancel",
    "test_cancelled": "MPI_Test_cancelled",
    "wait": "MPI_Wait",
    "request_free": "MPI_Request_free",
}
STATUS_BYTES: Final = 128
"""`EDM_MPI_STATUS_BYTES` of native/mpi.h: the room for a status; it takes 20 to 40."""
KEEP_CPU_S: Final = 30e-6
"""Of a spin, how long not to offer the CPU: the usual answer is there by then."""
HANDLE_BYTES: Final = (4, 8)
_MARKS: Final = (0x1E3D51, 0x2E3D52)


def find_library(mpi: Any, comm: Any) -> Any:
    """A `struct edm_mpi` for messages over `comm`; raises `UsageError` for an MPI that cannot be called so."""
    loaded = ctypes.CDLL(mpi.__file__)
    try:
        functions = {name: ctypes.cast(loaded[symbol], ctypes.c_void_p).value for name, symbol in _FUNCTIONS.items()}
    except AttributeError as error:
        raise UsageError(f"mpi4py's MPI library does not offer what EDM calls of it: {error}") from None
    handle_bytes = mpi._sizeof(mpi.Comm)  # noqa: SLF001  mpi4py's documented way to a handle
    if handle_bytes not in HANDLE_BYTES or mpi._sizeof(mpi.Status) > STATUS_BYTES:  # noqa: SLF001
        raise UsageError(f"mpi4py's MPI library has handles of {handle_bytes} bytes, which EDM does not know")
    source_at, tag_at = _fields(mpi)
    found = {
        "handle_bytes": handle_bytes,
        "source_at": source_at,
        "tag_at": tag_at,
        "comm": _handle(mpi, comm, handle_bytes),
        "byte": _handle(mpi, mpi.BYTE, handle_bytes),
    }
    return ffi.new("struct edm_mpi *", found | {name: ffi.cast("void *", at) for name, at in functions.items()})


def waits_of(options: MpiOptions) -> Any:
    """A `struct edm_mpi_waits`, for the calling thread."""
    # With a single CPU the other side needs this very one.
    keep_s = KEEP_CPU_S if len(os.sched_getaffinity(0)) > 1 else 0.0
    times = (options.spin_us / 1e6, keep_s, options.sleep_us / 1e6, options.sleep_max_us / 1e6)
    return ffi.new("struct edm_mpi_waits *", times)


def _handle(mpi: Any, of: Any, handle_bytes: int) -> int:
    return int.from_bytes(ctypes.string_at(mpi._addressof(of), handle_bytes), "little")  # noqa: SLF001


def _fields(mpi: Any) -> tuple[int, int]:
    """Where MPI_SOURCE and MPI_TAG are in a status: tried with two numbers that are nowhere else in it."""
    status = mpi.Status()
    status.Set_source(_MARKS[0])
    status.Set_tag(_MARKS[1])
    raw = ctypes.string_at(mpi._addressof(status), mpi._sizeof(status))  # noqa: SLF001
    places = [raw.find(mark.to_bytes(ctypes.sizeof(ctypes.c_int), "little")) for mark in _MARKS]
    if min(places) < 0:
        raise UsageError("mpi4py's MPI library keeps source and tag of a message where EDM does not find them")
    return places[0], places[1]
