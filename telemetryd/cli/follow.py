"""The command that keeps a second database in step with a daemon's: follow."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Any, Final

import click

from telemetryd.cli.options import counted, failing, json_flag, load_settings, print_json, settings_flags
from telemetryd.cli.reach import Where, client_config, daemon_flags
from telemetryd.cli.stream import Daemon, GoneError, reach
from telemetryd.errors import DatabaseError, UnavailableError
from telemetryd.model import events
from telemetryd.model.changes import LEAST_PAGE_BYTES, PAGE_BYTES, GetFollowed, write_known
from telemetryd.model.commands import ApplyChanges, CopiedRun
from telemetryd.model.runs import stored_row
from telemetryd.ops.metrics import Metrics
from telemetryd.store import Store

_PAGE: Final = 500
_WAIT_S: Final = 30
_PAGE_FIELDS: Final = ("changes", "events", "epoch", "last", "more", "newest")
_PAUSES_S: Final = (0.2, 1.0, 5.0)
_FIRST_PAGE_BYTES: Final = 1024 * 1024
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

    \b
    Examples:
      telemetryd follow http://primary:8765 --db-path copy.sqlite
      telemetryd follow unix:///run/telemetryd/telemetryd.sock --db-path copy.sqlite --once
    """
)
@click.argument("primary", metavar="[URL]", required=False)
@click.option("--once", is_flag=True, help="End when everything that there is has been taken over.")
@json_flag
@daemon_flags
@settings_flags("db_path", "lock_file", db_path="The copy; made if it is not there.")
def follow(primary: str | None, *, once: bool, as_json: bool, where: Where, **flags: Any) -> None:
    if primary is not None and where.url is not None:
        raise click.UsageError("Give one address of the primary")
    settings = load_settings(flags).settings
    config = client_config(where, url=primary)

    async def run() -> None:
        store = await Store.open(settings, Metrics())
        try:
            async with reach(config) as daemon:
                following = asyncio.create_task(_follow(daemon, store, once=once, as_json=as_json))
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
            raise DatabaseError(
                f"{error}. {settings.db_path} cannot be kept in step any more: "
                "move it away or delete it, and start this command again; it makes a new copy"
            ) from error


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


async def _follow(daemon: Daemon, store: Store, *, once: bool, as_json: bool) -> None:
    failures = changes = happened = 0
    size = PageSize()
    while True:
        followed = await store.fetch(GetFollowed())
        cursor = followed.cursor
        if followed.newest > (cursor.seq if cursor is not None else 0):
            raise DatabaseError(
                "This database holds changes that are not the primary's; follow with --db-path of one that does not "
                "exist yet"
            )
        parameters = {
            "limit": str(_PAGE),
            "wait": "0" if once else str(_WAIT_S),
            "events_after": str(followed.last_event),
            "max_bytes": str(size.bytes),
        }
        if cursor is not None:
            parameters |= {"after": str(cursor), "begun": str(followed.begun), "known": write_known(followed.known)}
        try:
            page, seconds = await daemon.timed("/api/v1/changes", parameters, _PAGE_FIELDS)
        except UnavailableError as error:
            if failures == 0:
                click.echo(f"telemetryd: {error}; trying again", err=True)
            if once and failures == len(_PAUSES_S):
                raise
            await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
            failures += 1
            size.failed()
            continue
        failures = 0
        size.took(seconds)
        if cursor is None or page["last"] != cursor.seq or page["events"]:
            # Not to be interrupted half-way: the writer carries it out anyway, and the next turn sees that.
            await asyncio.shield(store.submit(_command(page, followed.begun if cursor is not None else page["newest"])))
            changes += len(page["changes"])
            happened += len(page["events"])
        if once and not page["more"]:
            if as_json:
                print_json({"changes": changes, "events": happened, "epoch": page["epoch"], "last": page["last"]})
            else:
                taken = f"{counted(changes, 'change')} and {counted(happened, 'event')}"
                click.echo(f"{taken} taken over, up to {page['epoch']}-{page['last']}")
            return


def _command(page: dict[str, Any], begun: int) -> ApplyChanges:
    changes: list[tuple[int, CopiedRun | str]] = []
    for change in page["changes"]:
        if "deleted" in change:
            changes.append((change["seq"], change["deleted"]))
        else:
            run = change["run"]
            changes.append((change["seq"], CopiedRun(run["id"], stored_row(run), run["updated_at"])))
    happened = tuple((event["run"], *events.stored_row(event)) for event in page["events"])
    return ApplyChanges(tuple(changes), happened, page["epoch"], page["last"], begun)
