"""Schemathesis reads the daemon's own /openapi.json and tries, over a real socket, to make the daemon break it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import StartDaemon

# Every check runs on every endpoint, except where the guide or API.md wants what the check forbids:
CONFIG = """
[[operations]]
# "One bad item never costs the good ones": a batch with a bad item is answered 200, with the item in error_details.
# GET /api/v1/runs/batch is the run whose event_id is "batch", so Allow rightly names GET and PATCH too.
include-path = "/api/v1/runs/batch"
[operations.checks]
negative_data_rejection.enabled = false
allow_header_conformance.enabled = false

[[operations]]
# Which format goes with include=events, and which filters this daemon has an index for, no schema can say; nor that
# only so many exports run at once. PATCH /api/v1/runs/export is the run whose event_id is "export".
include-path = "/api/v1/runs/export"
[operations.checks]
allow_header_conformance.enabled = false
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 503]

[[operations]]
# A patch in which every field is null or missing is valid JSON, and the guide's 400 "No valid fields to update".
include-name = "PATCH /api/v1/runs/{event_id}"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 404]

[[operations]]
# A filter is a string with a language of its own (a,b and -2h and metrics.tokens>1000), and q needs a setting.
include-name = "GET /api/v1/runs"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400]

[[operations]]
# The same language of filters and times.
include-name = "GET /api/v1/stats"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400]

[[operations]]
include-name = "GET /api/v1/regressions"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 400]

[[operations]]
# What a valid place is depends on the database: of another epoch or number the answer is that it is gone.
include-name = "GET /api/v1/changes"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", 410]

[[operations]]
# More events than one request may hold are too large, not wrong.
include-name = "POST /api/v1/runs/{event_id}/events"
[operations.checks.negative_data_rejection]
expected-statuses = [400, 404, 413, 415, 422]
"""

# In the short form no request tries each boundary of the runs of a batch, which are those of a single run.
SHORT = """
[[operations]]
include-path = "/api/v1/runs/batch"
[operations.phases.coverage]
enabled = false
"""

# What no schema can say: at no depth may the agent's own objects hold a NUL or an integer of more than 64 bits. And
# what it does not say: that 3.x's texts for counts and truth values are taken; test_runs.py sends them.
HOOKS = """
import schemathesis

FREE = ("metrics_json", "context_json", "payload")
COUNTS = ("items_discovered", "items_succeeded", "items_failed", "items_skipped", "duration_ms", "api_retry_count")

def storable(value):
    if isinstance(value, dict):
        return {storable(name): storable(part) for name, part in value.items()}
    if isinstance(value, list):
        return [storable(part) for part in value]
    if isinstance(value, str):
        return value.replace(chr(0), "")
    if isinstance(value, int) and abs(value) >= 2**63:
        return 0
    return value

def run(body):
    if not isinstance(body, dict):
        return body
    return {name: storable(value) if name in FREE else value for name, value in body.items()}

def is_taken(name, value):
    words = ("yes", "no", "true", "false", "1", "0")
    is_text = isinstance(value, str) and (value.lower() in words or value.lstrip("-").isdecimal())
    return is_text and name in (*COUNTS, "api_posted")

@schemathesis.hook
def filter_body(context, body):
    return not (isinstance(body, dict) and any(is_taken(*item) for item in body.items()))

@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict) and isinstance(body.get("runs"), list):
        return {**body, "runs": [run(item) for item in body["runs"]]}
    return [run(item) for item in body] if isinstance(body, list) else run(body)
"""


def test_no_request_makes_the_daemon_break_its_own_document(
    request: pytest.FixtureRequest, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    is_short = request.config.getoption("--rounds-scale") < 0.1
    daemon = start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")
    with urllib.request.urlopen(f"{daemon.url}/openapi.json") as response:
        document = json.load(response)
    # What a valid cursor is depends on earlier answers and other parameters; test_queries.py and test_events.py forge
    # them.
    for path in ("/api/v1/runs", "/api/v1/runs/{event_id}/events"):
        parameters = document["paths"][path]["get"]["parameters"]
        parameters.remove(next(parameter for parameter in parameters if parameter["name"] == "cursor"))
    # Schemathesis knows no NDJSON, so it would stumble over the example; test_openapi.py sends it.
    del document["paths"]["/api/v1/runs/batch"]["post"]["requestBody"]["content"]["application/x-ndjson"]["example"]
    # What is taken although the document offers it to nobody.
    document["components"]["schemas"]["NewRun"]["properties"]["api_posted"]["anyOf"].append({"enum": [0, 1]})
    # An answer without an end, and one that waits; test_feed.py and test_changes.py read them.
    del document["paths"]["/api/v1/runs/stream"]
    parameters = document["paths"]["/api/v1/changes"]["get"]["parameters"]
    parameters.remove(next(parameter for parameter in parameters if parameter["name"] == "wait"))
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "schemathesis.toml").write_text(CONFIG + SHORT * is_short)
    (tmp_path / "hooks.py").write_text(HOOKS)
    examples = 3 if is_short else 10
    command = f"--config-file schemathesis.toml run openapi.json --seed 1 --max-examples {examples} --no-shrink"
    finished = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"),
            *command.split(),
            "--continue-on-failure",
            "--url",
            daemon.url,
        ],
        cwd=tmp_path,
        env={**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert daemon.process.poll() is None, daemon.wait()
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
    operations = sum(len(path) for path in document["paths"].values())
    assert f"{operations} selected / {operations} total" in finished.stdout
    assert not [line for line in daemon.lines if line["level"] == "CRITICAL" or line.get("status") == 500]
    assert daemon.stop() == 0
