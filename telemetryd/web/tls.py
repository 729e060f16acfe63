"""The daemon's TLS certificate, and whose certificates it asks for: read, checked, and replaced without a restart."""

from __future__ import annotations

import hashlib
import re
import ssl
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from telemetryd.client.address import UNFIT_KEY
from telemetryd.errors import ConfigurationError
from telemetryd.ops.logs import log
from telemetryd.settings import Settings, variable

_CERT: Final = variable("tls_cert")
_KEY: Final = variable("tls_key")
_CLIENT_CA: Final = variable("tls_client_ca")
_NO_CHECK_TIME: Final = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which Python has no name."""
_NEVER_OF_ROOT: Final = 0o037
_NEVER: Final = 0o077
"""Permissions that a file with a key must not have."""


class _UnusableError(Exception):
    """Raised for a file that cannot be used; its text says which and why."""

    def __init__(self, name: str, file: Path, words: str) -> None:
        super().__init__(f"{name}: {file}: {words}")


class _EncryptedError(Exception):
    """Raised instead of asking for a password on the terminal."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One certificate with all that a handshake needs."""

    context: ssl.SSLContext
    names: frozenset[str]
    """The host names for which the certificate is made, in lower case; *.example.org stands for one label more."""
    expires: float
    """When it expires, in seconds since 1970."""
    digest: bytes
    """Of what the files held."""

    def is_for(self, host: str) -> bool:
        """Return whether the certificate is made for a host name."""
        return host in self.names or f"*.{host.partition('.')[2]}" in self.names


class Tls:
    """What the daemon's TCP sockets speak: TLS with the current certificate, or plain HTTP.

    Each handshake takes the current identity, and with it a context of its own keys for session tickets. So a session
    from before a renewal is never resumed: its client shows its certificate again, to the authorities that count now.

    Raises:
        ConfigurationError: if a file cannot be used.

    """

    def __init__(self, settings: Settings) -> None:
        self.identity: Identity | None = None
        """None if the sockets speak plain HTTP."""
        self._use(read_identity(settings))

    def expires(self) -> float:
        """Return when the certificate expires, in seconds since 1970; 0 without TLS."""
        return 0.0 if self.identity is None else self.identity.expires

    def prepare(self, settings: Settings) -> Callable[[], None] | None:
        """Read and check the new certificate; return what puts it into use and cannot fail; None if it is the same.

        Raises:
            ConfigurationError: if a file cannot be used, or TLS would be switched on or off.

        """
        identity = read_identity(settings)
        if (identity is None) is not (self.identity is None):
            raise ConfigurationError([f"{_CERT}: TLS is switched on or off only by a restart of the daemon"])
        if identity is None or self.identity is None or identity.digest == self.identity.digest:
            return None
        return partial(self._use, identity)

    def _use(self, identity: Identity | None) -> None:
        self.identity = identity
        if identity is None:
            return
        expires = datetime.fromtimestamp(identity.expires, UTC).isoformat()
        details = {"names": sorted(identity.names), "expires": expires}
        if identity.expires <= time.time():
            log.warning("The TLS certificate has expired; clients do not accept it", extra=details)
        else:
            log.info("TLS certificate in use", extra=details)


def read_identity(settings: Settings) -> Identity | None:
    """Read the certificate, its key and the authorities of clients; None if no certificate is set.

    Raises:
        ConfigurationError: with every problem, each naming its variable and file.

    """
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None:
        return None
    digest = _digest([cert, key, settings.tls_client_ca])  # before they are loaded: a later change is seen next time
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # it would let a client have the processor sign again and again
    context.set_alpn_protocols(["http/1.1"])
    problems = []
    for load in (partial(_load_key, context, cert, key), partial(_trust, context, settings.tls_client_ca)):
        try:
            load()
        except _UnusableError as error:
            problems.append(str(error))
        except OSError as error:  # somebody is just replacing a file
            problems.append(f"{_CERT}: cannot be read: {error.strerror}")
    if problems:
        raise ConfigurationError(problems)
    try:
        return Identity(context, *_names_and_end(cert, key), digest)
    except ssl.SSLError as error:
        words = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else _words(error)
        raise ConfigurationError([f"{_CERT}: {cert}: no client would accept it: {words}"]) from error
    except OSError as error:
        raise ConfigurationError([f"{_CERT}: cannot be read: {error.strerror}"]) from error


