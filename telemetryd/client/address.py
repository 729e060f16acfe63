"""Where a daemon is, and why it was not reached: the one reader of addresses, for the client and all commands."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, cast
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    import ssl
    from pathlib import Path

Scheme = Literal["http", "https", "unix"]
_FORMS: Final = "must be http://…, https://… or unix:///path"


@dataclass(frozen=True, slots=True)
class Address:
    """A daemon's address, taken apart."""

    scheme: Scheme
    host: str
    """Of the network; empty with a Unix socket."""
    port: int | None
    socket: str
    """The path of the Unix socket; empty with the network."""
    prefix: str
    """What comes before /api in each path, without a slash at its end."""

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read an address.

        Raises:
            ValueError: if it is none; the message says what it must be.

        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:  # a port that is none, or half an IPv6 address
            raise ValueError(_FORMS) from error
        if parts.username is not None:
            raise ValueError("must not hold a user or a password; the token is a separate setting")
        is_unix = parts.scheme == "unix"
        socket = unquote(parts.netloc + parts.path) if is_unix else ""
        host = "" if is_unix else parts.hostname or ""
        is_whole = bool(socket or host) and port != 0 and not parts.query + parts.fragment
        if parts.scheme not in ("http", "https", "unix") or not is_whole:
            raise ValueError(_FORMS)
        prefix = "" if is_unix else parts.path.rstrip("/")
        return cls(cast("Scheme", parts.scheme), host, None if is_unix else port, socket, prefix)

    @property
    def base(self) -> str:
        """What a path is appended to, to be an address of HTTP; with a Unix socket the host's name means nothing."""
        if self.scheme == "unix":
            return "http://telemetryd"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{'' if self.port is None else f':{self.port}'}{self.prefix}"


def unix_url(path: Path) -> str:
    """Return the address of a Unix socket."""
    return f"unix://{quote(str(path.absolute()))}"


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Return what a certificate is checked by: the system's authorities, or those of a file instead.

    Raises:
        OSError: if the file cannot be read, or holds no certificate (then an `ssl.SSLError`).

    """
    import ssl  # noqa: PLC0415 - most agents never need it, and it takes long to load

    return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))


def why(error: BaseException) -> str:
    """Return in words why a daemon was not reached."""
    import http.client  # noqa: PLC0415 - here it is loaded already, but not in an agent that sends nothing
    import ssl  # noqa: PLC0415

    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not accepted: {error.verify_message or error}; if it comes from an authority of your "
            "own, name the file of its certificate with --ca (TELEMETRY_API_CA_FILE)"
        )
    if isinstance(error, ssl.SSLError):
        return f"no TLS connection: {(error.reason or str(error)).replace('_', ' ').lower()}; is http:// meant?"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)  # event loops have words of their own for some
    if isinstance(error, http.client.BadStatusLine | http.client.UnknownProtocol):
        return "what answered does not speak HTTP"
    words = error.strerror if isinstance(error, OSError) else None
    return words or str(error) or type(error).__name__
