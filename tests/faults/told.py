"""A client that writes down what it was told of each run, and the comparison of a database with that."""

from __future__ import annotations

import contextlib
import http.client
import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import urlsplit

from tests.conftest import Row, make_run


class Counts(TypedDict):
    """What the ledger takes."""

    acknowledged: int
    lost: int
    duplicated: int
    unrecovered: int
    server_errors: int


@dataclass
class Told:
    """What the daemon at an address said to every run that was sent to it."""

    url: str
    acknowledged: set[str] = field(default_factory=set)
    refused: dict[str, Row] = field(default_factory=dict)
    """Runs whose last answer was 503 or none; they may be stored or not."""
    server_errors: int = 0
    """5xx answers that are not a 503 with `Retry-After`."""
    statuses: Counter[int | None] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)

    def send(self, run: Row | None = None, timeout_s: float = 60, **fields: Any) -> int | None:
        """Post one run; return the status, or None if there was no answer."""
        run = make_run(**fields) if run is None else run
        status, headers, answer = self.call("POST", "/api/v1/runs", run, timeout_s)
        self.statuses[status] += 1
        if status in (200, 201):
            self.acknowledged.add(run["event_id"])
            self.refused.pop(run["event_id"], None)
            return status
        assert status in (503, None), answer
        self.refused[run["event_id"]] = run
        if status == 503:
            self.details.append(answer["detail"])
            self.server_errors += "Retry-After" not in headers
        return status

    def health(self) -> tuple[int | None, Row]:
        """Ask for the health."""
        status, _, answer = self.call("GET", "/health")
        return status, answer

    def call(self, method: str, path: str, body: object = None, timeout_s: float = 60) -> tuple[int | None, Row, Any]:
        """Send a request over a connection of its own; return status, headers and decoded answer."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=timeout_s)
        with closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            headers = {"Content-Type": "application/json"} if body is not None else {}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            return response.status, dict(response.headers), json.loads(response.read())
        return None, {}, None

    def send_until(self, is_enough: Callable[[int | None], bool], timeout_s: float = 60, **fields: Any) -> None:
        """Send run after run until the status is as wanted."""
        deadline = time.monotonic() + timeout_s
        while not is_enough(self.send(**fields)):
            assert time.monotonic() < deadline, (self.statuses, self.details[-3:])
            time.sleep(0.02)

    def repeat(self) -> None:
        """Send again what was refused, as clients do."""
        for run in list(self.refused.values()):
            assert self.send(run) in (200, 201)

    def compare(self, database: Path) -> Counts:
        """Return how many runs are lost, there twice, or not recovered, as the ledger takes it."""
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            checked = connection.execute("PRAGMA integrity_check").fetchall()
            stored = Counter(row[0] for row in connection.execute("SELECT event_id FROM agent_runs NOT INDEXED"))
        return {
            "acknowledged": len(self.acknowledged),
            "lost": len(self.acknowledged - stored.keys()),
            "duplicated": sum(count > 1 for count in stored.values()),
            "unrecovered": int(checked != [("ok",)]),
            "server_errors": self.server_errors,
        }