def _digest(files: Iterable[Path | None]) -> bytes:
    """Return what tells the contents of these files from others; of one that cannot be used nothing is in it."""
    made = hashlib.sha256()
    for file in files:
        with suppress(OSError):
            held = b"" if file is None or not file.is_file() else file.read_bytes()
            made.update(len(held).to_bytes(8) + held)
    return made.digest()


def _load_key(context: ssl.SSLContext, cert: Path, key: Path | None) -> None:
    """Load a certificate and its key."""
    _check_pem(_CERT, cert, "CERTIFICATE", "certificate")
    name, file = (_CERT, cert) if key is None else (_KEY, key)
    _check_pem(name, file, "PRIVATE KEY", "private key" if key else f"private key, and {_KEY} names no file")
    if _is_open_to_others(file):
        raise _UnusableError(name, file, "holds a private key that others can use: chmod 600, or 640 if it is root's")
    try:
        context.load_cert_chain(cert, file, password=_refuse_to_ask)
    except _EncryptedError as error:
        raise _UnusableError(name, file, "the private key is encrypted, and nobody is asked for a password") from error
    except ssl.SSLError as error:
        if error.reason in UNFIT_KEY:
            raise _UnusableError(name, file, f"the private key does not fit the certificate in {cert}") from error
        raise _UnusableError(_CERT, cert, f"cannot be used: {_words(error)}") from error


def _trust(context: ssl.SSLContext, authorities: Path | None) -> None:
    """Have clients asked for a certificate of these authorities, if there are any."""
    if authorities is None:
        return
    _check_pem(_CLIENT_CA, authorities, "CERTIFICATE", "certificate")
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(authorities)
    except ssl.SSLError as error:
        raise _UnusableError(_CLIENT_CA, authorities, f"cannot be used: {_words(error)}") from error


def _check_pem(name: str, file: Path, kind: str, words: str) -> None:
    """Make sure that a file can be read, and holds something of a kind; what it is exactly, OpenSSL says."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a reload would wait for the other end of a pipe
            raise _UnusableError(name, file, "is no regular file")
        text = file.read_bytes()
    except OSError as error:
        raise _UnusableError(name, file, f"cannot be read: {error.strerror}") from error
    if not re.search(rb"-----BEGIN [A-Z ]*%s-----" % kind.encode(), text):
        raise _UnusableError(name, file, f"holds no {words} in PEM")


def _is_open_to_others(file: Path) -> bool:
    """Return whether others than the daemon may use a key, by PostgreSQL's rule: a file of root may have a group."""
    found = file.stat()
    return bool(found.st_mode & (_NEVER_OF_ROOT if found.st_uid == 0 else _NEVER))


def _refuse_to_ask() -> NoReturn:
    raise _EncryptedError


def _names_and_end(cert: Path, key: Path | None) -> tuple[frozenset[str], float]:
    """Return the names of a certificate and when it expires, as a client sees it that trusts it.

    Python decodes a certificate only after a handshake; so there is one, in memory.

    Raises:
        ssl.SSLError: if it is not made for a server.

    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key, password=_refuse_to_ask)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cert)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True))
    for end in ends * 3:  # TLS 1.2 takes that many
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    shown: dict[str, Any] = ends[0].getpeercert() or {}
    names = (name.lower() for kind, name in shown.get("subjectAltName", ()) if kind == "DNS")
    return frozenset(names), ssl.cert_time_to_seconds(shown["notAfter"])


def _words(error: ssl.SSLError) -> str:
    return (error.reason or "it is cut off or damaged").replace("_", " ").lower()
