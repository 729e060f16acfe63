"""How a command reaches a daemon: the flags, which address they mean, the session, and what answers count."""

from __future__ import annotations

import functools
import logging
import os
import stat
import sys
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import click
import orjson

from telemetryd.cli.basics import EXIT_USAGE, F
from telemetryd.cli.options import complain, settings_flags
from telemetryd.client.address import Address, disconnected, tls_context, unix_url, why
from telemetryd.client.answers import seconds_of
from telemetryd.client.config import Config, read_token
from telemetryd.client.paths import expanded
from telemetryd.client.transport import SERVER_HEADER
from telemetryd.configuration import Origin, load
from telemetryd.errors import ConfigurationError, TelemetrydError
from telemetryd.model import values
from telemetryd.settings import Settings, variable

if TYPE_CHECKING:
    import ssl

    import aiohttp

_PAUSE_S: Final = 1.0
_LEAST_PAUSE_S: Final = 0.1
"""The time between two attempts if an answer asks for none, and the least whatever it asks for."""
_LONGEST_SOCKET: Final = 107
"""Bytes of a path that fit into an address of a Unix socket (unix(7))."""
_ADDRESSES: Final = ("TELEMETRY_API_URL", "METRICS_API_URL")
"""The variables that name a daemon."""
_WHERE_ACCESS_COMES_FROM: Final = (
    ". A command finds its token in --auth-token-file, in TELEMETRY_API_AUTH_TOKEN, or in the file that "
    "TELEMETRY_API_AUTH_TOKEN_FILE names"
)
_HOW_TO_ADMINISTER: Final = "; a command uses that with --unix instead of --url"


class RefusedError(TelemetrydError):
    """The daemon refused the request, or what answered is no daemon."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


# --- Flags ---------------------------------------------------------------------------------------


class Renamed(click.Option):
    """An option with spellings of earlier releases, which still work and are shown nowhere."""

    def __init__(self, *declarations: Any, old: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(*declarations, **options)
        self._old = old

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser know every spelling."""
        shown = self.opts
        self.opts = [*shown, *self._old]
        super().add_to_parser(parser, ctx)
        self.opts = shown


def selection_flags(since: str) -> Callable[[F], F]:
    """Give a command the flags of the runs that it looks at: from when (by default since then) to when, and whose."""
    flags = (
        click.option(
            "--from", "begin", default=since, show_default=True, metavar="TIME", help="A time, or an age: -7d."
        ),
        click.option("--to", "end", default="now", show_default=True, metavar="TIME", help="A time, an age, or now."),
        click.option(
            "--agent",
            "agent_name",
            cls=Renamed,
            old=("--agent-name",),
            metavar="NAMES",
            help="Only these agents: a,b or web-*.",
        ),
        click.option(
            "--job-type", "job_type", cls=Renamed, old=("--job",), metavar="NAMES", help="Only these job types."
        ),
    )
    return lambda function: functools.reduce(lambda made, flag: flag(made), reversed(flags), function)


_FILE_FLAGS: Final = {"ca_file": "--ca", "client_cert": "--client-cert", "client_key": "--client-key"}
"""The client's settings that name files for TLS, and their flags."""


