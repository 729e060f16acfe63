"""`telemetryd record`, log records as events, and traces that are handed on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from telemetryd.client import Client, handler, units
from telemetryd.traces import Span
from tests.client.conftest import MakeClient, flushed, url_of
from tests.client.test_processes import environment, runs
from tests.conftest import Api, StartDaemon

RECORD = (sys.executable, "-m", "telemetryd", "record")
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def record(url: str, buffer: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RECORD, *options], env=environment(url, buffer, **variables), capture_output=True, text=True, check=False
    )


def test_a_run_that_has_ended_is_recorded_whole(start_daemon: StartDaemon, buffer: Path) -> None:
    daemon = start_daemon()
    given = ("--agent", "backup", "--job-type", "nightly", "--status", "partial", "--duration", "90s")
    more = (
        "--items-succeeded",
        "3",
        "--items-failed",
        "1",
        "--metric",
        "bytes=7",
        "--metric",
        "disk=sda",
        "--metric",
        "ratio=nan",
    )
    last = ("--label", "host=db1", "--error-summary", "one failed", "--event-id", "one")
    for _ in range(2):
        done = record(daemon.url, buffer, *given, *more, *last, TRACEPARENT=TRACEPARENT)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    (run,) = runs(daemon.url)
    assert (run["event_id"], run["agent_name"], run["job_type"], run["status"]) == (
        "one",
        "backup",
        "nightly",
        "partial",
    )
    assert (run["duration_ms"], run["items_succeeded"], run["items_failed"]) == (90_000, 3, 1)
    assert (run["metrics_json"], run["labels"]) == (
        {"bytes": 7, "disk": "sda", "ratio": "nan"},  # no number of JSON
        {"host": "db1"},
    )
    assert (run["error_summary"], run["trace_id"]) == ("one failed", TRACEPARENT[3:35])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "Missing option '--agent'."),
        (("--agent", "a", "--status", "good"), "'good' is not one of 'success'"),
        (("--agent", "a", "--metric", "x"), "'x' must be a key and a value"),
        (("--from-systemd",), "SERVICE_RESULT or INVOCATION_ID is not set"),
    ],
)
def test_bad_usage_records_nothing(buffer: Path, options: tuple[str, ...], complaint: str) -> None:
    done = record("http://127.0.0.1:9", buffer, *options)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not buffer.exists()


def test_a_spool_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = record("http://127.0.0.1:9", tmp_path / "file" / "buffer", "--agent", "a", TELEMETRY_FLUSH_TIMEOUT_S="0.1")
    assert done.returncode == 1
    assert "cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("result", "code", "status", "outcome", "summary"),
    [
        ("success", "exited", "0", "success", None),
        ("success", "killed", "TERM", "cancelled", "success: killed by SIGTERM"),
        ("signal", "killed", "15", "cancelled", "signal: killed by SIGTERM"),
        ("signal", "killed", "SEGV", "failure", "signal: killed by SIGSEGV"),
        ("core-dump", "dumped", "ABRT", "failure", "core-dump: killed by SIGABRT"),
        ("exit-code", "exited", "3", "failure", "exit-code: exit status 3"),
        ("timeout", "killed", "TERM", "timeout", "timeout: killed by SIGTERM"),
        ("watchdog", "killed", "ABRT", "timeout", "watchdog: killed by SIGABRT"),
        ("oom-kill", "killed", "KILL", "failure", "oom-kill: killed by SIGKILL"),
        ("exec-condition", "", "", "cancelled", "exec-condition"),
        ("resources", "", "", "failure", "resources"),
    ],
)
def test_systemds_words_for_an_end_become_ours(
    result: str, code: str, status: str, outcome: str, summary: str | None
) -> None:
    fields = units.outcome(result, code, status)
    assert (fields["status"], fields.get("error_summary")) == (outcome, summary)


def test_a_unit_that_has_stopped_is_recorded_once(start_daemon: StartDaemon, buffer: Path) -> None:
    daemon = start_daemon()
    variables = {"SERVICE_RESULT": "exit-code", "EXIT_CODE": "exited", "EXIT_STATUS": "4", "INVOCATION_ID": "ab" * 16}
    for _ in range(2):
        assert record(daemon.url, buffer, "--from-systemd", "--agent", "unit", **variables).returncode == 0
    (run,) = runs(daemon.url)
    assert (run["event_id"], run["status"], run["job_type"]) == (f"systemd:{'ab' * 16}", "failure", "unit")
    assert run["metrics_json"]["exit_status"] == 4


async def test_records_of_logging_become_events_of_the_run_around_them(api: Api, make_client: MakeClient) -> None:
    client = make_client(url_of(api))
    logger = logging.getLogger("tests.of.records")
    taking = handler("INFO", most=3)
    logger.addHandler(taking)
    logger.setLevel(logging.DEBUG)
    try:
        logger.warning("outside of any run")
        with client.run("a", "j") as run:
            logger.debug("too low")
            logger.info("read %d files", 3)
            logging.getLogger("telemetryd.client").warning("the client's own")
            try:
                os.environ["TELEMETRY_NO_SUCH"]
            except KeyError:
                logger.exception("oops")
            for number in range(5):
                logger.warning("number %d", number)
        with client.run("a", "j") as another:
            logger.error("in another run")
    finally:
        logger.removeHandler(taking)
    await flushed(client)
    events = await api.get(f"/api/v1/runs/{run.event_id}/events")
    said = [event["payload"]["message"] for event in events]
    assert (said[0], said[2:]) == ("read 3 files", ["number 0", "Further records are left out."])
    assert said[1].startswith("oops\nTraceback")
    assert said[1].endswith("KeyError: 'TELEMETRY_NO_SUCH'")
    assert events[0]["event_type"] == "log"
    assert events[0]["payload"] == {"level": "INFO", "logger": "tests.of.records", "message": "read 3 files"}
    (other,) = await api.get(f"/api/v1/runs/{another.event_id}/events")
    assert other["payload"]["level"] == "ERROR"


def test_a_record_whose_arguments_do_not_fit_costs_only_itself(
    make_client: MakeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    taking = handler()
    with make_client().run("a", "j"):
        taking.handle(logging.LogRecord("x", logging.ERROR, __file__, 1, "%d", ("no number",), None))
    assert "Logging error" in capsys.readouterr().err


async def test_a_run_of_the_client_joins_the_trace_of_its_process_and_hands_it_on(
    api: Api, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEPARENT", TRACEPARENT)
    client: Client = make_client(url_of(api))
    with client.run("outer", "j") as outer:
        assert Span.parse(outer.environment()["TRACEPARENT"]) == outer.span
        with client.run("inner", "j") as inner:
            pass
    monkeypatch.delenv("TRACEPARENT")
    with client.run("untraced", "j") as untraced:
        assert "TRACEPARENT" not in untraced.environment()
    await flushed(client)
    spans = {run["agent_name"]: (run["trace_id"], run["span_id"]) for run in await api.get("/api/v1/runs")}
    assert outer.span is not None
    assert inner.span is not None
    assert spans["outer"] == (TRACEPARENT[3:35], outer.span.span_id)
    assert spans["inner"] == (TRACEPARENT[3:35], inner.span.span_id)
    assert spans["untraced"] == (None, None)
    assert len({TRACEPARENT[36:52], outer.span.span_id, inner.span.span_id}) == 3


def test_the_handler_needs_no_client(tmp_path: Path) -> None:
    """Made at the import of a program, before anything else of ours."""
    program = (
        "from telemetryd import client; import logging; logging.root.addHandler(client.handler()); logging.error(1)"
    )
    clean = environment("http://127.0.0.1:9", tmp_path)
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
