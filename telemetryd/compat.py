"""The surface of the library that telemetryd replaces: change the import, and an agent goes on as it is.

from telemetryd.compat import TelemetryClient, TelemetryConfig
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode, urlsplit

from telemetryd.client import Client
from telemetryd.client.context import timestamp
from telemetryd.client.lines import encode
from telemetryd.client.run import Run

__all__ = ["RunContext", "TelemetryClient", "TelemetryConfig"]

logger: Final = logging.getLogger("telemetryd.client")

_PAGE: Final = 500


@dataclass
class TelemetryConfig:
    """The replaced library's configuration; what only its own database and files needed has no effect any more."""

    api_url: str | None = None
    """The daemon's address; None means TELEMETRY_API_URL, else METRICS_API_URL, else http://localhost:8765."""
    api_token: str | None = None
    """The daemon's token; None means TELEMETRY_API_AUTH_TOKEN."""
    api_enabled: bool = False
    """Without effect: it was about Google Sheets only, and runs were always sent to the service."""
    google_sheets_api_enabled: bool = False
    google_sheets_api_url: str | None = None
    retry_backoff_factor: float = 1.0
    buffer_dir: Path | None = None
    """The spool's folder; None means TELEMETRY_BUFFER_DIR, else the client's default."""
    agent_owner: str | None = None
    """Stored in each run's context_json."""
    metrics_dir: Path | None = None
    database_path: Path | None = None
    ndjson_dir: Path | None = None
    test_mode: str | None = None
    skip_validation: bool = False
    more: dict[str, Any] = field(default_factory=dict)
    """Further settings of `telemetryd.client.Config`."""

    @classmethod
    def from_env(cls) -> TelemetryConfig:
        """Read the variables of the environment."""
        path = {name: Path(text) for name in _PATHS if (text := os.environ.get(_PATHS[name]))}
        return cls(
            api_url=os.environ.get("TELEMETRY_API_URL") or os.environ.get("METRICS_API_URL") or None,
            api_token=os.environ.get("TELEMETRY_API_AUTH_TOKEN") or None,
            agent_owner=os.environ.get("AGENT_OWNER") or None,
            test_mode=os.environ.get("TELEMETRY_TEST_MODE") or None,
            **path,  # type: ignore[arg-type]
        )

    def validate(self, strict: bool = True) -> tuple[bool, list[str]]:
        """Return whether a client can be made of it, and what is wrong if not."""
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
        return Client(
            self.api_url,
            token=self.api_token,
            buffer_dir=self.buffer_dir,
            **self.more,
        )


_SHEETS: Final = (
    "METRICS_API_ENABLED",
    "METRICS_API_TOKEN",
    "METRICS_API_AUTH_REQUIRED",
    "GOOGLE_SHEETS_API_ENABLED",
    "GOOGLE_SHEETS_API_URL",
)


@functools.cache
def _remark_on_sheets() -> None:
    """Say once in a process that variables are set which were about Google Sheets."""
    if found := [name for name in _SHEETS if name in os.environ]:
        text = "The export to Google Sheets is gone: %s has no effect; runs are sent to the telemetry daemon as before"
        logger.warning(text, ", ".join(found))


_PATHS: Final = {
    "buffer_dir": "TELEMETRY_BUFFER_DIR",
    "database_path": "TELEMETRY_DB_PATH",
    "ndjson_dir": "TELEMETRY_NDJSON_DIR",
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


class TelemetryClient:
    """The replaced library's client on top of the new one. None of its methods raises.

    Args:
        config: by default that of the environment.

    """

    def __init__(self, config: TelemetryConfig | None = None) -> None:
        _remark_on_sheets()
        self.config = config or TelemetryConfig.from_env()
        self._client = self.config.client()
        self._runs: dict[str, Run] = {}

    # --- Runs ------------------------------------------------------------------------------------

    def start_run(self, agent_name: str, job_type: str, trigger_type: str = "cli", **kw: Any) -> str:
        """Begin a run and return its run_id."""
        run = self._begin(agent_name, job_type, trigger_type, kw)
        self._runs[run.run_id] = run
        return run.run_id

    def _begin(self, agent_name: str, job_type: str, trigger_type: str, fields: Mapping[str, Any]) -> Run:
        given = {"agent_owner": self.config.agent_owner, **fields, "trigger_type": trigger_type}
        known = {name: value for name, value in given.items() if value is not None}
        return self._client.run(agent_name, job_type, **known).start()

    def log_event(self, run_id: str, event_type: str, payload: Mapping[str, Any] | None = None) -> None:
        """Record something that happened during a run."""
        run = self._runs.get(str(run_id))
        if run is None:
            logger.warning("No run of this process has run_id %r: event %r is not recorded", run_id, event_type)
        else:
            run.event(event_type, payload)

    def end_run(self, run_id: str, status: str = "success", **kw: Any) -> None:
        """End a run."""
        run = self._runs.pop(str(run_id), None)
        if run is None:
            logger.warning("No run of this process has run_id %r: its end is not recorded", run_id)
        else:
            run.finish(status, **kw)

    @contextmanager
    def track_run(self, agent_name: str, job_type: str, trigger_type: str = "cli", **kw: Any) -> Iterator[RunContext]:
        """Record the block as a run: `success`, or what suits the exception that passes through."""
        run = self._begin(agent_name, job_type, trigger_type, kw)
        self._runs[run.run_id] = run
        try:
            with run:
                yield RunContext(run)
        finally:
            self._runs.pop(run.run_id, None)

    # --- The daemon ------------------------------------------------------------------------------

    def get_stats(self) -> dict[str, Any]:
        """Return the daemon's totals (`GET /metrics`), and under `client` what became of this client's lines."""
        from telemetryd.client.answers import shown  # noqa: PLC0415
        from telemetryd.client.transport import Transport, UnreachableError  # noqa: PLC0415

        stats: dict[str, Any] = {"client": self._client.stats()}
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
                page = _next_page(answer.headers.get("link", ""))
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


def _next_page(link: str) -> str | None:
    """Return the path and query of a Link header's next page."""
    target, _, relation = link.partition(">")
    if 'rel="next"' not in relation:
        return None
    parts = urlsplit(target.lstrip("<"))
    return f"{parts.path}?{parts.query}"
