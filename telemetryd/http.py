"""Routes and their handlers: request in, command or query, answer out."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any, Final

import orjson
from aiohttp import hdrs, web

import telemetryd
from telemetryd import admin, browsers, events, openapi, pages, queries, regressions, runs, stats
from telemetryd.alerting import Alerting
from telemetryd.body import JSON_TYPES, NDJSON_TYPES, Bodies, check_media_type
from telemetryd.certificates import Certificates, ProcessRequest
from telemetryd.commands import CreateEvents, CreateRuns, UpdateRun
from telemetryd.errors import (
    BodyTooLargeError,
    InvalidBodyError,
    InvalidRequestError,
    RunNotFoundError,
)
from telemetryd.exports import Exports, describe
from telemetryd.metrics import Metrics, wants_prometheus
from telemetryd.middleware import NOTE, REASON, Handler, json_response, middleware
from telemetryd.openapi import EVENT_ID, INCLUDE, INTEGER, STRING, WARNINGS, Operation, obj, ref
from telemetryd.rules import Rules
from telemetryd.settings import Settings
from telemetryd.store import Store
from telemetryd.tails import add_feed, list_changes, stream_runs
from telemetryd.upkeep import Upkeep

STORE: Final = web.AppKey("store", Store)
SETTINGS: Final = web.AppKey("settings", Settings)
METRICS: Final = web.AppKey("metrics", Metrics)
CERTIFICATES: Final = web.AppKey("certificates", Certificates)
BODIES: Final = web.AppKey("bodies", Bodies)
EXPORTS: Final = web.AppKey("exports", Exports)
ALERTING: Final = web.AppKey("alerting", Alerting)
UPKEEP: Final = web.AppKey("upkeep", Upkeep)
DOCUMENT: Final = web.AppKey("document", bytes)


# --- Runs ----------------------------------------------------------------------------------------


async def create_run(request: web.Request) -> web.Response:
    """Store one run; a single is a batch of one."""
    request.app[STORE].check_open()
    body, size = await _json_body(request)
    parsed = runs.parse_run(body)
    event_id, run_id = parsed.row[runs.EVENT_ID], parsed.row[runs.RUN_ID]
    created = await request.app[STORE].submit(CreateRuns((parsed.row,), size))
    is_new = created.new[0]
    request.app[METRICS].count_runs(created=int(is_new), duplicate=int(not is_new))
    request[NOTE].say("Run created" if is_new else "Run already exists", event_id=event_id, run_id=run_id)
    if is_new:
        answer = {"status": "created", "event_id": event_id, "run_id": run_id}
    else:
        answer = {"status": "duplicate", "event_id": event_id, "message": "Event already exists (idempotent)"}
    return json_response(_with_warnings(answer, parsed.ignored), 201 if is_new else 200)


async def create_batch(request: web.Request) -> web.Response:
    """Store the good runs of a batch in one transaction, and tell of each bad one."""
    request.app[STORE].check_open()
    batch = await _parse_batch(request)
    created = await request.app[STORE].submit(CreateRuns(tuple(batch.rows), batch.size)) if batch.rows else None
    inserted = sum(created.new) if created is not None else 0
    duplicates = len(batch.rows) - inserted
    request.app[METRICS].count_runs(created=inserted, duplicate=duplicates, invalid=len(batch.errors))
    request[NOTE].say(
        "Batch stored", inserted=inserted, duplicates=duplicates, errors=len(batch.errors), total=batch.total
    )
    answer: dict[str, Any] = {
        "inserted": inserted,
        "duplicates": duplicates,
        "errors": batch.errors,
        "total": batch.total,
    }
    if batch.errors:
        answer["error_details"] = batch.error_details
    return json_response(_with_warnings(answer, tuple(batch.ignored)))


async def list_runs(request: web.Request) -> web.Response:
    """Answer the runs that match every filter, newest first."""
    query = queries.parse_list(request.rel_url.raw_query_string)
    headers: dict[str, str] = {}
    if query.count is not None:  # first, for a page would be in memory while this waits its turn
        total = await request.app[STORE].fetch(queries.CountMatching(query.filters, query.count))
        headers |= {"X-Total-Count": str(total.runs), "X-Total-Count-Accuracy": str(total.accuracy)}
    page = await request.app[STORE].fetch(query)
    request[NOTE].say("Query executed", query_params=query.parameters(), result_count=len(page.runs))
    if page.end is not None:
        headers["Link"] = f'<{query.next_page(request.path, page.end)}>; rel="next"'
    return json_response(orjson.Fragment(f"[{','.join(page.runs)}]"), headers=headers)


async def export_runs(request: web.Request) -> web.StreamResponse:
    """Stream all runs that match every filter, oldest arrival first."""
    query = queries.parse_export(request.rel_url.raw_query_string, request.headers.get("Accept", ""))
    if request.method == hdrs.METH_HEAD:
        return await describe(request, query, request.app[STORE])
    return await request.app[EXPORTS].answer(request, query)


async def get_run(request: web.Request) -> web.Response:
    """Answer one run, with its first events if they are asked for."""
    with_events = queries.parse_include(request.rel_url.raw_query_string)
    run, page = await _stored_run(request, events.MAX_EVENTS if with_events else 0)
    return json_response(run | events.beside(page) if with_events else run)


async def update_run(request: web.Request) -> web.Response:
    """Change the given fields of a run."""
    request.app[STORE].check_open()
    body, size = await _json_body(request)
    changes, ignored = runs.parse_patch(body)
    event_id = request.match_info["event_id"]
    if not changes:
        raise InvalidRequestError("No valid fields to update")
    request[NOTE].say("Run updated", event_id=event_id, fields_updated=list(changes))
    if await request.app[STORE].submit(UpdateRun(event_id, changes, size)) is None:
        raise RunNotFoundError(runs.shorten(event_id))
    return json_response(
        _with_warnings({"event_id": event_id, "updated": True, "fields_updated": list(changes)}, ignored)
    )


async def associate_commit(request: web.Request) -> web.Response:
    """Record the commit that a run led to."""
    request.app[STORE].check_open()
    body, size = await _json_body(request)
    changes, ignored = runs.parse_commit(body)
    event_id = request.match_info["event_id"]
    request[NOTE].say("Commit associated", event_id=event_id, fields_updated=list(changes))
    updated = await request.app[STORE].submit(UpdateRun(event_id, changes, size))
    if updated is None:
        raise RunNotFoundError(runs.shorten(event_id))
    answer = {
        "status": "success",
        "event_id": event_id,
        "run_id": updated.run_id,
        "commit_hash": changes["git_commit_hash"],
    }
    return json_response(_with_warnings(answer, ignored))


async def get_commit_url(request: web.Request) -> web.Response:
    """Answer the page of a run's commit."""
    run, _ = await _stored_run(request)
    return json_response({"commit_url": run["commit_url"]})


