"""Notices that commits are gone: a server took over without them, or an older copy was restored.

Subscribers continue after numbers that they know, and those may be drawn again then; so a new epoch begins. Two things
tell: a daemon that has seen a number further on, and the server's own identity, which outlives every daemon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from telemetryd.engine.postgres.connection import Plain
from telemetryd.engine.postgres.statements.numbers import NEWEST
from telemetryd.ops.logs import log

_STAND: Final = f"SELECT {NEWEST}, (SELECT epoch FROM change_feed)"
# A timeline begins with each server that takes over, an identifier with each initdb
# (postgresql.org/docs/current/continuous-archiving.html#BACKUP-TIMELINES, functions-info.html).
_LINEAGES: Final = """
    SELECT lineage, (SELECT system_identifier::text FROM pg_control_system()),
        left(pg_walfile_name(pg_current_wal_lsn()), 8)
    FROM change_feed
"""
_NOTE: Final = "UPDATE change_feed SET lineage = %s"


@dataclass(frozen=True, slots=True)
class Stand:
    """Where the commit sequence stands."""

    newest: int
    epoch: str

    def lacks_what_was(self, before: Stand) -> bool:
        """Return whether commits are gone that were there before."""
        return self.epoch == before.epoch and self.newest < before.newest


def stand(plain: Plain) -> Stand:
    """Return where the commit sequence stands."""
    return Stand(*plain.execute(_STAND).fetchall()[0])


def make_epoch(plain: Plain, seen: Stand) -> Stand:
    """Begin a new epoch, after every number that was seen: commits that subscribers know of are lost."""
    plain.execute("SELECT telemetryd_take_turn(false)")
    plain.execute(
        "UPDATE change_feed SET epoch = left(replace(gen_random_uuid()::text, '-', ''), 12), "
        "floor = greatest(floor, %(newest)s), horizon = greatest(horizon, %(newest)s)",
        {"newest": seen.newest},
    )
    plain.execute("SELECT setval('numbers', greatest(nextval('numbers'), %s + 1))", (seen.newest,))
    return stand(plain)


def check(plain: Plain, seen: Stand | None, *, waits_for_standby: bool) -> None:
    """Begin a new epoch if commits are gone, or may be; call it on each connection before anything is written.

    Args:
        plain: a connection in no transaction.
        seen: the furthest stand that this daemon or a subscriber of its knows of, if it has seen any.
        waits_for_standby: whether what was seen by anybody was on a standby before; then a server that takes over
            has it.

    """
    now = stand(plain)
    if seen is not None and now.lacks_what_was(seen):
        log.error(
            "The database lacks changes that were there before; subscribers begin anew",
            extra={"seen": seen.newest, "newest": now.newest},
        )
        with plain.transaction():
            make_epoch(plain, seen)
    known, is_known, _ = _look(plain)
    if is_known:
        return
    with plain.transaction():
        plain.execute("SELECT telemetryd_take_turn(false)")  # several daemons may have come to this
        known, is_known, found = _look(plain)
        if is_known:
            return
        if known and not (waits_for_standby and _system(known) == _system(found)):
            log.error(
                "Another server holds the database, perhaps without the last changes; subscribers begin anew",
                extra={"known": known, "found": found},
            )
            make_epoch(plain, stand(plain))
        plain.execute(_NOTE, (found,))


def _look(plain: Plain) -> tuple[str, bool, str]:
    """Return the lineage that was noted, whether it is today's, and today's."""
    ((known, system, timeline),) = plain.execute(_LINEAGES).fetchall()
    found = f"{system}/{timeline}"
    return known, known == found, found


def _system(lineage: str) -> str:
    return lineage.partition("/")[0]
