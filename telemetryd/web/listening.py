"""Binds the listening sockets, or explains in one sentence why it cannot; removes the Unix socket at the end."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

from telemetryd.errors import AddressError
from telemetryd.ops.logs import log
from telemetryd.settings import Settings

_FOR_GROUP: Final = 0o117
_FOR_USER: Final = 0o177
"""The umask with which a socket is bound."""
_LONGEST_PATH: Final = 107
"""Bytes of the path of a Unix socket (unix(7), sun_path)."""
_NO_ADDRESS: Final = "that is no address of this machine (TELEMETRY_API_HOST)"


@asynccontextmanager
async def bound(settings: Settings, passed: Sequence[socket.socket] = ()) -> AsyncIterator[list[socket.socket]]:
    """Bind what the settings name, so that the address is ours before the database is touched; nobody listens yet.

    Sockets that the service manager has passed stand in for those of the settings that are of the same kind.

    Raises:
        AddressError: if an address cannot be used.

    """
    with ExitStack() as cleanup:
        sockets = [cleanup.enter_context(listening) for listening in passed]
        unix_passed = [listening for listening in passed if listening.family == socket.AF_UNIX]
        if len(unix_passed) == len(passed):
            sockets += await _bind_tcp(settings.api_host, settings.api_port, cleanup)
        if settings.unix_socket is not None and not unix_passed:
            sockets.append(_bind_unix(settings.unix_socket.absolute(), cleanup, _FOR_GROUP))
        yield sockets


@contextmanager
def bound_next_to_database(settings: Settings) -> Iterator[socket.socket | None]:
    """Bind the socket of the daemon's own user and root, unless TELEMETRY_API_UNIX says otherwise; nobody listens yet.

    It only makes commands easier: where it cannot be bound, that is a line in the log. To be called by the owner of the
    database, so that what stands there was left by an earlier one.
    """
    with ExitStack() as cleanup:
        listening = None
        if (path := settings.own_socket) is not None:
            try:
                listening = _bind_unix(path, cleanup, _FOR_USER)
            except AddressError as error:
                log.warning(
                    "No Unix socket next to the database",
                    extra={"reason": str(error), "advice": "TELEMETRY_API_UNIX names another path, or none"},
                )
        yield listening


async def _bind_tcp(host: str, port: int, cleanup: ExitStack) -> list[socket.socket]:
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise AddressError(f"Cannot listen on {place}: {_NO_ADDRESS}") from error
    sockets = []
    for family, kind, protocol, _, address in dict.fromkeys(found):
        listening = cleanup.enter_context(socket.socket(family, kind, protocol))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        try:
            listening.bind(address)
        except OSError as error:
            raise AddressError(f"Cannot listen on {place}: {_tcp_reason(error, port)}") from error
        sockets.append(listening)
    return sockets


def _tcp_reason(error: OSError, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} is already in use, perhaps by another telemetryd; stop what uses it, or choose another port "
            "with --port (TELEMETRY_API_PORT)"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return _NO_ADDRESS
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"this user may not use port {port}; choose one from 1024 on with --port (TELEMETRY_API_PORT)"
    return error.strerror or str(error)


def _bind_unix(path: Path, cleanup: ExitStack, umask: int) -> socket.socket:
    """Bind a socket that belongs to no other user from its first moment on, whatever the process's umask is."""
    _remove_dead_socket(path)
    listening = cleanup.enter_context(socket.socket(socket.AF_UNIX))
    before = os.umask(umask)
    try:
        listening.bind(str(path))
        made = path.lstat()
    except OSError as error:
        reason = error.strerror or str(error)
        if len(os.fsencode(path)) > _LONGEST_PATH:
            reason = (
                f"the path is too long: it has {len(os.fsencode(path))} bytes, at most {_LONGEST_PATH} are possible"
            )
        if isinstance(error, FileNotFoundError):
            reason = f"the directory {path.parent} does not exist; make it: mkdir -p {path.parent}"
        raise _unix_error(path, reason) from error
    finally:
        os.umask(before)
    cleanup.callback(_remove_own_socket, path, made)
    return listening


def _remove_own_socket(path: Path, made: os.stat_result) -> None:
    with suppress(OSError):
        if os.path.samestat(path.lstat(), made):  # and not that of a daemon that came after us
            path.unlink()


def _remove_dead_socket(path: Path) -> None:
    """Remove the socket of a daemon that was killed, because binding would also take that of one that is alive.

    Raises:
        AddressError: if the socket is in use, or what stands there is no socket.

    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise _unix_error(path, "there is a file that is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    except (FileNotFoundError, NotADirectoryError):
        return  # binding says it better
    except ConnectionRefusedError:
        path.unlink()
        return
    except OSError as error:
        raise _unix_error(path, error.strerror or str(error)) from error
    raise _unix_error(path, "another process listens there; stop it, or choose another path")


def _unix_error(path: Path, reason: str) -> AddressError:
    return AddressError(f"Cannot listen on the Unix socket {path}: {reason} (TELEMETRY_API_UNIX)")