async def get_repo_url(request: web.Request) -> web.Response:
    """Answer the page of a run's repository."""
    run, _ = await _stored_run(request)
    return json_response({"repo_url": run["repo_url"]})


async def _stored_run(request: web.Request, most_events: int = 0) -> tuple[dict[str, Any], events.EventPage]:
    event_id = request.match_info["event_id"]
    request[NOTE].say("Run queried", event_id=event_id)
    found = await request.app[STORE].fetch(queries.GetRun(event_id, most_events))
    if found is None:
        raise RunNotFoundError(runs.shorten(event_id))
    row, page = found
    return runs.to_json(row), page


async def _json_body(request: web.Request) -> tuple[object, int]:
    """Return the decoded body, and how many bytes it came in."""
    check_media_type(request, JSON_TYPES)
    async with request.app[BODIES].read(request) as body:
        return runs.parse_body(body), len(body)


def _with_warnings(answer: dict[str, Any], ignored: tuple[str, ...]) -> dict[str, Any]:
    return {**answer, "warnings": runs.ignored_field_warnings(ignored)} if ignored else answer


# --- Events --------------------------------------------------------------------------------------


async def create_events(request: web.Request) -> web.Response:
    """Store one or many events of a run, each once, or none if one is bad."""
    request.app[STORE].check_open()
    event_id = request.match_info["event_id"]
    body, size = await _json_body(request)
    parsed = events.parse_events(body)
    created = await request.app[STORE].submit(CreateEvents(event_id, parsed.rows, size))
    if created is None:
        raise RunNotFoundError(runs.shorten(event_id))
    answer = {"inserted": created.inserted, "duplicates": len(parsed.rows) - created.inserted}
    request.app[METRICS].count_events(created=answer["inserted"], duplicate=answer["duplicates"])
    request[NOTE].say("Events stored", event_id=event_id, **answer)
    return json_response(_with_warnings(answer, parsed.ignored), 201)


async def list_events(request: web.Request) -> web.Response:
    """Answer events of a run, from either end."""
    event_id = request.match_info["event_id"]
    query = queries.parse_event_list(request.rel_url.raw_query_string, event_id)
    page = await request.app[STORE].fetch(query)
    if page is None:
        raise RunNotFoundError(runs.shorten(event_id))
    # Whoever pages by offset would lose events with a shorter page; a cursor goes on behind its last one.
    if page.more and len(page.rows) < query.limit and not query.by_cursor:
        raise InvalidRequestError(
            f"Invalid limit: {query.limit}; that is more than one answer holds: ask for at most {len(page.rows)} at a "
            "time"
        )
    request[NOTE].say("Events queried", event_id=event_id, result_count=len(page.rows))
    headers = {}
    if page.more:
        following = query.next_page(request.rel_url.raw_path, events.place(page.rows[-1]))
        headers["Link"] = f'<{following}>; rel="next"'
    return json_response([events.to_json(row) for row in page.rows], headers=headers)


# --- Death certificates --------------------------------------------------------------------------


