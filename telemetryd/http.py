"""Routes and their handlers: request in, command or query, answer out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import orjson
from aiohttp import hdrs, web

import telemetryd
from telemetryd import traces
from telemetryd.errors import InvalidBodyError, InvalidRequestError, RunNotFoundError
from telemetryd.mcp import endpoint as mcp
from telemetryd.model import event_queries, events, filters, queries, regressions, runs, stats, values
from telemetryd.model.answers import (
    BatchStored,
    CommitAssociated,
    CommitPage,
    EventsStored,
    Metadata,
    Performance,
    RepoPage,
    RunCreated,
    RunDuplicate,
    RunUpdated,
    Totals,
)
from telemetryd.model.batches import read_batch
from telemetryd.model.commands import CreateEvents, CreateRuns, TooManyLabels, Updated, UpdateRun
from telemetryd.model.parameters import accept_none
from telemetryd.model.rules import Rules
from telemetryd.model.tokens import Scope
from telemetryd.ops.metrics import Metrics
from telemetryd.services import admin_handlers
from telemetryd.services.admin_handlers import STORE, UPKEEP
from telemetryd.services.admission import METRICS, QUOTAS, Admission, check_run
from telemetryd.services.alerting import Alerting
from telemetryd.services.certificates import Certificates
from telemetryd.services.duplicates import differences, warning
from telemetryd.services.exports import Exporter
from telemetryd.services.process_handlers import CERTIFICATES, register_process, watch_processes
from telemetryd.services.subscriptions import add_feed, list_changes, stream_runs
from telemetryd.services.upkeep import Upkeep
from telemetryd.settings import Settings
from telemetryd.store import Store
from telemetryd.web import browsers, openapi, operations, pages
from telemetryd.web.answers import NOTE, REASON, Handler, json_response, next_page, with_warnings
from telemetryd.web.body import BODIES, JSON_TYPES, NDJSON_TYPES, Bodies, check_media_type, json_body
from telemetryd.web.limits import AgentQuotas
from telemetryd.web.middleware import middleware
from telemetryd.web.negotiation import wants_prometheus
from telemetryd.web.openapi import Described, Operation
from telemetryd.web.tokens import TOKENS, Tokens

SETTINGS: Final = web.AppKey("settings", Settings)
ALERTING: Final = web.AppKey("alerting", Alerting)
EXPORTER: Final = web.AppKey("exporter", Exporter)

_MOST_NAMED: Final = 10
"""Runs that a line of the log names."""


# --- Runs ----------------------------------------------------------------------------------------


async def create_run(request: web.Request) -> web.Response:
    """Store one run; a single is a batch of one."""
    request.app[STORE].check_open()
    body, size = await json_body(request)
    parsed = runs.parse_run(body)
    if (admission := Admission.of(request)) is not None:
        admission.check(parsed.row)
        admission.pay([parsed.row], size)
    event_id, run_id = str(parsed.row[runs.EVENT_ID]), str(parsed.row[runs.RUN_ID])
    row = runs.in_trace(parsed.row, request.headers.get(traces.HEADER))
    created = await request.app[STORE].submit(CreateRuns((row,), size))
    is_new = created.new[0]
    notes = parsed.notes
    if is_new:
        request.app[METRICS].count_runs(created=1)
        request[NOTE].say("Run created", event_id=event_id, run_id=run_id)
        stored: RunCreated = {"status": "created", "event_id": event_id, "run_id": run_id}
        return json_response(with_warnings(stored, parsed.ignored, notes), 201)
    if admission is not None:
        await admission.check_known(parsed.row)
    request.app[METRICS].count_runs(duplicate=1)
    differing = (await differences(request.app[STORE], [parsed.row])).get(0)
    if differing is None:
        request[NOTE].say("Run already exists", event_id=event_id, run_id=run_id)
    else:
        notes = (*notes, warning(differing))
        request.app[METRICS].differing.inc()
        said = {"event_id": event_id, "run_id": run_id, "differs_in": differing}
        request[NOTE].say("Run already exists, and says something else", logging.WARNING, **said)
    known: RunDuplicate = {"status": "duplicate", "event_id": event_id, "message": "Event already exists (idempotent)"}
    return json_response(with_warnings(known, parsed.ignored, notes))


async def create_batch(request: web.Request) -> web.Response:
    """Store the good runs of a batch in one transaction, and report each bad one."""
    request.app[STORE].check_open()
    media_type = check_media_type(request, (*JSON_TYPES, *NDJSON_TYPES))
    changes_follow = queries.changes_follow(request.query.get(queries.CHANGES.name))
    admission = Admission.of(request)
    async with request.app[BODIES].read(request) as body:
        limit, is_lines = request.app[SETTINGS].max_batch, media_type in NDJSON_TYPES
        check = None if admission is None else admission.check
        batch = await read_batch(body, limit, is_lines=is_lines, check=check)
    if admission is not None and (late := admission.late(batch.rows)):
        batch.drop(late)
    batch.raise_if_all_wait()
    if admission is not None:
        admission.pay(batch.rows, batch.size, batch.total)
    inserted, taken = 0, 0
    differing: list[str] = []
    if batch.rows:
        created = await request.app[STORE].submit(CreateRuns(tuple(batch.rows), batch.size))
        inserted = sum(created.new)
        known = [place for place, is_new in enumerate(created.new) if not is_new]
        if admission is not None and (others := await admission.taken([batch.rows[place] for place in known])):
            batch.refuse({known[index]: refusal for index, refusal in others.items()})
            known = [place for index, place in enumerate(known) if index not in others]
            taken = len(others)
        rows = [batch.rows[place] for place in known]
        for place, names in (await differences(request.app[STORE], rows, changes_follow=changes_follow)).items():
            batch.note(batch.indexes[known[place]], [warning(names)])
            differing.append(str(rows[place][runs.EVENT_ID]))
    duplicates = len(batch.rows) - inserted - taken
    request.app[METRICS].count_runs(created=inserted, duplicate=duplicates, invalid=len(batch.errors))
    said: dict[str, Any] = {
        "inserted": inserted,
        "duplicates": duplicates,
        "errors": len(batch.errors),
        "total": batch.total,
        **batch.refused,
    }
    if differing:
        request.app[METRICS].differing.inc(len(differing))
        said |= {"differing": len(differing), "event_ids": differing[:_MOST_NAMED]}
        request[NOTE].say("Batch stored; known runs say something else", logging.WARNING, **said)
    else:
        request[NOTE].say("Batch stored", **said)
    answer: BatchStored = {
        "inserted": inserted,
        "duplicates": duplicates,
        "errors": batch.errors,
        "total": batch.total,
    }
    if batch.errors:
        answer["error_details"] = batch.error_details
    return json_response(with_warnings(answer, tuple(batch.ignored), batch.notes))


async def list_runs(request: web.Request) -> web.Response:
    """Answer the runs that match every filter, newest first."""
    query = queries.parse_list(request.rel_url.raw_query_string)
    headers: dict[str, str] = {}
    if query.count is not None:  # first, for a page would be in memory while this waits its turn
        total = await request.app[STORE].fetch(queries.CountMatching(query.filters, query.count))
        headers |= {"X-Total-Count": str(total.runs), "X-Total-Count-Accuracy": str(total.accuracy)}
    page = await request.app[STORE].fetch(query)
    request[NOTE].say("Query executed", query_params=filters.for_log(query.parameters()), result_count=len(page.runs))
    if page.end is not None:
        headers |= next_page(request, query.next_page(request.path, page.end))
    return json_response(orjson.Fragment(f"[{','.join(page.runs)}]"), headers=headers)


async def export_runs(request: web.Request) -> web.StreamResponse:
    """Stream all runs that match every filter, oldest arrival first."""
    query = queries.parse_export(request.rel_url.raw_query_string, request.headers.get("Accept", ""))
    if request.method == hdrs.METH_HEAD:
        return await request.app[EXPORTER].describe(request, query)
    return await request.app[EXPORTER].stream(request, query)


async def get_run(request: web.Request) -> web.Response:
    """Answer one run, with its first events if they are asked for."""
    with_events = queries.parse_include(request.rel_url.raw_query_string)
    run, page = await _stored_run(request, events.MAX_EVENTS if with_events else 0)
    return json_response(run | events.page_fields(page) if with_events else run)


async def update_run(request: web.Request) -> web.Response:
    """Change the given fields of a run."""
    request.app[STORE].check_open()
    body, size = await json_body(request)
    changes, ignored, notes = runs.parse_patch(body)
    event_id = request.match_info["event_id"]
    if not changes:
        raise InvalidRequestError("No valid fields to update")
    request[NOTE].say("Run updated", event_id=event_id, fields_updated=list(changes))
    await _update(request, UpdateRun(event_id, changes, size))
    answer: RunUpdated = {"event_id": event_id, "updated": True, "fields_updated": list(changes)}
    return json_response(with_warnings(answer, ignored, notes))


async def _update(request: web.Request, command: UpdateRun) -> Updated:
    await check_run(request, command.event_id, command.size)
    updated = await request.app[STORE].submit(command)
    if updated is None:
        raise RunNotFoundError(values.shorten(command.event_id))
    if isinstance(updated, TooManyLabels):
        raise InvalidBodyError([runs.too_many_labels(updated.labels)])
    return updated


async def associate_commit(request: web.Request) -> web.Response:
    """Record the commit that a run led to."""
    request.app[STORE].check_open()
    body, size = await json_body(request)
    changes, ignored = runs.parse_commit(body)
    event_id = request.match_info["event_id"]
    request[NOTE].say("Commit associated", event_id=event_id, fields_updated=list(changes))
    updated = await _update(request, UpdateRun(event_id, changes, size))
    answer: CommitAssociated = {
        "status": "success",
        "event_id": event_id,
        "run_id": updated.run_id,
        "commit_hash": str(changes["git_commit_hash"]),
    }
    return json_response(with_warnings(answer, ignored))


async def get_commit_url(request: web.Request) -> web.Response:
    """Answer the page of a run's commit."""
    run, _ = await _stored_run(request)
    answer: CommitPage = {"commit_url": run["commit_url"]}
    return json_response(answer)