@dataclass(frozen=True, slots=True)
class Where:
    """What a command line says about the daemon to be reached."""

    url: str | None = None
    token_file: str | None = None
    ca_file: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The flags of settings (db_path, lock_file) that were given, by name."""

    @property
    def names_database(self) -> bool:
        """Whether a database was named, and with it the daemon that owns it."""
        return self.settings.get("db_path") is not None

    def address(self) -> str | None:
        """Return the address that the flags name, else that of the environment if no flag names a database.

        Raises:
            ConfigurationError: if that of the environment is none.

        """
        name = next((name for name in _ADDRESSES if os.environ.get(name)), None)
        if self.url is not None or self.names_database or name is None:
            return self.url
        try:
            Address.parse(os.environ[name])
        except ValueError as error:
            raise ConfigurationError([f"{name}: {error}"]) from error
        return os.environ[name]

    def config(self, url: str | None = None, token: str | None = None, **given: Any) -> Config:
        """Return the client's settings for a daemon.

        Args:
            url: where it is, if not where the flags and the environment say.
            token: what to bring if neither of them holds one.
            **given: other settings of the client.

        Raises:
            ConfigurationError: if something is wrong with them.

        """
        try:
            given["token"] = self.token(token)
            for name in _FILE_FLAGS:
                file = getattr(self, name)
                given[name] = None if file is None else expanded(file).absolute()
            return Config.load(url=url or self.address() or _url_here(), **given)
        except ValueError as error:
            name, _, fault = str(error).partition(" ")
            is_of_flag = name in _FILE_FLAGS and getattr(self, name) is not None
            raise ConfigurationError([f"{_FILE_FLAGS[name]} {fault}" if is_of_flag else str(error)]) from error

    def token(self, otherwise: str | None = None) -> str | None:
        """Return the token of --auth-token-file, else another one; None leaves it to the environment.

        Raises:
            ConfigurationError: if the file cannot be read.

        """
        if self.token_file is not None:
            try:
                token = read_token(self.token_file)
            except ValueError as error:
                raise ConfigurationError([f"--auth-token-file: {error}"]) from error
            if not token:
                raise ConfigurationError([f"--auth-token-file: {self.token_file} holds no token"])
            return token
        return otherwise


def _url_here() -> str:
    """Return where a daemon with the settings of this folder and environment listens.

    Raises:
        ConfigurationError: if they do not say it.

    """
    loaded = load(names=("api_port", "tls_cert"), needs_dotenv=False)
    port = loaded.settings.api_port
    if loaded.unread and loaded.origins["api_port"] is Origin.DEFAULT:
        text = f"telemetryd: {'; '.join(loaded.unread)}; if {variable('api_port')} stands there, it is not used"
        click.echo(text, err=True)
    if port == 0:
        raise ConfigurationError([f"{variable('api_port')}: 0 is any free port; say with --url where the daemon is"])
    return local_url(loaded.settings)


def local_url(settings: Settings, plain: str = "localhost") -> str:
    """Return the address by which a daemon with these settings is reached from its machine.

    Args:
        settings: the daemon's.
        plain: the host without TLS; a certificate is for a name.

    """
    scheme, host = ("http", plain) if settings.tls_cert is None else ("https", "localhost")
    return f"{scheme}://{host}:{settings.api_port}"


def daemon_flags(function: F) -> F:
    """Give a command the flags that say how to reach a daemon, as its argument `where`."""
    return _flags(function, "the daemon that TELEMETRY_API_URL names, else http://localhost:TELEMETRY_API_PORT (8765)")


def target_flags(function: F) -> F:
    """Give a command the flags for a daemon or a database, as its argument `where`."""
    default = "the daemon that TELEMETRY_API_URL names, else the one that owns the database, else the database itself"
    return settings_flags("db_path", "lock_file")(_flags(function, default, ("db_path", "lock_file")))


def _flags(function: F, default: str, names: Collection[str] = ()) -> F:
    @functools.wraps(function)
    def called(
        *arguments: Any,
        url: str | None,
        unix: str | None,
        port: int | None,
        token_file: str | None,
        ca_file: str | None,
        client_cert: str | None,
        client_key: str | None,
        **options: Any,
    ) -> Any:
        chosen = [text for text, given in (("--url", url), ("--unix", unix), ("--port", port)) if given is not None]
        if len(chosen) > 1:
            raise click.UsageError(f"Give one address, not both {' and '.join(chosen)}")
        if unix is not None:
            try:
                url = unix_url(expanded(unix))
            except ValueError as error:
                raise click.UsageError(f"--unix {error}") from error
        elif port is not None:
            url = f"http://localhost:{port}"
        settings = {name: options.pop(name) for name in names}
        return function(*arguments, where=Where(url, token_file, ca_file, client_cert, client_key, settings), **options)

    decorated: Any = called
    for option in (
        click.option(
            "--client-key",
            metavar="FILE",
            help="Its private key (PEM).  [TELEMETRY_API_CLIENT_KEY; default: in the same file]",
        ),
        click.option(
            "--client-cert",
            metavar="FILE",
            help="Certificate (PEM) for a daemon that asks for one.  [TELEMETRY_API_CLIENT_CERT]",
        ),
        click.option(
            "--ca",
            "ca_file",
            metavar="FILE",
            help="Certificates (PEM) by which https is checked.  [TELEMETRY_API_CA_FILE; default: the system's]",
        ),
        click.option(
            "--auth-token-file",
            "token_file",
            metavar="PATH",
            help="File that holds the daemon's token; or "
            "set TELEMETRY_API_AUTH_TOKEN.  [TELEMETRY_API_AUTH_TOKEN_FILE]",
        ),
        click.option("--port", type=click.IntRange(1, 65535), hidden=True),
        click.option("--unix", metavar="PATH", help="The daemon's Unix socket, instead of --url."),
        click.option(
            "--url",
            metavar="URL",
            help=f"The daemon's address: http://host/path, https://…, unix:///path.  [default: {default}]",
        ),
    ):
        decorated = option(decorated)
    result: F = decorated
    return result


def client_config(where: Where, **given: Any) -> Config:
    """Return the client's settings, or end the process with what is wrong with them."""
    logging.getLogger("telemetryd.client").addHandler(logging.NullHandler())  # here the commands say it themselves
    try:
        return where.config(**given)
    except ConfigurationError as error:
        for problem in error.problems:
            complain(problem)
        sys.exit(EXIT_USAGE)


