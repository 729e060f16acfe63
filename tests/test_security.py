"""The security list of docs and SECURITY.md that no other file shows: tokens, smuggling, files, links, peers."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from telemetryd.errors import AddressError
from telemetryd.web.listening import _bind_unix
from tests.conftest import Api, MakeApi, StartDaemon, make_run
from tests.contract.wire import JSON, RUNS, check_alive, check_error, send, send_raw
from tests.http_client import call, get, post
from tests.tools.old_databases import make_old_database
from tests.tools.process import telemetryd

TOKEN = "correct-horse-battery"


def one_line(text: str) -> str:
    assert len(text.splitlines()) == 1, text
    return text


# --- Tokens --------------------------------------------------------------------------------------


async def test_every_token_is_compared_in_constant_time(make_api: MakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    api = await make_api(api_auth_enabled=True, api_auth_token=TOKEN)
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(given: bytes, known: bytes) -> bool:
        compared.append((given, known))
        return real(given, known)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    tries = ["x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), TOKEN]
    statuses = [(await send(api, "GET", RUNS, headers={"X-API-Key": given})).status for given in tries]
    statuses.append((await send(api, "GET", RUNS)).status)
    assert statuses == [401, 401, 401, 401, 200, 401]
    assert compared == [(hashlib.sha256(TOKEN.encode()).digest(),) * 2]  # others are not found by their hashes


def test_a_token_is_in_no_line_no_answer_and_no_argument(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Also where it does not belong: in a query, a body, a path, another header, a request that is no HTTP."""
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    daemon = start_daemon(
        prefix=("env",),  # with a command line of its own
        TELEMETRY_API_AUTH_ENABLED="true",
        TELEMETRY_API_AUTH_TOKEN_FILE=str(file),
        TELEMETRY_LOG_LEVEL="DEBUG",
    )
    seen: list[str] = []

    def curl(*arguments: str) -> None:
        done = subprocess.run(["curl", "-s", "-i", *arguments], capture_output=True, text=True, check=False)
        seen.append(done.stdout)

    key = f"X-API-Key: {TOKEN}"
    curl("-H", key, f"{daemon.url}{RUNS}?limit=0")
    curl("-H", key, "-H", "Content-Type: application/json", "-d", "{", f"{daemon.url}{RUNS}")
    curl("-H", key, "-X", "DELETE", f"{daemon.url}{RUNS}")
    curl("-H", key, f"{daemon.url}/health")
    curl("-H", key, f"{daemon.url}/openapi.json")
    curl("-H", key, "-H", "Bad Header: x", f"{daemon.url}/health")
    curl("-H", f"Authorization: Basic {TOKEN}", f"{daemon.url}{RUNS}")
    curl(
        "-H",
        f"Cookie: {TOKEN}",
        "-H",
        f"User-Agent: {TOKEN}",
        "-H",
        f"Referer: http://x/{TOKEN}",
        f"{daemon.url}{RUNS}",
    )
    curl(f"{daemon.url}{RUNS}?token={TOKEN}")
    assert len(seen) == 9
    assert all(seen)
    command_line = Path(f"/proc/{daemon.process.pid}/cmdline").read_text()
    assert "serve" in command_line
    assert TOKEN not in command_line
    assert daemon.stop() == 0
    assert TOKEN not in json.dumps(daemon.lines)
    assert TOKEN not in "".join(seen)
    assert len(daemon.lines) > len(seen)


def test_wrong_settings_do_not_print_the_token(tmp_path: Path) -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {"TELEMETRY_API_AUTH_TOKEN": "hunter2", "TELEMETRY_API_AUTH_ENABLED": "true"},  # too short
        {"TELEMETRY_API_AUTH_TOKEN": TOKEN, "TELEMETRY_API_AUTH_TOKEN_FILE": "/nonexistent"},
        {"TELEMETRY_API_AUTH_TOKEN": TOKEN, "TELEMETRY_API_PORT": "x", "TELEMETRY_LOG_FORMAT": "x"},
    )
    for variables in wrong:
        done = telemetryd("serve", status=2, cwd=tmp_path, **variables)
        assert "TELEMETRY_" in done.stderr
        assert "hunter2" not in done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr


