"""How much of userfaultfd this user has on this kernel: all of it, all but forks, only faults in user mode, nothing."""

from __future__ import annotations

import errno
import os
import pwd
from typing import Final

from edm._native import lib
from edm.errors import UsageError

_NEEDS: Final = "EDM needs Linux 6.8 or later (userfaultfd with UFFDIO_MOVE)"
_REMEDY: Final = "run as root, or give access: sudo sysctl -w vm.unprivileged_userfaultfd=1 (or read /dev/userfaultfd)"
_FORKS: Final = (
    "the kernel does not tell user '{user}' of forks (CAP_SYS_PTRACE): before each, all that was evicted comes back, "
    "whatever the budget; a child made by a raw system call, past the C library, would miss it"
)
_USER_MODE: Final = (
    "user '{user}' has userfaultfd in user mode only: where a page has been evicted, or given up with MADV_DONTNEED, "
    "system calls that read or write it fail with EFAULT, mlock fails, and a signal that needs it ends the program"
)
_UNTIED: Final = (
    "no io_uring here (kernel.io_uring_disabled, or a sandbox): were a program's sidecar, the DM-Handler and its "
    "holder all killed within a second, the program would read zeros where a page is away"
)
_REFUSED: Final = (
    "no permission for userfaultfd as user '{user}', but in user mode: system calls would fail with EFAULT on pages "
    f"that have been evicted; {_REMEDY}; or try it: -o fault_source.uffd.user_mode=on"
)


def check(*, user_mode: bool = False) -> list[str]:
    """What will be different for want of permission; `UsageError` with the remedy where EDM cannot do its work.

    user_mode: the user knows what that means, and wants it where there is nothing better.
    """
    result: int = lib.edm_uffd_access()
    if result >= 0:
        return _on_rung(result, user_mode=user_mode) + ([_UNTIED] if lib.edm_tie_access() else [])
    if result == -errno.ENOSYS:
        raise UsageError(f"this kernel has no userfaultfd ({os.uname().release}); {_NEEDS}")
    if result == -errno.EINVAL:
        raise UsageError(f"this kernel's userfaultfd lacks features ({os.uname().release}); {_NEEDS}")
    if result in {-errno.EPERM, -errno.EACCES}:
        raise UsageError(f"no permission for userfaultfd as user '{_user()}': {_REMEDY}")
    raise UsageError(f"userfaultfd cannot be used: {os.strerror(-result)}")


def _on_rung(rung: int, *, user_mode: bool) -> list[str]:
    if rung == lib.EDM_ACCESS_ALL:
        return []
    if rung == lib.EDM_ACCESS_NO_FORKS:
        return [_FORKS.format(user=_user())]
    if not user_mode:
        raise UsageError(_REFUSED.format(user=_user()))
    return [_USER_MODE.format(user=_user()), _FORKS.format(user=_user())]


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())
