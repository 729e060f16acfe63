"""Opens connections to PostgreSQL, each with a thread of its own, and translates what goes wrong on them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import psycopg
from psycopg import conninfo
from psycopg.types.string import TextBinaryLoader, TextLoader

from telemetryd.errors import (
    DatabaseError,
    DatabaseSuspectError,
    QueryTimeoutError,
    StorageFullError,
    TelemetrydError,
    UnavailableError,
    WriteFailedError,
)
from telemetryd.settings import Settings, Sync

T = TypeVar("T")
Plain = psycopg.Connection[tuple[Any, ...]]
"""What statements are run on."""

_DEFAULTS: Final[Mapping[str, str]] = {
    # Of all the hosts in the URL the one that takes writes: the primary.
    "target_session_attrs": "read-write",
    "connect_timeout": "3",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
"""What a URL may set otherwise (postgresql.org/docs/current/libpq-connect.html)."""

_OF_ALL: Final[Mapping[str, str]] = {
    "client_encoding": "UTF8",
    "timezone": "UTC",
    "jit": "off",
    "standard_conforming_strings": "on",
    "datestyle": "ISO",
    "array_nulls": "on",
}
_OF_WRITERS: Final[Mapping[str, str]] = {
    # That a standby does not hold a commit the server says in a warning, and nowhere else.
    "client_min_messages": "warning",
    # What is looked at after a lock was waited for has to be as it is then.
    "default_transaction_isolation": "read committed",
    "statement_timeout": "0",
    # A daemon that is stopped in the middle of a transaction must not hold the others up.
    "idle_in_transaction_session_timeout": "10s",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
}
ATTEMPTS: Final = 4
"""How often a transaction is tried that may succeed if it is tried again."""
_LOCK_TIMEOUT_S: Final = 10.0
_ANSWER_S: Final = 10.0
"""How long a server may take to answer the first statements of a session."""
STANDBYS: Final = frozenset({Sync.STANDBY, Sync.APPLY})
"""With which a commit waits for a standby."""
_SYNC: Final[Mapping[Sync, str]] = {Sync.STANDBY: "on", Sync.APPLY: "remote_apply", Sync.LOCAL: "local"}

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_ENCRYPTED: Final = frozenset({"require", "verify-ca", "verify-full"})

_LOST: Final = re.compile("08...|57P0[1235]|25006|25P03|26000")
"""SQLSTATEs after which a connection is of no use.

It broke, the server goes down, it is no primary any more, or it has not the prepared statements that the driver names.
"""
_AGAIN: Final = frozenset({"40001", "40P01", "55P03"})
"""A serialization failure, a deadlock, a lock that was not to be had: the same transaction may succeed."""
_OF_ONE: Final = re.compile("2[23]...|54...")
"""What is wrong with values alone: data, constraints, a limit of the server such as the size of an index's entry."""
_FULL: Final = "53100"
_LIMIT: Final = re.compile("53...")
_CANCELLED: Final = "57014"
_NOT_OURS: Final = re.compile("42P01|42703|42883|3F000")


@dataclass(frozen=True, slots=True)
class Target:
    """A database, and how it is connected to."""

    parameters: Mapping[str, str]
    schema: str
    sync: Sync
    name: str
    """How messages call it; it holds no password."""
    commit_timeout_s: float
    """After so long an answer counts as lost."""

    @property
    def lock_timeout_s(self) -> float:
        """How long one attempt waits for a lock: every attempt comes to its end before the answer counts as lost."""
        return min(_LOCK_TIMEOUT_S, self.commit_timeout_s / (ATTEMPTS + 1))

    @property
    def waits_for_standby(self) -> bool:
        """Whether a commit waits for a synchronous standby."""
        return self.sync in STANDBYS

    @property
    def is_exposed(self) -> bool:
        """Whether what is sent can be read by others on the way, or a server in the middle could answer."""
        hosts = (*self.parameters.get("host", "").split(","), *self.parameters.get("hostaddr", "").split(","))
        is_near = all(not host or host.startswith(("/", "@")) or host in _LOOPBACK for host in hosts)
        return not is_near and self.parameters.get("sslmode") not in _ENCRYPTED

    @classmethod
    def of(cls, settings: Settings) -> Target:
        """Return what the settings name.

        Raises:
            DatabaseError: if the URL is none, or the file of the password cannot be read.

        """
        assert settings.db_url is not None  # noqa: S101 - the caller has looked
        try:
            given = conninfo.conninfo_to_dict(settings.db_url.get_secret_value())
        except psycopg.Error:
            # What the driver says of it may hold the password.
            raise DatabaseError(
                "TELEMETRY_DB_URL is no address of PostgreSQL, such as postgresql://telemetryd@db1,db2/telemetry?"
                "sslmode=verify-full (postgresql.org/docs/current/libpq-connect.html)"
            ) from None
        parameters = {**_DEFAULTS, **{name: str(value) for name, value in given.items() if value is not None}}
        if settings.db_password_file is not None:
            parameters["password"] = _password(settings)
        hosts = parameters.get("host", parameters.get("hostaddr", "")).split(",")
        sync = settings.db_sync or (Sync.STANDBY if len(hosts) > 1 else Sync.LOCAL)
        return cls(parameters, settings.db_schema, sync, _name(parameters, hosts), settings.db_commit_timeout_s)