# --- Request smuggling ---------------------------------------------------------------------------

HEAD = b"POST /api/v1/runs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
OLD_HEAD = HEAD.replace(b"1.1", b"1.0")
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
HIDDEN = b"GET /api/v1/metadata HTTP/1.1\r\nHost: x\r\nX-Request-ID: smuggled\r\n\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(HIDDEN)
END = b"\r\n0\r\n\r\n"
SMUGGLED = {
    "CL.TE": HEAD + LENGTH + b"Transfer-Encoding: chunked\r\n" + END,
    "TE.CL": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n2\r\n{}" + END,
    "two Content-Lengths": HEAD + b"Content-Length: 0\r\n" + LENGTH + b"\r\n",
    "a list of Content-Lengths": HEAD + b"Content-Length: 0, 2\r\n\r\n",
    "a tab in a Content-Length": HEAD + b"Content-Length: 0\t2\r\n\r\n",
    "a NUL in a Content-Length": HEAD + b"Content-Length: 0\0\r\n\r\n",
    "a folded Transfer-Encoding": HEAD + b"Transfer-Encoding:\r\n chunked\r\n" + END,
    "a blank before the colon": HEAD + b"Transfer-Encoding : chunked\r\n" + END,
    "xchunked": HEAD + b"Transfer-Encoding: xchunked\r\n" + END,
    "chunked after a vertical tab": HEAD + b"Transfer-Encoding: \x0bchunked\r\n" + END,
    "chunked and identity": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n" + END,
    "a bare LF after a header": HEAD + b"A: b\nTransfer-Encoding: chunked\r\n" + END,
    "a bare CR in a header": HEAD + b"A: b\rTransfer-Encoding: chunked\r\n" + END,
    "a bare LF after a chunk size": CHUNKED + b"0\n\r\n",
    "a bare LF after a chunk": CHUNKED + b"2\r\n{}\n0\r\n\r\n",
    "a negative chunk size": CHUNKED + b"-1\r\n\r\n",
    "a chunk size that wraps around": CHUNKED + b"10000000000000002\r\n{}" + END,
    "a chunk size in quotes": CHUNKED + b'"0"\r\n\r\n',
    "a LF in a chunk extension": CHUNKED + b"0;a=\nb\r\n\r\n",
    "an empty header name": HEAD + b": chunked\r\n\r\n",
    "no version": b"GET /health\r\n",  # HTTP/0.9
    "no version, and headers": b"GET /health\r\nHost: x\r\n\r\n",
    "HTTP/0.9": b"GET /health HTTP/0.9\r\nHost: x\r\n\r\n",
    "a folded request line": b"GET /health\r\n HTTP/1.1\r\nHost: x\r\n\r\n",
    "chunks in HTTP/1.0": OLD_HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n" + END,
}


@pytest.mark.parametrize("request_bytes", SMUGGLED.values(), ids=SMUGGLED)
async def test_a_request_hidden_in_another_is_not_answered(api: Api, request_bytes: bytes) -> None:
    """A proxy and we would disagree about where the first one ends, so it is the last on its connection."""
    [answer] = await send_raw(api, request_bytes + HIDDEN)  # which waits until the connection is closed
    assert answer.status in (400, 415), answer.text
    assert answer.headers["x-request-id"] != "smuggled"
    assert await api.list() == []
    await check_alive(api)


async def test_a_body_on_get_is_no_request(api: Api) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN)
    last = b"GET /nope HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert [answer.status for answer in await send_raw(api, head + HIDDEN + last)] == [200, 404]


# --- Log injection -------------------------------------------------------------------------------


