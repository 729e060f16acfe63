"""Tells what kind of file system a path is on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_MOUNTS: Final = Path("/proc/self/mountinfo")
_NETWORK: Final = re.compile(
    r"nfs4?|cifs|smb3|smbfs|ncpfs|9p|afs|ceph|lustre|fuse\.(sshfs|s3fs|glusterfs|rclone|davfs2?|vmhgfs.*)"
)


def network_file_system(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """Return the type of the network file system that a path is on, or None if it is on none as far as is known.

    Locks are not reliable there, and the write-ahead log needs memory shared by all of its users
    (sqlite.org/wal.html, sqlite.org/howtocorrupt.html).

    Args:
        path: a file or a folder, which need not be there.
        mounts: what mounts there are, in the form of proc_pid_mountinfo(5).

    """
    try:
        lines = mounts.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # another system than Linux
        return None
    real, found, depth = path.resolve(), "", -1
    for line in lines:
        where, _, what = line.partition(" - ")
        escaped = where.split()[4]
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), escaped))
        if len(point.parts) >= depth and real.is_relative_to(point):  # of two at one place, the later covers the other
            found, depth = what.split()[0], len(point.parts)
    return found if _NETWORK.fullmatch(found) else None
