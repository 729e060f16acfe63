"""Where a command runs: through the running daemon's API, or directly on the database."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import aiohttp
import click
import orjson

from telemetryd.cli.database import refuse_missing
from telemetryd.cli.options import load_for
from telemetryd.cli.reach import (
    RefusedError,
    Request,
    Where,
    is_hopeless,
    local_url,
    pause_s,
    read_list,
    read_object,
    reason,
    refusal,
    refuse_missing_socket,
    session,
    settings_token,
)
from telemetryd.client.address import unix_url, why
from telemetryd.client.config import Config
from telemetryd.client.transport import Transport, UnreachableError
from telemetryd.configuration import Origin, load
from telemetryd.engine.factory import open_read_only, owner
from telemetryd.engine.interface import QueryingEngine
from telemetryd.errors import ConfigurationError, DatabaseOwnedError, InvalidRequestError, UnavailableError
from telemetryd.model import event_queries, events, queries, regressions, runs, stats, values
from telemetryd.model.filters import TIME_BOUNDS, Filters, quoted
from telemetryd.ops.metrics import Metrics
from telemetryd.services import admin
from telemetryd.settings import SYSTEM_SOCKET, Settings, variable, without_password
from telemetryd.store import Store

Body = dict[str, Any]
_PAGE: Final = 500
_PROBE_S: Final = 5.0
_TOKENS: Final = ("api_auth_token", "api_auth_token_file")


class Source(Protocol):
    """Something that can be asked what the runs add up to."""

    async def stats(self, parameters: dict[str, str]) -> Body:
        """Answer what `GET /api/v1/stats` answers."""

    async def regressions(self, parameters: dict[str, str]) -> Body:
        """Answer what `GET /api/v1/regressions` answers."""


class Target(Source, Protocol):
    """Something that prunes, reaps and lists runs, too."""

    async def prune(self, body: Body) -> Body:
        """Answer what `POST /api/v1/admin/prune` answers."""

    async def reap(self, body: Body) -> Body:
        """Answer what `POST /api/v1/admin/reap` answers."""

    async def confirm(self, body: Body) -> Body:
        """Answer what `POST /api/v1/admin/confirm` answers."""

    async def delete(self, event_id: str) -> Body:
        """Answer what `DELETE /api/v1/runs/{event_id}` answers."""

    async def redact(self, body: Body) -> Body:
        """Answer what `POST /api/v1/admin/redact` answers."""

    def pages(self, filters: dict[str, str]) -> AsyncIterator[list[Body]]:
        """Yield page after page of what `GET /api/v1/runs` answers, each run with its first events."""

    async def run(self, event_id: str) -> Body | None:
        """Answer what `GET /api/v1/runs/{event_id}` answers, with its first events; None if there is no such run."""

    async def events(self, event_id: str, offset: int) -> list[Body]:
        """Answer what `GET /api/v1/runs/{event_id}/events` answers, as many as there are at once."""


class Neighbour:
    """The database, read next to the daemon that owns it."""

    def __init__(self, engine: QueryingEngine, clock: Callable[[], datetime] = values.utc_now) -> None:
        self._engine = engine
        self._clock = clock

    async def stats(self, parameters: dict[str, str]) -> Body:
        """Read the statistics."""
        query = stats.parse(urlencode(parameters), self._clock())
        return {**stats.to_json(query, await self._engine.read(query))}

    async def regressions(self, parameters: dict[str, str]) -> Body:
        """Look for regressions."""
        query = regressions.parse(urlencode(parameters), self._clock())
        return {**regressions.to_json(query, await self._engine.read(query))}


class Local:
    """The database itself, which no daemon owns."""

    def __init__(self, store: Store, clock: Callable[[], datetime] = values.utc_now) -> None:
        self._store = store
        self._clock = clock

    async def prune(self, body: Body) -> Body:
        """Delete a slice."""
        return await admin.prune(self._store, body, self._clock())

    async def reap(self, body: Body) -> Body:
        """Cancel a slice."""
        return await admin.reap(self._store, body, self._clock())

    async def confirm(self, body: Body) -> Body:
        """Write it into the database."""
        return await admin.confirm(self._store, body, self._clock())

    async def delete(self, event_id: str) -> Body:
        """Delete the run."""
        return await admin.delete(self._store, event_id)

    async def redact(self, body: Body) -> Body:
        """Remove what the fields hold."""
        return await admin.redact(self._store, body)

    async def stats(self, parameters: dict[str, str]) -> Body:
        """Read the statistics from the database."""
        query = stats.parse(urlencode(parameters), self._clock())
        return {**stats.to_json(query, await self._store.fetch(query))}

    async def regressions(self, parameters: dict[str, str]) -> Body:
        """Look for regressions in the database."""
        query = regressions.parse(urlencode(parameters), self._clock())
        return {**regressions.to_json(query, await self._store.fetch(query))}

    async def pages(self, filters: dict[str, str]) -> AsyncIterator[list[Body]]:
        """Yield pages from the database."""
        after: queries.Position | None = None
        limit = _PAGE
        bounds = {name: value for name, value in filters.items() if name in TIME_BOUNDS}
        equal = {name: (value,) for name, value in filters.items() if name not in bounds}
        while True:
            try:
                asked = queries.ListRuns(Filters(equal, bounds), limit, 0, after, with_events=True)
                page = await self._store.fetch(asked)
            except InvalidRequestError:
                limit //= 2  # so many runs are too large for one page
                if not limit:
                    raise
                continue
            yield [orjson.loads(run) for run in page.runs]
            if page.end is None:
                return
            after = page.end

    async def run(self, event_id: str) -> Body | None:
        """Read a run from the database."""
        found = await self._store.fetch(queries.GetRun(event_id, events.MAX_EVENTS))
        return None if found is None else runs.to_json(found[0]) | events.page_fields(found[1])

    async def events(self, event_id: str, offset: int) -> list[Body]:
        """Read events from the database."""
        page = await self._store.fetch(event_queries.ListEvents(event_id, events.MAX_EVENTS, offset))
        return [] if page is None else [events.to_json(row) for row in page.rows]


class Remote:
    """A running daemon, over HTTP.

    Args:
        request: sends requests to it.
        patience_s: how long it may refuse for the moment, or not be there (a restart takes a second or two).

    """

    def __init__(self, request: Request, patience_s: float = 30.0) -> None:
        self._request = request
        self._patience_s = patience_s

    async def prune(self, body: Body) -> Body:
        """Ask for a slice."""
        return await self._object("POST", "/api/v1/admin/prune", (_counted(body, "pruned"),), json=body)

    async def reap(self, body: Body) -> Body:
        """Ask for a slice."""
        return await self._object("POST", "/api/v1/admin/reap", (_counted(body, "reaped"),), json=body)

    async def confirm(self, body: Body) -> Body:
        """Ask to write it down."""
        field = "clock" if "date" in body else "prune_after"
        return await self._object("POST", "/api/v1/admin/confirm", (field,), json=body)

    async def delete(self, event_id: str) -> Body:
        """Ask to delete the run."""
        return await self._object("DELETE", f"/api/v1/runs/{quote(event_id, safe='')}", ("deleted",))

    async def redact(self, body: Body) -> Body:
        """Ask to remove it."""
        return await self._object("POST", "/api/v1/admin/redact", ("redacted",), json=body)

    async def stats(self, parameters: dict[str, str]) -> Body:
        """Ask for statistics."""
        return await self._object("GET", "/api/v1/stats", ("groups", "group_by", "bucket"), params=parameters)

    async def regressions(self, parameters: dict[str, str]) -> Body:
        """Ask for regressions."""
        return await self._object("GET", "/api/v1/regressions", ("regressions", "pairs"), params=parameters)

    async def pages(self, filters: dict[str, str]) -> AsyncIterator[list[Body]]:
        """Yield pages by following the Link header."""
        asked = {name: quoted(value) for name, value in filters.items()}
        parameters: dict[str, str] | None = {**asked, "limit": str(_PAGE), "include": queries.EVENTS}
        while parameters is not None:
            try:
                response, text = await self._ask("GET", "/api/v1/runs", params=parameters)
            except RefusedError as error:
                limit = int(parameters["limit"]) // 2  # so many runs may be too large for one page
                if error.status != 400 or not limit:
                    raise
                parameters["limit"] = str(limit)
                continue
            yield read_list(response, text, "event_id")
            following = urlsplit(str(response.links["next"]["url"])).query if "next" in response.links else ""
            parameters = dict(parse_qsl(following)) if following else None

    async def run(self, event_id: str) -> Body | None:
        """Ask for a run."""
        path = f"/api/v1/runs/{quote(event_id, safe='')}"
        try:
            return await self._object("GET", path, ("event_id",), params={"include": queries.EVENTS})
        except RefusedError as error:
            if error.status != 404:
                raise
            return None

    async def events(self, event_id: str, offset: int) -> list[Body]:
        """Ask for the events of one run; of one that was deleted there are none."""
        parameters = {"limit": str(events.MAX_EVENTS), "offset": str(offset)}
        response, text = await self._ask("GET", f"/api/v1/runs/{quote(event_id, safe='')}/events", params=parameters)
        return read_list(response, text, "event_type")

    async def _object(self, method: str, path: str, fields: Collection[str], **options: Any) -> Body:
        response, text = await self._ask(method, path, **options)
        return read_object(response, text, fields)

    async def _ask(self, method: str, path: str, **options: Any) -> tuple[aiohttp.ClientResponse, bytes]:
        """Send a request until it is answered with 200; return the answer.

        Every request of ours may be repeated: what was done already is not there to be done again.
        """
        until = time.monotonic() + self._patience_s
        while True:
            try:
                async with self._request(method, path, **options) as response:
                    text = await response.read()
                    if response.status == 200:
                        return response, text
                    pause, problem = pause_s(response.headers), refusal(response, text)
                    if response.status not in (429, 503) or time.monotonic() + pause > until:
                        raise RefusedError(problem, response.status)
            except (aiohttp.ClientError, OSError) as error:
                problem, pause = f"Cannot reach the daemon: {reason(error, self._request.url)}", 1.0
                if is_hopeless(error) or time.monotonic() + pause > until:
                    raise UnavailableError(problem) from error
            click.echo(f"{problem}; trying again in {pause:g} s", err=True)
            await asyncio.sleep(pause)


def _counted(body: Body, done: str) -> str:
    """Return the count that an answer to an admin's request has: a dry run only says how many there are."""
    return "matching" if body.get("dry_run") else done


