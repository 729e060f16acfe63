"""Handlers that create runs, one or many at once."""

from __future__ import annotations

import logging
from typing import Any, Final

from aiohttp import web

from telemetryd.model import queries, runs
from telemetryd.model.answers import BatchStored, RunCreated, RunDuplicate
from telemetryd.model.batches import read_batch
from telemetryd.model.commands import CreateRuns
from telemetryd.services.admin_handlers import STORE
from telemetryd.services.admission import METRICS, Admission
from telemetryd.services.duplicates import differences, warning
from telemetryd.settings import Settings
from telemetryd.web.answers import NOTE, json_response, with_warnings
from telemetryd.web.body import BODIES, JSON_TYPES, NDJSON_TYPES, check_media_type, json_body

SETTINGS: Final = web.AppKey("settings", Settings)
_MOST_NAMED: Final = 10
"""Runs that a line of the log names."""


async def create_run(request: web.Request) -> web.Response:
    """Store one run; a single is a batch of one."""
    request.app[STORE].check_open()
    body, size = await json_body(request)
    parsed = runs.parse_run(body)
    if (admission := Admission.of(request)) is not None:
        admission.check(parsed.row)
        admission.pay([parsed.row], size)
    event_id, run_id = str(parsed.row[runs.EVENT_ID]), str(parsed.row[runs.RUN_ID])
    created = await request.app[STORE].submit(CreateRuns((parsed.row,), size))
    is_new = created.new[0]
    notes = runs.text_warnings(body)
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
        notes.append(warning(differing))
        request.app[METRICS].differing.inc()
        said = {"event_id": event_id, "run_id": run_id, "differs_in": differing}
        request[NOTE].say("Run already exists, and says something else", logging.WARNING, **said)
    known: RunDuplicate = {
        "status": "duplicate",
        "event_id": event_id,
        "message": "Event already exists (idempotent)",
    }
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
