"""Every error EDM raises on purpose.

EdmError
├── UsageError              a user's mistake: one line on stderr, exit 2, nothing started
│   ├── UnknownPlugin       no such transport, store …; says what is installed
│   ├── PluginConflict      two distributions offer one name
│   ├── PluginBroken        a plugin breaks what its interface promises
│   └── MissingExtra        the plugin is there, a library it needs is not
├── TransportError
│   ├── TransportTimeout    no answer within the deadline
│   ├── PeerLost            the other side is gone, for good
│   └── ProtocolError       a message that breaks the wire layout
├── StoreError
│   ├── StoreFull           no room; nothing was changed
│   ├── StoreLocked         another server has it open
│   ├── Corrupt             a page or table whose checksum does not match
│   └── StaleVersion        an older version than the stored one
└── NativeError             a call in the C core failed: errno and which call
"""

from __future__ import annotations

import os


class EdmError(Exception):
    """Base of EDM's own errors; its text is one line for a person."""


class UsageError(EdmError):
    """What was asked for cannot be had; the text says why and what to do."""


class UnknownPlugin(UsageError):
    """No plugin of that kind has that name."""


class PluginConflict(UsageError):
    """Two distributions offer the same name."""


class PluginBroken(UsageError):
    """A plugin does not keep to its interface."""


class MissingExtra(UsageError):
    """A plugin needs a library that is not installed."""


class TransportError(EdmError):
    """A request could not be carried to the DMS and back."""


class TransportTimeout(TransportError):
    """No answer within the deadline; the request may be sent again."""


class PeerLost(TransportError):
    """The other side of the transport is gone for good: the request need not be made again."""


class ProtocolError(TransportError):
    """A message that is truncated, corrupt, or of another version."""


class StoreError(EdmError):
    """The SPT store or page store could not do what was asked."""


class StoreFull(StoreError):
    """No room left; nothing was changed."""


class StoreLocked(StoreError):
    """Another server has this store open."""


class Corrupt(StoreError):
    """Stored bytes whose checksum does not match; never served."""


class StaleVersion(StoreError):
    """A write with an older version than the stored one."""


class NativeError(EdmError):
    """A call in the C core failed."""

    def __init__(self, errno: int, call: str) -> None:
        super().__init__(f"{call}: {os.strerror(errno)}")
        self.errno = errno
        self.call = call
