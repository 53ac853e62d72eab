"""Whether this user, on this kernel, may have another process's page faults."""

from __future__ import annotations

import errno
import getpass
import os

from edm._native import lib
from edm.errors import UsageError

_NEEDS = "EDM needs Linux 6.8 or later (userfaultfd with UFFDIO_MOVE)"


def check() -> None:
    """Raise `UsageError` with the remedy where userfaultfd cannot be used as EDM needs it."""
    result = -lib.edm_uffd_check()
    if result == 0:
        return
    if result == errno.ENOSYS:
        raise UsageError(f"this kernel has no userfaultfd ({os.uname().release}); {_NEEDS}")
    if result == errno.EINVAL:
        raise UsageError(f"this kernel's userfaultfd lacks features ({os.uname().release}); {_NEEDS}")
    if result in {errno.EPERM, errno.EACCES}:
        raise UsageError(
            f"no permission for userfaultfd with fork events as user '{_user()}': "
            "run as root, or give the interpreter the capability: "
            "sudo setcap cap_sys_ptrace+ep $(readlink -f $(command -v python3)), "
            "and access: sudo sysctl -w vm.unprivileged_userfaultfd=1"
        )
    raise UsageError(f"userfaultfd cannot be used: {os.strerror(result)}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
