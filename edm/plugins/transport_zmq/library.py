"""libzmq's own functions, as pyzmq has loaded them: what native/zmq_link.c and native/zmq_serving.c call.

EDM is built against no libzmq. pyzmq's extension module is linked to one (its wheel brings it), so the functions are
looked up there. Sockets are made, set up, bound and connected by pyzmq; C sends and receives over them. Where the
functions cannot be had, because libzmq is inside pyzmq's module or pyzmq runs over cffi, all goes through Python.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import threading
from typing import Any, Final

import zmq

from edm._native import ffi

log = logging.getLogger(__name__)

_MODULE: Final = "zmq.backend.cython._zmq"
_FUNCTIONS: Final = (
    "msg_init", "msg_init_data", "msg_recv", "msg_send", "msg_size", "msg_data", "msg_more", "msg_gets", "msg_close",
    "send", "recv", "poll", "getsockopt", "setsockopt",
)  # fmt: skip
_OLDEST: Final = (4, 1)
"""zmq_msg_gets came with it."""
_finding = threading.Lock()


def find_library() -> Any:
    """A `struct edm_zmq`, to be kept while it is used, or None, with the reason in the log once. Any thread."""
    with _finding:
        return _library()


@functools.cache
def _library() -> Any:
    try:
        return _found()
    except (ImportError, OSError, AttributeError) as error:
        reason = str(error)
    log.info("messages go through Python, not C, and are slower: libzmq cannot be called directly: %s", reason)
    return None


def socket_of(socket: zmq.Socket[Any]) -> Any:
    """The pointer that libzmq knows a socket by."""
    return ffi.cast("void *", socket.underlying)


def _found() -> Any:
    loaded = ctypes.CDLL(importlib.import_module(_MODULE).__file__)
    functions = {name: ctypes.cast(loaded[f"zmq_{name}"], ctypes.c_void_p).value for name in _FUNCTIONS}
    numbers = [ctypes.c_int() for _ in range(3)]
    loaded.zmq_version(*map(ctypes.byref, numbers))
    version = tuple(number.value for number in numbers)
    # Another one than pyzmq's would be handed sockets that are not its own.
    if version != zmq.zmq_version_info() or version < _OLDEST or version[0] != _OLDEST[0]:
        raise AttributeError(f"version {'.'.join(map(str, version))} was found, pyzmq uses {zmq.zmq_version()}")
    return ffi.new("struct edm_zmq *", {name: ffi.cast("void *", at) for name, at in functions.items()})
