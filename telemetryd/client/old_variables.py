"""The variables of the replaced service and its library (3.x): what takes their place, and where its files lie."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

logger: Final = logging.getLogger("telemetryd.client")

_SHEETS: Final = (
    "has no effect: the export to Google Sheets is gone, and runs are sent to the telemetry daemon as before"
)
_ONE_WRITER: Final = (
    "has no effect: the daemon alone writes to the database, so nothing is tried again; TELEMETRY_DB_BUSY_TIMEOUT_MS "
    "is how long it waits for another process"
)
_NEVER_HAD: Final = "has no effect, as in 3.x"
_SENDS_AT_ONCE: Final = (
    "has no effect: what is in the spool is sent at once, in batches as large as the daemon asks for"
)
_TAKEN_OVER: Final = (
    "has no effect, except that `telemetryd sync --take-over` and `telemetryd replay --take-over` look there for the "
    "files of 3.x"
)

WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    "TELEMETRY_DB_CONNECT_TIMEOUT_SECONDS": _ONE_WRITER,
    "TELEMETRY_DB_MAX_RETRIES": _ONE_WRITER,
    "TELEMETRY_DB_RETRY_BASE_DELAY_SECONDS": _ONE_WRITER,
    "TELEMETRY_RETENTION_DAYS": f"{_NEVER_HAD}: nothing is deleted by itself. To have old runs deleted, set "
    "TELEMETRY_PRUNE_AFTER (such as 90d) and confirm the age once for the database: "
    "telemetryd prune --confirm-automatic 90d",
    "TELEMETRY_DRY_RUN_CLEANUP": f"{_NEVER_HAD}: telemetryd prune --dry-run says what would be deleted",
    "TELEMETRY_LEVEL": f"{_NEVER_HAD}: every run is stored; TELEMETRY_LOG_LEVEL is how much is logged",
    "TELEMETRY_SAMPLING_RATE": f"{_NEVER_HAD}: every run is stored",
    "TELEMETRY_MAX_PAYLOAD_BYTES": f"{_NEVER_HAD}: TELEMETRY_MAX_BODY_BYTES bounds a request",
    "DATABASE_URL": f"{_NEVER_HAD}: telemetryd stores runs in SQLite, at TELEMETRY_DB_PATH",
    "TELEMETRY_BUFFER_MAX_SIZE_MB": "has no effect: TELEMETRY_BUFFER_MAX_MB bounds the whole spool",
    "TELEMETRY_BUFFER_MAX_AGE_HOURS": "has no effect: a spool file is closed by itself after ten minutes",
    "TELEMETRY_SYNC_INTERVAL_SECONDS": _SENDS_AT_ONCE,
    "TELEMETRY_SYNC_BATCH_SIZE": _SENDS_AT_ONCE,
    "METRICS_API_TOKEN": f"{_SHEETS}; the daemon's token is TELEMETRY_API_AUTH_TOKEN",
    "METRICS_API_AUTH_REQUIRED": _SHEETS,
    "METRICS_API_ENABLED": _SHEETS,
    "GOOGLE_SHEETS_API_ENABLED": _SHEETS,
    "GOOGLE_SHEETS_API_URL": _SHEETS,
    "TELEMETRY_BASE_DIR": _TAKEN_OVER,
    "AGENT_METRICS_DIR": _TAKEN_OVER,
    "TELEMETRY_NDJSON_DIR": _TAKEN_OVER,
    "TELEMETRY_SKIP_VALIDATION": "has no effect: no folder has to be there before the first run",
    "TELEMETRY_TEST_MODE": "has no effect: tests give the client the address of a daemon of their own, or send=False",
    "TELEMETRY_RETRY_BACKOFF_FACTOR": "has no effect: the client tries again with pauses of its own, until the daemon "
    "has acknowledged the run",
}
"""Each variable of 3.x that does nothing here, with what is said of it."""

_OTHERS_USE: Final = frozenset({"DATABASE_URL"})
"""Where an agent has it in its environment, it is most likely about the agent's own database."""

_said: set[str] = set()


def remarks(variables: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """Yield the name of each variable of 3.x that is set and does nothing, and a sentence on it without its value."""
    for name, text in WITHOUT_EFFECT.items():
        if variables.get(name):
            yield name, f"{name} {text}"


def log_remarks(*, of_others: bool = False) -> None:
    """Log each remark on this process's environment once, also on variables that other programs use if asked to."""
    for name, text in remarks(os.environ):
        if of_others or name not in _OTHERS_USE:
            log_once(name, text)


def log_once(name: str, text: str) -> None:
    """Log a remark, unless one on the same thing was logged in this process."""
    if name not in _said:
        _said.add(name)
        logger.warning("%s", text)


# --- Where the files of 3.x lie ------------------------------------------------------------------

_PLACES: Final = ("/agent-metrics", "/opt/telemetry", "/data/telemetry", "~/.telemetry")
"""Where the library looked for its folder if no variable named it."""


def base_folders(variables: Mapping[str, str]) -> list[Path]:
    """Return the folders that may have been the library's, in the order in which it looked for it."""
    database = variables.get("TELEMETRY_DB_PATH")
    named: list[str | Path] = [Path(database).parent.parent] if database else []
    named += [text for name in ("TELEMETRY_BASE_DIR", "AGENT_METRICS_DIR") if (text := variables.get(name))]
    return [_absolute(each) for each in named or _PLACES]


def _absolute(path: str | Path) -> Path:
    return Path(os.path.expanduser(path)).absolute()


def old_buffer_folders(variables: Mapping[str, str]) -> list[Path]:
    """Return where the library may have left its buffer (`*.jsonl.ready`)."""
    given = variables.get("TELEMETRY_BUFFER_DIR")
    named = [_absolute(given)] if given else []
    return [*named, *(base / "telemetry_buffer" for base in base_folders(variables)), _absolute("telemetry_buffer")]


def old_raw_folders(variables: Mapping[str, str]) -> list[Path]:
    """Return where the library may have left its raw files (`*.ndjson`)."""
    given = variables.get("TELEMETRY_NDJSON_DIR")
    return [_absolute(given)] if given else [base / "raw" for base in base_folders(variables)]
