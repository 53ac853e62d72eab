"""CURVE keys: made by `edm keys new`, read by both sides, checked against the allow-list by the memory server.

A secret key is a file of one line, 40 characters (Z85), readable by its owner only. A public key is a line of 40
characters, then whatever tells a person whose it is; an allow-list is such lines. Lines that begin with "# " are
comments (a key itself may begin with #).
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger(__name__)

KEY_CHARACTERS: Final = 40
SECRET_NAME: Final = "edm.key"  # noqa: S105
PUBLIC_NAME: Final = "edm.pub"
_ALPHABET: Final = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#")
_ZAP: Final = "inproc://zeromq.zap.01"


def new_keys(directory: Path, name: str) -> tuple[Path, Path]:
    """Make a pair in `directory`; returns the secret and the public file. Never overwrites; raises `UsageError`."""
    import zmq  # noqa: PLC0415

    public, secret = (key.decode() for key in zmq.curve_keypair())
    paths = directory / SECRET_NAME, directory / PUBLIC_NAME
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, text, mode in ((paths[0], secret, 0o600), (paths[1], f"{public} {name}".rstrip(), 0o644)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
                file.write(text + "\n")
    except FileExistsError as error:
        raise UsageError(f"{error.filename} exists already: keys are not overwritten") from None
    except OSError as error:
        raise UsageError(f"cannot write keys: {error}") from None
    return paths


def read_secret(path: Path) -> tuple[bytes, bytes]:
    """The public and the secret key of a secret key file; raises `UsageError`, also if others may read it."""
    import zmq  # noqa: PLC0415

    text = _read(path).strip()
    # systemd hands credentials over by access lists, which look like rights of the group, in a private directory.
    handed_over = path.is_relative_to(os.environ.get("CREDENTIALS_DIRECTORY", "/nowhere"))
    if path.stat().st_mode & 0o077 and not handed_over:
        raise UsageError(f"{path} holds a secret key and can be read by others: chmod 600 {path}")
    if not _is_key(text):
        raise UsageError(f"{path} holds no secret key: make one with 'edm keys new'")
    return zmq.curve_public(text.encode()), text.encode()


def read_public(text: str) -> bytes:
    """The public key that `text` is, or that the file of that name holds; raises `UsageError`."""
    if _is_key(text):
        return text.encode()
    keys = read_list(Path(text).expanduser())
    if len(keys) != 1:
        raise UsageError(f"{text} holds {len(keys)} public keys, where the memory server's one is wanted")
    return next(iter(keys)).encode()


def read_list(path: Path) -> dict[str, str]:
    """Public key → what stands behind it, of an allow-list; raises `UsageError` naming the line that is wrong."""
    keys = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        key, _, name = line.strip().partition(" ")
        if not key or (key == "#" and name):
            continue
        if not _is_key(key):
            raise UsageError(f"{path}:{number}: not a public key (40 characters, as in {PUBLIC_NAME})")
        keys[key] = name.strip()
    return keys


class AllowList:
    """Answers libzmq's question whether a client may come in (ZAP), in a thread. Source: ZeroMQ RFC 27.

    Opened before the socket that asks is bound. Without keys (None) every client may.
    """

    def __init__(self, context: Any, keys: Iterable[str]) -> None:
        import zmq  # noqa: PLC0415

        self._keys = frozenset(keys)
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(_ZAP)
        self._end = context.socket(zmq.REQ)
        self._end.linger = 0
        self._end.connect(_ZAP)
        self._thread = threading.Thread(target=self._serve, name="edm-keys", daemon=True)
        self._thread.start()

    def allow(self, keys: Iterable[str]) -> None:
        """Let these clients in from now on; connections that are there stay."""
        self._keys = frozenset(keys)

    def close(self) -> None:
        """End the thread; a second call does nothing."""
        if not self._end.closed:
            self._end.send(b"")
            self._thread.join()
            self._end.close()

    def _serve(self) -> None:
        import zmq.utils.z85 as z85  # noqa: PLC0415, PLR0402

        # libzmq's question has six parts and more; one is `close`.
        while len(question := self._socket.recv_multipart()) > 1:
            version, request, _, address, _, mechanism, *credentials = question
            key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
            allowed = key in self._keys
            if not allowed:
                log.warning("refused a client at %s: its key %s is not allowed", address.decode(), key or "(none)")
            verdict = (b"200", b"OK", key.encode()) if allowed else (b"400", b"not allowed", b"")
            self._socket.send_multipart([version, request, *verdict, b""])
        self._socket.close()


def _is_key(text: str) -> bool:
    return len(text) == KEY_CHARACTERS and _ALPHABET.issuperset(text)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not text'}") from None
