"""The records of the replaced library (3.x): a run, an event, and what it sent to Google Sheets, as data classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Self

from telemetryd.client.old_variables import log_once
from telemetryd.uuids import new_uuid

SCHEMA_VERSION: Final = 7
"""The version of the tables that the last library of 3.x wrote; today's is none of an agent's concerns."""


class _Record:
    """What the three have in common."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # each of the three is a data class

    def to_json(self) -> str:
        """Return the fields as JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return a record of what a mapping holds; names that are no fields are left out."""
        known = {each.name for each in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in data.items() if name in known})


@dataclass
class RunRecord(_Record):
    """A run, as a line of the library's files holds it; `TelemetryClient.start_run` makes none any more."""

    run_id: str
    agent_name: str
    job_type: str
    trigger_type: str
    start_time: str
    event_id: str = field(default_factory=new_uuid)
    schema_version: int = SCHEMA_VERSION
    agent_owner: str | None = None
    end_time: str | None = None
    status: str = "running"
    items_discovered: int = 0
    items_succeeded: int = 0
    items_failed: int = 0
    items_skipped: int = 0
    duration_ms: int = 0
    input_summary: str | None = None
    output_summary: str | None = None
    source_ref: str | None = None
    target_ref: str | None = None
    error_summary: str | None = None
    error_details: str | None = None
    metrics_json: str | None = None
    context_json: str | None = None
    insight_id: str | None = None
    product: str | None = None
    platform: str | None = None
    product_family: str | None = None
    subdomain: str | None = None
    website: str | None = None
    website_section: str | None = None
    item_name: str | None = None
    git_repo: str | None = None
    git_branch: str | None = None
    git_run_tag: str | None = None
    git_commit_hash: str | None = None
    git_commit_source: str | None = None
    git_commit_author: str | None = None
    git_commit_timestamp: str | None = None
    host: str | None = None
    environment: str | None = None
    api_posted: int = 0
    api_posted_at: str | None = None
    api_retry_count: int = 0
    parent_run_id: str | None = None
    created_at: str | None = None
    updated_at: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, and that it is a run."""
        return {**super().to_dict(), "record_type": "run"}


@dataclass
class RunEvent(_Record):
    """An event of a run, as a line of the library's raw files holds it."""

    run_id: str
    event_type: str
    timestamp: str
    payload_json: str | None = None
    id: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, and that it is an event."""
        return {**super().to_dict(), "record_type": "event"}


@dataclass
class APIPayload(_Record):
    """What the library sent to Google Sheets of a run; nothing sends it any more."""

    run_id: str
    agent_name: str
    job_type: str
    trigger_type: str
    start_time: str
    status: str
    agent_owner: str | None = None
    end_time: str | None = None
    items_discovered: int = 0
    items_succeeded: int = 0
    items_failed: int = 0
    duration_ms: int = 0
    error_summary: str | None = None
    product: str | None = None
    platform: str | None = None
    product_family: str | None = None
    subdomain: str | None = None
    website: str | None = None
    website_section: str | None = None
    item_name: str | None = None
    git_repo: str | None = None
    git_branch: str | None = None
    git_commit_hash: str | None = None
    git_commit_source: str | None = None
    git_commit_author: str | None = None
    git_commit_timestamp: str | None = None
    host: str | None = None

    def __post_init__(self) -> None:
        log_once(
            "APIPayload",
            "APIPayload has no effect: the export to Google Sheets is gone; GET /api/v1/runs/export gives runs as CSV",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that say something by name."""
        return {name: value for name, value in super().to_dict().items() if value is not None}

    @classmethod
    def from_run_record(cls, record: RunRecord) -> APIPayload:
        """Return what a run has of these fields."""
        return cls.from_dict(asdict(record))