async def get_repo_url(request: web.Request) -> web.Response:
    """Answer the page of a run's repository."""
    run, _ = await _stored_run(request)
    answer: RepoPage = {"repo_url": run["repo_url"]}
    return json_response(answer)


async def _stored_run(request: web.Request, most_events: int = 0) -> tuple[dict[str, Any], events.EventPage]:
    event_id = request.match_info["event_id"]
    request[NOTE].say("Run queried", event_id=event_id)
    found = await request.app[STORE].fetch(queries.GetRun(event_id, most_events))
    if found is None:
        raise RunNotFoundError(values.shorten(event_id))
    row, page = found
    return runs.to_json(row), page


# --- Events --------------------------------------------------------------------------------------


async def create_events(request: web.Request) -> web.Response:
    """Store one or many events of a run, each once, or none if one is bad."""
    request.app[STORE].check_open()
    event_id = request.match_info["event_id"]
    body, size = await json_body(request)
    parsed = events.parse_events(body)
    await check_run(request, event_id, size)
    created = await request.app[STORE].submit(CreateEvents(event_id, parsed.rows, size))
    if created is None:
        raise RunNotFoundError(values.shorten(event_id))
    answer: EventsStored = {"inserted": created.inserted, "duplicates": len(parsed.rows) - created.inserted}
    request.app[METRICS].count_events(created=answer["inserted"], duplicate=answer["duplicates"])
    request[NOTE].say("Events stored", event_id=event_id, **answer)
    return json_response(with_warnings(answer, parsed.ignored), 201)