def test_nothing_that_comes_over_the_wire_can_forge_a_log_line(start_daemon: StartDaemon) -> None:
    """Every line that the daemon wrote was one JSON object: `Daemon` would have failed on anything else."""
    daemon = start_daemon(TELEMETRY_LOG_LEVEL="DEBUG")
    forged = 'x"}\n{"level": "CRITICAL", "message": "forged"}\x1b[2J\u2028\u202e'
    run = make_run(event_id=forged, agent_name=forged, job_type=forged, run_id=forged, error_summary=forged)
    assert post(daemon.url, run)[0] == 201
    assert post(daemon.url, {**run, "status": forged})[0] == 422
    assert call(daemon.url, "POST", "/api/v1/runs/batch", [run, {**run, "status": forged}])[0] == 200
    for path in (
        "/%0a%7b%22level%22",
        "/api/v1/runs/%0a%1b%5b2J",
        "/api/v1/runs?agent_name=%0aforged",
        "/api/v1/runs?%0a=1",
    ):
        assert get(daemon.url, path)[0] in (200, 400, 404)
    assert daemon.stop() == 0
    assert not [line for line in daemon.lines if line["level"] == "CRITICAL" or line["message"] == "forged"]
    assert len([line for line in daemon.raw if "forged" in line]) >= 2, "it is in the log, as text"
    assert [line for line in daemon.raw if not line.isprintable()] == []


# --- Files ---------------------------------------------------------------------------------------


@pytest.fixture(params=[0o000, 0o077, 0o022], ids=["umask 000", "umask 077", "umask 022"])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_every_file_that_we_make_is_private_whatever_the_umask(start_daemon: StartDaemon, tmp_path: Path) -> None:
    made, backups = tmp_path / "made", tmp_path / "backups"
    backups.mkdir(0o755)
    unix, database = tmp_path / "socket", made / "telemetry.sqlite"  # the socket is bound before the directory is made
    daemon = start_daemon(
        TELEMETRY_DB_PATH=str(database),
        TELEMETRY_DB_JOURNAL_MODE="WAL",
        TELEMETRY_LOCK_FILE=str(made / "configured.lock"),
        TELEMETRY_API_UNIX=str(unix),
        TELEMETRY_BACKUP_DIR=str(backups),
    )
    assert post(daemon.url, make_run(created_at="2020-01-01T00:00:00Z"))[0] == 201
    assert mode_of(unix) == 0o660
    assert mode_of(made) == 0o700
    request = ["curl", "-s", "-f", "--unix-socket", str(unix), "-H", "Content-Type: application/json", "-d", "{}"]
    subprocess.run([*request, "http://localhost/api/v1/admin/backup"], check=True, capture_output=True)
    telemetryd("backup", backups / "plain.sqlite", "--db-path", database)
    archive = backups / "runs.ndjson.zst"
    telemetryd("prune", "--older-than", "1d", "--archive", archive, "--unix", unix, "--db-path", database)
    check_private(made, backups, except_for={unix})
    assert {path.name for path in made.iterdir()} >= {"telemetry.sqlite-wal", "telemetry.sqlite-shm", "configured.lock"}
    assert len(list(backups.iterdir())) == 3
    assert daemon.stop() == 0
    telemetryd("restore", backups / "plain.sqlite", "--db-path", database)
    check_private(made, except_for={unix})


@pytest.mark.usefixtures("umask")
def test_a_migration_makes_private_files_too(tmp_path: Path) -> None:
    path = make_old_database(tmp_path / "old.sqlite", "v7")
    path.chmod(0o600)
    telemetryd("migrate", "--db-path", path)
    check_private(tmp_path)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def check_private(*folders: Path, except_for: set[Path] = frozenset()) -> None:  # type: ignore[assignment]
    found = {path: oct(mode_of(path)) for folder in folders for path in folder.iterdir() if path not in except_for}
    assert found
    assert found == dict.fromkeys(found, "0o600")


def test_the_socket_is_nobody_elses_from_its_first_moment_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("between bind and chmod somebody else could connect")

    monkeypatch.setattr(os, "chmod", never)
    before = os.umask(0)
    try:
        with ExitStack() as cleanup:
            _bind_unix(tmp_path / "socket", cleanup, 0o117)
            assert mode_of(tmp_path / "socket") == 0o660
            with pytest.raises(AddressError, match="too long"):
                _bind_unix(tmp_path / ("s" * 200), cleanup, 0o117)
        assert os.umask(0) == 0
    finally:
        os.umask(before)


# --- Links and other traps -----------------------------------------------------------------------


def to_link(lock: Path, other: Path) -> None:
    lock.symlink_to(other)