@dataclass(frozen=True, slots=True)
class Place:
    """Where a command works: through a daemon, or on the database that no daemon owns."""

    settings: Settings | None
    """Of the database, if it is one that this command may open."""
    config: Config | None
    """Of the daemon, if there is one and it can be reached."""
    obstacle: str = ""
    """Why a daemon that owns the database cannot be reached."""

    def __str__(self) -> str:
        if self.config is not None:
            return f"the daemon at {self.config.url}"
        if self.settings is None:
            return ""
        url = self.settings.db_url
        place = self.settings.db_path.absolute() if url is None else without_password(url.get_secret_value())
        return f"the database {place}"


def decide(where: Where) -> Place:
    """Decide where a command works.

    An address that is named wins. Else it is the daemon that owns the database, by the sockets where it may listen,
    then by its token and port; or the database itself if nobody owns it. Without any database at hand, it is the
    daemon of this machine's service.

    Raises:
        ConfigurationError: if a setting cannot be used.

    """
    if where.address() is not None:
        return Place(None, where.config(token=_token_of_dotenv()))
    loaded = load_for(where.settings)
    settings, socket_named = loaded.settings, loaded.settings.unix_socket
    if socket_named is not None and not where.names_database and _silence(socket_named) is None:
        return Place(None, _through(where, settings, socket_named))
    if settings.db_url is not None:  # to which anybody may write, next to its daemons
        return Place(settings, None)
    holder = owner(settings) or _other_user(settings)
    if holder is None:
        is_found = settings.db_path.exists() or loaded.origins["db_path"] is not Origin.DEFAULT
        if is_found or _silence(SYSTEM_SOCKET) is not None:
            return Place(settings, None)
        return Place(None, _through(where, settings, SYSTEM_SOCKET))
    return _through_owner(where, settings, holder)


