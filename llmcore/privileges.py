"""Root works on another user's files as that user: a link among them then opens nothing that this user could not."""

import os
import pwd
import stat
from pathlib import Path


def owner(path: Path) -> int:
    """The id of the first user other than root who owns a component of `path`, and can thus change where it leads; 0 if root
    owns all that exist. Links of root's are followed."""
    path = path.absolute()
    for part in (*reversed(path.parents), path):
        try:
            status = part.lstat()
        except OSError:
            return 0
        if status.st_uid:
            return status.st_uid
        if stat.S_ISLNK(status.st_mode):
            return owner(part.parent / part.readlink() / path.relative_to(part))
    return 0


def become_owner(*paths: Path) -> None:
    """If this process is root's, continue for good as the first other owner of one of `paths`, if there is one."""
    if os.geteuid() != 0:
        return
    for user in filter(None, map(owner, paths)):
        try:
            group = pwd.getpwuid(user).pw_gid
        except KeyError:  # no account of this host, so it has no group here
            group = user
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
        os.environ["HOME"] = "/nonexistent"
        return