def _password(settings: Settings) -> str:
    path = settings.db_password_file
    assert path is not None  # noqa: S101 - the caller has looked
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DatabaseError(f"TELEMETRY_DB_PASSWORD_FILE={path} cannot be read: {reason}") from None
    if not text:
        raise DatabaseError(f"TELEMETRY_DB_PASSWORD_FILE={path} holds no password")
    return text


def _name(parameters: Mapping[str, str], hosts: list[str]) -> str:
    ports = parameters.get("port", "").split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    places = [f"{host}:{port}" if port else host for host, port in zip(hosts, ports, strict=False)]
    return f"postgresql://{','.join(places)}/{parameters.get('dbname', parameters.get('user', ''))}"


class Connection:
    """One connection, used in a thread of its own: a function called there runs many statements in one hop.

    The event loop's tasks can be cancelled, a COMMIT must not: a commit whose wait for the standby is cancelled says
    that it was done (postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION).
    """

    def __init__(self, plain: Plain) -> None:
        self.plain = plain
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._end = socket.socket(fileno=os.dup(plain.fileno()))  # still ours when libpq has closed its own
        self._thread = threading.Thread(target=self._work, name="postgresql", daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether it cannot be used any more."""
        return self._is_closed or self.plain.closed

    async def run(self, function: Callable[[Plain], T]) -> T:
        """Call a function with the plain connection, in the connection's own thread."""
        return await self.start(function)

    def start(self, function: Callable[[Plain], T]) -> asyncio.Future[T]:
        """Do the same at once.

        Raises:
            ValueError: if the connection is closed.

        """
        if self._is_closed:
            raise ValueError("the connection is closed")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                result = function(self.plain)
            except BaseException as error:  # noqa: BLE001 - the caller that waits gets it
                report = partial(_fail, answer, error)
            else:
                report = partial(_succeed, answer, result)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(report)

        self._jobs.put(work)
        return answer

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def cut(self) -> None:
        """Break the connection, so that whatever waits for the server fails at once; from any thread."""
        with contextlib.suppress(OSError):  # it is broken already, or closed
            self._end.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Close it after what is under way."""
        if self._is_closed:
            return
        closing = self.start(self._close)
        self._is_closed = True
        self._jobs.put(None)
        await closing

    def _close(self, plain: Plain) -> None:
        plain.close()
        self._end.close()

    async def drop(self) -> None:
        """Close it at once, whatever is under way."""
        self.cut()
        await self.close()


def _fail(answer: asyncio.Future[Any], error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)


def _succeed(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():
        answer.set_result(result)


async def connect(target: Target, role: str, values: Mapping[str, str]) -> Connection:
    """Open a connection whose session has these settings, besides those that all have.

    Raises:
        DatabaseError: with one sentence that says why not.

    """
    is_left = threading.Event()

    def connect_unless_left() -> Plain:
        plain = connect_plainly(target, role, values)
        if is_left.is_set():  # the event loop may be closed by now
            plain.close()
        return plain

    connecting = asyncio.ensure_future(asyncio.to_thread(connect_unless_left))
    try:
        return Connection(await asyncio.shield(connecting))
    except asyncio.CancelledError:
        is_left.set()
        connecting.add_done_callback(_close_again)
        raise


def _close_again(connecting: asyncio.Future[Plain]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()


def connect_plainly(target: Target, role: str, values: Mapping[str, str]) -> Plain:
    """Do the same without a thread.

    Raises:
        DatabaseError: with one sentence that says why not.

    """
    name = f"telemetryd/{os.getpid()}/{role}"
    try:
        plain = psycopg.connect(
            conninfo.make_conninfo(**{**target.parameters, "application_name": name}), autocommit=True
        )
    except psycopg.Error as error:
        raise DatabaseError(f"Cannot connect to {target.name}: {_advice(first_line(error))}") from None
    with contextlib.ExitStack() as undo, refusing(target), answering(plain):
        undo.callback(plain.close)
        plain.adapters.register_loader("json", TextLoader)
        plain.adapters.register_loader("json", TextBinaryLoader)
        wanted = {"search_path": f'"{target.schema}"', **_OF_ALL, **values}
        plain.execute(
            "SELECT set_config(name, wanted, false) FROM unnest(%s::text[], %s::text[]) AS w (name, wanted) "
            "WHERE name IN (SELECT lower(s.name) FROM pg_settings AS s)",  # some are younger than PostgreSQL 15
            ([*wanted], [*wanted.values()]),
        )
        undo.pop_all()
    return plain


@contextlib.contextmanager
def answering(plain: Plain) -> Iterator[None]:
    """Break the connection, from a thread, if what is asked for in the block is not answered in time.

    A server that stands still keeps its connections, and its kernel answers for it: no timeout of TCP notices that.

    Raises:
        psycopg.OperationalError: then.

    """
    end = socket.socket(fileno=os.dup(plain.fileno()))
    is_late = threading.Event()

    def cut() -> None:
        is_late.set()
        with contextlib.suppress(OSError):  # it is broken already
            end.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_ANSWER_S, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except psycopg.Error as error:
        if is_late.is_set():
            raise psycopg.OperationalError(f"the server has not answered for {_ANSWER_S:g} s") from error
        raise
    finally:
        timer.cancel()
        timer.join()
        end.close()


@contextlib.contextmanager
def refusing(target: Target) -> Iterator[None]:
    """Put what the driver raises in the block into one sentence.

    Raises:
        DatabaseError: with that sentence.

    """
    try:
        yield
    except psycopg.Error as error:
        raise DatabaseError(f"Cannot use {target.name}: {first_line(error)}") from error


def writing_session(target: Target) -> Mapping[str, str]:
    """Return the settings of a session that writes."""
    commits = {"synchronous_commit": _SYNC[target.sync]} if target.sync in _SYNC else {}
    return {**_OF_WRITERS, "lock_timeout": f"{round(target.lock_timeout_s * 1000)}ms", **commits}


def reading_session(timeout_s: float) -> Mapping[str, str]:
    """Return the settings of a session that reads, each of its transactions from one snapshot."""
    return {
        "default_transaction_read_only": "on",
        "default_transaction_isolation": "repeatable read",
        "statement_timeout": str(round(timeout_s * 1000)),
        "idle_in_transaction_session_timeout": "60s",
        "idle_session_timeout": "0",
        # Else a query goes on after its client has closed the connection (runtime-config-connection.html).
        "client_connection_check_interval": "1s",
    }


_ADVICE: Final = (
    ("password authentication failed", "see TELEMETRY_DB_PASSWORD_FILE and the user in TELEMETRY_DB_URL"),
    ("no password supplied", "set TELEMETRY_DB_PASSWORD_FILE"),
    ("no pg_hba.conf entry", "let this machine in, in the server's pg_hba.conf"),
    ("read-only", "none of the hosts is a primary now"),
    ("remaining connection slots", "raise max_connections, or lower TELEMETRY_DB_READERS"),
    ("too many clients", "raise max_connections, or lower TELEMETRY_DB_READERS"),
    ("too many connections", "raise the limit, or lower TELEMETRY_DB_READERS"),
)


def _advice(text: str) -> str:
    for sign, advice in _ADVICE:
        if sign in text:
            return f"{text}; {advice}"
    return text


_BEFORE: Final = re.compile("^connection (failed|is bad): ")


def first_line(error: BaseException) -> str:
    """Return what a driver's error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _BEFORE.sub("", lines[0]) if lines else type(error).__name__


# --- What goes wrong -----------------------------------------------------------------------------


def is_lost(error: psycopg.Error) -> bool:
    """Return whether the connection is of no use after an error: the driver's own errors of that kind have no code."""
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return _LOST.fullmatch(error.sqlstate) is not None


def is_passing(error: psycopg.Error) -> bool:
    """Return whether the same transaction may succeed if it is tried again."""
    return error.sqlstate in _AGAIN


def is_of_one(error: psycopg.Error) -> bool:
    """Return whether it is one change alone that the database refuses."""
    if error.sqlstate is None:
        return isinstance(error, psycopg.DataError)
    return _OF_ONE.fullmatch(error.sqlstate) is not None


def translate(error: psycopg.Error) -> TelemetrydError:
    """Return what an error means for the callers that wait for a write."""
    state = error.sqlstate or ""
    if is_lost(error):
        return DatabaseSuspectError(f"The connection to PostgreSQL was lost: {first_line(error)}")
    if state == _FULL:
        return StorageFullError("The disk of the PostgreSQL server is full; nothing of this request was acknowledged.")
    if _LIMIT.fullmatch(state):
        return UnavailableError(f"PostgreSQL has reached a limit: {first_line(error)}")
    return WriteFailedError()


def translate_reading(error: psycopg.Error, timeout_s: float) -> TelemetrydError:
    """Return what an error means for the caller that waits for an answer."""
    if error.sqlstate == _CANCELLED:
        return QueryTimeoutError(f"The query took longer than {timeout_s:g} s and was interrupted; narrow its filters")
    if error.sqlstate is not None and _NOT_OURS.fullmatch(error.sqlstate):
        return UnavailableError(f"The database's schema is not that of telemetryd: {first_line(error)}")
    return UnavailableError("The database cannot be read now; try again later")
