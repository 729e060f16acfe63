"""The command that keeps a second database in step with a daemon's: follow."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from dataclasses import dataclass
from typing import Any, Final

import click

from telemetryd.cli.options import counted, failing, json_flag, load_settings, print_json, settings_flags
from telemetryd.cli.reach import Where, client_config, daemon_flags
from telemetryd.cli.stream import Daemon, GoneError, reach
from telemetryd.errors import DatabaseError, UnavailableError, sentence
from telemetryd.model import events
from telemetryd.model.changes import LEAST_PAGE_BYTES, PAGE_BYTES, Followed, GetFollowed, Known, write_known
from telemetryd.model.commands import Applied, ApplyChanges, CopiedRun, MergeChanges
from telemetryd.model.runs import stored_row
from telemetryd.model.values import Row
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import without_password
from telemetryd.store import Store

_PAGE: Final = 500
_WAIT_S: Final = 30
_PAGE_FIELDS: Final = ("changes", "events", "epoch", "last", "more", "newest")
_PAUSES_S: Final = (0.2, 1.0, 5.0)
_FIRST_PAGE_BYTES: Final = 1024 * 1024
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUICK_S: Final = 1.0
_SLOW_S: Final = 5.0
"""After a page that comes in more quickly than the first, pages become larger; after one slower than this, smaller."""


@click.command(
    help=r"""Keep a copy of a daemon's runs in step until stopped.

    The copy is a separate database that this command owns: others may read it (sqlite3, telemetryd check), and it can
    take the primary's place with `telemetryd serve`, after which it is nobody's copy any more. It has the runs and
    their events, with their ids, and the commit sequence; registered processes and originals of old values stay with
    the primary. Interrupted at any moment, it goes on where it was; what --once has done is printed. If the primary was
    restored or put back from an older copy, or this copy is too far behind, the command says so and ends: move the copy
    away, and start again. Over a slow link pages become smaller.

    With --db-url the copy is on PostgreSQL; let daemons serve it when the primary takes no more writes.

    With --as it is no copy, but a database on PostgreSQL that daemons serve and into which many others are followed,
    each under a name of its own. Runs get new ids there; of two states of a run (by its event_id) the newer one stands.
    Each source has its place, kept in the same transaction as what came from it, so that a lost connection, a kill or a
    repeat changes nothing. A source that was restored is read from its beginning, and what was followed before stays.

    \b
    Examples:
      telemetryd follow http://primary:8765 --db-path copy.sqlite
      telemetryd follow unix:///run/telemetryd/telemetryd.sock --db-path copy.sqlite --once
      telemetryd follow http://old:8765 --db-url postgresql://telemetryd@db1,db2/telemetry
      telemetryd follow http://localhost:8765 --db-url postgresql://telemetryd@db1,db2/telemetry --as plant-7
    """
)
@click.argument("primary", metavar="[URL]", required=False)
@click.option("--once", is_flag=True, help="End when everything that there is has been taken over.")
@click.option("--as", "source", metavar="NAME", help="Merge into a database on PostgreSQL, as the source of this name.")
@json_flag
@daemon_flags
@settings_flags(
    *("db_path", "lock_file", "db_url", "db_password_file", "db_schema", "db_sync"),
    db_path="The copy; made if it is not there.",
    db_url="A database on PostgreSQL in its place.",
)
def follow(primary: str | None, *, once: bool, source: str | None, as_json: bool, where: Where, **flags: Any) -> None:
    if primary is not None and where.url is not None:
        raise click.UsageError("Give one address of the primary")
    if source is not None and not _NAME.fullmatch(source):
        raise click.UsageError("--as takes a name of 1 to 64 letters, digits, dots, hyphens and underscores")
    settings = load_settings(flags).settings
    if source is not None and settings.db_url is None:
        raise click.UsageError("--as needs --db-url: only a database on PostgreSQL takes many sources")
    config = client_config(where, url=primary)

    async def run() -> None:
        store = await Store.open(settings, Metrics(), may_lead=source is None)
        try:
            async with reach(config) as daemon:
                copy = _Copy(store) if source is None else _Merged(store, source)
                following = asyncio.create_task(_follow(daemon, copy, once=once, as_json=as_json))
                for number in (signal.SIGTERM, signal.SIGINT):
                    asyncio.get_running_loop().add_signal_handler(number, following.cancel)
                with contextlib.suppress(asyncio.CancelledError):
                    await following
        finally:
            await store.close()

    with failing():
        try:
            asyncio.run(run())
        except GoneError as error:
            if settings.db_url is not None:
                name = without_password(settings.db_url.get_secret_value())
                raise DatabaseError(
                    f"{error}. {name} cannot be kept in step any more: give this command a new database there"
                ) from error
            raise DatabaseError(
                f"{error}. {settings.db_path} cannot be kept in step any more: "
                "move it away or delete it, and start this command again; it makes a new copy"
            ) from error


@dataclass(frozen=True, slots=True)
class Page:
    """What has come from the primary: changes with their numbers, and events."""

    changes: tuple[tuple[int, CopiedRun | str], ...]
    events: tuple[Row, ...]
    epoch: str
    last: int
    newest: int
    more: bool
    last_event: int
    """The highest id of these events; 0 if there are none."""

    @classmethod
    def read(cls, answer: dict[str, Any]) -> Page:
        """Return the answer of `GET /api/v1/changes`."""
        changes: list[tuple[int, CopiedRun | str]] = []
        for change in answer["changes"]:
            if "deleted" in change:
                changes.append((change["seq"], change["deleted"]))
            else:
                run = change["run"]
                changes.append((change["seq"], CopiedRun(run["id"], stored_row(run), run["updated_at"])))
        happened = tuple((event["run"], *events.stored_row(event)) for event in answer["events"])
        numbers = answer["epoch"], answer["last"], answer["newest"], answer["more"]
        last_event = max((event["id"] for event in answer["events"]), default=0)
        return cls(tuple(changes), happened, *numbers, last_event)

    def for_copy(self, begun: int) -> ApplyChanges:
        """Return the command that takes it over with its ids and numbers."""
        return ApplyChanges(self.changes, self.events, self.epoch, self.last, begun)


class _Copy:
    """A database that is equal to the primary's."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def stand(self) -> Followed:
        """Return how far it has come.

        Raises:
            DatabaseError: if it holds anything else.

        """
        followed = await self._store.fetch(GetFollowed())
        if followed.newest > (followed.cursor.seq if followed.cursor is not None else 0):
            raise DatabaseError(
                "This database holds changes that are not the primary's; follow with --db-path of one that does not "
                "exist yet, or with --db-url of one without runs"
            )
        return followed

    async def take(self, page: Page, followed: Followed) -> Applied:
        """Take over what has come since."""
        begun = page.newest if followed.cursor is None else followed.begun
        return await self._store.submit(page.for_copy(begun))

    def begin_anew(self, error: GoneError) -> None:
        """Give up.

        Raises:
            GoneError: always.

        """
        raise error