def to_dangling_link(lock: Path, other: Path) -> None:
    other.unlink()
    lock.symlink_to(other)


def to_hard_link(lock: Path, other: Path) -> None:
    lock.hardlink_to(other)


def to_pipe(lock: Path, _other: Path) -> None:
    os.mkfifo(lock)


def to_folder(lock: Path, _other: Path) -> None:
    lock.mkdir()


@pytest.mark.parametrize("trap", [to_link, to_dangling_link, to_hard_link, to_pipe, to_folder])
@pytest.mark.parametrize("name", ["telemetry.sqlite.lock", "configured.lock"])
def test_what_is_put_in_a_lock_files_place_is_refused_at_once_and_left_alone(
    start_daemon: StartDaemon, tmp_path: Path, trap: Callable[[Path, Path], None], name: str
) -> None:
    """Else a user who may write to the folder could have a PID written into any empty file of the daemon's user."""
    other = tmp_path / "somebody-elses"
    other.write_text("")
    trap(tmp_path / name, other)
    status, errors = start_daemon(TELEMETRY_LOCK_FILE=str(tmp_path / "configured.lock")).wait()
    assert status == 1
    assert name in one_line(errors)
    assert other.exists() is (trap is not to_dangling_link)
    assert not other.exists() or other.read_bytes() == b""
    assert not (tmp_path / "telemetry.sqlite").exists()


def test_a_database_behind_a_link_is_private_and_locked_where_it_is(start_daemon: StartDaemon, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir(0o700)
    (tmp_path / "telemetry.sqlite").symlink_to(real / "runs.sqlite")
    daemon = start_daemon()
    assert post(daemon.url, make_run())[0] == 201
    assert {path.name for path in real.iterdir()} == {"runs.sqlite", "runs.sqlite.lock", "runs.sqlite.sock"}
    check_private(real)
    status, errors = start_daemon(TELEMETRY_DB_PATH=str(real / "runs.sqlite")).wait()
    assert status == 1
    assert f"PID {daemon.process.pid}" in one_line(errors)
    assert daemon.stop() == 0


# --- Admin ---------------------------------------------------------------------------------------


async def test_a_request_cannot_name_where_a_backup_goes(make_api: MakeApi, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    api = await make_api(api_auth_enabled=True, api_auth_token=TOKEN, backup_dir=folder)
    headers = {**JSON, "X-API-Key": TOKEN}
    path = "/api/v1/admin/backup"
    for body in ({"path": "/etc/x"}, {"destination": "../x"}, {"name": "x"}, ["x"], "x", {"backup_dir": str(tmp_path)}):
        detail = check_error(await send(api, "POST", path, json=body, headers=headers), 400)
        assert "TELEMETRY_BACKUP_DIR" in detail
    assert list(folder.iterdir()) == []
    for query in ("?path=/etc", "?destination=../x", "/../../etc", "/x"):
        await send(api, "POST", path + query, json={}, headers=headers)
    assert {str(file) for file in os.scandir(tmp_path) if "backup_" in file.name} == set()
    assert {file.name.partition("_backup_")[0] for file in os.scandir(folder)} <= {"telemetry"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_over_the_unix_socket_another_user_is_no_admin(start_daemon: StartDaemon) -> None:
    """The socket's mode keeps others out already; here it is opened, and the peer's credentials still do."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        unix = Path(folder) / "socket"
        daemon = start_daemon(TELEMETRY_API_UNIX=str(unix))
        assert daemon.url
        unix.chmod(0o666)
        answers: dict[int, Any] = {}
        for user in (0, 65534):
            for path in ("/api/v1/admin/reap", "/api/v1/runs"):
                request = ["curl", "-s", "--unix-socket", str(unix), "-H", "Content-Type: application/json"]
                request += ["-d", '{"older_than": "1d"}', "-o", "/dev/null", "-w", "%{http_code}"]
                done = subprocess.run(
                    [*request, f"http://localhost{path}"], user=user, capture_output=True, text=True, check=True
                )
                answers.setdefault(user, []).append(done.stdout)
        assert answers == {0: ["200", "422"], 65534: ["403", "422"]}