async def register_process(request: web.Request) -> web.Response:
    """Watch the process that works on a run."""
    event_id = request.match_info["event_id"]
    body, _ = await _json_body(request)
    wanted: ProcessRequest = runs.validate(ProcessRequest, body)
    request[NOTE].say("Process registered", event_id=event_id, pid=wanted.pid)
    await request.app[CERTIFICATES].register(event_id, wanted)
    answer = {"event_id": event_id, "pid": wanted.pid, "watched": True}
    return json_response(_with_warnings(answer, tuple(wanted.__pydantic_extra__ or ())), 201)


async def _watch_processes(app: web.Application) -> AsyncIterator[None]:
    app[CERTIFICATES].resume()
    yield
    await app[CERTIFICATES].close()


# --- Admin ---------------------------------------------------------------------------------------


async def prune_runs(request: web.Request) -> web.Response:
    """Delete one slice of old runs."""
    body, _ = await _json_body(request)
    answer = await admin.prune(request.app[STORE], body, runs.utc_now())
    request[NOTE].say("Runs pruned", **answer)
    return json_response(answer)


async def reap_runs(request: web.Request) -> web.Response:
    """Cancel one slice of stale runs."""
    body, _ = await _json_body(request)
    answer = await admin.reap(request.app[STORE], body, runs.utc_now())
    request[NOTE].say("Runs reaped", **answer)
    return json_response(answer)


async def confirm(request: web.Request) -> web.Response:
    """Take note of what the operator confirms."""
    body, _ = await _json_body(request)
    answer = await admin.confirm(request.app[STORE], body, runs.utc_now())
    request.app[UPKEEP].look_again()
    request[NOTE].say("Confirmed", **answer)
    return json_response(answer)


async def make_backup(request: web.Request) -> web.Response:
    """Make a verified backup in the configured directory."""
    body, _ = await _json_body(request)
    if body != {}:
        raise InvalidRequestError("The body must be {}: where backups go is a setting, TELEMETRY_BACKUP_DIR")
    answer = await admin.back_up(request.app[SETTINGS], runs.utc_now())
    request[NOTE].say("Backup made", **answer)
    return json_response(answer)


# --- A batch -------------------------------------------------------------------------------------

_SLICE_S: Final = 0.002
"""How long items are checked before the event loop gets its turn."""

_TOLD_IN_FULL: Final = 1000
"""Errors of one batch that are all told; of items beyond, each tells its first error and how many more it has."""


class _Batch:
    """The rows of a batch, and the faults of what is not in them."""

    def __init__(self, size: int) -> None:
        self.size = size
        """How many bytes it came in."""
        self.rows: list[runs.Row] = []
        self.errors: list[str] = []
        self.error_details: list[dict[str, Any]] = []
        self.is_readable = False
        self._told = 0
        self.ignored: dict[str, None] = {}
        self.total = 0

    def add(self, read: Callable[[], object]) -> None:
        """Take in the next item, or its faults."""
        item = None
        try:
            item = read()
            self.is_readable = True
            parsed = runs.parse_run(item)
        except InvalidBodyError as error:
            event_id = item.get("event_id") if isinstance(item, dict) else None
            self._tell(error, runs.shorten(event_id) if isinstance(event_id, str) else None)
        else:
            self.rows.append(parsed.row)
            self.ignored.update(dict.fromkeys(parsed.ignored))
        self.total += 1

    def _tell(self, error: InvalidBodyError, event_id: str | None) -> None:
        told = error.errors if self._told < _TOLD_IN_FULL else error.errors[:1]
        self._told += len(told)
        if left_out := len(error.errors) - len(told):
            more = f"and {left_out} more errors in this item"
            told = [*told, {"loc": ["body"], "msg": more, "type": "more_errors"}]
        shown = InvalidBodyError(told)
        named = f" (event_id {event_id})" if event_id is not None else ""
        self.errors.append(f"Item {self.total}{named}: {shown}")
        self.error_details.append({"index": self.total, "event_id": event_id, "detail": runs.under(shown, self.total)})


async def _parse_batch(request: web.Request) -> _Batch:
    media_type = check_media_type(request, (*JSON_TYPES, *NDJSON_TYPES))
    limit = request.app[SETTINGS].max_batch
    async with request.app[BODIES].read(request) as body:
        batch = _Batch(len(body))
        items: list[Any]
        if media_type in NDJSON_TYPES:
            items = [line[0] for line in islice(_LINES.finditer(body), limit + 1)]
        else:
            items = _items(runs.parse_body(body), batch)
        if len(items) > limit:
            raise BodyTooLargeError(f"A batch must not hold more than {limit} runs (TELEMETRY_MAX_BATCH)")
        decode: Callable[[Any], object] = runs.parse_body if media_type in NDJSON_TYPES else _as_it_is
        turn = time.perf_counter()
        for item in items:
            if time.perf_counter() - turn > _SLICE_S:
                await asyncio.sleep(0)
                turn = time.perf_counter()
            batch.add(partial(decode, item))
    if batch.errors and not batch.is_readable:
        raise InvalidBodyError([error for item in batch.error_details[:100] for error in item["detail"]])
    return batch


