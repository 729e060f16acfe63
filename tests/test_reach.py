"""Which daemon or database a command works on, and what it says of answers that are none."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from telemetryd.cli import main, target
from telemetryd.cli.reach import Where, pause_s
from telemetryd.client.address import Address, unix_url
from telemetryd.client.config import Config
from telemetryd.compat import TelemetryConfig
from telemetryd.configuration import load
from telemetryd.errors import ConfigurationError
from tests.conftest import PATIENCE_S, StartDaemon, make_run
from tests.http_client import get, post
from tests.needs import require_program
from tests.tools.forks import popen
from tests.tools.process import telemetryd

TOKEN = "0123456789abcdef"
OLD = "2020-01-01T00:00:00Z"


def old_run(**fields: Any) -> dict[str, Any]:
    return make_run(created_at=OLD, start_time=OLD, **fields)


def runs_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM agent_runs").fetchone()[0])


Answer = Callable[[BaseHTTPRequestHandler], tuple[int, dict[str, str], bytes]]


@contextmanager
def server(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Something at an address that answers everything in its own way."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, body = answer(self)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = handle_any  # noqa: N815 - the names of http.server

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:  # who is not accepted, or does not accept us, hangs up
            pass

    with Server(("127.0.0.1", 0), Handler) as listening:
        if tls is not None:
            listening.socket = tls.wrap_socket(listening.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        try:
            scheme, host = ("http", "127.0.0.1") if tls is None else ("https", "localhost")
            yield f"{scheme}://{host}:{listening.server_address[1]}"
        finally:
            listening.shutdown()
            thread.join()


# --- Addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "base", "path"),
    [
        ("http://host", "http://host", ""),
        ("http://host:80/staging/", "http://host:80/staging", ""),
        ("https://[::1]:8443/a/b", "https://[::1]:8443/a/b", ""),
        ("unix:///run/a%20b.sock", "http://telemetryd", "/run/a b.sock"),
    ],
)
def test_an_address_is_read_in_one_place(url: str, base: str, path: str) -> None:
    address = Address.parse(url)
    assert (address.base, address.socket) == (base, path)
    assert Address.parse(unix_url(Path("/run/a?b #c%20d"))).socket == "/run/a?b #c%20d"


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://x:0", "http://x:y", "unix://", "http://x/?a=1", "http://[::1"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"must be http://"):
        Address.parse(url)


def test_flags_win_over_the_environment_and_a_named_database_over_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TELEMETRY_API_URL", "http://elsewhere")
    assert Where().address() == "http://elsewhere"
    assert Where(url="http://here").address() == "http://here"
    assert Where(settings={"db_path": "x.sqlite"}).address() is None
    monkeypatch.setenv("TELEMETRY_API_URL", "ftp://wrong")
    assert Where(url="http://here").config().url == "http://here"  # what is not used may be wrong
    with pytest.raises(ConfigurationError, match="TELEMETRY_API_URL: must be http"):
        Where().config()


def test_the_port_of_the_daemons_settings_counts_for_commands_and_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`TELEMETRY_API_PORT=9100 make run`, and then `telemetryd demo`, which filled another daemon."""
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("TELEMETRY_API_PORT=9200\n")
    assert (Where().config().url, Config.load().url) == ("http://localhost:9200", "http://localhost:8765")
    monkeypatch.setenv("TELEMETRY_API_PORT", "9100")
    assert (Where().config().url, Config.load().url) == ("http://localhost:9100",) * 2
    assert TelemetryConfig.from_env().api_url == "http://localhost:8765"  # as with 3.x, whatever a shared .env holds
    monkeypatch.delenv("TELEMETRY_API_PORT")
    Path(".env").write_bytes(b"NAME=caf\xe9\nTELEMETRY_API_PORT=9200\n")
    assert Where().config().url == "http://localhost:8765"
    warning = ".env: is not UTF-8 text (byte 9 cannot be); if TELEMETRY_API_PORT stands there, it is not used"
    assert capsys.readouterr().err == f"telemetryd: {warning}\n"
    monkeypatch.setenv("TELEMETRY_API_PORT", "9100")
    assert Where().config().url == "http://localhost:9100"
    assert not capsys.readouterr().err
    monkeypatch.setenv("METRICS_API_URL", "http://elsewhere")
    assert (Where().config().url, Config.load().url) == ("http://elsewhere", "http://elsewhere")
    monkeypatch.delenv("METRICS_API_URL")
    for text, problem in {"0": "say with --url", "tcp://10.0.0.7:8765": "must be a whole number"}.items():
        monkeypatch.setenv("TELEMETRY_API_PORT", text)
        with pytest.raises(ConfigurationError, match=problem):
            Where().config()
        assert Config.load().url == "http://localhost:8765"  # Kubernetes sets such a text, which is no agent's fault


