"""The surface of the library that telemetryd replaces: change the import, and an agent goes on as it is.

from telemetryd.compat import TelemetryClient, TelemetryConfig
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

from telemetryd.client import Client
from telemetryd.client.config import DEFAULT_URL, url_of_port
from telemetryd.client.context import timestamp
from telemetryd.client.intake import MAX_NAME
from telemetryd.client.lines import encode
from telemetryd.client.old_records import SCHEMA_VERSION, APIPayload, RunEvent, RunRecord
from telemetryd.client.old_variables import base_folders, log_once, log_remarks
from telemetryd.client.run import Run
from telemetryd.uuids import new_uuid

__all__ = [
    "SCHEMA_VERSION",
    "APIPayload",
    "RunContext",
    "RunEvent",
    "RunRecord",
    "TelemetryClient",
    "TelemetryConfig",
]

logger: Final = logging.getLogger("telemetryd.client")

_PAGE: Final = 500
_REMEMBERED: Final = 1000
"""Runs that have ended and are still known by their run_id."""
_COMMIT_WAIT_S: Final = 10.0
"""How long a commit waits for its run to be stored."""


@dataclass
class TelemetryConfig:
    """The replaced library's configuration; what only its own database and files needed has no effect any more."""

    metrics_dir: Path | None = None
    database_path: Path | None = None
    ndjson_dir: Path | None = None
    api_url: str | None = None
    """The daemon's address; None means what the variables say, by default http://localhost:8765."""
    google_sheets_api_url: str | None = None
    google_sheets_api_enabled: bool = False
    api_token: str | None = field(default=None, repr=False)
    """Without effect: it was for Google Sheets. The daemon's token is TELEMETRY_API_AUTH_TOKEN, or `more["token"]`."""
    api_enabled: bool = False
    """Without effect: it was about Google Sheets only, and runs were always sent to the service."""
    retry_backoff_factor: float = 1.0
    agent_owner: str | None = None
    """Stored in each run's context_json."""
    test_mode: str | None = None
    skip_validation: bool = False
    buffer_dir: Path | None = None
    """The spool's folder; None means TELEMETRY_BUFFER_DIR, else the client's default."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further settings of `telemetryd.client.Config`."""

    @classmethod
    def from_env(cls) -> TelemetryConfig:
        """Read the variables of the environment."""
        environment = {name: text for name, text in os.environ.items() if text}
        folders = base_folders(environment)
        base = next((folder for folder in folders if folder.is_dir()), folders[0])
        buffer = environment.get("TELEMETRY_BUFFER_DIR")
        return cls(
            metrics_dir=base,
            database_path=Path(environment.get("TELEMETRY_DB_PATH", base / "db" / "telemetry.sqlite")),
            ndjson_dir=Path(environment.get("TELEMETRY_NDJSON_DIR", base / "raw")),
            api_url=environment.get("TELEMETRY_API_URL")
            or environment.get("METRICS_API_URL")
            or url_of_port(environment.get("TELEMETRY_API_PORT", ""))
            or DEFAULT_URL,
            agent_owner=environment.get("AGENT_OWNER"),
            test_mode=environment.get("TELEMETRY_TEST_MODE"),
            buffer_dir=None if buffer is None else Path(buffer),
        )

    def validate(self, strict: bool = True) -> tuple[bool, list[str]]:
        """Return whether a client can be made of it, and what is wrong if not; no folder has to be there before."""
        try:
            self.client().close()
        except (TypeError, ValueError) as error:
            return False, [str(error)]
        return True, []

    def client(self) -> Client:
        """Return a client with this configuration.

        Raises:
            TypeError, ValueError: if it cannot be used.

        """
        return Client(self.api_url, buffer_dir=self.buffer_dir, **self.more)

    def remark(self) -> None:
        """Log once in a process which of the fields that are given have no effect; variables are remarked on anyway."""
        usual, variables = TelemetryConfig(), self.from_env()
        for name, text in _WITHOUT_EFFECT.items():
            if getattr(self, name) not in (getattr(usual, name), getattr(variables, name)):
                log_once(f"TelemetryConfig.{name}", f"TelemetryConfig({name}=…) has no effect: {text}")