_LINES: Final = re.compile(rb"[^ \t\r\n][^\n]*")
"""The lines of NDJSON that are not blank."""


def _as_it_is(item: object) -> object:
    return item


def _items(decoded: object, batch: _Batch) -> list[object]:
    if isinstance(decoded, dict) and isinstance(decoded.get("runs"), list):
        batch.ignored.update(dict.fromkeys(str(name) for name in decoded if name != "runs"))
        decoded = decoded["runs"]
    if not isinstance(decoded, list):
        message = 'A batch must be an array of runs, or an object {"runs": [...]}'
        raise InvalidBodyError([{"loc": ["body"], "msg": message, "type": "list_type"}])
    return decoded


# --- Everything else -----------------------------------------------------------------------------


async def get_stats(request: web.Request) -> web.Response:
    """Answer statistics of the runs that were created in some hours."""
    query = stats.parse(request.rel_url.raw_query_string, runs.utc_now())
    groups = await request.app[STORE].fetch(query)
    request[NOTE].say("Statistics queried", query_params=stats.parameters(query), result_count=len(groups))
    return json_response(stats.to_json(query, groups))


async def get_regressions(request: web.Request) -> web.Response:
    """Answer since which commits runs are worse."""
    query = regressions.parse(request.rel_url.raw_query_string, runs.utc_now())
    findings = await request.app[STORE].fetch(query)
    count = len(findings.regressions)
    request[NOTE].say("Regressions queried", query_params=query.parameters(), result_count=count)
    return json_response(regressions.to_json(query, findings))


async def get_metadata(request: web.Request) -> web.Response:
    """Answer the agents and job types there are."""
    counts = await request.app[STORE].fetch(queries.CountRuns())
    agents = sorted(counts.agents)
    request[NOTE].say("Metadata queried", result_count=len(agents))
    answer = {
        "agent_names": agents,
        "job_types": counts.job_types,
        "counts": {"agent_names": counts.agent_names, "job_types": counts.job_type_names},
        "cache_hit": counts.is_remembered,
    }
    return json_response(answer)


async def get_health(request: web.Request) -> web.Response:
    """Tell at once whether writes are taken."""
    health = request.app[STORE].health()
    request[NOTE].say("Health checked", logging.DEBUG)
    answer = {
        "status": "ok" if health.problem is None else "error",
        "version": telemetryd.__version__,
        "db_path": str(health.path),
        "journal_mode": health.modes.journal_mode,
        "synchronous": health.modes.synchronous,
        "durable": health.durable,
        "durability": "an acknowledged write survives a crash and a power cut"
        if health.durable
        else "an acknowledged write survives a crash, not a power cut",
        "queue_depth": health.queue_depth,
        "oldest_waiting_s": round(health.oldest_s, 3),
        "last_commit_at": None if health.last_commit is None else runs.format_timestamp(health.last_commit),
        "wal_bytes": health.wal_bytes,
        "disk_free_bytes": health.free_bytes,
        "counts": health.counts.as_json(),
        "automatic": request.app[UPKEEP].shown(),
        "notices": request.app[UPKEEP].notices(),
    }
    if health.counts.warning is not None:
        answer["warning"] = health.counts.warning
    if health.problem is not None:
        answer["detail"] = health.problem
    response = json_response(answer, 200 if health.problem is None else 503, {"Cache-Control": "no-store"})
    response[REASON] = health.problem or ""
    return response


async def get_metrics(request: web.Request) -> web.Response:
    """Answer the totals as JSON, or everything for Prometheus."""
    given = queries.parse_parameters(request.rel_url.raw_query_string, ("format",))
    form = given.get("format", "prometheus" if wants_prometheus(request.headers.get("Accept", "")) else "json")
    if form not in ("json", "prometheus"):
        raise InvalidRequestError(f"Invalid format: {runs.shorten(form)!r}; it must be json or prometheus")
    counts = await request.app[STORE].fetch(queries.CountRuns())
    request[NOTE].say("Metrics queried", logging.DEBUG)
    if form == "prometheus":
        alerts = await request.app[ALERTING].shown()
        request.app[METRICS].show_alerts(
            {rule["name"]: len(rule["firing"]) + rule["more"] for rule in alerts["rules"]},
            {webhook["name"]: webhook["waiting"] for webhook in alerts["webhooks"]},
        )
        body, content_type = request.app[METRICS].expose(request.headers.get("Accept", ""), counts.total)
        return web.Response(body=body, headers={"Content-Type": content_type})
    health = request.app[STORE].health()
    answer = {
        "total_runs": counts.total,
        "agents": counts.agents,
        **({"agents_more": more} if (more := counts.agent_names - len(counts.agents)) else {}),
        "recent_24h": counts.recent,
        "performance": {
            "db_path": str(health.path),
            "journal_mode": health.modes.journal_mode,
            "synchronous": health.modes.synchronous,
            "queue_depth": health.queue_depth,
        },
    }
    return json_response(answer)