def test_pauses_are_never_too_short() -> None:
    for text in ("", "-5", "0", "soon", "Mon, 01 Jan 2001 00:00:00 GMT"):
        assert pause_s({"Retry-After": text}) == 1.0
    assert pause_s({"Retry-After": "2"}) == 2.0
    assert pause_s({"Retry-After": "0.0001"}) == 0.1


def test_every_command_has_the_same_flags_for_a_daemon_and_hides_old_ones() -> None:
    context = main.make_context("telemetryd", ["--help"], resilient_parsing=True)
    for name in (
        "prune",
        "reap",
        "confirm-clock",
        "stats",
        "regressions",
        "tail",
        "export",
        "import",
        "sync",
        "follow",
        "demo",
    ):
        command = main.get_command(context, name)
        assert command is not None
        shown = command.get_help(context)
        for flag in ("--url", "--unix", "--auth-token-file", "--ca "):
            assert flag in shown, (name, flag)
        assert not {"--port", "--job ", "--agent-name"} & set(shown.split()), name
    for arguments in (["stats", "--job", "x"], ["export", "-", "--agent-name", "x"], ["prune", "--port", "1"]):
        command = main.get_command(context, arguments[0])
        assert command is not None
        command.make_context(arguments[0], [*arguments[1:], *(["--older-than", "1d"] if "prune" in arguments else [])])


# --- Which daemon, which database ----------------------------------------------------------------