async def list_events(request: web.Request) -> web.Response:
    """Answer events of a run, from either end."""
    event_id = request.match_info["event_id"]
    query = event_queries.parse_event_list(request.rel_url.raw_query_string, event_id)
    page = await request.app[STORE].fetch(query)
    if page is None:
        raise RunNotFoundError(values.shorten(event_id))
    # Clients that page by offset would lose events with a shorter page; a cursor continues after its last one.
    if page.more and len(page.rows) < query.limit and not query.by_cursor:
        raise InvalidRequestError(
            f"Invalid limit: {query.limit}; that is more than one answer holds: ask for at most {len(page.rows)} at a "
            "time"
        )
    request[NOTE].say("Events queried", event_id=event_id, result_count=len(page.rows))
    headers = {}
    if page.more:
        headers = next_page(request, query.next_page(request.rel_url.raw_path, events.cursor(page.rows[-1])))
    return json_response([events.to_json(row) for row in page.rows], headers=headers)


# --- Everything else -----------------------------------------------------------------------------


async def get_stats(request: web.Request) -> web.Response:
    """Answer statistics of the runs that were created in some hours."""
    query = stats.parse(request.rel_url.raw_query_string, values.utc_now())
    groups = await request.app[STORE].fetch(query)
    request[NOTE].say("Statistics queried", query_params=stats.parameters(query), result_count=len(groups))
    return json_response(stats.to_json(query, groups))


async def get_regressions(request: web.Request) -> web.Response:
    """Answer since which commits runs are worse."""
    query = regressions.parse(request.rel_url.raw_query_string, values.utc_now())
    findings = await request.app[STORE].fetch(query)
    count = len(findings.regressions)
    request[NOTE].say("Regressions queried", query_params=query.parameters(), result_count=count)
    return json_response(regressions.to_json(query, findings))