_SHEETS: Final = "the export to Google Sheets is gone, and runs are sent to the telemetry daemon as before"
_WITHOUT_EFFECT: Final = {
    "metrics_dir": "runs wait in the spool's folder (buffer_dir) until the daemon has stored them",
    "database_path": "only the daemon opens the database; ask it over HTTP",
    "ndjson_dir": "every run is in the spool's folder (buffer_dir) until the daemon has stored it",
    "google_sheets_api_url": _SHEETS,
    "google_sheets_api_enabled": _SHEETS,
    "api_token": f"{_SHEETS}; the daemon's token is TELEMETRY_API_AUTH_TOKEN",
    "api_enabled": _SHEETS,
    "retry_backoff_factor": "the client tries again with pauses of its own, until the daemon has stored the run",
    "test_mode": "a test gives the client the address of a daemon of its own, or more={'send': False}",
    "skip_validation": "no folder has to be there before the first run",
}


class RunContext:
    """What `track_run` yields: one run that goes on."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.run_id = run.run_id
        self.event_id = run.event_id

    def log_event(self, event_type: str, payload: Mapping[str, Any] | None = None) -> None:
        """Record something that happened during the run."""
        self._run.event(event_type, payload)

    def set_metrics(self, **fields: Any) -> None:
        """Record fields of the run; what has no field becomes part of metrics_json or context_json."""
        self._run.update(**fields)


class _RunIds:
    """Checks run_ids as the replaced library did, and counts them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(
            ("custom_accepted", "generated", "empty", "too_long", "invalid_chars", "duplicates"), 0
        )

    def take(self, given: object, running: Container[str]) -> str | None:
        """Return the run_id for a new run, or None if one has to be made."""
        if given is None:
            self._count("generated")
            return None
        text = str(given)
        if fault := _fault_of_run_id(text):
            self._count(fault)
            self._count("generated")
            logger.warning("A run_id that was given is not used (%s), another is made: %.50r", fault, text)
            return None
        self._count("custom_accepted")
        if text not in running:
            return text
        self._count("duplicates")
        logger.warning("A run with run_id %r is going on in this process; the new one gets another", text)
        return f"{text[:_LONGEST_BEFORE_SUFFIX]}-duplicate-{new_uuid()[-8:]}"

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def counts(self) -> dict[str, Any]:
        """Return the counts in the replaced library's form."""
        with self._lock:
            count = dict(self._counts)
        rejected = {name: count[name] for name in ("empty", "too_long", "invalid_chars")}
        total = count["custom_accepted"] + count["generated"]
        return {
            "custom_accepted": count["custom_accepted"],
            "generated": count["generated"],
            "rejected": {**rejected, "total": sum(rejected.values())},
            "duplicates_detected": count["duplicates"],
            "total_runs": total,
            "custom_percentage": round(100 * count["custom_accepted"] / total, 2) if total else 0.0,
        }


_LONGEST_BEFORE_SUFFIX: Final = MAX_NAME - len("-duplicate-12345678")


def _fault_of_run_id(text: str) -> str | None:
    if not text.strip():
        return "empty"
    if len(text) > MAX_NAME:
        return "too_long"
    return "invalid_chars" if any(sign in text for sign in "/\\\0") else None