# --- Requests ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """Sends requests to one daemon."""

    url: str
    """Where it is, as the client's settings say."""
    base: str
    """What each path is appended to."""
    opened: aiohttp.ClientSession

    def __call__(self, method: str, path: str, **more: Any) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Send a request; more is what aiohttp takes besides."""
        from yarl import URL  # noqa: PLC0415 - aiohttp has loaded it

        url = URL(self.base + path, encoded=True)  # as it is: a run may be called .. or .
        return self.opened.request(method, url, allow_redirects=False, **more)


@asynccontextmanager
async def session(config: Config, patience: aiohttp.ClientTimeout | None = None) -> AsyncIterator[Request]:
    """Give what sends requests to the daemon at the address of a client's settings, with its token.

    Redirects are not followed: they would lead the token, and what is deleted, to another place than was named.

    Raises:
        RefusedError: if the certificates of the authorities cannot be read.

    """
    import aiohttp  # noqa: PLC0415 - takes most of a command's start, and some need only the flags
    from yarl import URL  # noqa: PLC0415

    address = Address.parse(config.url)
    if address.scheme == "unix":
        connector: aiohttp.BaseConnector = aiohttp.UnixConnector(address.socket)
    elif address.scheme == "https":
        connector = aiohttp.TCPConnector(ssl=tls_context(config.ca_file, config.client_cert, config.client_key))
    else:
        connector = aiohttp.TCPConnector()
    headers = {"Authorization": f"Bearer {config.token}"} if config.token else {}
    options = {} if patience is None else {"timeout": patience}

    base = str(URL(address.base)).rstrip("/")
    async with aiohttp.ClientSession(connector=connector, headers=headers, **options) as opened:  # type: ignore[arg-type]
        yield Request(config.url, base, opened)


def refuse_missing_socket(config: Config) -> None:
    """Make sure that the Unix socket that is meant, if one is, can be reached: to wait for one would hide a typo.

    Raises:
        RefusedError: if it cannot.

    """
    path = Address.parse(config.url).socket
    if not path:
        return
    if len(os.fsencode(path)) > _LONGEST_SOCKET:
        raise RefusedError(f"{path:.200} is too long for a Unix socket, whose path has at most {_LONGEST_SOCKET} bytes")
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RefusedError(f"There is no Unix socket {path}: no daemon runs, or it listens elsewhere") from error
    except OSError as error:  # such as a loop of links: another attempt fails as well
        raise RefusedError(f"There is no way to the Unix socket {path}: {error.strerror}") from error
    if not is_socket:
        raise RefusedError(f"{path} is no Unix socket")


def reason(error: BaseException, url: str) -> str:
    """Return why a daemon was not reached; where a connection was refused, the address and the system's words."""
    import aiohttp  # noqa: PLC0415
    from aiohttp.client_exceptions import UnixClientConnectorError  # noqa: PLC0415

    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"{error.host}:{error.port}: {why(error.certificate_error)}"
    if isinstance(error, UnixClientConnectorError):
        return f"{error.path}: {why(error.os_error)}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"{error.host}:{error.port}: {why(error.os_error)}"
    if isinstance(error, aiohttp.ClientResponseError):
        return f"what answered does not speak HTTP properly: {error.message or type(error).__name__}"
    if (alert := _alert(error)) is not None:
        return why(alert)
    return disconnected(url) if isinstance(error, aiohttp.ServerDisconnectedError) else why(error)


