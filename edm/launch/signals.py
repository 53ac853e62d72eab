"""Waiting for signals that are held back."""

from __future__ import annotations

import ctypes
import functools
import os
import select
import signal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

SIGSET_WORDS: Final = 1024 // 64
"""Of glibc's and musl's sigset_t, in 64-bit words."""
SFD_NONBLOCK: Final = os.O_NONBLOCK
SFD_CLOEXEC: Final = os.O_CLOEXEC


def wait_signal(signals: Iterable[int], timeout_s: float) -> signal.struct_siginfo | None:
    """The next of these blocked signals, None when the time is over first; for the main thread.

    `signal.sigtimedwait` alone will not do: when this process is stopped and goes on after the time is over, it answers
    with whatever its memory held. With no time to wait it cannot be interrupted.
    """
    wanted = frozenset(signals)
    select.select([_signal_fd(wanted)], [], [], timeout_s)
    return signal.sigtimedwait(wanted, 0)


@functools.cache
def _signal_fd(signals: frozenset[int]) -> int:
    """A descriptor that can be read while one of `signals` is pending. Source: signalfd(2)."""
    mask = (ctypes.c_uint64 * SIGSET_WORDS)()
    mask[0] = sum(1 << (number - 1) for number in signals)
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.signalfd(-1, ctypes.byref(mask), SFD_NONBLOCK | SFD_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "signalfd")
    return fd
