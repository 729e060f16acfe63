"""Drives every operation with the generated Python client: `python drive.py URL TOKEN PID START_TIME BOOT_ID`.

Prints the names of the operations that it has called, one a line. mypy checks it against the client's own types.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, TypeVar

from telemetryd_client import AuthenticatedClient
from telemetryd_client.api.admin import confirm, make_backup, prune_runs, reap_runs
from telemetryd_client.api.operation import get_health, get_metrics
from telemetryd_client.api.runs import (
    associate_commit,
    create_batch,
    create_events,
    create_run,
    export_runs,
    get_commit_url,
    get_metadata,
    get_regressions,
    get_repo_url,
    get_run,
    get_stats,
    list_alerts,
    list_changes,
    list_events,
    list_runs,
    register_process,
    stream_runs,
    update_run,
)
from telemetryd_client.models import (
    Alerts,
    BackupMade,
    BackupRequest,
    BatchStored,
    ChangesAnswer,
    CommitAssociated,
    CommitAssociation,
    CommitPage,
    CommitSource,
    Confirmed,
    ConfirmRequest,
    Error,
    EventsStored,
    ExportRunsFormat,
    GetMetricsFormat,
    GetRunInclude,
    Health,
    JsonObject,
    ListRunsCount,
    Metadata,
    MetricFilters,
    NewEvent,
    NewRun,
    NewRunBatch,
    ProcessRequest,
    ProcessWatched,
    PruneRequest,
    ReapRequest,
    RegressionReport,
    RepoPage,
    Run,
    RunChanged,
    RunCreated,
    RunDuplicate,
    RunPatch,
    RunsPruned,
    RunsReaped,
    RunUpdated,
    Stats,
    Status,
    Totals,
    ValidationErrors,
)
from telemetryd_client.types import UNSET, Response

T = TypeVar("T")

STARTED = datetime(2025, 12, 24, 10, 0, tzinfo=UTC)


def answered(response: Response[Any], kind: type[T], status: int = 200) -> T:
    """Return the answer, which must be of that kind."""
    assert response.status_code == HTTPStatus(status), response.content
    assert isinstance(response.parsed, kind), response.parsed
    return response.parsed


def new_run(event_id: str, status: Status = Status.RUNNING) -> NewRun:
    metrics = JsonObject()
    metrics["tokens"] = 48211
    return NewRun(
        event_id=event_id,
        run_id=f"run of {event_id}",
        agent_name="python",
        job_type="drive",
        start_time=STARTED,
        created_at=None,  # as a form with an empty field has it
        status=status,
        metrics_json=metrics,
        git_repo="https://github.com/acme/tool.git",
    )


def write_runs(client: AuthenticatedClient) -> None:
    created = answered(create_run.sync_detailed(client=client, body=new_run("py-1")), RunCreated, 201)
    assert (created.event_id, created.status, created.warnings) == ("py-1", "created", UNSET)
    known = answered(create_run.sync_detailed(client=client, body=new_run("py-1")), RunDuplicate)
    assert known.status == "duplicate"
    nameless = new_run(" ")
    refused = answered(create_run.sync_detailed(client=client, body=nameless), ValidationErrors, 422)
    assert refused.detail[0].loc == ["body", "event_id"]

    array = [new_run("py-1"), new_run("py-2", Status.FAILURE), nameless]
    stored = answered(create_batch.sync_detailed(client=client, body=array), BatchStored)
    assert (stored.inserted, stored.duplicates, stored.total) == (1, 1, 3)
    assert stored.error_details
    assert stored.error_details[0].detail[0].loc == ["body", 2, "event_id"]
    wrapped = NewRunBatch(runs=[new_run("py-3", Status.TIMEOUT)])
    assert answered(create_batch.sync_detailed(client=client, body=wrapped), BatchStored).inserted == 1

    context = JsonObject()
    context["language"] = "de"
    patch = RunPatch(status=Status.SUCCESS, end_time=datetime.now(UTC), items_succeeded=7, context_json=context)
    updated = answered(update_run.sync_detailed("py-1", client=client, body=patch), RunUpdated)
    assert sorted(updated.fields_updated) == ["context_json", "end_time", "items_succeeded", "status"]
    commit = CommitAssociation(commit_hash="3f2a91c", commit_source=CommitSource.LLM)
    assert answered(associate_commit.sync_detailed("py-1", client=client, body=commit), CommitAssociated).run_id

    payload = JsonObject()
    payload["page"] = 17
    one = NewEvent(event_type="page", event_key="page-17", payload=payload)
    assert answered(create_events.sync_detailed("py-1", client=client, body=one), EventsStored, 201).inserted == 1
    several = [one, NewEvent(event_type="page", event_key="page-18", timestamp=STARTED)]
    more = answered(create_events.sync_detailed("py-1", client=client, body=several), EventsStored, 201)
    assert (more.inserted, more.duplicates) == (1, 1)


def read_runs(client: AuthenticatedClient) -> None:
    missing = answered(get_run.sync_detailed("none", client=client), Error, 404)
    assert missing.detail == "Run not found: none"
    run = answered(get_run.sync_detailed("py-1", client=client, include=GetRunInclude.EVENTS), Run)
    assert (run.status, run.git_commit_source, run.items_succeeded) == (Status.SUCCESS, CommitSource.LLM, 7)
    assert run.start_time == STARTED
    assert run.metrics_json is not None
    assert run.metrics_json["tokens"] == 48211
    assert run.events
    assert {event.event_key for event in run.events} == {"page-17", "page-18"}

    page = list_runs.sync_detailed(
        client=client, agent_name="py*", status="failure,timeout", count=ListRunsCount.EXACT, limit=1
    )
    listed = answered(page, list)
    assert [each.event_id for each in listed] == ["py-3"]
    assert page.headers["X-Total-Count"] == "2"
    assert 'rel="next"' in page.headers["Link"]
    short = answered(list_runs.sync_detailed(client=client, fields="event_id,status"), list)
    assert [(each.event_id, each.run_id) for each in short] == [(f"py-{n}", UNSET) for n in (3, 2, 1)]
    for name, value, found in (("metrics.tokens", "48211", 3), ("metrics.tokens>", "48212", 0)):
        metrics = MetricFilters()
        metrics[name] = value
        assert len(answered(list_runs.sync_detailed(client=client, metrics=metrics), list)) == found, name
    wrong = answered(list_runs.sync_detailed(client=client, status="nope"), Error, 400)
    assert wrong.detail.startswith("Invalid status")

    events = answered(list_events.sync_detailed("py-1", client=client), list)
    assert [event.event_key for event in events] == ["page-18", "page-17"]
    commit = answered(get_commit_url.sync_detailed("py-1", client=client), CommitPage)
    assert commit.commit_url == "https://github.com/acme/tool/commit/3f2a91c"
    assert answered(get_repo_url.sync_detailed("py-1", client=client), RepoPage).repo_url is not None
    exported = export_runs.sync_detailed(client=client, format_=ExportRunsFormat.NDJSON)
    assert len(answered(exported, str).splitlines()) == 3
    assert exported.headers["Telemetry-Snapshot"] == "exact"
    table = answered(export_runs.sync_detailed(client=client, format_=ExportRunsFormat.CSV, status="timeout"), str)
    assert [line.split(",")[1] for line in table.splitlines()] == ["event_id", '"py-3"']

    changes = answered(list_changes.sync_detailed(client=client, events_after=0), ChangesAnswer)
    runs = [change.run.event_id for change in changes.changes if isinstance(change, RunChanged)]
    assert sorted(runs) == ["py-1", "py-2", "py-3"]
    assert changes.events
    assert len(changes.events) == 2

    # What does not end cannot be read as a whole: the request is the client's, and reading it httpx's.
    request = stream_runs._get_kwargs(after="0")
    with client.get_httpx_client().stream(**request) as stream:
        data = next(line for line in stream.iter_lines() if line.startswith("data: {"))
    assert Run.from_dict(json.loads(data.removeprefix("data: "))).agent_name == "python"


def read_figures(client: AuthenticatedClient) -> None:
    stats = answered(get_stats.sync_detailed(client=client, group_by="agent_name,status", status="failure"), Stats)
    assert [(group.agent_name, group.runs) for group in stats.groups] == [("python", 1)]
    assert answered(get_regressions.sync_detailed(client=client), RegressionReport).regressions == []
    assert answered(list_alerts.sync_detailed(client=client), Alerts).rules == []
    assert answered(get_metadata.sync_detailed(client=client), Metadata).agent_names == ["python"]
    assert answered(get_health.sync_detailed(client=client), Health).status == "ok"
    totals = answered(get_metrics.sync_detailed(client=client), Totals)
    assert (totals.agents["python"], totals.performance.synchronous) == (3, "FULL")
    # This generator knows one type of answer, so of text the request is the client's, and reading it httpx's.
    request = get_metrics._get_kwargs(format_=GetMetricsFormat.PROMETHEUS)
    assert "telemetryd_runs" in client.get_httpx_client().request(**request).text


def administer(client: AuthenticatedClient, process: ProcessRequest) -> None:
    answered(create_run.sync_detailed(client=client, body=new_run("py-4")), RunCreated, 201)
    watched = answered(register_process.sync_detailed("py-4", client=client, body=process), ProcessWatched, 201)
    assert watched.pid == process.pid
    later = datetime(2125, 1, 1, tzinfo=UTC)
    counted = answered(
        reap_runs.sync_detailed(client=client, body=ReapRequest(created_before=later, dry_run=True)), RunsReaped
    )
    assert counted.matching == 1
    reaped = answered(reap_runs.sync_detailed(client=client, body=ReapRequest(created_before=later)), RunsReaped)
    assert (reaped.reaped, reaped.more) == (1, False)
    prune = PruneRequest(created_before=later, status=Status.FAILURE)
    assert answered(prune_runs.sync_detailed(client=client, body=prune), RunsPruned).pruned == 1
    both = PruneRequest(created_before=later, older_than="90d")
    answered(prune_runs.sync_detailed(client=client, body=both), ValidationErrors, 422)
    allowed = answered(confirm.sync_detailed(client=client, body=ConfirmRequest(prune_after="90d")), Confirmed)
    assert allowed.prune_after == "90d"
    assert answered(make_backup.sync_detailed(client=client, body=BackupRequest()), BackupMade).rows == 3


def main(url: str, token: str, pid: str, start_time: str, boot_id: str) -> None:
    with AuthenticatedClient(base_url=url, token=token) as client:
        write_runs(client)
        read_runs(client)
        read_figures(client)
        administer(client, ProcessRequest(pid=int(pid), start_time=int(start_time), boot_id=boot_id))


if __name__ == "__main__":
    main(*sys.argv[1:])