class _Merged:
    """A database that daemons serve, and into which others are followed as well."""

    def __init__(self, store: Store, source: str) -> None:
        self._store, self._source = store, source
        self._stands: Followed | None = None
        self._is_anew = False

    async def stand(self) -> Followed:
        """Return how far this source is taken over; nothing if it has to begin anew."""
        self._stands = await self._store.fetch(GetFollowed(self._source))
        return Followed(0, None, 0, 0) if self._is_anew else self._stands

    async def take(self, page: Page, followed: Followed) -> Applied:
        """Take over what has come since, unless another process with this name has done so."""
        stands = self._stands
        assert stands is not None  # noqa: S101 - the caller has asked
        command = MergeChanges(
            self._source,
            page.changes,
            page.events,
            page.epoch,
            page.last,
            begun=page.newest if followed.cursor is None else followed.begun,
            last_event=page.last_event or followed.last_event,
            known=newest_known(followed.known, page.changes),
            stood=stands.cursor,
            stood_event=stands.last_event,
        )
        applied = await self._store.submit(command)
        self._is_anew = False
        return applied

    def begin_anew(self, error: GoneError) -> None:
        """Read the source from its beginning: what is there already stays as it is."""
        click.echo(f"telemetryd: {error}; beginning anew", err=True)
        self._is_anew = True


