"""The deployment guide, taken at its word: its commands run against a daemon, its examples compared with answers."""

from __future__ import annotations

import http.client
import json
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from telemetryd.configuration import Origin, load
from telemetryd.model.runs import COLUMNS
from telemetryd.settings import variable
from tests.conftest import Daemon, StartDaemon, make_run
from tests.engines import engine_settings
from tests.guide.reading import block, blocks, commands, example, examples, names, section
from tests.guide.shell import DATABASE, LOG, TEE, Shell

STALE = {"agent_name": "hugo-translator", "status": "running", "created_at": "2025-12-24T10:00:00Z"}
OF_SQLITE = re.compile("TELEMETRY_(DB|LOCK)_")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


def moment(value: Any) -> Any:
    """Return a timestamp as the moment that it means, and anything else as it is."""
    return datetime.fromisoformat(value) if isinstance(value, str) and TIME.fullmatch(value) else value


def kind(value: Any) -> str:
    """Return the name of a value's JSON type."""
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def start_with_env_file(start: StartDaemon, folder: Path, engine: str = "sqlite", **variables: str) -> Shell:
    """Start a daemon with the guide's `.env` as it stands (only the port is a free one); return a shell next to it.

    On PostgreSQL it is without what names SQLite's file, and says how that is kept.
    """
    text = block("Environment Variables")
    if engine == "sqlite":
        (folder / DATABASE).parent.mkdir(parents=True, exist_ok=True)
        variables["TELEMETRY_DB_PATH"] = ""
    else:
        text = "".join(line for line in text.splitlines(keepends=True) if not OF_SQLITE.match(line))
    (folder / ".env").write_text(text)
    return Shell(start(folder=folder, prefix=TEE, **variables))


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    folder = tmp_path_factory.mktemp("guide")
    with engine_settings(request, engine, folder) as settings:
        place = {} if engine == "sqlite" else {variable(name): str(value) for name, value in settings.items()}
        shell = start_with_env_file(Daemon, folder, engine, **place)
        yield shell
        shell.daemon.close()


@pytest.fixture
def shell(shared: Shell) -> Shell:
    """A shell next to a daemon without runs and with an empty log."""
    shared.forget()
    return shared


@pytest.fixture
def own_shell(start_daemon: StartDaemon, engine: str, tmp_path: Path) -> Shell:
    """A shell next to a daemon that the test may stop."""
    return start_with_env_file(start_daemon, tmp_path, engine)


# --- Configuration -------------------------------------------------------------------------------


def test_every_variable_of_the_reference_has_its_default() -> None:
    rows = re.findall(
        r"^\| `(TELEMETRY_\w+)` \| `([^`]*)` \|", "\n".join(section("Configuration Reference").lines), re.M
    )
    assert len(rows) == 8
    shown = load({}, {}, None).shown()
    ours = {variable: str(shown[variable]["value"]) for variable, _ in rows}
    windows_paths = {variable for variable, default in rows if default.startswith("D:/")}
    assert windows_paths == {"TELEMETRY_DB_PATH", "TELEMETRY_LOCK_FILE"}
    assert {name: ours[name] for name, _ in rows if name not in windows_paths} == {
        name: default for name, default in rows if name not in windows_paths
    }


def test_the_env_file_is_read_with_its_comments(tmp_path: Path) -> None:
    text = block("Environment Variables")
    assert "TELEMETRY_API_WORKERS=1  # CRITICAL: Must be 1\n" in text
    (tmp_path / ".env").write_text(text)
    loaded = load({}, {}, tmp_path / ".env")
    written = dict(re.findall(r"^(TELEMETRY_\w+)=(\S+)", text, re.M))
    assert len(written) == 8
    shown = loaded.shown()
    paths = {name: str(Path(written[name]).absolute()) for name in ("TELEMETRY_DB_PATH", "TELEMETRY_LOCK_FILE")}
    assert {name: str(shown[name]["value"]) for name in written} == written | paths
    assert {shown[name]["origin"] for name in written} == {str(Origin.DOTENV)}