def _through_owner(where: Where, settings: Settings, holder: str) -> Place:
    """Find a way to the daemon that owns a database."""
    tried = []
    for path in dict.fromkeys((settings.unix_socket or settings.own_socket, SYSTEM_SOCKET)):
        if path is None:
            continue
        silence = _silence(path)
        if silence is None and (path == settings.own_socket or _serves(path, settings.db_path)):
            return Place(settings, _through(where, settings, path))
        tried.append(f"{path}: {silence or 'it serves another database'}")
    if (token := where.token(settings_token(settings))) is not None:
        return Place(settings, where.config(local_url(settings, "127.0.0.1"), token))
    return Place(
        settings,
        None,
        f"A telemetryd ({holder}) owns this database, and does not answer by a Unix socket ({'; '.join(tried)}). Run "
        "the command as the daemon's user or root, give --unix SOCKET as the daemon has it, or set "
        "TELEMETRY_API_AUTH_TOKEN (or --auth-token-file) to its token",
    )


def _token_of_dotenv() -> str | None:
    """Return the token of a `.env` file, which may be another program's; one in the environment comes before it."""
    if any(os.environ.get(variable(name)) for name in _TOKENS):
        return None
    try:
        return settings_token(load(environment={}, names=_TOKENS, needs_dotenv=False).settings)
    except ConfigurationError:
        return None