async def get_metadata(request: web.Request) -> web.Response:
    """Answer the agents and job types there are."""
    counts = await request.app[STORE].counts()
    agents = sorted(counts.agents)
    request[NOTE].say("Metadata queried", result_count=len(agents))
    answer: Metadata = {
        "agent_names": agents,
        "job_types": list(counts.job_types),
        "counts": {"agent_names": counts.agent_names, "job_types": counts.job_type_names},
        "cache_hit": counts.is_remembered,
    }
    return json_response(answer)


async def get_health(request: web.Request) -> web.Response:
    """Answer at once whether writes are accepted."""
    health = request.app[STORE].health()
    request[NOTE].say("Health checked", logging.DEBUG)
    answer = {
        "status": "ok" if health.problem is None else "error",
        "version": telemetryd.__version__,
        **health.description,
        "durable": health.durable,
        "durability": "an acknowledged write survives a crash and a power cut"
        if health.durable
        else "an acknowledged write survives a crash, not a power cut",
        "queue_depth": health.queue_depth,
        "oldest_waiting_s": round(health.oldest_s, 3),
        "last_commit_at": None if health.last_commit is None else values.format_timestamp(health.last_commit),
        **health.figures,
        "counts": health.counts,
        "full_text": request.app[UPKEEP].full_text,
        "automatic": request.app[UPKEEP].shown(),
        "notices": request.app[UPKEEP].notices(),
    }
    if health.warning is not None:
        answer["warning"] = health.warning
    if health.problem is not None:
        answer["detail"] = health.problem
    response = json_response(answer, 200 if health.problem is None else 503, {"Cache-Control": "no-store"})
    response[REASON] = health.problem or ""
    return response


async def get_metrics(request: web.Request) -> web.Response:
    """Answer the totals as JSON, or everything for Prometheus."""
    accepted = "prometheus" if wants_prometheus(request) else "json"
    form = queries.parse_metrics(request.rel_url.raw_query_string, accepted)
    counts = await request.app[STORE].counts()
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
    kept: Performance = {
        "db_path": health.description["db_path"],
        "synchronous": health.description["synchronous"],
        "queue_depth": health.queue_depth,
    }
    if (mode := health.description.get("journal_mode")) is not None:
        kept["journal_mode"] = mode
    answer: Totals = {
        "total_runs": counts.total,
        "agents": dict(counts.agents),
        "recent_24h": counts.recent,
        "performance": kept,
    }
    if more := counts.agent_names - len(counts.agents):
        answer["agents_more"] = more
    return json_response(answer)


async def list_alerts(request: web.Request) -> web.Response:
    """Answer the rules of alerts with what they are firing for."""
    accept_none(request.rel_url.raw_query_string, values.utc_now())
    answer = await request.app[ALERTING].shown()
    request[NOTE].say("Alerts listed", result_count=sum(len(rule["firing"]) for rule in answer["rules"]))
    return json_response(answer)


async def get_openapi(request: web.Request) -> web.Response:
    """Answer the OpenAPI document."""
    request[NOTE].say("Document served", logging.DEBUG)
    body = await asyncio.to_thread(_document, request.app[SETTINGS].api_auth_enabled)
    return web.Response(body=body, content_type="application/json")


