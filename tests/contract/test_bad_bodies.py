"""The catalogue of bad bodies at every endpoint that takes one: it is refused in the one shape, and changes nothing."""

from __future__ import annotations

import io

import pytest

from tests.conftest import MakeApi, make_run
from tests.contract.test_bad_input import NOT_AN_OBJECT, NOT_JSON
from tests.contract.wire import JSON, RUNS, check_error, send

OTHER_BODIES = {
    "change": ("PATCH", f"{RUNS}/known"),
    "commit": ("POST", f"{RUNS}/known/associate-commit"),
    "events": ("POST", f"{RUNS}/known/events"),
    "process": ("POST", f"{RUNS}/known/process"),
    "prune": ("POST", "/api/v1/admin/prune"),
    "reap": ("POST", "/api/v1/admin/reap"),
    "redact": ("POST", "/api/v1/admin/redact"),
    "backup": ("POST", "/api/v1/admin/backup"),
}
TOKEN = "correct-horse-battery"


@pytest.mark.parametrize(("method", "path"), OTHER_BODIES.values(), ids=OTHER_BODIES)
async def test_every_other_endpoint_refuses_them_as_well(make_api: MakeApi, method: str, path: str) -> None:
    api = await make_api(api_auth_enabled=True, api_auth_token=TOKEN)
    headers = {**JSON, "X-API-Key": TOKEN}
    run = make_run(event_id="known")
    assert (await send(api, "POST", RUNS, json=run, headers=headers)).status == 201
    before = (await send(api, "GET", f"{RUNS}/known", headers=headers)).json
    for label, body in NOT_JSON.items():
        [fault] = check_error(await send(api, method, path, data=io.BytesIO(body), headers=headers), 422)
        assert (fault["loc"], fault["type"]) == (["body"], "json_invalid"), label
    for label, body in NOT_AN_OBJECT.items():
        status = 413 if label == "a million elements" and path.endswith("/events") else 422
        status = 400 if path.endswith("/backup") else status  # which takes {} and nothing else
        if not (label == "an empty array" and path.endswith("/events")):
            check_error(await send(api, method, path, data=io.BytesIO(body), headers=headers), status)
    for given, status in (({}, 415), ({"Content-Type": "text/plain"}, 415), ({"Content-Encoding": "br"}, 415)):
        typed = {"X-API-Key": TOKEN, "Content-Type": "application/json", **given} if given else {"X-API-Key": TOKEN}
        check_error(await send(api, method, path, data=io.BytesIO(b"{}"), headers=typed), status)
    check_error(await send(api, method, path, data=io.BytesIO(b" " * (16 << 20) + b"{}"), headers=headers), 413)
    assert (await send(api, "GET", f"{RUNS}/known", headers=headers)).json == before
