"""limit-select: the same SELECT and orjson in this process, on one connection, without HTTP or threads."""

from __future__ import annotations

import sqlite3
import statistics
import time
from pathlib import Path

import orjson

from telemetryd.engine.sqlite.statements.runs import select_page
from telemetryd.model.queries import ListRuns
from telemetryd.model.runs import COLUMNS


def median_s(database: Path, limit: int, seconds: float) -> float:
    """Return the median time of selecting so many runs and turning them into JSON."""
    connection = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)
    connection.execute(f"PRAGMA cache_size = -{16 * 1024}")
    statement = select_page(ListRuns(limit=limit))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end or not times:
        orjson.dumps(
            [dict(zip(COLUMNS, row, strict=True)) for row in connection.execute(*statement).fetchall()[:limit]]
        )
        times.append(time.perf_counter() - started)
    connection.close()
    return statistics.median(times)
