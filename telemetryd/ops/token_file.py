"""Reads and changes the file of tokens: private, whole at any moment, one change after the other."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from telemetryd.errors import ConfigurationError
from telemetryd.model.tokens import MAX_FILE_BYTES, Token, parse, render
from telemetryd.ops.files import hand_over, owner_to_keep, sync_directory

_MODE: Final = 0o600
Signature = tuple[int, int, int, int]
"""What differs between two states of a file: inode, size, and the times of its last changes."""


def signature(path: Path) -> Signature | None:
    """Return what identifies the state of the file, None if there is none; raise OSError if it cannot be seen."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class UnreadableError(ConfigurationError):
    """Raised for a file that the system does not let us read, which may be over in a moment."""


def read(path: Path) -> tuple[Token, ...]:
    """Return the tokens of a file; none if there is no file.

    Raises:
        UnreadableError: if it cannot be read now.
        ConfigurationError: if others can read it, if it is no file of its own, or has another form.

    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ()
    except OSError as error:
        if path.is_symlink():
            raise ConfigurationError([f"{path}: must be a file, not a link"]) from error
        raise UnreadableError([f"{path}: cannot be read: {error.strerror}"]) from error
    try:
        _check(path, os.fstat(descriptor))
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UnreadableError([f"{path}: cannot be read: {error.strerror}"]) from error
    finally:
        os.close(descriptor)
    _check_size(path, data)
    return parse(data, str(path))


def _check_size(path: Path, data: bytes) -> None:
    if len(data) > MAX_FILE_BYTES:
        raise ConfigurationError([f"{path}: must not be larger than {MAX_FILE_BYTES >> 20} MiB"])


def _check(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigurationError([f"{path}: must be a file"])
    if found.st_nlink > 1:
        raise ConfigurationError([f"{path}: must have one name only, and has {found.st_nlink} hard links"])
    if found.st_mode & 0o077:
        raise ConfigurationError(
            [
                f"{path}: must be its owner's only (mode 0600, not {stat.S_IMODE(found.st_mode):04o}): chmod 600 it, "
                "or name a file where that works in TELEMETRY_TOKENS_FILE"
            ]
        )
    trusted = {0, os.geteuid(), path.absolute().parent.stat().st_uid}
    if found.st_uid not in trusted:
        raise ConfigurationError([f"{path}: belongs to another user (uid {found.st_uid}), who could add tokens"])


def change(path: Path, edit: Callable[[tuple[Token, ...]], Sequence[Token]]) -> None:
    """Replace the tokens of a file by what a function makes of them; changes wait for one another.

    Raises:
        ConfigurationError: if the file cannot be read, or the function refuses; then it stays as it is.
        OSError: if it cannot be written.

    """
    made = path.with_name(f".{path.name}.new")
    with _alone_with(made) as descriptor:
        try:
            hand_over(descriptor, owner_to_keep(path))
            data = render(edit(read(path)))
            _check_size(path, data)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            made.replace(path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise
    sync_directory(path.absolute().parent)


@contextmanager
def _alone_with(made: Path) -> Iterator[int]:
    """Give the descriptor of a new, empty file, of which there is one at a time.

    The file is its own lock: nobody else can open it. Any user who may list the folder could lock that for ever.

    Raises:
        ConfigurationError: if something else has its name.

    """
    while True:
        try:
            descriptor = os.open(made, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, _MODE)
        except OSError as error:
            raise ConfigurationError([f"{made}: cannot be made: {error.strerror}"]) from error
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_mode & 0o077:
                raise ConfigurationError([f"{made}: is in the way, and not what a change that was cut off leaves"])
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, made):  # else the change before this one has put it into its place, or given it up
                os.ftruncate(descriptor, 0)  # of a change that was cut off, as nobody else is at work
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