def _through(where: Where, settings: Settings, path: Path) -> Config:
    return where.config(unix_url(path), settings_token(settings))


def _silence(path: Path) -> str | None:
    """Return why nobody answers at a Unix socket, None if somebody listens there."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(path))
        except OSError as error:
            return why(error)
    return None


def _other_user(settings: Settings) -> str | None:
    """Return that another user's daemon owns the database, of which this one may look at nothing but the socket."""
    own = settings.own_socket
    return "of another user" if own is not None and _silence(own) == os.strerror(errno.EACCES) else None


def _serves(path: Path, database: Path) -> bool:
    """Return whether the daemon at a Unix socket has this database."""
    with closing(Transport(Config(url=unix_url(path), timeout_s=_PROBE_S))) as transport:
        try:
            health = transport.request("GET", "/health").body
            return os.path.samefile(health["db_path"], database)
        except (UnreachableError, TypeError, KeyError, OSError):
            return False


@asynccontextmanager
async def find_target(where: Where, *, changes: bool = False) -> AsyncIterator[Target]:
    """Give the daemon, or the database, that is decided on.

    Args:
        where: what the command line says.
        changes: whether the command deletes or cancels something; then it is said first where.

    Raises:
        TelemetrydError: if neither can be used; the message says what to add to the command.

    """
    place = decide(where)
    if place.obstacle:
        raise DatabaseOwnedError(place.obstacle)
    if place.config is None and place.settings is not None and place.settings.db_url is None:
        refuse_missing(place.settings.db_path, by_address=True)
    if changes:
        click.echo(f"telemetryd: works on {place}", err=True)
    if place.config is not None:
        refuse_missing_socket(place.config)
        async with session(place.config) as request:
            yield Remote(request)
        return
    assert place.settings is not None  # noqa: S101 - for the type checker
    store = await Store.open(place.settings, Metrics())
    try:
        yield Local(store)
    finally:
        await store.close()


@asynccontextmanager
async def find_source(where: Where) -> AsyncIterator[Source]:
    """Give what `find_target` gives; but the database next to its daemon, where that cannot be reached.

    Raises:
        TelemetrydError: if it cannot be used.

    """
    place = decide(where)
    if place.settings is None or not place.obstacle:
        async with find_target(where) as target:
            yield target
        return
    engine = await open_read_only(place.settings)
    try:
        yield Neighbour(engine)
    finally:
        await engine.close()


def ask_source(where: Where, question: Callable[[Source], Awaitable[Body]]) -> Body:
    """Return the answer to one question, from the source that `find_source` gives.

    Raises:
        TelemetrydError: if there is none.

    """

    async def ask() -> Body:
        async with find_source(where) as source:
            return await question(source)

    return asyncio.run(ask())
