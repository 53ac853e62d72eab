"""Who the program is to be: `edm run --user`."""

from __future__ import annotations

import os
import pwd
import subprocess
from typing import TYPE_CHECKING, Literal

import attrs

from edm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@attrs.frozen
class User:
    """An account. groups: all it is in, by number."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    def environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        """`environment` as this user's."""
        return {**environment, "HOME": self.home, "USER": self.name, "LOGNAME": self.name}

    def become(self) -> None:
        """Be this user from now on, to replace this process by a program."""
        os.environ.update(self.environment({}))
        os.setgroups(self.groups)
        os.setgid(self.gid)
        os.setuid(self.uid)

    def may(self, flag: Literal["-r", "-x"], file: Path) -> bool:
        """Whether it may read or run `file`, and come by every directory on the way."""
        test = ["/usr/bin/test", flag, str(file)]
        done = subprocess.run(
            test, user=self.uid, group=self.gid, extra_groups=self.groups, env={}, cwd="/", check=False
        )
        return done.returncode == 0


def find_user(text: str) -> User:
    """The account of that name or number; raises `UsageError`, also where we may not become it."""
    try:
        entry = pwd.getpwuid(int(text)) if text.isdigit() else pwd.getpwnam(text)
    except (KeyError, OverflowError):
        raise UsageError(f"--user: no such user '{text}'") from None
    if os.geteuid() not in {0, entry.pw_uid}:
        raise UsageError(f"--user {text}: only root may run programs as somebody else")
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir)
