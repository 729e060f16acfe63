"""What a daemon on a SQLite database answers to a follower, without the daemon."""

from __future__ import annotations

import sqlite3

import orjson

from telemetryd.cli.follow import Page
from telemetryd.engine.sqlite.statements.changes import fetch_changes
from telemetryd.model.changes import BEGINNING, Followed, ListChanges, RunChanged, RunDeleted, answer_with
from telemetryd.model.runs import to_json


def page_of(connection: sqlite3.Connection, followed: Followed, limit: int) -> Page:
    """What a daemon on this database answers to a follower."""
    after = BEGINNING if followed.cursor is None else followed.cursor.seq
    changes = fetch_changes(
        connection, ListChanges(after, limit, events_after=followed.last_event, known=followed.known)
    )
    assert changes.unknown is None
    found: list[RunChanged | RunDeleted] = [
        {"seq": seq, "run": to_json(what)} if isinstance(what, tuple) else {"seq": seq, "deleted": what}
        for seq, what in changes.found
    ]
    return Page.read(orjson.loads(orjson.dumps(answer_with(changes, found))))
