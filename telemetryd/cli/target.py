"""Where a command runs: through the running daemon's API, or directly on the database."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import aiohttp
import click
import orjson

from telemetryd.cli.database import refuse_missing
from telemetryd.cli.stream import detail_of, reason
from telemetryd.client.answers import seconds_of
from telemetryd.engine.factory import open_read_only, owner
from telemetryd.engine.interface import QueryingEngine
from telemetryd.errors import DatabaseOwnedError, InvalidRequestError, TelemetrydError, UnavailableError
from telemetryd.model import event_queries, events, queries, regressions, runs, stats, values
from telemetryd.model.filters import TIME_BOUNDS, Filters, quoted
from telemetryd.ops.metrics import Metrics
from telemetryd.services import admin
from telemetryd.settings import Settings
from telemetryd.store import Store

Body = dict[str, Any]
_PAGE: Final = 500
_PROBE_S: Final = 5.0
_PATIENCE_S: Final = 30.0
"""How long a daemon may refuse for the moment, or not be there (a restart takes a second or two)."""


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


class RefusedError(TelemetrydError):
    """The daemon refused the request, with a status of 4xx or 5xx."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


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
    """A running daemon, over HTTP."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def prune(self, body: Body) -> Body:
        """Ask for a slice."""
        answer: tuple[Body, str] = await self._ask("POST", "/api/v1/admin/prune", json=body)
        return answer[0]

    async def reap(self, body: Body) -> Body:
        """Ask for a slice."""
        answer: tuple[Body, str] = await self._ask("POST", "/api/v1/admin/reap", json=body)
        return answer[0]

    async def confirm(self, body: Body) -> Body:
        """Ask to write it down."""
        answer: tuple[Body, str] = await self._ask("POST", "/api/v1/admin/confirm", json=body)
        return answer[0]

    async def delete(self, event_id: str) -> Body:
        """Ask to delete the run."""
        answer: tuple[Body, str] = await self._ask("DELETE", f"/api/v1/runs/{quote(event_id, safe='')}")
        return answer[0]

    async def redact(self, body: Body) -> Body:
        """Ask to remove it."""
        answer: tuple[Body, str] = await self._ask("POST", "/api/v1/admin/redact", json=body)
        return answer[0]

    async def stats(self, parameters: dict[str, str]) -> Body:
        """Ask for statistics."""
        answer: tuple[Body, str] = await self._ask("GET", "/api/v1/stats", params=parameters)
        return answer[0]

    async def regressions(self, parameters: dict[str, str]) -> Body:
        """Ask for regressions."""
        answer: tuple[Body, str] = await self._ask("GET", "/api/v1/regressions", params=parameters)
        return answer[0]

    async def pages(self, filters: dict[str, str]) -> AsyncIterator[list[Body]]:
        """Yield pages by following the Link header."""
        asked = {name: quoted(value) for name, value in filters.items()}
        parameters: dict[str, str] | None = {**asked, "limit": str(_PAGE), "include": queries.EVENTS}
        while parameters is not None:
            try:
                page, following = await self._ask("GET", "/api/v1/runs", params=parameters)
            except RefusedError as error:
                limit = int(parameters["limit"]) // 2  # so many runs may be too large for one page
                if error.status != 400 or not limit:
                    raise
                parameters["limit"] = str(limit)
                continue
            yield page
            parameters = dict(parse_qsl(following)) if following else None

    async def run(self, event_id: str) -> Body | None:
        """Ask for a run."""
        try:
            answer: tuple[Body, str] = await self._ask(
                "GET", f"/api/v1/runs/{quote(event_id, safe='')}", params={"include": queries.EVENTS}
            )
        except RefusedError as error:
            if error.status != 404:
                raise
            return None
        return answer[0]

    async def events(self, event_id: str, offset: int) -> list[Body]:
        """Ask for the events of one run; of one that was deleted there are none."""
        parameters = {"limit": str(events.MAX_EVENTS), "offset": str(offset)}
        answer: tuple[list[Body], str] = await self._ask(
            "GET", f"/api/v1/runs/{quote(event_id, safe='')}/events", params=parameters
        )
        return answer[0]

    async def _ask(self, method: str, path: str, **options: Any) -> tuple[Any, str]:
        """Send a request until it is answered; return the answer, and the query string of the next page.

        Every request of ours may be repeated: what was done already is not there to be done again.
        """
        until = time.monotonic() + _PATIENCE_S
        while True:
            try:
                async with self._session.request(method, path, **options) as response:
                    text = await response.read()
                    if response.status == 200:
                        link = response.links["next"]["url"] if "next" in response.links else ""
                        try:
                            return orjson.loads(text), urlsplit(str(link)).query
                        except ValueError as error:
                            raise RefusedError("What answered is no telemetryd: it sent no JSON", 200) from error
                    pause = seconds_of(response.headers.get("Retry-After", "1"))
                    if response.status not in (429, 503) or time.monotonic() + pause > until:
                        hint = _WHERE_ACCESS_COMES_FROM if response.status == 401 else ""
                        raise RefusedError(
                            f"The daemon answered {response.status}: {detail_of(text)}{hint}", response.status
                        )
                    problem = f"The daemon answers {response.status}: {detail_of(text)}"
            except (aiohttp.ClientConnectionError, TimeoutError) as error:
                problem, pause = f"Cannot reach the daemon: {reason(error)}", 1.0
                if time.monotonic() + pause > until:
                    raise UnavailableError(problem) from error
            click.echo(f"{problem}; trying again in {pause:g} s", err=True)
            await asyncio.sleep(pause)


_WHERE_ACCESS_COMES_FROM: Final = (
    ". A command finds its token in TELEMETRY_API_AUTH_TOKEN or in the file that TELEMETRY_API_AUTH_TOKEN_FILE names"
)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


@asynccontextmanager
async def find_target(settings: Settings, url: str | None) -> AsyncIterator[Target]:
    """Give the daemon at a URL; else the one that owns the database; else the database itself.

    Raises:
        TelemetrydError: if neither can be used; the message says what to add to the command.

    """
    # A socket on which somebody listens is meant, whatever database the settings name, or none, is on this machine.
    is_heard = url is None and settings.api_unix is not None and _listens(settings.api_unix)
    holder = None if url or is_heard else owner(settings)
    if url is None and holder is None and not is_heard:
        refuse_missing(settings.db_path.absolute())
        store = await Store.open(settings, Metrics())
        try:
            yield Local(store)
        finally:
            await store.close()
        return
    token = settings.token()
    headers = {"Authorization": f"Bearer {token.decode()}"} if token is not None else {}
    if url is None and settings.api_unix is None and token is None:
        raise DatabaseOwnedError(
            f"A telemetryd ({holder}) owns this database; to reach it, give --unix SOCKET as the daemon has it, "
            "or set TELEMETRY_API_AUTH_TOKEN (or --auth-token-file) to its token"
        )
    use_unix = url is None and settings.api_unix is not None
    connector = aiohttp.UnixConnector(str(settings.api_unix)) if use_unix else aiohttp.TCPConnector()
    base = "http://telemetryd" if use_unix else url or f"http://127.0.0.1:{settings.api_port}"
    async with aiohttp.ClientSession(base, connector=connector, headers=headers) as session:
        yield Remote(session)


@asynccontextmanager
async def find_source(settings: Settings, url: str | None) -> AsyncIterator[Source]:
    """Give what `find_target` gives; but the database next to its daemon, where nothing says how to reach that.

    Raises:
        TelemetrydError: if it cannot be used.

    """
    is_reachable = url is not None or settings.api_unix is not None or settings.token() is not None
    if is_reachable or owner(settings) is None:
        async with find_target(settings, url) as target:
            yield target
        return
    engine = await open_read_only(settings)
    try:
        yield Neighbour(engine)
    finally:
        await engine.close()


def ask_source(settings: Settings, url: str | None, question: Callable[[Source], Awaitable[Body]]) -> Body:
    """Return the answer to one question, from the source that `find_source` gives.

    Raises:
        TelemetrydError: if there is none.

    """

    async def ask() -> Body:
        async with find_source(settings, url) as source:
            return await question(source)

    return asyncio.run(ask())
