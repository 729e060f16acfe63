"""Where a daemon is, and why it was not reached: the one reader of addresses, for the client and all commands."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NoReturn, cast
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


def tls_context(ca_file: Path | None, cert: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """Return what a certificate is checked by, and what is shown to a daemon that asks for a certificate.

    Args:
        ca_file: the authorities, instead of the system's.
        cert: the client's certificate; None: none is shown.
        key: its private key; None: it is in the same file.

    Raises:
        OSError: if a file cannot be read, or holds nothing of the kind (then an `ssl.SSLError`).

    """
    import ssl  # noqa: PLC0415 - most agents never need it, and it takes long to load

    context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    if cert is not None:
        context.load_cert_chain(cert, key, password=_refuse_to_ask)
    return context


def _refuse_to_ask() -> NoReturn:
    """Keep OpenSSL from asking for the password of a key on the agent's terminal."""
    raise OSError("the private key is encrypted, and nobody is asked for a password")


UNFIT_KEY: Final = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
"""What OpenSSL says of a private key that is not the certificate's; the last, where they are of different kinds."""


def fault_of_authorities(file: Path | None) -> str | None:
    """Return what is wrong with a file of authorities, None if nothing is."""
    if file is None:
        return None
    try:
        tls_context(file)
    except OSError as error:
        return _unreadable(file) or f"holds no certificate in PEM: {file} ({_words_of(error)})"
    return None


def fault_of_pair(cert: Path | None, key: Path | None) -> str | None:
    """Return what is wrong with a client's certificate and its key, which are right only together."""
    if cert is None:
        return None if key is None else "must be set when --client-key (TELEMETRY_API_CLIENT_KEY) is"
    try:
        tls_context(None, cert, key)
    except OSError as error:
        for file in (cert, key):
            if file is not None and (fault := _unreadable(file)) is not None:
                return fault.replace("cannot be read", "cannot be used")
        return f"cannot be used: {_why_unfit(error, cert, key)}"
    return None


def _why_unfit(error: OSError, cert: Path, key: Path | None) -> str:
    import ssl  # noqa: PLC0415 - the caller has loaded it

    if not isinstance(error, ssl.SSLError):
        return str(error)
    if error.reason in UNFIT_KEY:
        return f"the private key in {cert if key is None else key} does not fit {cert}"
    if error.reason is not None:
        return f"{cert}: {_words_of(error)}"
    if key is None:
        return (
            f"{cert} holds no certificate with its private key; "
            "name the file of the key with --client-key (TELEMETRY_API_CLIENT_KEY)"
        )
    return f"{key} holds no private key, or {cert} no certificate, in PEM"


def _unreadable(file: Path) -> str | None:
    """Return that a file cannot be read, and why; OpenSSL does not say which one it is."""
    try:
        file.open("rb").close()
    except OSError as error:
        return f"cannot be read: {file}: {error.strerror}"
    return None


def _words_of(error: OSError) -> str:
    return (getattr(error, "reason", None) or error.strerror or str(error)).replace("_", " ").lower()


_OWN_AUTHORITY: Final = (
    "if it comes from an authority of your own, name the file of its certificate with --ca (TELEMETRY_API_CA_FILE)"
)
_OTHER_NAME: Final = "reach the daemon by a name that its certificate holds"
_HINTS: Final = {
    9: "is the clock of this machine right?",
    10: "the daemon needs a new one, unless the clock of this machine is wrong",
    62: _OTHER_NAME,
    64: _OTHER_NAME,
}
"""What can be done about a certificate, by OpenSSL's number of what is wrong (X509_V_ERR_…)."""
_CERTIFICATE_ALERTS: Final = (
    "BAD_CERTIFICATE",
    "CERTIFICATE_EXPIRED",
    "CERTIFICATE_REVOKED",
    "CERTIFICATE_UNKNOWN",
    "UNKNOWN_CA",
    "UNSUPPORTED_CERTIFICATE",
)


def _why_no_tls(reason: str) -> str:
    """Return in words what OpenSSL's reason means; one of an alert is what the other side says."""
    words = reason.rpartition("_ALERT_")[2].replace("_", " ").lower()
    if reason.endswith("_ALERT_CERTIFICATE_REQUIRED"):
        return "it asks for a client certificate: name its file with --client-cert (TELEMETRY_API_CLIENT_CERT)"
    if "_ALERT_" in reason and reason.endswith(_CERTIFICATE_ALERTS):
        return f"it does not accept the client certificate: {words} (--client-cert, TELEMETRY_API_CLIENT_CERT)"
    if "_ALERT_" in reason:
        return f"no TLS connection: {words}; if it asks for a client certificate: --client-cert"
    return f"no TLS connection: {words}; is http:// meant?"


def disconnected(url: str) -> str:
    """Return in words that there was no answer; a port that speaks TLS has none for plain HTTP."""
    hint = "; is https:// meant?" if url.startswith("http://") else ""
    return f"it closed the connection without an answer{hint}"


def why(error: BaseException, url: str = "") -> str:
    """Return in words why a daemon was not reached.

    Args:
        error: what happened.
        url: where it was looked for, if there was a connection.

    """
    import http.client  # noqa: PLC0415 - here it is loaded already, but not in an agent that sends nothing
    import ssl  # noqa: PLC0415

    if isinstance(error, ssl.SSLCertVerificationError):
        hint = _HINTS.get(error.verify_code, _OWN_AUTHORITY)
        return f"its certificate is not accepted: {error.verify_message or error}; {hint}"
    if isinstance(error, ssl.SSLError):
        return _why_no_tls(error.reason or str(error))
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)  # event loops have words of their own for some
    if isinstance(error, http.client.RemoteDisconnected):
        return disconnected(url)
    if isinstance(error, http.client.BadStatusLine | http.client.UnknownProtocol):
        return "what answered does not speak HTTP"
    words = error.strerror if isinstance(error, OSError) else None
    return words or str(error) or type(error).__name__