# --- The routes, which are also what the OpenAPI document lists ----------------------------------


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint: how it is reached, who answers, and how it is described (not at all for pages and for /mcp)."""

    method: str
    path: str
    handler: Handler
    operation: Operation | None = None


ROUTES: Final[tuple[Route, ...]] = (
    Route("POST", "/api/v1/runs", create_run, operations.CREATE_RUN),
    Route("POST", "/api/v1/runs/batch", create_batch, operations.CREATE_BATCH),
    Route("GET", "/api/v1/runs", list_runs, operations.LIST_RUNS),
    # Before the runs themselves: one whose event_id is "stream" is found in the list.
    Route("GET", "/api/v1/runs/stream", stream_runs, operations.STREAM_RUNS),
    Route("GET", "/api/v1/changes", list_changes, operations.LIST_CHANGES),
    Route("GET", "/api/v1/runs/export", export_runs, operations.EXPORT_RUNS),
    Route("GET", "/api/v1/runs/{event_id}", get_run, operations.GET_RUN),
    Route("PATCH", "/api/v1/runs/{event_id}", update_run, operations.UPDATE_RUN),
    Route("DELETE", "/api/v1/runs/{event_id}", admin_handlers.delete_run, operations.DELETE_RUN),
    Route("POST", "/api/v1/runs/{event_id}/associate-commit", associate_commit, operations.ASSOCIATE_COMMIT),
    Route("POST", "/api/v1/runs/{event_id}/events", create_events, operations.CREATE_EVENTS),
    Route("GET", "/api/v1/runs/{event_id}/events", list_events, operations.LIST_EVENTS),
    Route("POST", "/api/v1/runs/{event_id}/process", register_process, operations.REGISTER_PROCESS),
    Route("GET", "/api/v1/runs/{event_id}/commit-url", get_commit_url, operations.GET_COMMIT_URL),
    Route("GET", "/api/v1/runs/{event_id}/repo-url", get_repo_url, operations.GET_REPO_URL),
    Route("GET", "/api/v1/stats", get_stats, operations.GET_STATS),
    Route("GET", "/api/v1/regressions", get_regressions, operations.GET_REGRESSIONS),
    Route("GET", "/api/v1/alerts", list_alerts, operations.LIST_ALERTS),
    Route("GET", "/api/v1/metadata", get_metadata, operations.GET_METADATA),
    Route("GET", "/health", get_health, operations.GET_HEALTH),
    Route("GET", "/metrics", get_metrics, operations.GET_METRICS),
    Route("POST", "/api/v1/admin/prune", admin_handlers.prune_runs, operations.PRUNE_RUNS),
    Route("POST", "/api/v1/admin/reap", admin_handlers.reap_runs, operations.REAP_RUNS),
    Route("POST", "/api/v1/admin/redact", admin_handlers.redact_run, operations.REDACT_RUN),
    Route("POST", "/api/v1/admin/confirm", admin_handlers.confirm, operations.CONFIRM),
    Route("POST", "/api/v1/admin/backup", admin_handlers.make_backup, operations.MAKE_BACKUP),
    Route("POST", mcp.PATH, mcp.answer_assistant),
    Route("GET", "/openapi.json", get_openapi),
    *(Route("GET", path, handler) for path, handler in pages.handlers()),
)


def described() -> Iterator[Described]:
    """Yield each endpoint that the OpenAPI document describes, under the name of its handler."""
    for route in ROUTES:
        if route.operation is not None:
            yield Described(route.handler.__name__, route.method, route.path, route.operation)


@cache
def _document(needs_token: bool) -> bytes:
    """Return the OpenAPI document, of which there are two; to write one takes longer than to start the daemon."""
    return orjson.dumps(openapi.document(described(), needs_token=needs_token))


def make_app(
    store: Store,
    settings: Settings,
    metrics: Metrics,
    *,
    alerting: Alerting | None = None,
    upkeep: Upkeep | None = None,
    tokens: Tokens | None = None,
) -> web.Application:
    """Return the app that answers for one store."""
    tokens = tokens or Tokens(settings, metrics)
    scopes = {route.handler: route.operation.scope if route.operation else Scope.READ for route in ROUTES}
    passed = middleware(settings, metrics, store.flow, tokens, scopes)
    app = web.Application(middlewares=[passed], client_max_size=settings.max_body_bytes)
    app[STORE], app[SETTINGS], app[METRICS] = store, settings, metrics
    app[TOKENS] = tokens
    app[QUOTAS] = AgentQuotas(settings.quota_runs_per_minute, settings.quota_bytes_per_day)
    app[CERTIFICATES] = Certificates(store, settings, metrics)
    app.cleanup_ctx.append(watch_processes)
    if settings.reading_origins:
        app.on_response_prepare.append(browsers.sharing(settings.reading_origins))
    add_feed(app, store, metrics)
    app[BODIES] = Bodies(settings.max_body_bytes)
    app[EXPORTER] = Exporter(store)
    app[ALERTING] = alerting or Alerting(store, Rules())
    app[mcp.SOURCE] = mcp.StoreSource(store, app[ALERTING])
    app[UPKEEP] = upkeep or Upkeep(store, settings)
    # aiohttp's own pattern of a variable part leaves out braces, which an event_id may hold.
    paths = [(route, route.path.replace("{event_id}", "{event_id:[^/]+}")) for route in ROUTES]
    app.router.add_routes([web.route(route.method, path, route.handler) for route, path in paths])
    # A slash at the end is ignored, except after the names of pages and of their files.
    slashed = [(route, f"{path}/") for route, path in paths if route.operation or path in ("/openapi.json", mcp.PATH)]
    app.router.add_routes([web.route(route.method, path, route.handler) for route, path in slashed])
    return app
