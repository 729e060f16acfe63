"""The benchmark's PostgreSQL server, as durable as a real one, and databases on it that are filled by SQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Final

from pydantic import SecretStr

from bench.errors import LostRunError
from bench.seeding import STEP_S
from bench.workplace import TELEMETRYD, Contender
from telemetryd.engine.postgres import schema
from telemetryd.engine.postgres.connection import Plain, Target, connect_plainly, writing_session
from telemetryd.model.values import format_timestamp, utc_now
from telemetryd.settings import Settings
from tests.postgres_cluster import Cluster, running

_SETTINGS: Final = {
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "autovacuum": "on",
    "shared_buffers": "1GB",
    "max_wal_size": "1GB",
    "maintenance_work_mem": "256MB",
    "log_min_messages": "warning",
}
"""Durable, and with memory for the indexes of a million runs; all else is as PostgreSQL comes."""

# The same runs as in `seeding`.
_FILL: Final = """
    INSERT INTO agent_runs (
        id, event_id, run_id, created_at, updated_at, start_time, end_time, agent_name, job_type, status,
        items_discovered, items_succeeded, items_failed, duration_ms, metrics_json, host, environment, git_repo,
        git_branch, git_commit_hash, product, trigger_type
    )
    SELECT
        n,
        lpad(to_hex(n * 2654435761 %% 4294967296), 8, '0') || '-seed-' || n,
        '20251231T153045Z-hugo-translator-' || lpad(n::text, 8, '0'),
        to_char(moment, form), to_char(moment, form),
        to_char(moment - interval '60 s', form), to_char(moment - interval '1 s', form),
        'agent-' || n %% 10,
        'job-' || n / 10 %% 5,
        (ARRAY['running', 'success', 'failure', 'partial', 'timeout', 'cancelled'])[1 + n / 50 %% 6],
        100, 98, 2, 100 * (1 + n * 7919 %% 1000), '{"tokens":12345,"cost":0.25}', 'worker-7', 'prod',
        'git@github.com:acme/site.git', 'main', 'abcdef1234567', 'words', 'cron'
    FROM generate_series(1, %(rows)s::bigint) AS n
        CROSS JOIN LATERAL (
            SELECT to_timestamp(%(now)s - (%(rows)s - n) * %(step)s) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'
        ) AS made (moment, form)
"""
# Of each tenth run what the others have not: labels, texts, a conversation.
ENRICH: Final = """
    UPDATE agent_runs SET labels = CAST('{{"team":"t' || id / 10 % 20 || '"}}' AS {json}),
        error_summary = 'Connection timed out after ' || id / 10 % 97 || ' s', conversation_id = 'c-' || id % 1000
    WHERE id % 10 = 0
"""
_NUMBER: Final = "INSERT INTO run_changes (run, seq) SELECT id, id FROM agent_runs"
# Statistics by hours are left out: no query of runs reads them.
_COUNT: Final = (
    "INSERT INTO run_totals SELECT agent_name, job_type, status, count(*) FROM agent_runs GROUP BY 1, 2, 3",
    "INSERT INTO run_minutes SELECT left(created_at, 16), count(*) FROM agent_runs GROUP BY 1",
)
_COUNT_ON: Final = "SELECT setval('numbers', %s)"
_INDEXES: Final = """
    SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index
    WHERE indrelid = 'agent_runs'::regclass AND NOT indisprimary
"""


@contextmanager
def durable_cluster() -> Iterator[Cluster]:
    """Run a server for the length of a block; the folder for temporary files decides which disk is measured."""
    with running(**_SETTINGS) as cluster:
        yield cluster


def target_of(url: str) -> Target:
    """Return the database at a URL."""
    return Target.of(Settings(db_url=SecretStr(url)))


DAEMON: Final = Contender("telemetryd on PostgreSQL", TELEMETRYD)


@dataclass(frozen=True, slots=True)
class Database:
    """A database on the server, with telemetryd's schema."""

    cluster: Cluster
    name: str

    @property
    def url(self) -> str:
        """Its address."""
        return self.cluster.url(self.name)

    @property
    def variables(self) -> dict[str, str]:
        """What tells a daemon of it."""
        return {"TELEMETRY_DB_URL": self.url}

    def check_created(self, nonce: str, acknowledged: int) -> None:
        """Make sure that a load's runs are at least as many as were acknowledged.

        Raises:
            LostRunError: if they are fewer.

        """
        found = self.cluster.execute(f"SELECT count(*) FROM agent_runs WHERE event_id LIKE '%-{nonce}'", self.name)
        stored = int(str(found[0][0]))
        if stored < acknowledged:
            raise LostRunError(f"{acknowledged} runs were acknowledged, but {self.name} holds only {stored} of them")


@contextmanager
def database(cluster: Cluster, template: str) -> Iterator[Database]:
    """Make a database as another one is, for the length of a block."""
    name = cluster.make(template)
    try:
        yield Database(cluster, name)
    finally:
        cluster.drop(name)


def make(cluster: Cluster) -> str:
    """Make a database with telemetryd's schema; return its name."""
    name = cluster.make()
    with closing(_connect(cluster.url(name))) as plain:
        schema.make(plain, target_of(cluster.url(name)), format_timestamp(utc_now()), count_anew=None)
    return name


def fill(url: str, rows: int, now: int) -> None:
    """Fill a database that has the schema and nothing else; the last run is of `now`, in seconds since 1970."""
    with closing(_connect(url)) as plain:
        with plain.transaction():
            indexes = plain.execute(_INDEXES).fetchall()
            for name, _ in indexes:
                plain.execute(f"DROP INDEX {name}".encode())
            plain.execute(_FILL, {"rows": rows, "step": STEP_S, "now": now})
            plain.execute(ENRICH.format(json="json").encode())
            for _, statement in indexes:
                plain.execute(statement.encode())
            plain.execute(_NUMBER)
            plain.execute(_COUNT_ON, (rows,))
            for statement in _COUNT:
                plain.execute(statement.encode())
        plain.execute("VACUUM (ANALYZE)")


def _connect(url: str) -> Plain:
    target = target_of(url)
    return connect_plainly(target, "bench", writing_session(target))