def _alert(error: BaseException) -> ssl.SSLError | None:
    """Return what the daemon has said by TLS, if that is why there is no answer: of clients' certificates mostly.

    With TLS 1.3 it comes when the client has finished its handshake, and aiohttp takes it for a lost connection.
    """
    import ssl  # noqa: PLC0415 - aiohttp has loaded it

    cause = error.__cause__
    return cause if isinstance(cause, ssl.SSLError) and "_ALERT_" in (cause.reason or "") else None


def is_hopeless(error: BaseException) -> bool:
    """Return whether another attempt would fail as well: a certificate that is not accepted, an address of nobody."""
    import aiohttp  # noqa: PLC0415

    kinds = (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError, aiohttp.InvalidURL)
    return (
        isinstance(error, kinds)
        or _alert(error) is not None
        or isinstance(getattr(error, "os_error", error), PermissionError)
    )


def pause_s(headers: Mapping[str, str]) -> float:
    """Return how long to wait before the next attempt: as long as an answer asks for, and never too short."""
    return max(seconds_of(headers.get("Retry-After", "")) or _PAUSE_S, _LEAST_PAUSE_S)


def detail_of(text: bytes) -> str:
    """Return what an error of the daemon says of itself."""
    try:
        detail = orjson.loads(text)["detail"]
    except (ValueError, KeyError, TypeError):
        return text[: values.MAX_ECHO].decode("utf-8", "replace")
    return detail if isinstance(detail, str) else orjson.dumps(detail).decode()


def refusal(response: aiohttp.ClientResponse, text: bytes) -> str:
    """Return what an answer that is not 200 says."""
    status = response.status
    if 300 <= status < 400:
        place = response.headers.get("Location", "somewhere else")
        return f"The address answered {status} and points to {place:.200}; give the address that is meant, with --url"
    who = "The daemon" if _is_daemons(response) or text.startswith(b'{"detail"') else "Something that is not telemetryd"
    hint = _WHERE_ACCESS_COMES_FROM if status == 401 else _HOW_TO_ADMINISTER if b"Admin endpoints need" in text else ""
    return f"{who} answered {status}: {detail_of(text)}{hint}"


def read_object(response: aiohttp.ClientResponse, text: bytes, fields: Collection[str]) -> dict[str, Any]:
    """Return the JSON object that an answer of status 200 holds, which has at least these fields.

    Raises:
        RefusedError: if it holds something else.

    """
    answer = _json(text)
    if not isinstance(answer, dict) or not answer.keys() >= set(fields):
        raise RefusedError(f"What answered is no telemetryd: its answer has no {' or '.join(fields)}", response.status)
    return answer


def read_list(response: aiohttp.ClientResponse, text: bytes, field: str) -> list[dict[str, Any]]:
    """Return the list of JSON objects, each with this field, that an answer of status 200 holds.

    Raises:
        RefusedError: if it holds something else; an empty list can be anybody's.

    """
    answer = _json(text)
    is_list = isinstance(answer, list) and all(isinstance(item, dict) and field in item for item in answer)
    if not is_list or not (answer or _is_daemons(response)):
        raise RefusedError("What answered is no telemetryd: its answer is no list of what was asked for", 200)
    listed: list[dict[str, Any]] = answer
    return listed


def _json(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except ValueError as error:
        raise RefusedError("What answered is no telemetryd: it sent no JSON", 200) from error


def _is_daemons(response: aiohttp.ClientResponse) -> bool:
    return response.headers.get(SERVER_HEADER, "").startswith("telemetryd")


def settings_token(settings: Settings) -> str | None:
    """Return the token that a daemon's settings hold, for those who share them.

    Raises:
        ConfigurationError: if it cannot be read.

    """
    try:
        token = settings.token()
    except ValueError as error:
        raise ConfigurationError([str(error)]) from error
    return None if token is None else token.decode()
