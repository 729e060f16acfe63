"""baseline: the usual way. FastAPI and pydantic; each request opens SQLite, writes, commits and closes.

The handlers are coroutines although SQLite blocks them: in FastAPI's thread pool the requests would only
wait for each other's lock, and be slower.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import click
import orjson
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field

SCHEMA = Path(__file__).parents[2] / "schema" / "telemetry.sql"
Status = Literal["running", "success", "failure", "partial", "timeout", "cancelled"]


class Run(BaseModel):
    """A run; the fields that the loads send, and a few more."""

    status: Status | None = None
    end_time: datetime | None = None
    duration_ms: int | None = Field(None, ge=0)
    items_succeeded: int | None = Field(None, ge=0)
    items_failed: int | None = Field(None, ge=0)
    output_summary: str | None = None
    error_summary: str | None = None
    metrics_json: dict[str, Any] | None = None
    event_id: str = Field(min_length=1, max_length=255)
    run_id: str = Field(min_length=1, max_length=255)
    agent_name: str = Field(min_length=1, max_length=255)
    job_type: str = Field(min_length=1, max_length=255)
    start_time: datetime
    created_at: datetime | None = None
    items_discovered: int = Field(0, ge=0)
    product: str | None = None
    platform: str | None = None
    website: str | None = None
    input_summary: str | None = None
    host: str | None = None
    environment: str | None = None
    trigger_type: str | None = None
    git_repo: str | None = None
    git_branch: str | None = None
    git_commit_hash: str | None = None
    context_json: dict[str, Any] | None = None


def _columns(run: Run) -> dict[str, Any]:
    values = run.model_dump(exclude_none=True)
    for name, value in values.items():
        if isinstance(value, datetime):
            values[name] = value.isoformat()
        elif isinstance(value, dict):
            values[name] = orjson.dumps(value).decode()
    return values


def make_app(database: Path) -> FastAPI:
    """Return the app for a database, which is made if there is none."""

    @contextmanager
    def transaction() -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(database, timeout=60)
        try:
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = FULL")
            with connection:
                yield connection
        finally:
            connection.close()

    def insert(connection: sqlite3.Connection, run: Run) -> bool:
        now = datetime.now(UTC).isoformat()
        values = {"created_at": now, "updated_at": now, "status": "running", **_columns(run)}
        names, places = ", ".join(values), ", ".join("?" * len(values))
        sql = f"INSERT INTO agent_runs ({names}) VALUES ({places}) ON CONFLICT (event_id) DO NOTHING"
        return connection.execute(sql, list(values.values())).rowcount == 1

    async def create_run(run: Run) -> dict[str, Any]:
        with transaction() as connection:
            is_new = insert(connection, run)
        return {"status": "created" if is_new else "duplicate", "event_id": run.event_id, "run_id": run.run_id}

    async def get_health() -> dict[str, str]:
        return {"status": "ok"}

    with transaction() as connection:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            connection.executescript(SCHEMA.read_text("utf-8"))
    app = FastAPI()
    app.add_api_route("/api/v1/runs", create_run, methods=["POST"], status_code=201)
    app.add_api_route("/health", get_health)
    return app


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--database", type=click.Path(path_type=Path), required=True)
def main(port: int, database: Path) -> None:
    """Serve until the process is ended."""
    uvicorn.run(make_app(database), host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
