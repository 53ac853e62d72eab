"""C interfaces that plugins may offer beside their Python ones: `__edm_ops__` (native/edm_ops.h).

Place on the path: whoever drives a fault [5-11] or an eviction asks an object here for its table of C functions. With
one, the work stays in C; without, the object's Python methods are called.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from edm.errors import PluginBroken

ATTRIBUTE: Final = "__edm_ops__"
OPS_VERSION: Final = 1
"""`EDM_OPS_VERSION` of native/edm_ops.h, as built into EDM."""

CHANNEL: Final = b"edm.channel_ops"
SERVER: Final = b"edm.server_ops"
PAGE_STORE: Final = b"edm.page_store_ops"
POLICY: Final = b"edm.policy_ops"
SERVER_BYTES: Final = 32
"""sizeof(struct edm_server_ops)."""
POLICY_BYTES: Final = 48
"""sizeof(struct edm_policy_ops)."""

_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _Head(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("bytes", ctypes.c_uint32))


def capsule(address: int, name: bytes) -> Any:
    """A PyCapsule around the table at `address`; `name` is one of this module's and must outlive the capsule."""
    return _new(address, name, None)


def address_of(offered_by: object, name: bytes, least_bytes: int = 0) -> int:
    """Address of the table an object offers under `name`, 0 if it offers none or one of another version.

    least_bytes: how much of the table the caller knows; a shorter one is another version's. Raises `PluginBroken` when
    the attribute is no such capsule.
    """
    found = getattr(offered_by, ATTRIBUTE, None)
    if found is None:
        return 0
    if not _is_valid(found, name):
        raise PluginBroken(f"{type(offered_by).__name__}.{ATTRIBUTE} is not a PyCapsule named {name.decode()!r}")
    address = int(_pointer(found, name))
    head = _Head.from_address(address)
    return address if head.version == OPS_VERSION and head.bytes >= least_bytes else 0