def test_the_path_of_an_address_counts_for_every_command(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """`prune --url http://host/staging/` deleted from the daemon at `http://host/`."""
    (tmp_path / "there").mkdir()
    daemon = start_daemon(folder=tmp_path / "there")
    assert post(daemon.url, old_run())[0] == 201
    asked: list[str] = []

    def proxy(request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        asked.append(request.path)
        return 404, {"Telemetry-Server": "telemetryd/0"}, b'{"detail":"Nothing here"}'

    with server(proxy) as url:
        for command in (
            ("prune", "--older-than", "1d"),
            ("reap", "--older-than", "1d"),
            ("confirm-clock", "2026-01-01"),
            ("stats",),
            ("regressions",),
            ("tail",),
            ("tail", "-f"),
            ("export", "-"),
            ("demo", "--no-live", "--runs", "1"),
        ):
            done = telemetryd(*command, "--url", f"{url}/staging/", status=1)
            assert "The daemon answered 404: Nothing here" in done.stderr, command
        named = telemetryd("prune", "--older-than", "1d", status=1, TELEMETRY_API_URL=f"{url}/staging", cwd=tmp_path)
        assert named.stderr.splitlines()[0] == f"telemetryd: works on the daemon at {url}/staging"
    assert asked
    assert all(path.startswith("/staging/api/v1/") for path in asked)


def test_the_daemon_is_reached_by_its_socket_next_to_the_database(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon()
    assert post(daemon.url, old_run())[0] == 201
    own = tmp_path / "telemetry.sqlite.sock"
    assert daemon.wait_for_line("Serving")["addresses"][-1] == f"unix:{own}"
    assert own.stat().st_mode & 0o777 == 0o600
    (tmp_path / "link.sqlite").symlink_to(daemon.database)
    asked = telemetryd("prune", "--older-than", "90d", "--dry-run", "--db-path", tmp_path / "link.sqlite")
    assert asked.stderr == f"telemetryd: works on the daemon at {unix_url(own)}\n"
    assert asked.stdout.startswith("[DRY RUN] 1 run ")
    assert telemetryd("reap", "--older-than", "1d", TELEMETRY_DB_PATH=str(daemon.database)).stderr == asked.stderr
    # A database that is named wins over the address in the environment, a daemon that is named needs no database.
    nobody = "http://127.0.0.1:1"
    assert telemetryd(
        "prune", "--older-than", "90d", "--db-path", daemon.database, TELEMETRY_API_URL=nobody
    ).stdout.startswith("1 run ")
    assert telemetryd("stats", "--unix", own, cwd=Path("/")).stdout.startswith("No runs were created")
    assert daemon.stop() == 0
    assert not own.exists()
    local = telemetryd("prune", "--older-than", "90d", "--db-path", daemon.database)
    assert local.stderr == f"telemetryd: works on the database {daemon.database}\n"


def test_the_socket_of_the_service_is_tried_where_no_database_is_at_hand(
    start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("service", "other", "nothing"):
        (tmp_path / name).mkdir()
    service = start_daemon(folder=tmp_path / "service", TELEMETRY_API_UNIX=str(tmp_path / "service.sock"))
    other = start_daemon(folder=tmp_path / "other", TELEMETRY_API_UNIX="none")
    for daemon in (service, other):
        daemon.wait_for_line("Serving")
    monkeypatch.setattr(target, "SYSTEM_SOCKET", tmp_path / "service.sock")
    monkeypatch.chdir(tmp_path / "nothing")
    by_service = f"the daemon at {unix_url(tmp_path / 'service.sock')}"
    assert str(target.decide(Where())) == by_service
    assert str(target.decide(Where(settings={"db_path": service.database}))) == by_service
    place = target.decide(Where(settings={"db_path": other.database}))
    assert place.config is None
    assert "service.sock: it serves another database" in place.obstacle
    named = Where(settings={"db_path": tmp_path / "typo.sqlite"})
    assert str(target.decide(named)) == f"the database {tmp_path / 'typo.sqlite'}"  # which is then said to be missing
    monkeypatch.setenv("TELEMETRY_API_UNIX", str(tmp_path / "service.sock"))
    assert str(target.decide(Where())) == by_service


def test_another_users_daemon_is_no_database_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.sqlite").touch()
    monkeypatch.setattr(target, "_silence", lambda _: os.strerror(errno.EACCES))
    place = target.decide(Where(settings={"db_path": tmp_path / "t.sqlite"}))
    assert "A telemetryd (of another user) owns this database" in place.obstacle
    assert "t.sqlite.sock: Permission denied" in place.obstacle


def test_the_socket_next_to_the_database_needs_no_token_and_another_one_does(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    token = {"TELEMETRY_API_AUTH_ENABLED": "true", "TELEMETRY_API_AUTH_TOKEN": TOKEN}
    daemon = start_daemon(**token)
    daemon.wait_for_line("Serving")
    place = ("--db-path", str(daemon.database))
    assert telemetryd("stats", *place).stdout.startswith("No runs were created")
    archive = tmp_path / "archive.zst"
    assert telemetryd("prune", "--older-than", "1d", "--archive", archive, *place).stdout.startswith("0 runs ")
    assert get(daemon.url, "/api/v1/stats")[0] == 401
    assert daemon.stop() == 0
    other = start_daemon(TELEMETRY_API_UNIX=str(tmp_path / "other"), **token)
    other.wait_for_line("Serving")
    refused = telemetryd("stats", "--unix", tmp_path / "other", status=1).stderr
    assert "The daemon answered 401: A valid token is needed" in refused
    assert telemetryd("reap", "--older-than", "1d", "--unix", tmp_path / "other").stdout.startswith("0 runs ")


def test_a_daemon_that_offers_no_socket_is_never_bypassed(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TELEMETRY_API_UNIX="none")
    assert post(daemon.url, old_run())[0] == 201
    assert len(daemon.wait_for_line("Serving")["addresses"]) == 1
    place = str(daemon.database)
    refused = telemetryd("prune", "--older-than", "90d", status=1, TELEMETRY_DB_PATH=place)
    for word in (f"PID {daemon.process.pid}", "telemetry.sqlite.sock: No such file", "--unix", "--auth-token-file"):
        assert word in refused.stderr
    assert telemetryd("stats", TELEMETRY_DB_PATH=place).stdout.startswith(
        "No runs were created"
    )  # read next to the daemon
    assert runs_of(daemon.database) == 1


def test_a_socket_that_cannot_be_made_is_a_warning(start_daemon: StartDaemon, tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    long = start_daemon(folder=folder)
    line = long.wait_for_line("No Unix socket next to the database")
    assert "the path is too long" in line["reason"]
    assert line["level"] == "WARNING"
    assert get(long.url, "/health")[0] == 200
    precious = tmp_path / "telemetry.sqlite.sock"
    precious.write_text("precious")
    assert "not a socket" in start_daemon().wait_for_line("No Unix socket next to the database")["reason"]
    assert precious.read_text() == "precious"


def test_a_socket_that_a_killed_daemon_left_is_made_anew(start_daemon: StartDaemon, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "telemetry.sqlite.sock"))
    daemon = start_daemon()
    assert daemon.wait_for_line("Serving")["addresses"][-1].startswith("unix:")
    assert telemetryd("stats", "--unix", tmp_path / "telemetry.sqlite.sock").returncode == 0


# --- No tracebacks -------------------------------------------------------------------------------

COMMANDS = (
    ("prune", "--older-than", "1d"),
    ("stats",),
    ("regressions",),
    ("tail",),
    ("tail", "-f"),
    ("export", "-"),
    ("demo", "--no-live", "--runs", "1"),
    ("follow",),
)


def fails(url: str, tmp_path: Path, *commands: tuple[str, ...], **variables: Any) -> list[str]:
    """Return the last line on standard error of each command, none of which ends with anything else than a sentence."""
    lines = []
    for command in commands or COMMANDS:
        place = (
            (url, "--once", "--db-path", str(tmp_path / "copy.sqlite")) if command[0] == "follow" else ("--url", url)
        )
        done = telemetryd(*command, *place, status=(1, 2), cwd=tmp_path, **variables)
        assert "Traceback" not in done.stderr, (command, done.stderr)
        lines.append(done.stderr.splitlines()[-1])
    return lines


def test_what_answers_in_the_daemons_place_is_named(tmp_path: Path) -> None:
    for body in (b"<html>please log in</html>", b'{"hello": 1}', b"[]", b"[1]", b"null", b"{}"):
        with server(lambda _, body=body: (200, {"Content-Type": "application/json"}, body)) as url:  # type: ignore[misc]
            for line in fails(url, tmp_path):
                assert line.startswith("telemetryd: What answered is no telemetryd: "), line


def test_a_socket_that_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text(json.dumps(make_run()))
    (tmp_path / "buffer").mkdir()
    (tmp_path / "buffer" / "x.rejected.jsonl").write_text('{"line": {"event_id": "a"}, "status": 422, "error": "no"}\n')
    missing = unix_url(tmp_path / "none.sock")
    for command in (
        *(command for command in COMMANDS if command[0] in ("prune", "stats")),
        ("export", "-", "--retry-for", "600"),
        ("import", "run.jsonl", "--retry-for", "600"),
        ("dead-letters", "retry", "--all", "--buffer-dir", "buffer", "--retry-for", "600"),
        ("sync", "--buffer-dir", "buffer", "--retry-for", "600"),
    ):
        done = telemetryd(*command, "--url", missing, cwd=tmp_path, status=1)
        assert f"There is no Unix socket {tmp_path / 'none.sock'}: no daemon runs" in done.stderr.splitlines()[-1]
        assert "trying again" not in done.stderr
    (line,) = fails(unix_url(tmp_path / "run.jsonl"), tmp_path, ("stats",))
    assert line.endswith("run.jsonl is no Unix socket")
    (tmp_path / "loop").symlink_to("loop")
    (line,) = fails(unix_url(tmp_path / "loop"), tmp_path, ("stats",))
    assert line.endswith(f"no way to the Unix socket {tmp_path / 'loop'}: Too many levels of symbolic links")
    (line,) = fails(unix_url(Path("/", "a" * 107)), tmp_path, ("stats",))
    assert line.endswith("is too long for a Unix socket, whose path has at most 107 bytes")


def test_files_are_sent_to_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text(json.dumps(make_run()))
    (tmp_path / "buffer").mkdir()
    (tmp_path / "buffer" / "old.jsonl.ready").write_text(json.dumps(make_run()) + "\n")
    answers: list[tuple[int, dict[str, str], bytes]] = [
        (200, {"Content-Type": "text/html"}, b"<html>please log in</html>"),
        (200, {}, b'{"inserted": 1, "duplicates": 0, "errors": []}'),
        (302, {"Location": "/elsewhere"}, b""),
        (503, {"Retry-After": "-1"}, b""),
    ]
    for answer in answers:
        with server(lambda _, answer=answer: answer) as url:  # type: ignore[misc]
            for command in (("import", "run.jsonl"), ("replay", "run.jsonl"), ("sync", "--buffer-dir", "buffer")):
                (line,) = fails(url, tmp_path, (*command, "--retry-for", "0"))
                assert "Something that is not telemetryd answered" in line, line
    assert (tmp_path / "buffer" / "old.jsonl.ready").exists()


def test_what_was_stored_before_a_command_gave_up_is_counted(tmp_path: Path) -> None:
    """Nothing was counted of a batch that went wrong halfway, though its runs were stored."""
    run = make_run()
    event = {"op": "event", "event_id": run["event_id"], "event": {"event_type": "step"}}
    (tmp_path / "buffer").mkdir()
    text = f"{json.dumps(run)}\n{json.dumps(event)}\n"
    for path in (tmp_path / "run.jsonl", tmp_path / "buffer" / "x.jsonl.ready"):
        path.write_text(text)
    taken = json.dumps({"inserted": 1, "duplicates": 0, "errors": [], "total": 1}).encode()

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        is_batch = "/runs/batch" in request.path
        return 200 if is_batch else 503, {"Telemetry-Server": "telemetryd/4"}, taken if is_batch else b"{}"

    with server(answer) as url:
        for command, name in (
            (("import", "run.jsonl"), "inserted"),
            (("replay", "run.jsonl"), "stored"),
            (("sync", "--buffer-dir", "buffer"), "stored"),
        ):
            done = telemetryd(*command, "--url", url, "--retry-for", "0", "--json", cwd=tmp_path, status=1)
            shown = json.loads(done.stdout)
            assert (shown[name], shown["events"], "503" in shown["problem"]) == (1, 0, True), command


def test_redirects_are_not_followed(tmp_path: Path) -> None:
    with server(lambda request: (302, {"Location": request.path}, b"")) as url:
        for line in fails(url, tmp_path):
            assert "302" in line, line


def test_a_retry_after_is_never_a_flood(tmp_path: Path) -> None:
    asked: list[float] = []

    def refuse(_: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        asked.append(time.monotonic())
        return (503, {"Retry-After": "-1"}, b"{}") if len(asked) % 2 else (400, {}, b'{"detail":"no"}')

    with server(refuse) as url:
        for command in (("prune", "--older-than", "1d"), ("export", "-"), ("demo", "--no-live", "--runs", "1")):
            asked.clear()
            fails(url, tmp_path, command)
            assert len(asked) == 2
            assert asked[1] - asked[0] > 0.9


def test_tokens_and_certificates_that_cannot_be_used_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"caf\xe9-token")
    (tmp_path / "lines").write_text("one two three\nfour")
    (tmp_path / "bom").write_text("\ufeff0123456789")
    (tmp_path / "nul").write_text("01234\x0056789")
    for name, words in {
        "missing": "No such file",
        "empty": "holds no token|at least 8 characters",
        "latin": "utf-8",
        "lines": "one line, not 2",
        "bom": "begins with a byte order mark",
        "nul": "U\\+0000",
    }.items():
        path = str(tmp_path / name)
        said = re.compile(rf"^(--auth-token-file|TELEMETRY_API_AUTH_TOKEN_FILE): (?=.*{re.escape(path)}\b).*({words})")
        with pytest.raises(ConfigurationError, match=said):
            Where(token_file=path).config()
        with pytest.raises(ConfigurationError, match=said):
            load({}, {"TELEMETRY_API_AUTH_ENABLED": "true", "TELEMETRY_API_AUTH_TOKEN_FILE": path}, None)
    for command in (("stats",), ("tail",), ("demo",)):
        (line,) = fails("http://127.0.0.1:1", tmp_path, (*command, "--auth-token-file", str(tmp_path / "lines")))
        assert "one line" in line, line
    (line,) = fails("https://127.0.0.1:1", tmp_path, ("stats", "--ca", str(tmp_path / "lines")))
    assert "--ca holds no certificate in PEM: " in line
    assert "must be printable" in fails("http://127.0.0.1:1", tmp_path, ("tail",), TELEMETRY_API_AUTH_TOKEN="a\nb")[0]


def test_a_certificate_is_checked_by_the_authorities_that_are_named(tmp_path: Path) -> None:
    """Of one that is not accepted, "Operation not permitted" was said."""
    require_program("openssl", "openssl")
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    make += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*make, "-keyout", "key.pem", "-out", "ca.pem"], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.pem", tmp_path / "key.pem")

    def answer(_: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        return 404, {"Telemetry-Server": "telemetryd/0"}, b'{"detail":"asked"}'

    commands = (("stats",), ("tail",), ("export", "-", "--retry-for", "5"), ("demo", "--no-live"))
    with server(answer, context) as url:
        for line in fails(url, tmp_path, *commands):
            assert "its certificate is not accepted: self-signed certificate; " in line, line
            assert "--ca" in line
        for line in fails(url, tmp_path, *((*command, "--ca", "ca.pem") for command in commands)):
            assert line.endswith("The daemon answered 404: asked")
        assert fails(url, tmp_path, ("stats",), TELEMETRY_API_CA_FILE=str(tmp_path / "ca.pem"))[0].endswith("asked")
        for line in fails(url.replace("https", "http"), tmp_path, ("tail",), ("demo", "--no-live")):
            assert "Cannot reach the daemon: " in line
    with server(answer) as url:
        for line in fails(url.replace("http", "https"), tmp_path, *commands):
            assert "no TLS connection: " in line
            assert line.endswith("is http:// meant?")


def test_a_foreign_dotenv_matters_only_where_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"NAME=caf\xe9\n")
    with server(lambda _: (404, {"Telemetry-Server": "telemetryd/0"}, b'{"detail":"asked"}')) as url:
        for line in fails(url, tmp_path, ("prune", "--older-than", "1d"), ("stats",), ("tail",), ("demo", "--no-live")):
            assert line.endswith("The daemon answered 404: asked")
    done = telemetryd("check", "--db-path", tmp_path / "none.sqlite", cwd=tmp_path, status=1)
    assert "There is no database at" in done.stderr
    assert (
        telemetryd("check", cwd=tmp_path, status=2).stderr == "telemetryd: .env: is not UTF-8 text (byte 9 cannot be)\n"
    )
    assert telemetryd("serve", "--db-path", tmp_path / "x", cwd=tmp_path, status=2).stderr.startswith(
        "telemetryd: .env"
    )


def test_who_finds_no_database_is_told_how_to_name_what_is_meant(tmp_path: Path) -> None:
    missing = f"There is no database at {tmp_path}/data/telemetry.sqlite; name it with --db-path (TELEMETRY_DB_PATH)"
    assert telemetryd("check", cwd=tmp_path, status=1).stderr == f"telemetryd: {missing}\n"
    other = f"{missing}, or a running daemon with --url (TELEMETRY_API_URL)"
    assert telemetryd("stats", cwd=tmp_path, status=1).stderr == f"telemetryd: {other}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_disk_on_standard_output_is_one_sentence(start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    assert post(daemon.url, make_run())[0] == 201
    for command in (["stats"], ["config"], ["export", "-"], ["tail"]):
        place = [] if command == ["config"] else ["--url", daemon.url]
        with open("/dev/full", "w") as full:
            arguments = [sys.executable, "-m", "telemetryd", *command, *place]
            done = popen(arguments, os.environ, stdout=full, stderr=subprocess.PIPE, cwd=daemon.folder)
        stderr = done.communicate(timeout=PATIENCE_S)[1]
        assert (done.returncode, stderr) == (1, "telemetryd: No space left on device\n"), command


def test_a_daemon_without_standard_input_stops_in_order(start_daemon: StartDaemon) -> None:
    """A descriptor of the event loop took its place, and libuv aborts when it has to close one below 3."""
    daemon = start_daemon(prefix=("bash", "-c", 'exec "$@" <&-', "bash"))
    assert get(daemon.url, "/health")[0] == 200
    assert daemon.stop() == 0


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("prnue",), "Did you mean prune or run?"),
        (("alerts", "tset"), "Did you mean test?"),
        (("xyzzy",), "--help."),
    ],
)
def test_an_unknown_command_gets_a_suggestion(typed: tuple[str, ...], meant: str) -> None:
    assert meant in telemetryd(*typed, status=2).stderr


# --- Paths ---------------------------------------------------------------------------------------


def test_a_home_is_expanded_and_what_a_shell_would_replace_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = telemetryd(
        "config", "--json", cwd=tmp_path, TELEMETRY_DB_PATH="~/t.sqlite", TELEMETRY_API_UNIX="None"
    ).stdout
    assert f'"{tmp_path}/t.sqlite"' in shown
    assert '"none"' in shown
    assert Config.load(buffer_dir="~/buffer").buffer_dir == tmp_path / "buffer"
    for path in ("${HOME}/x", "$HOME/x", "/a/${b}"):
        refused = telemetryd("config", cwd=tmp_path, status=2, TELEMETRY_DB_PATH=path).stderr
        assert "TELEMETRY_DB_PATH: must not hold $" in refused
        with pytest.raises(ValueError, match="must not hold"):
            Config.load(buffer_dir=path)
    assert Config.load(buffer_dir="/data/$RECYCLE.BIN").buffer_dir == Path("/data/$RECYCLE.BIN")