class TelemetryClient:
    """The replaced library's client on top of the new one. None of its methods raises.

    Args:
        config: by default that of the environment.

    """

    def __init__(self, config: TelemetryConfig | None = None) -> None:
        log_remarks(of_others=True)
        self.config = config or TelemetryConfig.from_env()
        self.config.remark()
        self._client = self.config.client()
        self._runs: dict[str, Run] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        """run_id → event_id of the last runs that have ended, whose commit may come later."""
        self._run_ids = _RunIds()

    # --- Runs ------------------------------------------------------------------------------------

    def start_run(self, agent_name: str, job_type: str, trigger_type: str = "cli", **kw: Any) -> str:
        """Begin a run and return its run_id, which may be given."""
        run = self._begin(agent_name, job_type, trigger_type, kw)
        return run.run_id

    def _begin(self, agent_name: str, job_type: str, trigger_type: str, fields: Mapping[str, Any]) -> Run:
        given = {"agent_owner": self.config.agent_owner, **fields, "trigger_type": trigger_type}
        given["run_id"] = self._run_ids.take(fields.get("run_id"), self._runs)
        known = {name: value for name, value in given.items() if value is not None}
        run = self._client.run(agent_name, job_type, **known).start()
        self._runs[run.run_id] = run
        return run

    def _forget(self, run_id: str) -> Run | None:
        run = self._runs.pop(run_id, None)
        if run is not None:
            self._ended[run_id] = run.event_id
            if len(self._ended) > _REMEMBERED:
                self._ended.popitem(last=False)
        return run

    def log_event(self, run_id: str, event_type: str, payload: Mapping[str, Any] | None = None) -> None:
        """Record something that happened during a run."""
        run = self._runs.get(str(run_id))
        if run is None:
            logger.warning("No run of this process has run_id %r: event %r is not recorded", run_id, event_type)
        else:
            run.event(event_type, payload)

    def end_run(self, run_id: str, status: str = "success", **kw: Any) -> None:
        """End a run."""
        run = self._forget(str(run_id))
        if run is None:
            logger.warning("No run of this process has run_id %r: its end is not recorded", run_id)
        else:
            run.finish(status, **kw)

    @contextmanager
    def track_run(self, agent_name: str, job_type: str, trigger_type: str = "cli", **kw: Any) -> Iterator[RunContext]:
        """Record the block as a run: `success`, or what suits the exception that passes through."""
        run = self._begin(agent_name, job_type, trigger_type, kw)
        try:
            with run:
                yield RunContext(run)
        finally:
            self._forget(run.run_id)

    def associate_commit(
        self,
        run_id: str,
        commit_hash: str,
        commit_source: str,
        commit_author: str | None = None,
        commit_timestamp: str | None = None,
    ) -> tuple[bool, str]:
        """Record the commit that a run led to, which may have ended; return whether that is done, and a sentence."""
        commit = {"commit_hash": commit_hash, "commit_source": commit_source}
        more = {"commit_author": commit_author, "commit_timestamp": commit_timestamp}
        try:
            return self._associate(str(run_id), encode({**commit, **{n: v for n, v in more.items() if v is not None}}))
        except Exception as error:  # noqa: BLE001 - whatever it is must not reach the agent
            self._client.failed()
            return False, f"[ERROR] The commit is not recorded: {error}"

    def _associate(self, run_id: str, body: bytes) -> tuple[bool, str]:
        from telemetryd.client.answers import shown  # noqa: PLC0415
        from telemetryd.client.transport import Transport, UnreachableError, run_path, runs_path  # noqa: PLC0415

        transport = Transport(self._client.config)
        try:
            run = self._runs.get(run_id)
            event_id = run.event_id if run is not None else self._ended.get(run_id)
            if event_id is None:
                found = transport.request("GET", f"{runs_path(run_id)}&limit=1")
                if not (found.is_daemons and found.status == 200 and isinstance(found.body, list) and found.body):
                    return False, f"[ERROR] Run ID not found: {run_id}"
                event_id = str(found.body[0]["event_id"])
            path = f"{run_path(event_id)}/associate-commit"
            answer = transport.request("POST", path, body)
            if answer.is_daemons and answer.status == 404:  # the run itself may still be on its way
                self._client.flush(_COMMIT_WAIT_S)
                answer = transport.request("POST", path, body)
        except UnreachableError as error:
            return False, f"[ERROR] {error}"
        finally:
            transport.close()
        if answer.is_daemons and answer.status == 200:
            return True, f"Commit {answer.body['commit_hash']} associated with run {run_id}"
        return False, f"[ERROR] {shown(answer)}"

    # --- The daemon ------------------------------------------------------------------------------

    def get_stats(self) -> dict[str, Any]:
        """Return the daemon's totals (`GET /metrics`), and under `client` what became of this client's lines."""
        from telemetryd.client.answers import shown  # noqa: PLC0415
        from telemetryd.client.transport import Transport, UnreachableError  # noqa: PLC0415

        stats: dict[str, Any] = {"client": self._client.stats(), **self.get_run_id_metrics()}
        transport = Transport(self._client.config)
        try:
            answer = transport.request("GET", "/metrics?format=json")
        except UnreachableError as error:
            return {**stats, "error": str(error)}
        finally:
            transport.close()
        if not answer.is_daemons or answer.status != 200 or not isinstance(answer.body, dict):
            return {**stats, "error": shown(answer)}
        return {**answer.body, **stats}

    def get_run_id_metrics(self) -> dict[str, Any]:
        """Return how many run_ids were given, were made, and could not be used, as `run_id_metrics`."""
        return {"run_id_metrics": self._run_ids.counts(), "timestamp": timestamp()}

    def log_run_id_metrics(self) -> None:
        """Log what `get_run_id_metrics` returns."""
        logger.info("Run ID metrics: %s", encode(self.get_run_id_metrics()).decode().rstrip())

    def cleanup_stale_runs(self, agent_name: str, stale_threshold_hours: float = 1.0) -> int:
        """Cancel the agent's runs that have been running for so long without a change; return how many.

        This is the flow of the deployment guide: query, then PATCH each. Runs that this process has begun are left
        alone. If the daemon cannot be reached, nothing is done and the log says so.
        """
        from telemetryd.client.answers import shown  # noqa: PLC0415
        from telemetryd.client.transport import Transport, UnreachableError, run_path  # noqa: PLC0415

        try:
            before = timestamp(time.time() - stale_threshold_hours * 3600)
        except (TypeError, ValueError, OverflowError, OSError) as error:
            logger.warning("Stale runs not cleaned up: stale_threshold_hours=%r: %s", stale_threshold_hours, error)
            return 0
        transport = Transport(self._client.config)
        query = {"agent_name": agent_name, "status": "running", "created_before": before, "limit": str(_PAGE)}
        page: str | None = f"/api/v1/runs?{urlencode(query, errors='replace')}"
        own = {run.event_id for run in list(self._runs.values())}
        cancelled = 0
        try:
            while page is not None:
                answer = transport.request("GET", page)
                if not answer.is_daemons or answer.status != 200 or not isinstance(answer.body, list):
                    logger.warning("Stale runs not cleaned up: %s", shown(answer))
                    break
                for run in answer.body:
                    if run["updated_at"] < before and run["event_id"] not in own:
                        body = encode(_stale_changes(run["created_at"]))
                        cancelled += transport.request("PATCH", run_path(run["event_id"]), body).status == 200
                page = _next_page(answer.headers.get("link", ""), page.partition("?")[0])
        except (UnreachableError, KeyError, TypeError) as error:
            logger.warning("Stale runs not cleaned up: %s", error)
        finally:
            transport.close()
        return cancelled

    # --- The end ---------------------------------------------------------------------------------

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until everything has been acknowledged; return whether it has."""
        return self._client.flush(timeout_s)

    def close(self) -> None:
        """Send what can be sent within a bound; happens by itself at the end of the process."""
        self._client.close()


def _stale_changes(created_at: str) -> dict[str, str]:
    return {
        "status": "cancelled",
        "end_time": timestamp(),
        "error_summary": f"Stale run cleaned up on startup (created at {created_at})",
        "output_summary": "Process did not complete - cleanup on restart",
    }


def _next_page(link: str, path: str) -> str | None:
    """Return the next page of a list as a Link header has it; the path is ours, for a proxy may show another one."""
    target, _, relation = link.partition(">")
    if 'rel="next"' not in relation:
        return None
    return f"{path}?{urlsplit(target.lstrip('<')).query}"