def newest_known(known: tuple[Known, ...], changes: tuple[tuple[int, CopiedRun | str], ...]) -> tuple[Known, ...]:
    """Return what is known of a source after some changes: what was changed last, created last and deleted last."""
    named = {what if isinstance(what, str) else what.event_id for _, what in changes}
    kept = [each for each in known if each.event_id not in named or each.id is None]
    for seq, what in changes:
        if isinstance(what, str):
            kept.append(Known(seq, what))
        else:
            kept.append(Known(seq, what.event_id, what.id, what.updated_at))
    runs = [each for each in kept if each.id is not None]
    gone = [each for each in kept if each.id is None]
    last = (
        max(runs, key=lambda each: each.seq, default=None),
        max(runs, key=lambda each: each.id or 0, default=None),
        max(gone, key=lambda each: each.seq, default=None),
    )
    return tuple(dict.fromkeys(each for each in last if each is not None))


class PageSize:
    """How many bytes of runs a page may hold: as many as come in within some seconds."""

    def __init__(self) -> None:
        self.bytes = _FIRST_PAGE_BYTES

    def took(self, seconds: float) -> None:
        """Take note of how long a page came in."""
        if seconds > _SLOW_S:
            self.failed()
        elif seconds < _QUICK_S:
            self.bytes = min(self.bytes * 2, PAGE_BYTES)

    def failed(self) -> None:
        """Take note that a page did not come in whole: a link that breaks may carry a shorter one."""
        self.bytes = max(self.bytes // 2, LEAST_PAGE_BYTES)


async def _follow(daemon: Daemon, copy: _Copy | _Merged, *, once: bool, as_json: bool) -> None:
    failures = changes = happened = 0
    size = PageSize()
    while True:
        is_asked = False
        try:
            followed = await copy.stand()
            is_asked = True
            page, seconds = await _ask(daemon, followed, size, wait_s=0 if once else _WAIT_S)
            is_asked = False
            size.took(seconds)
            cursor = followed.cursor
            if cursor is None or page.last != cursor.seq or page.events:
                # Not to be interrupted half-way: the writer carries it out anyway, and the next turn sees that.
                applied = await asyncio.shield(copy.take(page, followed))
                changes += applied.changes
                happened += applied.events
        except GoneError as error:
            copy.begin_anew(error)
            continue
        except UnavailableError as error:
            if failures == 0:
                click.echo(f"telemetryd: {sentence(error)}; trying again", err=True)
            if once and failures == len(_PAUSES_S):
                raise
            await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
            failures += 1
            if is_asked:
                size.failed()
            continue
        failures = 0
        if once and not page.more:
            if as_json:
                print_json({"changes": changes, "events": happened, "epoch": page.epoch, "last": page.last})
            else:
                taken = f"{counted(changes, 'change')} and {counted(happened, 'event')}"
                click.echo(f"{taken} taken over, up to {page.epoch}-{page.last}")
            return


async def _ask(daemon: Daemon, followed: Followed, size: PageSize, *, wait_s: int) -> tuple[Page, float]:
    """Return what comes after what is there, and for how many seconds it came in; raise as `Daemon.get` does."""
    parameters = {
        "limit": str(_PAGE),
        "wait": str(wait_s),
        "events_after": str(followed.last_event),
        "max_bytes": str(size.bytes),
    }
    if followed.cursor is not None:
        known = write_known(followed.known)
        parameters |= {"after": str(followed.cursor), "begun": str(followed.begun), "known": known}
    answer, seconds = await daemon.timed("/api/v1/changes", parameters, _PAGE_FIELDS)
    return Page.read(answer), seconds
