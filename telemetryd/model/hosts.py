"""The host names under which the daemon may be called; they keep foreign web pages from it (DNS rebinding).

A page of evil.example can let its own name point to 127.0.0.1 (DNS rebinding) and then talk to the daemon as
to its own server, from the operator's machine, where protected mode lets it in. What it cannot change is the
`Host` its browser sends: its own name, and the port unless that is the scheme's default (RFC 9110 §7.2; Host
and Origin are forbidden to scripts, fetch.spec.whatwg.org/#forbidden-request-header).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Final

ANY: Final = "*"
_AUTHORITY: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s\[\]:/@]*))(?::([0-9]*))?")
PORTS: Final = {"http": 80, "https": 443}
"""The default port of each scheme."""
_LAST_PORT: Final = 65535
_PORT_DIGITS: Final = 5
_REMEMBERED: Final = 1000
HOST_NAME: Final = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
"""A name in lower case; those of other scripts in the form that goes over the wire (xn--…)."""


def split(authority: str) -> tuple[str, str] | None:
    """Return name (in lower case, without a last dot) and port ("" if there is none) of a Host, or None."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        return None
    name: str = match[1] or match[2]
    return name.lower().removesuffix("."), match[3] or ""


def is_address(name: str) -> bool:
    """Return whether a name is an IP address, which nobody can rebind: a page with it came from that machine."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def origin_of(address: str) -> str | None:
    """Return the origin of a web address as browsers write it (scheme, name, and port unless it is the default's).

    None if it has none, or is not written in ASCII.
    """
    scheme, separator, rest = address.lower().partition("://")
    parts = split(re.split(r"[/?#]", rest, maxsplit=1)[0])
    if not separator or scheme not in PORTS or parts is None or not parts[0] or not address.isascii():
        return None
    name, port = parts
    if not (HOST_NAME.fullmatch(name) or is_address(name)) or not _is_port(port):
        return None
    shown = f"[{name}]" if ":" in name else name
    return f"{scheme}://{shown}" if port in ("", str(PORTS[scheme])) else f"{scheme}://{shown}:{int(port)}"


def _is_port(port: str) -> bool:
    return not port or (len(port) <= _PORT_DIGITS and 0 < int(port) <= _LAST_PORT)


def parse_origins(text: str) -> str:
    """Return a list of origins, with commas between them, each as browsers write it.

    Raises:
        ValueError: if one is none. A star is none: a page that may read has to be named.

    """
    given = [each.strip().removesuffix("/") for each in text.split(",")]
    origins = [None if re.search(r"://.*[/?#]", each) else origin_of(each) for each in given]
    if None in origins:
        raise ValueError("must be origins such as https://dashboard.example.com, separated by commas; * is none")
    return ",".join(dict.fromkeys(str(origin) for origin in origins))


class Names:
    """The names by which the daemon may be called.

    Args:
        listed: TELEMETRY_ALLOWED_HOSTS, or None if it is not set; `*` allows every Host.
        bound: the name or address that it listens on.

    """

    def __init__(self, listed: frozenset[str] | None, bound: str) -> None:
        machine = socket.gethostname().lower()
        self._listed = listed
        self._names = frozenset({"localhost", bound.lower(), machine, machine.partition(".")[0]}) | (listed or set())
        self._known: set[str] = set()

    def has_host(self, host: str) -> bool:
        """Return whether a Host names us."""
        if host in self._known:
            return True
        parts = split(host)
        if parts is None or not (parts[0] in self._names or ANY in self._names or is_address(parts[0])):
            return False
        if len(self._known) < _REMEMBERED:
            self._known.add(host)
        return True

    def may_be_a_proxys(self, host: str, port: int, default: int) -> bool:
        """Return whether a Host that does not name us can only come from a program, such as a proxy (nginx's `$host`).

        A browser that came to this port would name it, unless it is the default of its scheme. Once names are
        listed, the proxy's has to be among them.

        Args:
            host: the header's value.
            port: where the request came in.
            default: the port that is the default of the scheme by which it came.

        """
        parts = split(host)
        return self._listed is None and parts is not None and not parts[1] and port != default

    def has_origin(self, origin: str, host: str) -> bool:
        """Return whether a page may change something here: one of ours, or one of a listed name.

        The scheme does not count, because a proxy may speak TLS; nor does the port if the proxy left it out.
        """
        page, own = _authority(origin), split(host.lower())
        if page is None or own is None:
            return False
        return (page[0] == own[0] and own[1] in ("", page[1])) or self.lists_origin(origin)

    def lists_origin(self, origin: str) -> bool:
        """Return whether the name of an origin is listed; the star stands for names of ours only."""
        page = _authority(origin)
        return page is not None and page[0] in (self._listed or ())


def _authority(origin: str) -> tuple[str, str] | None:
    """Return name and port of a web page's origin, or None."""
    scheme, _, authority = origin.lower().partition("://")
    page = split(authority)
    return page if scheme in PORTS and page is not None and page[0] else None
