"""The fields of a run as the client's keyword arguments; a test holds them equal to telemetryd/model/runs.py."""

from __future__ import annotations

from typing import Any, Final, TypedDict


class Details(TypedDict, total=False):
    """What may be said of a run at its end, besides its status."""

    end_time: str
    items_succeeded: int
    items_failed: int
    items_skipped: int
    duration_ms: int
    output_summary: str
    error_summary: str
    error_details: str
    metrics_json: dict[str, Any]
    context_json: dict[str, Any]
    git_commit_source: str
    git_commit_author: str
    git_commit_timestamp: str
    labels: dict[str, Any]
    expected_by: str


class Changes(Details, total=False):
    """What may still be said of a run after its start (the fields that PATCH takes)."""

    status: str


class Fields(Changes, total=False):
    """What may be said of a run at its start."""

    event_id: str
    run_id: str
    created_at: str
    start_time: str
    product: str
    product_family: str
    platform: str
    subdomain: str
    website: str
    website_section: str
    item_name: str
    items_discovered: int
    input_summary: str
    source_ref: str
    target_ref: str
    git_repo: str
    git_branch: str
    git_commit_hash: str
    git_run_tag: str
    host: str
    environment: str
    trigger_type: str
    api_posted: bool
    api_posted_at: str
    api_retry_count: int
    insight_id: str
    parent_run_id: str
    attempt: int
    retry_of: str
    conversation_id: str
    trace_id: str
    span_id: str


class NamedFields(Fields, total=False):
    """What a finished run may bring along, names of agent and job included."""

    agent_name: str
    job_type: str


CHANGES: Final = frozenset(Changes.__annotations__)
FIELDS: Final = frozenset(NamedFields.__annotations__)

NAMES: Final = ("event_id", "run_id", "agent_name", "job_type")
COUNTS: Final = ("items_discovered", "items_succeeded", "items_failed", "items_skipped", "api_retry_count")
TIMES: Final = ("created_at", "start_time", "end_time", "api_posted_at", "git_commit_timestamp", "expected_by")
FLAGS: Final = ("api_posted",)
SOURCES: Final = ("manual", "llm", "ci")
STATUSES: Final = {
    **{status: status for status in ("running", "success", "failure", "partial", "timeout", "cancelled")},
    "failed": "failure",
    "completed": "success",
    "succeeded": "success",
    "canceled": "cancelled",
}
"""What may be given as a status, in any case, and the status that it means."""
