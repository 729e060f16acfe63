"""telemetryd sync and replay."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from telemetryd.client import Client
from tests.client.conftest import states
from tests.conftest import Daemon, StartDaemon, make_run
from tests.http_client import call, get
from tests.tools.bad_proxy import bad_proxy
from tests.tools.forks import popen
from tests.tools.process import telemetryd

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> Daemon:
    return start_daemon(TELEMETRY_DB_JOURNAL_MODE="WAL")


@pytest.fixture
def buffer(tmp_path: Path) -> Path:
    return tmp_path / "buffer"


def command_line(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "telemetryd", *map(str, arguments)]


def leave(buffer: Path, count: int = 5, **fields: object) -> None:
    """Be a process that records and does not send."""
    client = Client("http://127.0.0.1:9", buffer_dir=buffer, send=False)
    for _ in range(count):
        assert client.record(make_run(**fields))
    client.close()


def leave_refused(buffer: Path, count: int) -> None:
    """Be a process whose lines the daemon refuses: ours leaves out what no field can take."""
    client = Client("http://127.0.0.1:9", buffer_dir=buffer, send=False)
    for _ in range(count):
        assert client.write(make_run(items_failed=-1))
    client.close()


def test_sync_sends_what_is_left_and_says_so(daemon: Daemon, buffer: Path) -> None:
    leave(buffer)
    shown = json.loads(telemetryd("sync", "--buffer-dir", buffer, "--dry-run", "--json").stdout)
    assert shown["left"]["ready"]["files"] == 1
    assert shown["sent"] == 0
    out = telemetryd("sync", TELEMETRY_BUFFER_DIR=str(buffer), TELEMETRY_API_URL=daemon.url).stdout
    assert out == "5 lines sent: 5 runs stored, 0 known before, 0 changes, 0 events, 0 lines refused\n"
    assert states(buffer) == {".synced": 1}
    again = json.loads(telemetryd("sync", "--buffer-dir", buffer, "--url", daemon.url, "--json").stdout)
    assert (again["sent"], again["left"], again["problem"]) == (0, {}, None)
    assert get(daemon.url, "/metrics")[1]["total_runs"] == 5


def test_sync_says_how_many_torn_lines_it_leaves_out(daemon: Daemon, buffer: Path) -> None:
    buffer.mkdir()
    (buffer / "a.jsonl.ready").write_text(json.dumps(make_run()) + '\n{"event_id": "torn')
    out = telemetryd("sync", "--buffer-dir", buffer, "--url", daemon.url).stdout
    assert out.startswith("1 line sent: 1 run stored, ")
    assert out.endswith("\n1 torn line left out: the call that began to write it had not returned\n")


def accounts(shown: dict[str, Any], *names: str) -> list[tuple[Any, ...]]:
    """What a command says of the lines of each file and of all of them; each line is counted once."""
    for each in (*shown["files"], shown):
        ends = ("stored", "duplicates", "changes", "events", "refused")
        assert each["sent"] == sum(each[name] for name in ends), each
    for name in ("sent", "stored", "duplicates", "changes", "events", "refused", "torn", "aside"):
        assert shown[name] == sum(each[name] for each in shown["files"]), name
    return [
        *((each["file"], *(each[name] for name in names)) for each in shown["files"]),
        tuple(shown[n] for n in names),
    ]


def test_sync_accounts_for_each_line_of_each_file(daemon: Daemon, buffer: Path, free_port: int) -> None:
    buffer.mkdir()
    first, second, bad = make_run(), make_run(), make_run(status="odd")
    known = first["event_id"]
    update = {"op": "update", "event_id": known, "fields": {"status": "success"}}
    events = [{"op": "event", "event_id": name, "event": {"event_type": "step"}} for name in (known, "nobody")]
    nothing = {"op": "update", "event_id": known, "fields": {"error_summary": None}}
    for name, lines in (("a", [first, *events, update, bad]), ("b", [first, second, nothing])):
        text = "\n".join(map(json.dumps, lines))
        # Some editor has put a mark before the first line, and cut off the newline after the last one.
        (buffer / f"{name}.jsonl.ready").write_bytes(codecs.BOM_UTF8 + text.encode())
    dry = telemetryd("sync", "--buffer-dir", buffer, "--dry-run").stdout
    assert dry.startswith("a.jsonl: 5 lines left\nb.jsonl: 3 lines left\n2 files to be sent, 8 lines, ")
    command = ("sync", "--buffer-dir", buffer, "--json")
    nowhere = ("--url", f"http://127.0.0.1:{free_port}", "--retry-for", "0")
    shown = json.loads(telemetryd(*command, *nowhere, status=1).stdout)
    assert accounts(shown, "sent", "left")[:2] == [("a.jsonl", 0, 5), ("b.jsonl", 0, 3)]
    assert shown["left"]["ready"]["lines"] == 8
    shown = json.loads(telemetryd(*command, "--url", daemon.url, status=1).stdout)
    names = ("sent", "stored", "duplicates", "changes", "events", "refused")
    assert accounts(shown, *names) == [
        ("a.jsonl", 5, 1, 0, 1, 1, 2), ("b.jsonl", 3, 1, 1, 1, 0, 0), (8, 2, 1, 2, 1, 2),
    ]  # fmt: skip
    assert [each["left"] for each in shown["files"]] == [0, 0]
    assert get(daemon.url, f"/api/v1/runs/{known}")[1]["status"] == "success"


def test_sync_of_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    assert telemetryd("sync", "--buffer-dir", tmp_path).stdout.startswith("0 lines sent")
    shown = telemetryd("sync", "--buffer-dir", tmp_path, "--dry-run").stdout
    assert shown == f"Nothing is left to be sent in {tmp_path}\n"
    missing = tmp_path / "typo"
    for done in (
        telemetryd("sync", "--buffer-dir", missing, status=1),
        telemetryd("sync", "--dry-run", TELEMETRY_BUFFER_DIR=str(missing), status=1),
        telemetryd("dead-letters", "list", "--buffer-dir", missing, status=1),
    ):
        assert done.stderr.startswith(f"telemetryd: {missing} is no folder; ")
    by_default = telemetryd("sync", XDG_STATE_HOME=str(tmp_path))  # where no agent has ever run
    assert by_default.stdout.startswith("0 lines sent")


def test_sync_without_a_daemon_fails_and_loses_nothing(buffer: Path, free_port: int) -> None:
    leave(buffer)
    url = f"http://127.0.0.1:{free_port}"
    done = telemetryd("sync", "--buffer-dir", buffer, "--url", url, "--retry-for", "0.3", status=1)
    assert done.stderr == f"telemetryd: {url}: Connection refused\n"
    assert done.stdout.splitlines()[-1].startswith("1 file to be sent")
    assert states(buffer) == {".ready": 1, ".lock": 1}


def test_sync_tells_of_refusals_and_leaves_alone_who_sends_for_himself(daemon: Daemon, buffer: Path) -> None:
    leave_refused(buffer, 3)
    alive = Client("http://127.0.0.1:9", buffer_dir=buffer, flush_timeout_s=0.1)
    alive.record(make_run())
    done = telemetryd("sync", "--buffer-dir", buffer, "--url", daemon.url, status=1)
    assert "1 file of processes that are alive" in done.stdout
    assert done.stderr.startswith("telemetryd: ")
    assert "3 lines refused; see " in done.stderr
    alive.close()


def test_sync_sends_the_lines_of_a_living_process_that_does_not_send(daemon: Daemon, buffer: Path) -> None:
    alive = Client("http://127.0.0.1:9", buffer_dir=buffer, send=False)
    for count in (1, 2, 3):
        alive.record(make_run())
        done = telemetryd("sync", "--buffer-dir", buffer, "--url", daemon.url, "--json")
        assert (json.loads(done.stdout)["sent"], get(daemon.url, "/metrics")[1]["total_runs"]) == (1, count)
    alive.close()
    telemetryd("sync", "--buffer-dir", buffer, "--url", daemon.url)
    assert states(buffer) == {".synced": 1}


def test_a_wrong_setting_of_the_client_is_a_usage_error(buffer: Path) -> None:
    done = telemetryd("sync", "--buffer-dir", buffer, "--url", "ftp://x", status=2)
    assert "url must be http://" in done.stderr


def test_sync_watches_until_a_signal_stops_it(daemon: Daemon, buffer: Path) -> None:
    command = command_line("sync", "--watch", "--json", "--buffer-dir", buffer, "--url", daemon.url)
    watching = popen(command, os.environ, stdout=subprocess.PIPE)
    try:
        leave_refused(buffer, 1)  # reported when it comes; to be stopped is no failure
        for expected in (5, 10):
            leave(buffer)
            deadline = time.monotonic() + 60
            while get(daemon.url, "/metrics")[1]["total_runs"] < expected:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        watching.send_signal(signal.SIGTERM)
        out, _ = watching.communicate(timeout=60)
    finally:
        watching.kill()
        watching.wait()
    assert watching.returncode == 0
    assert json.loads(out)["stored"] == 10


def watch(buffer: Path, url: str) -> subprocess.Popen[str]:
    command = command_line("sync", "--watch", "--buffer-dir", buffer, "--url", url)
    return popen(command, os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def await_runs(url: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while get(url, "/metrics")[1]["total_runs"] < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_to_watch_outlives_trouble_with_the_folder(daemon: Daemon, buffer: Path) -> None:
    buffer.write_text("no folder")
    with watch(buffer, daemon.url) as watching:
        assert watching.stderr is not None
        assert "Not a directory" in watching.stderr.readline()
        buffer.unlink()
        leave(buffer)
        await_runs(daemon.url, 5)
        watching.terminate()
        assert watching.wait(60) == 0


def test_to_watch_ends_at_once_at_a_signal_even_in_a_pause_that_the_daemon_asked_for(
    daemon: Daemon, buffer: Path
) -> None:
    for _ in range(2):
        leave(buffer, 1)
    with bad_proxy(daemon.url) as proxy:
        proxy.flow = "batch=1, pause=60000"
        with watch(buffer, proxy.url) as watching:
            await_runs(daemon.url, 1)
            time.sleep(0.2)
            watching.terminate()
            assert watching.wait(60) == 0
    assert states(buffer) == {".synced": 1, ".ready": 1}


def test_two_syncs_at_once_send_each_line_once(daemon: Daemon, buffer: Path) -> None:
    for _ in range(20):
        leave(buffer, 20)
    command = command_line("sync", "--json", "--buffer-dir", buffer, "--url", daemon.url)
    both = [popen(command, os.environ, stdout=subprocess.PIPE) for _ in range(2)]
    told = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert sum(each["stored"] for each in told) == 400
    assert sum(each["duplicates"] for each in told) == 0


def test_a_bar_is_drawn_on_a_terminal(daemon: Daemon, buffer: Path) -> None:
    leave(buffer)
    ours, theirs = pty.openpty()
    command = command_line("sync", "--buffer-dir", buffer, "--url", daemon.url)
    with popen(command, os.environ, stdout=subprocess.PIPE, stderr=theirs) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    drawn = os.read(ours, 65536).decode()
    assert "Sending" in drawn
    assert "100%" in drawn
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize("form", ["plain", "gzip", "zstd", "standard input"])
def test_replay_sends_files_of_any_form(daemon: Daemon, tmp_path: Path, form: str) -> None:
    text = b"".join(json.dumps(make_run()).encode() + b"\n" for _ in range(2500)) + b"\n"
    path = tmp_path / "runs"
    path.write_bytes({"gzip": gzip.compress, "zstd": zstd.compress}.get(form, bytes)(text))  # type: ignore[operator]
    if form == "standard input":
        command = [sys.executable, "-m", "telemetryd", "replay", "-", "--json", "--url", daemon.url]
        with path.open("rb") as file:
            out = subprocess.run(command, stdin=file, capture_output=True, check=True).stdout.decode()
    else:
        out = telemetryd("replay", path, "--json", "--url", daemon.url).stdout
    assert json.loads(out)["stored"] == 2500
    if form == "plain":
        again = json.loads(telemetryd("replay", path, "--json", "--url", daemon.url).stdout)
        assert (again["stored"], again["duplicates"]) == (0, 2500)


def test_replay_keeps_what_is_refused_and_takes_it_again_once_it_is_fixed(daemon: Daemon, tmp_path: Path) -> None:
    path, rejects = tmp_path / "runs.ndjson", tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(make_run(items_failed=n - 2)) + "\n" for n in range(5)) + "{broken\n")
    done = telemetryd("replay", path, "--rejects", rejects, "--url", daemon.url, status=1)
    assert done.stdout.startswith("6 lines sent: 3 runs stored")
    assert "refused (422): items_failed: " in done.stderr
    link = tmp_path / "link.jsonl"
    link.symlink_to(rejects)
    assert (
        "link" in telemetryd("replay", path, "--rejects", link, "--url", daemon.url, status=1).stderr.splitlines()[-1]
    )
    assert len(rejects.read_text().splitlines()) == 3
    rejects.write_text(rejects.read_text().replace('"items_failed":-', '"items_failed":'))
    done = telemetryd("replay", rejects, "--url", daemon.url, status=1)
    assert done.stdout.startswith("3 lines sent: 2 runs stored")


def test_replay_takes_spool_files_with_changes_and_events(daemon: Daemon, buffer: Path) -> None:
    client = Client("http://127.0.0.1:9", buffer_dir=buffer, send=False)
    with client.run("a", "j", event_id="one") as run:
        run.event("step")
    client.close()
    (file,) = buffer.glob("*.ready")
    out = telemetryd("replay", file, "--json", "--url", daemon.url).stdout
    assert json.loads(out)["sent"] == 3
    status, stored = call(daemon.url, "GET", "/api/v1/runs/one?include=events")
    assert (status, stored["status"], len(stored["events"])) == (200, "success", 1)


def test_replay_brings_an_archive_back_with_its_events(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon(TELEMETRY_API_UNIX=str(tmp_path / "socket"))
    for name in ("talkative", "silent"):
        call(daemon.url, "POST", "/api/v1/runs", make_run(event_id=name, created_at="2025-01-01T00:00:00Z"))
    told = [{"event_key": str(number), "event_type": "step", "payload": {"n": number}} for number in range(1100)]
    for at in (0, 1000):
        status, _ = call(daemon.url, "POST", "/api/v1/runs/talkative/events", told[at : at + 1000])
        assert status in (200, 201)

    def stored() -> list[object]:
        runs = [call(daemon.url, "GET", f"/api/v1/runs/{name}")[1] for name in ("talkative", "silent")]
        events = [
            event
            for offset in (0, 1000)
            for event in get(daemon.url, f"/api/v1/runs/talkative/events?limit=1000&offset={offset}")[1]
        ]
        assert len(events) == 1100
        return [{**row, "id": None, "updated_at": None} for row in [*runs, *events]]

    before = stored()
    archive = tmp_path / "archive.ndjson.zst"
    paths = ("--db-path", daemon.database, "--unix", tmp_path / "socket")
    telemetryd("prune", "--older-than", "90d", "--archive", archive, *paths)
    assert get(daemon.url, "/metrics")[1]["total_runs"] == 0
    out = json.loads(telemetryd("replay", archive, "--json", "--url", daemon.url).stdout)
    assert (out["stored"], out["refused"]) == (2, 0)
    assert stored() == before
    telemetryd("replay", archive, "--url", daemon.url)
    assert stored() == before


def test_replay_without_a_daemon_or_with_a_broken_file_fails(tmp_path: Path, free_port: int, daemon: Daemon) -> None:
    path = tmp_path / "runs"
    path.write_text(json.dumps(make_run()))
    url = f"http://127.0.0.1:{free_port}"
    assert "refused" in telemetryd("replay", path, "--url", url, "--retry-for", "0.2", status=1).stderr
    path.write_bytes(gzip.compress(b"{}\n" * 5_000)[:-20])
    assert telemetryd("replay", path, "--url", daemon.url, status=1).stderr


def test_odd_names_are_sent_and_what_is_no_file_is_named_and_left_as_it_is(daemon: Daemon, tmp_path: Path) -> None:
    buffer = tmp_path / "buffer"
    buffer.mkdir()
    odd = [b"telemetry_new\nline", b"telemetry_\xff\xfe", b"telemetry_x"]
    for name in odd:
        (buffer / os.fsdecode(name + b".jsonl.active")).write_text(json.dumps(make_run()) + "\n")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (buffer / "telemetry_link.jsonl.active").symlink_to(secret)
    (buffer / "telemetry_link.jsonl.ready").symlink_to(secret)
    (buffer / "telemetry_x.jsonl.ready").symlink_to("nowhere")
    (buffer / "telemetry_folder.jsonl.active").mkdir()
    os.mkfifo(buffer / "telemetry_pipe.jsonl.active")
    strange = sorted(path.name for path in buffer.iterdir() if path.is_symlink() or not path.is_file())
    flags = ("sync", "--take-over", "--buffer-dir", buffer, "--url", daemon.url)
    for more in (("--dry-run",), ("--json",)):
        done = telemetryd(*flags, *more, status=1)
        assert done.stderr == f"telemetryd: Not read, for it is no regular file: {', '.join(strange)}\n"
    shown = json.loads(done.stdout)
    assert (shown["stored"], shown["left"]) == (3, {})
    assert {os.fsencode(each["file"]) for each in shown["files"]} == {
        b"telemetry_new\nline.jsonl", b"telemetry_\xff\xfe.jsonl", b"telemetry_x-1.jsonl",
    }  # fmt: skip
    left = {path.name for path in buffer.iterdir()}
    assert left >= set(strange)
    assert len(left) == len(strange) + 3


def test_what_the_replaced_client_has_left_is_taken_over(daemon: Daemon, tmp_path: Path) -> None:
    base = tmp_path / "base"
    buffer, raw = base / "telemetry_buffer", base / "raw"
    shutil.copytree(Path(__file__).parent / "old_files", buffer)
    raw.mkdir()
    (buffer / "events_20261130.ndjson").rename(raw / "events_20261130.ndjson")
    left_open = buffer / "telemetry_20261130_060000.jsonl.active"
    left_open.write_bytes((raw / "events_20261130.ndjson").read_bytes().splitlines(keepends=True)[-1])
    there: dict[str, Any] = {"TELEMETRY_BASE_DIR": str(base), "TELEMETRY_API_URL": daemon.url}
    first = next(buffer.glob("*.ready"))
    (buffer / "telemetry_20261130_060000.jsonl.synced").write_bytes(first.read_bytes())  # its name is taken
    assert "2 files to be sent, 3 lines, " in telemetryd("sync", "--take-over", "--dry-run", **there).stdout
    assert states(buffer) == {".ready": 1, ".active": 1, ".synced": 1}
    again = left_open.with_suffix(".ready")  # a file that is called so twice has the lines of both
    again.write_bytes(left_open.read_bytes() * 2)
    shown = json.loads(telemetryd("sync", "--take-over", "--dry-run", "--json", **there).stdout)
    assert [each["left"] for each in shown["files"]] == [2, 3]
    again.unlink()
    shown = json.loads(telemetryd("sync", "--take-over", "--json", **there).stdout)
    assert accounts(shown, "sent", "stored", "changes") == [
        ("telemetry_20261130_044913.jsonl", 2, 1, 1), ("telemetry_20261130_060000-1.jsonl", 1, 1, 0), (3, 2, 1),
    ]  # fmt: skip
    assert states(buffer) == {".synced": 3}
    for stored, known in ((4, 2), (0, 6)):  # the second time nothing changes
        shown = json.loads(telemetryd("replay", "--take-over", "--json", **there).stdout)
        assert (shown["sent"], shown["stored"], shown["duplicates"], shown["refused"]) == (13, stored, known, 0)
        assert accounts(shown, "changes", "events")[-1] == (5, 2)
    runs = get(daemon.url, "/api/v1/runs")[1]
    assert {run["job_type"]: run["status"] for run in runs} == {
        "job": "success", "job2": "failure", "job3": "failure", "job4": "cancelled", "job5-running": "running",
        "job6": "success",
    }  # fmt: skip
    run = next(run for run in runs if run["job_type"] == "job2")
    assert (run["metrics_json"], run["context_json"]) == ({"tokens": 5}, {"agent_owner": "team"})
    (event,) = get(daemon.url, f"/api/v1/runs/{run['event_id']}/events")[1]
    assert (event["event_type"], event["payload"]) == ("checkpoint", {"n": 1})
    nowhere = telemetryd("replay", "--take-over", status=1, TELEMETRY_BASE_DIR=str(tmp_path / "typo")).stderr
    assert nowhere == f"telemetryd: 3.x has left no *.ndjson in {tmp_path}/typo/raw; name its files\n"
    nowhere = telemetryd("sync", "--take-over", "--buffer-dir", raw, status=1).stderr
    assert nowhere.startswith(f"telemetryd: 3.x has left no telemetry_*.jsonl.* in {raw}; ")
    assert "Missing argument" in telemetryd("replay", status=2).stderr