@pytest.mark.sqlite
@pytest.mark.parametrize("text", blocks("PRAGMA Settings", "bash"))
def test_the_pragma_settings_are_what_the_daemon_runs_with(
    text: str, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(text)
    wanted = dict(re.findall(r"^TELEMETRY_DB_(\w+)=(\w+)", text, re.M))
    shell = Shell(start_daemon())
    health = shell.curl(block("Step 1: Health Check"))
    assert {name: health[name.lower()] for name in wanted} == wanted
    assert health["durable"] is (wanted["SYNCHRONOUS"] == "FULL")


@pytest.mark.parametrize(("level", "seen"), [("INFO", {"INFO", "ERROR"}), ("WARNING", {"ERROR"}), ("ERROR", {"ERROR"})])
def test_the_log_level_is_set_as_shown(
    level: str, seen: set[str], start_daemon: StartDaemon, tmp_path: Path, free_port: int
) -> None:
    setting = commands(blocks("Log Configuration", "bash")[0])[0]
    assert re.fullmatch(r"export (TELEMETRY_LOG_LEVEL)=INFO +# DEBUG, INFO, WARNING, ERROR", setting)
    (tmp_path / ".env").write_text(setting.replace("=INFO", f"={level}") + "\n")
    daemon = start_daemon(TELEMETRY_API_PORT=str(free_port), TELEMETRY_API_HOST="127.0.0.1")
    shell = Shell(daemon, f"127.0.0.1:{free_port}")
    shell.run("until curl http://localhost:8765/health; do sleep 0.05; done")
    assert shell.curl(blocks("GET /api/v1/runs - Query Runs", "bash")[0]) == []
    shell.curl("curl http://localhost:8765/api/v1/runs?status=nonsense", 400)
    assert daemon.stop() == 0
    assert {line["level"] for line in daemon.lines} - {"WARNING"} == seen  # the tests' PostgreSQL syncs nothing


def test_the_port_is_chosen_as_shown(start_daemon: StartDaemon, tmp_path: Path, free_port: int) -> None:
    script = next(text for text in blocks("Issue: Port Already in Use", "bash") if "--port" in text)
    flags = script.split()[1:]
    assert flags == ["--port", "8766"]
    assert start_daemon(flags[0], str(free_port)).url == f"http://127.0.0.1:{free_port}"


# --- Verification --------------------------------------------------------------------------------


@pytest.mark.sqlite
def test_step_1_the_health_check(shell: Shell) -> None:
    expected = example("Step 1: Health Check")
    health = shell.curl(block("Step 1: Health Check"))
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", health["version"])
    path = str(shell.folder / expected["db_path"])
    assert {**expected, "version": health["version"], "db_path": path}.items() <= health.items()


def test_step_2_the_metrics(shell: Shell, engine: str) -> None:
    expected = example("Step 2: Metrics Endpoint")
    agents = {name: number for number, name in enumerate(expected["agents"], start=2)}
    shell.post([make_run(agent_name=name) for name, runs in agents.items() for _ in range(runs)])
    shell.post([make_run(agent_name="hugo-translator", created_at="2025-12-24T10:00:00Z")])
    metrics = shell.curl(block("Step 2: Metrics Endpoint"))
    assert metrics.keys() == expected.keys()
    assert metrics["agents"] == {"hugo-translator": 3, "seo_intelligence.insight_engine": 3}
    assert (metrics["total_runs"], metrics["recent_24h"]) == (6, 5)
    if engine == "sqlite":
        path = str(shell.folder / expected["performance"]["db_path"])
        assert {**expected["performance"], "db_path": path}.items() <= metrics["performance"].items()
    assert json.loads(shell.run(block("Metrics Collection")).out) == metrics


def test_steps_3_and_4_a_test_event_and_its_repetition(shell: Shell) -> None:
    script = block("Step 3: Create Test Event")
    before = datetime.now(UTC).replace(microsecond=0)
    created = shell.curl(script, 201)
    assert re.fullmatch(r"test-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", created["event_id"])
    assert created == {**example("Step 3: Create Test Event"), "event_id": created["event_id"]}

    assert script.count("$(uuidgen)") == 1
    again = script.replace("$(uuidgen)", created["event_id"].removeprefix("test-"))
    expected = {**example("Step 4: Verify Idempotency"), "event_id": created["event_id"]}
    answers = [shell.curl(again, 200) for _ in range(2)]
    # The command's `date` may have gone on by a second; then the answer says so.
    assert all(answer.pop("warnings", ["start_time"])[0].endswith("start_time") for answer in answers)
    assert answers == [expected, expected]

    (stored,) = shell.curl("curl 'http://localhost:8765/api/v1/runs?agent_name=test-agent'")
    assert (stored["run_id"], stored["job_type"], stored["status"]) == ("test-run-001", "verification", "running")
    assert before <= moment(stored["start_time"]) <= datetime.now(UTC)


def test_the_periodic_health_check_mails_only_when_the_api_is_down(own_shell: Shell) -> None:
    shell = own_shell
    (line,) = commands(block("Health Monitoring"))
    schedule, command = line[:12], line[12:]
    assert schedule == "*/5 * * * * "
    shell.run(command)
    assert shell.mail() == ""
    assert shell.daemon.stop() == 0
    shell.run(command)
    assert shell.mail() == "Telemetry API down\n"


# --- GET /api/v1/runs ----------------------------------------------------------------------------

QUERY = "GET /api/v1/runs - Query Runs"


def test_a_run_is_answered_as_in_the_example(shell: Shell) -> None:
    (run,) = example(QUERY)
    shell.post([{name: value for name, value in run.items() if name != "id"}])
    (answer,) = shell.curl(blocks(QUERY, "bash")[0])
    assert {name: moment(answer[name]) for name in run} == {
        name: moment(value) for name, value in {**run, "id": answer["id"]}.items()
    }
    promised = next(line for line in section(QUERY).lines if line.startswith("**Response:**"))
    (fields,) = re.findall(r"all (\d+) database fields", promised)
    assert len(answer.keys() & set(COLUMNS)) >= int(fields)


def test_the_stale_example_finds_the_stale_runs_and_nothing_else(shell: Shell) -> None:
    shell.post(
        [
            make_run(**STALE, event_id="stale"),
            make_run(**{**STALE, "status": "success"}),
            make_run(**{**STALE, "agent_name": "another-agent"}),
            make_run(**{**STALE, "created_at": "2025-12-24T12:00:00.000001Z"}),
        ]
    )
    assert [run["event_id"] for run in shell.curl(blocks(QUERY, "bash")[0])] == ["stale"]


def test_the_paging_example_answers_the_newest_fifty(shell: Shell) -> None:
    shell.post(
        [make_run(event_id=f"{n:02}", status="success", created_at=f"2025-12-24T10:00:{n:02}Z") for n in range(53)]
    )
    shell.post([make_run(status="failure")])
    script = blocks(QUERY, "bash")[1]
    assert [run["event_id"] for run in shell.curl(script)] == [f"{n:02}" for n in range(52, 2, -1)]
    assert script.count("offset=0") == 1
    assert [run["event_id"] for run in shell.curl(script.replace("offset=0", "offset=50"))] == ["02", "01", "00"]


def test_the_date_range_example_includes_both_ends(shell: Shell) -> None:
    inside = ["2025-12-24T00:00:00Z", "2025-12-24T12:00:00+01:00", "2025-12-24T23:59:59Z"]
    outside = ["2025-12-23T23:59:59.999Z", "2025-12-25T00:00:00Z", "2025-12-25T00:30:00+01:00"]
    shell.post([make_run(start_time=start) for start in [*inside, *outside[:2]]])
    shell.post([make_run(start_time=outside[2], event_id="inside by its offset")])
    found = {moment(run["start_time"]) for run in shell.curl(blocks(QUERY, "bash")[2])}
    assert found == {datetime.fromisoformat(start) for start in [*inside, outside[2]]}


def test_every_query_parameter_of_the_list_is_known_and_checked(shell: Shell) -> None:
    listed = names(QUERY, "Query Parameters:")
    assert len(listed) == 9
    shell.post([make_run(job_type="a-job")])
    good = {"string": "nobody", "ISO8601": "2020-01-01T00:00:00Z", "integer": "1"}
    bad = {"ISO8601": "yesterday", "integer": "-1"}
    for name, form in listed:
        value = "timeout" if name == "status" else good[form]
        found = shell.curl(f"curl 'http://localhost:8765/api/v1/runs?{name}={value}'")
        is_wide = name in ("created_after", "start_time_from", "limit")
        assert len(found) == int(is_wide), name
        if wrong := "nonsense" if name == "status" else bad.get(form):
            answer = shell.curl(f"curl 'http://localhost:8765/api/v1/runs?{name}={wrong}'", 400)
            assert answer.keys() == {"detail"}
            assert name in answer["detail"]
            assert wrong in answer["detail"]


def test_limit_and_statuses_are_those_of_the_list(shell: Shell) -> None:
    text = "\n".join(section(QUERY).lines)
    ((default, most),) = re.findall(r"`limit` \(integer, default=(\d+), max=(\d+)\)", text)
    shell.post([make_run() for _ in range(int(most) + 1)])
    assert len(shell.curl("curl http://localhost:8765/api/v1/runs")) == int(default)
    assert len(shell.curl(f"curl http://localhost:8765/api/v1/runs?limit={most}")) == int(most)
    shell.curl(f"curl http://localhost:8765/api/v1/runs?limit={int(most) + 1}", 400)
    (status_line,) = re.findall(r"^- `status` .*", text, re.M)
    statuses = re.findall(r"`(\w+)`", status_line)[1:]
    assert len(statuses) == 6
    shell.post([make_run(agent_name="each-status", status=status) for status in statuses])
    for status in statuses:
        (run,) = shell.curl(f"curl 'http://localhost:8765/api/v1/runs?agent_name=each-status&status={status}'")
        assert run["status"] == status


# --- PATCH /api/v1/runs/{event_id} ---------------------------------------------------------------

UPDATE = "PATCH /api/v1/runs/{event_id} - Update Run"


def body_of(script: str) -> dict[str, Any]:
    """Return the JSON that a command of the guide sends."""
    (text,) = re.findall(r"-d '(.*)'", script, re.S)
    body: dict[str, Any] = json.loads(text)
    return body


def with_body(script: str, body: dict[str, Any]) -> str:
    """Return a command of the guide with another body."""
    return re.sub(r"-d '.*'", lambda _: f"-d '{json.dumps(body)}'", script, flags=re.S)


@pytest.mark.parametrize("number", range(2))
def test_the_update_examples_change_the_run(shell: Shell, number: int) -> None:
    script = blocks(UPDATE, "bash")[number]
    shell.post([make_run(**STALE, event_id="abc123"), make_run(**STALE, event_id="other")])
    before, other = shell.stored("abc123"), shell.stored("other")
    body = body_of(script)
    assert shell.curl(script) == {"event_id": "abc123", "updated": True, "fields_updated": list(body)}
    after = shell.stored("abc123")
    assert after["updated_at"] > before["updated_at"]
    expected = {**before, **body, "updated_at": after["updated_at"]}
    assert {name: moment(value) for name, value in after.items()} == {
        name: moment(value) for name, value in expected.items()
    }
    assert shell.stored("other") == other


def test_the_answer_to_an_update_is_the_one_shown(shell: Shell) -> None:
    expected = examples(UPDATE)[0]
    script = blocks(UPDATE, "bash")[0]
    shell.post([make_run(**STALE, event_id="abc123")])
    body = {name: value for name, value in body_of(script).items() if name in expected["fields_updated"]}
    assert shell.curl(with_body(script, body)) == expected


def test_the_error_responses_are_those_shown(shell: Shell) -> None:
    _, not_found, nothing, invalid = examples(UPDATE)
    cancel, metrics = blocks(UPDATE, "bash")
    assert shell.curl(cancel, 404) == not_found
    assert shell.curl(metrics, 404) == not_found
    shell.post([make_run(**STALE, event_id="abc123")])
    before = shell.stored("abc123")
    assert shell.curl(with_body(cancel, {}), 400) == nothing
    assert shell.curl(with_body(cancel, {"status": None, "end_time": None}), 400) == nothing
    assert shell.curl(with_body(cancel, {**body_of(cancel), "status": "bogus"}), 422) == invalid
    assert shell.stored("abc123") == before


def test_every_body_field_of_the_list_can_be_updated(shell: Shell) -> None:
    listed = names(UPDATE, "Request Body (JSON):")
    assert len(listed) == 11
    values = {"string": "a text", "ISO8601": "2025-12-24T13:05:00.000000Z", "integer": 7, "object": {"a": [1, None]}}
    body = {name: "partial" if name == "status" else values[form] for name, form in listed}
    shell.post([make_run(**STALE, event_id="abc123")])
    for name, value in body.items():
        answer = shell.curl(with_body(blocks(UPDATE, "bash")[0], {name: value}))
        assert answer == {"event_id": "abc123", "updated": True, "fields_updated": [name]}
    assert body.items() <= shell.stored("abc123").items()


# --- Longer flows --------------------------------------------------------------------------------


def test_the_batch_example_stores_its_runs_once(shell: Shell) -> None:
    script = block("Batch Endpoints")
    assert script.count(", ...}") == 2
    rest = ', "start_time": "2025-12-24T10:00:00Z", "agent_name": "hugo-translator", "job_type": "translate"}'
    script = script.replace(", ...}", rest)
    assert shell.curl(script) == {"inserted": 2, "duplicates": 0, "errors": [], "total": 2}
    assert shell.curl(script) == {"inserted": 0, "duplicates": 2, "errors": [], "total": 2}
    assert [shell.stored(name)["run_id"] for name in ("uuid1", "uuid2")] == ["run1", "run2"]


def test_the_stale_run_cleanup_flow_may_be_repeated(shell: Shell) -> None:
    steps = blocks("Stale Run Cleanup Flow (hugo-translator Example)", "bash")
    assert len(steps) == 3
    now = datetime.now(UTC)
    shell.post(
        [
            make_run(**STALE, event_id="abc123"),
            make_run(**{**STALE, "created_at": (now - timedelta(minutes=50)).isoformat()}, event_id="young"),
            make_run(**{**STALE, "agent_name": "another-agent"}, event_id="foreign"),
        ]
    )
    mark = "-- next step --"
    script = f"\necho '{mark}'\n".join(steps)  # one shell: step 3 uses the variable of step 1
    queried, updated, verified = map(json.loads, shell.run(script).out.split(mark))
    assert [run["event_id"] for run in queried] == ["abc123"]
    assert updated == {
        "event_id": "abc123",
        "updated": True,
        "fields_updated": ["status", "end_time", "error_summary", "output_summary"],
    }
    assert verified == []
    run = shell.stored("abc123")
    assert run["status"] == "cancelled"
    assert run["error_summary"] == "Stale run cleaned up on startup (created at 2025-12-24T10:00:00Z)"
    assert now.replace(microsecond=0) <= moment(run["end_time"]) <= datetime.now(UTC)
    assert [shell.stored(name)["status"] for name in ("young", "foreign")] == ["running", "running"]

    queried, updated, verified = map(json.loads, shell.run(script).out.split(mark))
    assert (queried, updated["updated"], verified) == ([], True, [])


def test_the_quick_reference_curls_work(shell: Shell) -> None:
    listed = [line for line in commands(block("Common Commands")) if line.startswith("curl ")]
    health, metrics, create, query, update = listed
    run = make_run(event_id="from-the-appendix")
    assert shell.curl(health)["status"] == "ok"
    assert shell.curl(create.replace("{...}", json.dumps(run)), 201)["event_id"] == "from-the-appendix"
    assert shell.curl(metrics)["total_runs"] == 1
    assert [found["run_id"] for found in shell.curl(query)] == [run["run_id"]]
    update = update.replace("{event_id}", "from-the-appendix").replace("{...}", '{"status": "success"}')
    assert shell.curl(update)["fields_updated"] == ["status"]
    assert shell.curl(query) == []


# --- Logging and observability -------------------------------------------------------------------


def with_traffic(shell: Shell) -> list[dict[str, Any]]:
    """Ask what the log examples tell of, and return the log."""
    query, update, error = examples("Log Format")
    shell.post([make_run(**STALE, event_id=name) for name in ("abc123", "2", "3", "4", "5")])
    parameters = "&".join(f"{name}={value}" for name, value in query["query_params"].items())
    shell.curl(f"curl 'http://localhost:8765/api/v1/runs?{parameters}'")
    cancel = blocks(UPDATE, "bash")[0]
    body = {name: value for name, value in body_of(cancel).items() if name in update["fields_updated"]}
    shell.curl(with_body(cancel, body))
    shell.curl(f"curl http://localhost:8765/api/v1/runs?status={error['status']}", 400)
    shell.curl(cancel.replace("abc123", "unknown"), 404)
    shell.curl(with_body(cancel, {"status": "bogus"}), 422)
    return [json.loads(line) for line in shell.log()]


def check_line(expected: dict[str, Any], line: dict[str, Any], variable: set[str]) -> None:
    """Check a log line against an example: the fields, their order, their types and, unless they vary, their values."""
    assert [name for name in line if name in expected] == list(expected)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"])
    variable = variable | {"timestamp"}
    assert {name: kind(line[name]) for name in expected if name not in variable} == {
        name: kind(value) for name, value in expected.items() if name not in variable
    }
    assert {name: line[name] for name in expected if name not in variable} == {
        name: value for name, value in expected.items() if name not in variable
    }


def test_the_log_lines_have_the_fields_of_the_examples(shell: Shell) -> None:
    query, update, error = examples("Log Format")
    lines = with_traffic(shell)
    (queried,) = (line for line in lines if line["message"] == query["message"])
    check_line(query, queried, {"duration_ms"})
    (updated,) = (line for line in lines if line["message"] == update["message"])
    check_line(update, updated, {"duration_ms"})
    for line in (queried, updated):
        assert kind(line["duration_ms"]) == "number"
        assert line["duration_ms"] > 0
    (failed,) = (line for line in lines if line["level"] == "ERROR" and line["endpoint"] == error["endpoint"])
    # Our sentence is longer than the guide's, and `status` is the answer's as in every other line.
    check_line(error, failed, {"message", "error_message", "status"})
    assert failed["message"] == f"Error in /api/v1/runs: {failed['error_message']}"
    assert "invalid_status" in failed["error_message"]


def grep(shell: Shell, command: str) -> list[dict[str, Any]]:
    """Run a command that prints log lines; return them decoded."""
    return [json.loads(line) for line in shell.run(command).lines]


def test_the_log_filters_find_their_lines(shell: Shell) -> None:
    lines = with_traffic(shell)
    follow, queries, errors, export = commands(blocks("Viewing Logs", "bash")[0])
    assert grep(shell, follow)[: len(lines)] == lines
    assert grep(shell, queries) == [line for line in lines if line.get("endpoint") == "/api/v1/runs"]
    assert any(line["message"] == "Query executed" for line in grep(shell, queries))
    assert [line["status"] for line in grep(shell, errors)] == [400, 422]
    shell.run(export)
    copy = (shell.folder / "telemetry-api.log").read_text()
    assert (shell.folder / LOG).read_text().startswith(copy), "the daemon may have written more by now"
    assert [json.loads(line) for line in copy.splitlines()][: len(lines)] == lines


def test_the_audit_trail_finds_the_updates(shell: Shell) -> None:
    with_traffic(shell)
    every, of_one, failed = commands(block("Audit Trail for Updates"))
    updates = grep(shell, every)
    assert [(line["method"], line["status"], line["success"]) for line in updates] == [
        ("PATCH", 200, True),
        ("PATCH", 404, False),
        ("PATCH", 422, False),
    ]
    assert grep(shell, of_one) == [updates[0]]
    assert grep(shell, failed) == updates[1:]


def test_the_log_figures_are_right(shell: Shell) -> None:
    for _ in range(20):
        shell.curl(blocks(QUERY, "bash")[0])
    durations = [line["duration_ms"] for line in map(json.loads, shell.log()) if line.get("endpoint") == "/api/v1/runs"]
    assert len(durations) == 20
    every, average, percentile = commands(block("Log Aggregation"))
    assert [float(line) for line in shell.run(every).lines] == durations
    assert float(shell.run(average).out) == pytest.approx(sum(durations) / 20, rel=1e-3)
    assert float(shell.run(percentile).out) == sorted(durations)[19]


def test_the_error_alert_comes_above_ten_errors(shell: Shell) -> None:
    alert = next(text for text in blocks("Alerting", "bash") if "ERROR" in text)
    for errors, mail in ((10, ""), (1, "Alert: 11 errors in last 5 minutes\n")):
        shell.run("curl 'http://localhost:8765/api/v1/runs?limit=[0-0]'\n" * errors)
        shell.log()
        shell.run(alert, status=0)
        assert shell.mail() == mail


def make_slow(shell: Shell, how_many: int) -> None:
    """Let queries wait for somebody who locks the database for more than a second."""
    address = re.findall(r'localhost:8765(/[^"]*)"', blocks(QUERY, "bash")[0])[0]
    hold_s = 1.1
    while sum('"is_slow": true' in line for line in shell.log()) < how_many:
        with shell.unreadable():
            waiting = [http.client.HTTPConnection(shell.address, timeout=60) for _ in range(how_many)]
            for connection in waiting:
                connection.request("GET", address)
            time.sleep(hold_s)  # slow means more than a second of the clock
        for connection in waiting:
            assert connection.getresponse().status == 200
            connection.close()
        hold_s *= 2


def test_slow_queries_are_found_counted_and_alerted(shell: Shell) -> None:
    alert = next(text for text in blocks("Alerting", "bash") if "is_slow" in text)
    assert shell.curl(blocks(QUERY, "bash")[0]) == []
    shell.log()
    shell.run(alert, status=0)
    assert shell.mail() == ""
    make_slow(shell, 6)
    find, count = commands(block("Monitoring Slow Queries"))
    slow = grep(shell, find)
    assert len(slow) >= 6
    assert all(line["message"] == "Query executed" and line["duration_ms"] > 1000 for line in slow)
    assert int(shell.run(count).out) == len(slow)
    shell.run(alert)
    assert shell.mail() == f"Alert: {len(slow)} slow queries (>1s) in last 15 minutes\n"


# --- The database, alongside the running daemon -----------------------------------------------------


def interactive(text: str) -> str:
    """Return a block that starts the `sqlite3` shell and goes on inside it as a script."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("sqlite3 "))
    inside = "\n".join(lines[start + 1 :])
    assert inside.endswith(".quit")
    return f"{lines[start]} <<'END'\n{inside}\nEND\n"


def schema(shell: Shell) -> set[tuple[str, str]]:
    with closing(sqlite3.connect(shell.folder / DATABASE)) as connection:
        return set(connection.execute("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_stat%'"))


def fill(shell: Shell) -> None:
    statuses = ("running", "success", "failure")
    shell.post(
        [
            make_run(agent_name=agent, status=statuses[n % 3], created_at=f"2025-12-24T{n % 24:02}:00:00Z")
            for agent in ("hugo-translator", "another-agent")
            for n in range(300)
        ]
    )


@pytest.mark.sqlite
def test_the_index_statements_find_the_indexes_there(shell: Shell, start_daemon: StartDaemon, tmp_path: Path) -> None:
    fill(shell)
    before = schema(shell)
    block_text = block("Adding Indexes to Existing Databases")
    (listed,) = re.findall(r"# Should return: (.*)", block_text)
    assert set(shell.run(interactive(block_text)).lines) == set(listed.split(", "))
    assert schema(shell) == before
    shell.post([make_run(event_id="after")])
    with closing(sqlite3.connect(shell.folder / DATABASE)) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_stat1 WHERE tbl = 'agent_runs'").fetchone()[0] > 0

    # A daemon that is started on it later accepts it too.
    shell.run(f"cp {DATABASE} {tmp_path}/telemetry.sqlite")
    assert Shell(start_daemon()).stored("after")["event_id"] == "after"


@pytest.mark.sqlite
@pytest.mark.parametrize("is_analyzed", [False, True])
def test_the_stale_query_uses_its_index(shell: Shell, is_analyzed: bool) -> None:
    fill(shell)
    maintenance = commands(block("Index Maintenance"))
    if is_analyzed:
        shell.run(maintenance[0])
    explain = block("Verifying Index Usage")
    plan = shell.run(interactive(explain)).out
    (expected,) = re.findall(r"# (SEARCH agent_runs USING INDEX \w+)", explain)
    assert expected in plan
    assert "SCAN" not in plan
    assert "TEMP B-TREE" not in plan


@pytest.mark.sqlite
def test_index_maintenance_works_while_the_daemon_runs(shell: Shell) -> None:
    fill(shell)
    analyze, sizes, reindex = commands(block("Index Maintenance"))
    shell.run(analyze)
    shell.run(reindex)
    with closing(sqlite3.connect(":memory:")) as connection:
        has_dbstat = ("ENABLE_DBSTAT_VTAB",) in connection.execute("PRAGMA compile_options").fetchall()
    if has_dbstat:  # an option of SQLite's build, not of ours
        assert {line.split("|")[0] for line in shell.run(sizes).lines} >= {"idx_runs_event_id", "idx_runs_created_desc"}
    assert shell.curl("curl http://localhost:8765/metrics")["total_runs"] == 600
    shell.post([make_run()])


@pytest.mark.sqlite
def test_the_table_has_the_event_id_as_shown(shell: Shell) -> None:
    # The number in front is the column's place, which differs: only migrated databases have it last.
    (line,) = shell.run(block("Step 4: Verify Migration")).lines
    assert line.split("|")[1:] == block("Step 4: Verify Migration", "").strip().split("|")[1:]


@pytest.mark.sqlite
def test_troubleshooting_finds_the_database(shell: Shell) -> None:
    path, listing, _ = blocks("Issue: Events Not Appearing in Database", "bash")
    assert json.loads(shell.run(path).out) == str(shell.folder / DATABASE)
    (line,) = shell.run(listing).lines
    assert line.startswith("-rw-------")
    assert line.endswith(DATABASE)
    check = next(text for text in blocks("Issue: Schema Migration Failed", "bash") if "integrity_check" in text)
    assert shell.run(check).out == "ok\n"


@pytest.mark.sqlite
def test_a_backup_made_while_the_daemon_runs_can_be_restored(
    own_shell: Shell, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    shell = own_shell
    shell.post([make_run(event_id="kept")])
    directory = tmp_path / "backups"
    directory.mkdir()
    shell.run(block("Automated Backups").replace("/backups/telemetry", str(directory)))
    (backup,) = directory.iterdir()
    assert re.fullmatch(r"telemetry_\d{8}_\d{6}\.sqlite", backup.name)

    stop, restore, verify, start = commands(block("Recovery"))
    assert (stop, start) == ("systemctl stop telemetry-api", "systemctl start telemetry-api")
    shell.post([make_run(event_id="lost")])
    assert shell.daemon.stop() == 0
    shell.run(restore.replace("/backups/telemetry/telemetry_20251220_090000.sqlite", str(backup)))
    assert shell.run(verify).out == "ok\n"
    restored = start_with_env_file(start_daemon, tmp_path)
    assert restored.stored("kept")["event_id"] == "kept"
    restored.curl("curl http://localhost:8765/api/v1/runs/lost", 404)
