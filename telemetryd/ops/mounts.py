"""Detects what kind of file system a path is on."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    real, found, depth = path.resolve(), "", -1
    for point, what in _read(mounts):
        if len(point.parts) >= depth and real.is_relative_to(point):  # of two at one place, the later covers the other
            found, depth = what, len(point.parts)
    return found if _NETWORK.fullmatch(found) else None


def is_mount_point(path: Path, mounts: Path = _MOUNTS) -> bool:
    """Return whether something is mounted right at a path, as far as is known."""
    real = path.resolve()
    return any(point == real for point, _ in _read(mounts))


def _read(mounts: Path) -> Iterator[tuple[Path, str]]:
    """Yield each mount point, and the type of its file system; none on another system than Linux."""
    try:
        lines = mounts.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        where, _, what = line.partition(" - ")
        escaped = where.split()[4]
        yield Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), escaped)), what.split()[0]