async def list_alerts(request: web.Request) -> web.Response:
    """Answer the rules of alerts with what they are firing for."""
    queries.parse_parameters(request.rel_url.raw_query_string, ())
    answer = await request.app[ALERTING].shown()
    request[NOTE].say("Alerts listed", result_count=sum(len(rule["firing"]) for rule in answer["rules"]))
    return json_response(answer)


async def get_openapi(request: web.Request) -> web.Response:
    """Answer the OpenAPI document."""
    request[NOTE].say("Document served", logging.DEBUG)
    return web.Response(body=request.app[DOCUMENT], content_type="application/json")


# --- The routes, which are also what the OpenAPI document tells ----------------------------------


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint: how it is reached, who answers, and how it is described (not at all for page assets)."""

    method: str
    path: str
    handler: Handler
    operation: Operation | None = None


_WRITE_ERRORS: Final = (400, 413, 415, 422, 503)
_NEW_RUN: Final = ref("NewRun")
_TEXT_OR_NULL: Final = {"anyOf": [STRING, {"type": "null"}]}
_UPDATE_ANSWER: Final = obj(
    {
        "event_id": STRING,
        "updated": {"type": "boolean"},
        "fields_updated": {"type": "array", "items": STRING},
        "warnings": WARNINGS,
    },
    ("event_id", "updated", "fields_updated"),
)

ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "POST",
        "/api/v1/runs",
        create_run,
        Operation(
            "Create a run",
            "A known event_id is a duplicate: the stored run stays as it is.",
            body=_NEW_RUN,
            body_types=JSON_TYPES,
            example=runs.example(runs.NewRun, runs.BEGUN),
            answers={
                201: (
                    "The run is stored and durable.",
                    obj(
                        {
                            "status": {"const": "created"},
                            "event_id": STRING,
                            "run_id": STRING,
                            "warnings": WARNINGS,
                        },
                        ("status", "event_id", "run_id"),
                    ),
                ),
                200: (
                    "The event_id is already stored.",
                    obj(
                        {
                            "status": {"const": "duplicate"},
                            "event_id": STRING,
                            "message": STRING,
                            "warnings": WARNINGS,
                        },
                        ("status", "event_id", "message"),
                    ),
                ),
            },
            errors=_WRITE_ERRORS,
        ),
    ),
    Route(
        "POST",
        "/api/v1/runs/batch",
        create_batch,
        Operation(
            "Create many runs",
            "An array, an object with the array under `runs`, or one run a line (NDJSON). A bad item is reported and "
            "costs the others nothing; all good ones are stored in one transaction.",
            body={
                "anyOf": [
                    {"type": "array", "items": _NEW_RUN},
                    obj({"runs": {"type": "array", "items": _NEW_RUN}}),
                ]
            },
            body_types=(*JSON_TYPES, NDJSON_TYPES[0]),
            example=[runs.example(runs.NewRun, runs.BEGUN, number) for number in (0, 1)],
            answers={
                200: (
                    "What became of the items.",
                    obj(
                        {
                            "inserted": INTEGER,
                            "duplicates": INTEGER,
                            "errors": {"type": "array", "items": STRING},
                            "total": INTEGER,
                            "error_details": {
                                "type": "array",
                                "items": obj(
                                    {
                                        "index": INTEGER,
                                        "event_id": {"anyOf": [STRING, {"type": "null"}]},
                                        "detail": {"type": "array", "items": ref("ErrorItem")},
                                    }
                                ),
                            },
                            "warnings": WARNINGS,
                        },
                        ("inserted", "duplicates", "errors", "total"),
                    ),
                )
            },
            errors=_WRITE_ERRORS,
        ),
    ),
    Route(
        "GET",
        "/api/v1/runs",
        list_runs,
        Operation(
            "Query runs",
            "Newest first. If more follow, the Link header holds the next page (rel=next).",
            parameters=openapi.list_parameters(),
            answers={200: ("The runs.", {"type": "array", "items": {"anyOf": [ref("Run"), ref("RunPart")]}})},
            errors=(400, 503),
        ),
    ),
    Route(  # before the runs themselves: one whose event_id is "stream" is found in the list
        "GET",
        "/api/v1/runs/stream",
        stream_runs,
        Operation(
            "Follow the runs",
            "Server-sent events: `run` with each run that is created or changed, after its commit, as one answers it; "
            "`missed` with the number of changes that were left out because the client was too slow. Whoever comes "
            "back with the last id goes on there, also after a restart of the daemon.",
            parameters=openapi.stream_parameters(),
            answers={200: ("Events without an end.", STRING)},
            answer_type="text/event-stream",
            errors=(400, 503),
        ),
    ),
    Route(
        "GET",
        "/api/v1/changes",
        list_changes,
        Operation(
            "List the changes behind a number of the commit sequence",
            "In the order of the commits; of each run only its newest change, with the run as it is now. Go on with "
            "`last` as `after`, while `more` is true at once. Events come with the page that has the last change, each "
            "with the id of its run; go on with the id of the last one as `events_after`.",
            parameters=openapi.change_parameters(),
            answers={
                200: (
                    "The changes.",
                    obj(
                        {
                            "changes": {
                                "type": "array",
                                "items": {
                                    "anyOf": [
                                        obj({"seq": {"type": "integer"}, "run": ref("Run")}),
                                        obj({"seq": INTEGER, "deleted": STRING}),
                                    ]
                                },
                            },
                            "events": {
                                "type": "array",
                                "items": {"allOf": [obj({"run": INTEGER}), ref("Event")]},
                                "description": "If events_after is given.",
                            },
                            "last": INTEGER,
                            "more": {"type": "boolean"},
                            "newest": INTEGER,
                            "epoch": STRING,
                        },
                        required=("changes", "last", "more", "newest", "epoch"),
                    ),
                )
            },
            errors=(400, 410, 503),
        ),
    ),
    Route(
        "GET",
        "/api/v1/runs/export",
        export_runs,
        Operation(
            "Export runs",
            "All that match, in the order of their arrival, as NDJSON, CSV (RFC 4180) or Parquet. The "
            f"header {queries.SNAPSHOT} says `exact` if they are one snapshot, X-Total-Count how many they are. An "
            "export that could not be brought to its end is cut off in the middle of the chunked encoding.",
            parameters=openapi.export_parameters(),
            answers={200: ("The runs.", STRING)},
            answer_type=queries.MEDIA_TYPES[queries.Format.NDJSON],
            other_answer_types=tuple(queries.MEDIA_TYPES.values())[1:],
            errors=(400, 503),
        ),
    ),
    Route(
        "GET",
        "/api/v1/runs/{event_id}",
        get_run,
        Operation(
            "Get a run",
            parameters=(EVENT_ID, INCLUDE),
            answers={200: ("The run.", ref("Run"))},
            errors=(400, 404, 503),
        ),
    ),
    Route(
        "PATCH",
        "/api/v1/runs/{event_id}",
        update_run,
        Operation(
            "Update a run",
            "A field that is null or missing stays as it is.",
            parameters=(EVENT_ID,),
            body=ref("RunPatch"),
            body_types=JSON_TYPES,
            example=runs.example(runs.RunPatch, runs.ENDED, 1),
            answers={200: ("The run is changed and the change durable.", _UPDATE_ANSWER)},
            errors=(404, *_WRITE_ERRORS),
        ),
    ),
    Route(
        "POST",
        "/api/v1/runs/{event_id}/associate-commit",
        associate_commit,
        Operation(
            "Record the commit that a run led to",
            parameters=(EVENT_ID,),
            body=ref("CommitAssociation"),
            body_types=JSON_TYPES,
            example=runs.example(runs.CommitAssociation),
            answers={
                200: (
                    "The commit is recorded and durable.",
                    obj(
                        {
                            "status": {"const": "success"},
                            "event_id": STRING,
                            "run_id": STRING,
                            "commit_hash": STRING,
                            "warnings": WARNINGS,
                        },
                        ("status", "event_id", "run_id", "commit_hash"),
                    ),
                )
            },
            errors=(404, *_WRITE_ERRORS),
        ),
    ),
    Route(
        "POST",
        "/api/v1/runs/{event_id}/events",
        create_events,
        Operation(
            "Report events of a run",
            f"One event, or an array of at most {events.MAX_EVENTS}; with one bad event none is stored. A key that the "
            "run already has is a duplicate: the stored event stays as it is.",
            parameters=(EVENT_ID,),
            body={
                "anyOf": [
                    ref("NewEvent"),
                    {"type": "array", "items": ref("NewEvent"), "maxItems": events.MAX_EVENTS},
                ]
            },
            body_types=JSON_TYPES,
            example=runs.example(events.NewEvent),
            answers={
                201: (
                    "The events are stored and durable; those with a known key were so before.",
                    obj({"inserted": INTEGER, "duplicates": INTEGER, "warnings": WARNINGS}, ("inserted", "duplicates")),
                )
            },
            errors=(404, *_WRITE_ERRORS),
        ),
    ),
    Route(
        "GET",
        "/api/v1/runs/{event_id}/events",
        list_events,
        Operation(
            "List a run's events",
            "Oldest first, or the last ones first with sort=-timestamp. If more follow, the Link header holds the next "
            "page (rel=next).",
            parameters=(EVENT_ID, *openapi.page_parameters("Events"), *openapi.EVENT_ORDER),
            answers={200: ("The events.", {"type": "array", "items": ref("Event")})},
            errors=(400, 404, 503),
        ),
    ),
    Route(
        "POST",
        "/api/v1/runs/{event_id}/process",
        register_process,
        Operation(
            "Register the process that works on a run",
            "If it ends while the run is still running, the run becomes a failure within a second. Only a process on "
            "the daemon's own machine can be watched.",
            parameters=(EVENT_ID,),
            body=ref("ProcessRequest"),
            body_types=JSON_TYPES,
            example=runs.example(ProcessRequest),
            answers={
                201: (
                    "The process is watched, also after a restart of the daemon.",
                    obj(
                        {
                            "event_id": STRING,
                            "pid": INTEGER,
                            "watched": {"const": True},
                            "warnings": WARNINGS,
                        },
                        ("event_id", "pid", "watched"),
                    ),
                )
            },
            errors=(404, 409, *_WRITE_ERRORS),
        ),
    ),
    *(
        Route(
            "GET",
            f"/api/v1/runs/{{event_id}}/{name}-url",
            handler,
            Operation(
                f"Get the web page of a run's {what}",
                "Known are github.com, gitlab.com and bitbucket.org; otherwise null.",
                parameters=(EVENT_ID,),
                answers={200: ("The page.", obj({f"{name}_url": {"anyOf": [STRING, {"type": "null"}]}}))},
                errors=(404, 503),
            ),
        )
        for name, what, handler in (
            ("commit", "commit", get_commit_url),
            ("repo", "repository", get_repo_url),
        )
    ),
    Route(
        "GET",
        "/api/v1/stats",
        get_stats,
        Operation(
            "Statistics of runs",
            "Counts, sums and quantiles by the time of created_at, from figures that the writer keeps: they are right "
            "as soon as a change is acknowledged. Only groups with runs are answered.",
            parameters=openapi.stats_parameters(),
            answers={200: ("The groups, the earliest bucket first, then by names.", openapi.stats_answer())},
            errors=(400, 503),
        ),
    ),
    Route(
        "GET",
        "/api/v1/regressions",
        get_regressions,
        Operation(
            "Commits that broke something",
            "For each agent and job type: the commit since which runs fail more often or take longer, if chance hardly "
            f"explains it. Looked at are the newest {regressions.MAX_RUNS:,} finished runs with a git_commit_hash. "
            "Commits are in the order of their first runs.",
            parameters=openapi.regressions_parameters(),
            answers={200: ("What was found, the most certain first.", openapi.regressions_answer())},
            errors=(400, 503),
        ),
    ),
    Route(
        "GET",
        "/api/v1/alerts",
        list_alerts,
        Operation(
            "List the rules of alerts and their state",
            "The rules of TELEMETRY_ALERTS_FILE, in its order, and for which agents (and job types) each is firing.",
            answers={200: ("The rules.", openapi.alerts_answer())},
            errors=(400, 503),
        ),
    ),
    Route(
        "GET",
        "/api/v1/metadata",
        get_metadata,
        Operation(
            "List agents and job types",
            answers={
                200: (
                    "The names in use.",
                    obj(
                        {
                            "agent_names": {"type": "array", "items": STRING},
                            "job_types": {"type": "array", "items": STRING},
                            "counts": obj({"agent_names": INTEGER, "job_types": INTEGER}),
                            "cache_hit": {"type": "boolean"},
                        }
                    ),
                )
            },
            errors=(503,),
        ),
    ),
    Route(
        "GET",
        "/health",
        get_health,
        Operation(
            "Check health",
            "Answers at once, with 503 when writes are not taken.",
            tags=("operation",),
            answers={
                200: (
                    "Writes are taken.",
                    obj(
                        {
                            "status": STRING,
                            "version": STRING,
                            "db_path": STRING,
                            "journal_mode": STRING,
                            "synchronous": STRING,
                            "durable": {"type": "boolean"},
                            "durability": STRING,
                            "queue_depth": INTEGER,
                            "oldest_waiting_s": {"type": "number", "minimum": 0},
                            "last_commit_at": {"anyOf": [STRING, {"type": "null"}]},
                            "wal_bytes": INTEGER,
                            "disk_free_bytes": INTEGER,
                            # And "warning", a sentence, while they are being compared.
                            "counts": obj(
                                {
                                    "state": {"type": "string", "enum": ["right", "being compared"]},
                                    "foreign_commit_at": {"anyOf": [STRING, {"type": "null"}]},
                                    "corrected": INTEGER,
                                }
                            ),
                            "automatic": obj(
                                {
                                    "prune_after": _TEXT_OR_NULL,
                                    "stale_after": _TEXT_OR_NULL,
                                    "paused": {
                                        "type": "boolean",
                                        "description": "Whether nothing goes on by itself, as the clock has jumped.",
                                    },
                                    "unconfirmed": {
                                        "anyOf": [
                                            obj({"would_delete": INTEGER, "oldest": _TEXT_OR_NULL}),
                                            {"type": "null"},
                                        ],
                                        "description": "What prune_after would delete if it were confirmed.",
                                    },
                                }
                            ),
                            "notices": {"type": "array", "items": STRING},
                        }
                    ),
                )
            },
            errors=(503,),
            open=True,
        ),
    ),
    Route(
        "GET",
        "/metrics",
        get_metrics,
        Operation(
            "Read totals and metrics",
            "JSON, or Prometheus text if Accept or `format` asks for it.",
            tags=("operation",),
            parameters=(
                {
                    "name": "format",
                    "in": "query",
                    "required": False,
                    "description": "Overrules the Accept header.",
                    "schema": {"type": "string", "enum": ["json", "prometheus"]},
                },
            ),
            answers={
                200: (
                    "The totals.",
                    obj(
                        {
                            "total_runs": INTEGER,
                            "agents": {"type": "object", "additionalProperties": INTEGER},
                            "agents_more": {**INTEGER, "description": "How many are not named; missing if all are."},
                            "recent_24h": INTEGER,
                            "performance": {"type": "object"},
                        },
                        ("total_runs", "agents", "recent_24h", "performance"),
                    ),
                )
            },
            other_answer_types=("text/plain", "application/openmetrics-text"),
            errors=(400, 503),
        ),
    ),
    *(
        Route(
            "POST",
            f"/api/v1/admin/{word}",
            handler,
            Operation(
                summary,
                "Needs authentication, or the Unix socket. Ask again while `more` is true.",
                tags=("admin",),
                body=ref(model),
                body_types=JSON_TYPES,
                answers={
                    200: (
                        "What was done, or with dry_run what would be.",
                        obj(
                            {
                                done: INTEGER,
                                "more": {"type": "boolean"},
                                "dry_run": {"type": "boolean"},
                                "matching": INTEGER,
                                "oldest": _TEXT_OR_NULL,
                                "ahead": {
                                    "type": "array",
                                    "items": STRING,
                                    "description": "event_ids of those whose created_at lies ahead of their arrival.",
                                },
                                "created_before": STRING,
                            },
                            ("created_before",),
                        ),
                    )
                },
                errors=_WRITE_ERRORS,
            ),
        )
        for word, done, handler, summary, model in (
            ("prune", "pruned", prune_runs, "Delete old runs", "PruneRequest"),
            ("reap", "reaped", reap_runs, "Cancel stale runs", "ReapRequest"),
        )
    ),
    Route(
        "POST",
        "/api/v1/admin/confirm",
        confirm,
        Operation(
            "Confirm what may be done without a command",
            "Needs authentication, or the Unix socket. Runs of an age may be deleted by themselves (a shorter age has "
            "to be confirmed again), or the clock is right although it has jumped.",
            tags=("admin",),
            body=ref("ConfirmRequest"),
            body_types=JSON_TYPES,
            answers={
                200: (
                    "It is written down for this database.",
                    obj(
                        {
                            "prune_after": STRING,
                            "created_before": STRING,
                            "matching": INTEGER,
                            "oldest": _TEXT_OR_NULL,
                            "clock": STRING,
                        },
                        (),
                    ),
                )
            },
            errors=_WRITE_ERRORS,
        ),
    ),
    Route(
        "POST",
        "/api/v1/admin/backup",
        make_backup,
        Operation(
            "Make a verified backup",
            "Needs authentication, or the Unix socket; the directory is the setting TELEMETRY_BACKUP_DIR.",
            tags=("admin",),
            body=obj({}),
            body_types=JSON_TYPES,
            answers={
                200: (
                    "The backup is verified and in its place.",
                    obj(
                        {
                            "path": STRING,
                            "bytes": INTEGER,
                            "rows": INTEGER,
                            "seconds": {"type": "number"},
                            "removed": {"type": "array", "items": STRING},
                        }
                    ),
                )
            },
            errors=_WRITE_ERRORS,
        ),
    ),
    Route("GET", "/openapi.json", get_openapi),
    *(Route("GET", path, handler) for path, handler in pages.handlers()),
)


def operations() -> Iterator[tuple[str, str, Operation]]:
    """Yield what the OpenAPI document tells of."""
    for route in ROUTES:
        if route.operation is not None:
            yield route.method, route.path, route.operation


@cache
def _document(needs_token: bool) -> bytes:
    """Return the OpenAPI document, of which there are two; to write one takes as long as to open a database."""
    return orjson.dumps(openapi.document(operations(), needs_token=needs_token))


def make_app(
    store: Store,
    settings: Settings,
    metrics: Metrics,
    alerting: Alerting | None = None,
    upkeep: Upkeep | None = None,
) -> web.Application:
    """Return the app that answers for one store."""
    passed = middleware(settings, metrics, store.flow)
    app = web.Application(middlewares=[passed], client_max_size=settings.max_body_bytes)
    app[STORE], app[SETTINGS], app[METRICS] = store, settings, metrics
    app[CERTIFICATES] = Certificates(store, settings, metrics)
    app.cleanup_ctx.append(_watch_processes)
    if settings.reading_origins:
        app.on_response_prepare.append(browsers.sharing(settings.reading_origins))
    add_feed(app, store, metrics)
    app[BODIES] = Bodies(settings.max_body_bytes)
    app[EXPORTS] = exports = Exports(settings)
    store.watch_reads(lambda: exports.are_running)
    app[ALERTING] = alerting or Alerting(store, Rules())
    app[UPKEEP] = upkeep or Upkeep(store, settings)
    app[DOCUMENT] = _document(settings.api_auth_enabled)
    # aiohttp's own pattern of a variable part leaves out braces, which an event_id may hold.
    paths = ((route, route.path.replace("{event_id}", "{event_id:[^/]+}")) for route in ROUTES)
    app.router.add_routes([web.route(route.method, path, route.handler) for route, path in paths])
    return app
