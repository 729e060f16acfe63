"""What commands do to a database while daemons may serve it: bring it up to date, check what is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from telemetryd.engine.postgres import opening, schema
from telemetryd.engine.postgres.connection import Plain, Target, connect_plainly, refusing, writing_session
from telemetryd.engine.postgres.groups import transact
from telemetryd.engine.postgres.statements import deltas
from telemetryd.errors import DatabaseError, TelemetrydError, sentence
from telemetryd.model.values import format_timestamp, utc_now
from telemetryd.settings import Settings


@contextlib.contextmanager
def _connected(settings: Settings) -> Iterator[tuple[Plain, Target]]:
    target = Target.of(settings)
    with contextlib.closing(connect_plainly(target, "command", writing_session(target))) as plain, refusing(target):
        opening.look(plain, target)
        yield plain, target


def bring_up_to_date(settings: Settings, *, dry_run: bool) -> tuple[int, int]:
    """Bring the schema to this version, unless that is only tried; return the versions before and after.

    Raises:
        DatabaseError: if that is not possible.

    """
    with _connected(settings) as (plain, target):
        before = schema.version_of(plain, target)
        if not dry_run:
            schema.make(plain, target, format_timestamp(utc_now()), count_anew=deltas.rebuild)
            schema.check(plain, target)
        return before, max(before, schema.current_version())


def count_wrong(settings: Settings, *, repair: bool) -> int:
    """Count what differs from what the runs add up to, and count everything anew if that is wanted.

    Raises:
        DatabaseError: if that is not possible.

    """
    with _connected(settings) as (plain, target):
        schema.check(plain, target)
        try:
            wrong = transact(plain, deltas.count_wrong)
            if wrong and repair:
                transact(plain, deltas.rebuild)
        except TelemetrydError as error:
            raise DatabaseError(f"Cannot check {target.name}: {sentence(error.__cause__ or error)}") from error
        return wrong
