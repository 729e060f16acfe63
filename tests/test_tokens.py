"""The file of tokens and the commands that change it: private, whole, and never with a secret in it."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from telemetryd.cli import main
from telemetryd.errors import ConfigurationError
from telemetryd.model import tokens
from telemetryd.model.tokens import Asked, Limits, Scope, Token
from telemetryd.ops import token_file
from telemetryd.ops.metrics import Metrics
from telemetryd.settings import Settings
from telemetryd.web.tokens import Tokens
from tests.tools.forks import popen

NOW = datetime(2026, 12, 1, 12, tzinfo=UTC)
ASKED = Asked("web", (Scope.INGEST,), "web-", timedelta(days=1), Limits(runs_per_minute=5))
SINGLE = "correct-horse-battery"


def add(path: Path, asked: Asked = ASKED, now: datetime = NOW) -> str:
    """Put a token into a file; return its secret."""
    token, secret = tokens.make(asked, now)
    token_file.change(path, lambda known: [*known, token])
    return secret


def problem_of(path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        token_file.read(path)
    assert len(caught.value.problems) <= 11
    return str(caught.value)


# --- The form of the file ------------------------------------------------------------------------


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    assert token_file.read(path) == ()
    secrets = [add(path), add(path, replace(ASKED, name="all", scopes=tuple(Scope), agent_prefix="", lifetime=None))]
    web, everything = token_file.read(path)
    assert (web.name, web.scopes, web.agent_prefix, web.limits) == ("web", (Scope.INGEST,), "web-", ASKED.limits)
    assert (web.created_at, web.expires_at) == (NOW, NOW + timedelta(days=1))
    assert (everything.scopes, everything.expires_at) == (tuple(Scope), None)
    assert all(re.fullmatch(r"tmd_[\w-]{43}", secret) for secret in secrets)
    assert [tokens.digest(secret.encode()).hex() for secret in secrets] == [web.hash, everything.hash]
    assert not any(secret[4:] in path.read_text() for secret in secrets)
    assert path.stat().st_mode & 0o777 == 0o600
    assert web.hash not in repr(web) + str(web.to_json())


ENTRY: dict[str, Any] = {
    "id": "0123abcd",
    "name": "web",
    "scopes": ["ingest"],
    "agent_prefix": "",
    "created_at": "2026-12-01T12:00:00Z",
    "expires_at": None,
    "hash": "a" * 64,
    "limits": {},
}
WRONG: dict[str, tuple[object, str]] = {
    "another version": ({"version": 2, "tokens": []}, "version"),
    "a list": ([], "object"),
    "no name": ({key: value for key, value in ENTRY.items() if key != "name"}, r"tokens\.0\.name: Field required"),
    "a name with a blank": (ENTRY | {"name": "a b"}, r"tokens\.0\.name: must have 1 to 64 letters"),
    "the variable's name": (ENTRY | {"name": "TELEMETRY_API_AUTH_TOKEN"}, "must be neither"),
    "a name like an id": (ENTRY | {"name": "abcdef01"}, "must be neither"),
    "no scope": (ENTRY | {"scopes": []}, r"tokens\.0\.scopes"),
    "an unknown scope": (ENTRY | {"scopes": ["write"]}, "'ingest', 'read' or 'admin'"),
    "a prefix for a reader": (ENTRY | {"scopes": ["read"], "agent_prefix": "a"}, "agent_prefix is for tokens with"),
    "a prefix for an admin": (ENTRY | {"scopes": ["ingest", "admin"], "agent_prefix": "a"}, "agent_prefix is for"),
    "a local time": (ENTRY | {"expires_at": "2026-12-01T12:00:00"}, "must be a time in UTC"),
    "a number as a time": (ENTRY | {"expires_at": 5}, r"tokens\.0\.expires_at"),
    "a secret as the hash": (ENTRY | {"hash": "tmd_secret"}, r"tokens\.0\.hash"),
    "an unknown field": (ENTRY | {"revoked": True}, r"tokens\.0\.revoked: Extra"),
    "no limit at all": (ENTRY | {"limits": {"runs_per_minute": 0}}, r"tokens\.0\.limits\.runs_per_minute"),
    "a fraction": (ENTRY | {"limits": {"runs_per_minute": 1.5}}, r"tokens\.0\.limits\.runs_per_minute"),
    "the same name twice": (
        {"version": 1, "tokens": [ENTRY, ENTRY | {"id": "1" * 8, "hash": "b" * 64}]},
        "the name 'web'",
    ),
    "the same secret twice": ({"version": 1, "tokens": [ENTRY, ENTRY | {"id": "1" * 8, "name": "b"}]}, "same secret"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, what: str) -> None:
    value, said = WRONG[what]
    path = tmp_path / "tokens"
    whole = {"version": 1, "tokens": [value]} if isinstance(value, dict) and "version" not in value else value
    path.write_text(json.dumps(whole))
    path.chmod(0o600)
    problem = problem_of(path)
    assert re.search(said, problem), problem
    assert all(line.startswith(f"{path}: ") for line in problem.splitlines())
    assert "secret" not in problem.replace("same secret", ""), "a value may be a secret in the wrong place"


def parsed(data: bytes) -> tuple[Token, ...]:
    """The tokens that bytes hold; none if they are refused, which nothing but the one error may say."""
    with contextlib.suppress(ConfigurationError):
        return tokens.parse(data, "tokens")
    return ()


@given(st.binary() | st.binary().map(lambda data: json.dumps({"version": 1, "tokens": [str(data)]}).encode()))
def test_any_bytes_are_tokens_or_a_clear_error(data: bytes) -> None:
    assert all(isinstance(each, Token) for each in parsed(data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from([*ENTRY.values()]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ENTRY]), inner, max_size=8),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from([*ENTRY]), json_values, max_size=3))
def test_an_entry_with_any_values_is_a_token_or_a_clear_error(changed: dict[str, Any]) -> None:
    found = parsed(json.dumps({"version": 1, "tokens": [ENTRY | changed]}).encode())
    assert parsed(tokens.render(found)) == found


def test_a_file_that_others_could_read_or_replace_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "tokens", tmp_path / "other"
    add(other)
    path.symlink_to(other)
    assert "must be a file, not a link" in problem_of(path)
    path.unlink()
    os.link(other, path)
    assert "must have one name only" in problem_of(path)
    path.unlink()
    os.mkfifo(path, 0o600)
    assert "must be a file" in problem_of(path)
    path.unlink()
    path.mkdir()
    assert "must be a file" in problem_of(path)
    other.chmod(0o640)
    assert "mode 0600, not 0640" in problem_of(other)
    other.chmod(0o600)
    with open(other, "ab") as file:
        file.truncate((4 << 20) + 1)
    assert "must not be larger than 4 MiB" in problem_of(other)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can give files away")
def test_who_owns_the_folder_owns_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "service"
    folder.mkdir()
    os.chown(folder, 4711, 4712)
    add(folder / "tokens")
    assert ((folder / "tokens").stat().st_uid, (folder / "tokens").stat().st_gid) == (4711, 4712)
    assert len(token_file.read(folder / "tokens")) == 1
    os.chown(folder / "tokens", 4713, 4712)
    assert "belongs to another user (uid 4713)" in problem_of(folder / "tokens")


def test_a_change_that_is_refused_or_cut_off_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokens"
    add(path)
    before = path.read_bytes()
    (tmp_path / ".tokens.new").write_text("cut off")
    (tmp_path / ".tokens.new").chmod(0o600)

    def refuse(_: tuple[Token, ...]) -> list[Token]:
        raise ConfigurationError(["no"])

    with pytest.raises(ConfigurationError):
        token_file.change(path, refuse)
    assert path.read_bytes() == before
    monkeypatch.setattr(token_file, "MAX_FILE_BYTES", len(before) + 10)
    with pytest.raises(ConfigurationError, match="must not be larger"):
        add(path, replace(ASKED, name="many"))
    assert path.read_bytes() == before
    monkeypatch.undo()
    add(path, replace(ASKED, name="second"))
    assert len(token_file.read(path)) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["tokens"]


def test_nobody_keeps_others_from_changing_the_file(tmp_path: Path) -> None:
    """Any user who can list a folder can lock it (flock(2)); what is locked here nobody else can open."""
    path = tmp_path / "tokens"
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    add(path)
    os.close(folder)
    assert len(token_file.read(path)) == 1


def test_what_is_in_the_way_of_a_change_is_named_and_left_alone(tmp_path: Path) -> None:
    path, made = tmp_path / "tokens", tmp_path / ".tokens.new"
    other = tmp_path / "other"
    other.touch(0o600)
    makers: list[Callable[[], object]] = [
        lambda: made.symlink_to(other),
        lambda: made.hardlink_to(other),
        lambda: os.mkfifo(made, 0o600),
        lambda: made.touch(0o644),
    ]
    for make in makers:
        make()
        with pytest.raises(ConfigurationError, match=r"tokens\.new: (cannot be made|is in the way)"):
            add(path)
        assert os.path.lexists(made)
        made.unlink()
    assert other.read_bytes() == b""
    assert not path.exists()


def test_changes_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    names = [f"n-{number}" for number in range(20)]
    threads = [threading.Thread(target=add, args=(path, replace(ASKED, name=name))) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.name for each in token_file.read(path)} == {*names}


# --- The commands --------------------------------------------------------------------------------


def run(folder: Path, *arguments: str, status: int = 0, **variables: str) -> Result:
    done = CliRunner().invoke(
        main, ["tokens", *arguments], env={"TELEMETRY_DB_PATH": str(folder / "db.sqlite"), **variables}
    )
    assert done.exit_code == status, done.output
    return done


def test_create_list_and_revoke(tmp_path: Path) -> None:
    made = run(tmp_path, "create", "--name", "web", "--scope", "ingest", "--agent-prefix", "web-")
    secret = made.stdout.removesuffix("\n")
    assert re.fullmatch(r"tmd_[\w-]{43}", secret), "alone on standard output"
    assert "authentication is off" in made.stderr
    everything = ("--requests-per-minute", "1", "--runs-per-minute", "2", "--bytes-per-day", "3000")
    scopes = ("--scope", "read", "--scope", "admin")
    second = run(
        tmp_path, "create", "--name", "b", *scopes, "--expires", "none", *everything, TELEMETRY_API_AUTH_ENABLED="true"
    )
    assert "for ever" in second.stderr
    assert "authentication" not in second.stderr
    listed = run(tmp_path, "list").stdout
    assert re.search(r"^[0-9a-f]{8}  web +ingest +until \d{4}-\d\d-\d\d +agents web-\*$", listed, re.MULTILINE)
    assert "read+admin    never expires     1 requests per minute  2 runs per minute  3,000 bytes per day" in listed
    as_json = json.loads(run(tmp_path, "list", "--json").stdout)
    assert [(each["name"], each["expired"], "hash" in each) for each in as_json] == [
        ("web", False, False),
        ("b", False, False),
    ]
    file = (tmp_path / "db.sqlite.tokens").read_text()
    assert secret not in listed + file + str(as_json)
    again = run(tmp_path, "create", "--name", "web", "--scope", "read", status=1)
    assert "there is a token 'web' already" in again.stderr
    revoked = json.loads(run(tmp_path, "revoke", as_json[1]["id"], "--json").stdout)
    assert [each["name"] for each in revoked] == ["b"]
    assert run(tmp_path, "revoke", "web").stdout == ""
    assert json.loads(run(tmp_path, "list", "--json").stdout) == []
    assert f"there are no tokens in {tmp_path / 'db.sqlite.tokens'}" in run(tmp_path, "list").stderr
    made = json.loads(run(tmp_path, "create", "--name", "c", "--scope", "read", "--json").stdout)
    assert (made["name"], made["secret"][:4]) == ("c", "tmd_")
    assert "there is no token 'web'" in run(tmp_path, "revoke", "web", status=1).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--name", "a b", "--scope", "read"), "1 to 64 letters"),
        (("--name", "a", "--scope", "read", "--agent-prefix", "x"), "agent_prefix is for tokens with the scope ingest"),
        (("--name", "a", "--scope", "write"), "'write' is not one of"),
        (("--name", "a"), "Missing option '--scope'"),
        (("--name", "a", "--scope", "read", "--expires", "90"), "must be a duration"),
        (("--name", "a", "--scope", "ingest", "--runs-per-minute", "0"), "0 is not in the range"),
        (("--name", "a", "--scope", "ingest", "--bytes-per-day", "9" * 20), "is not in the range"),
    ],
)
def test_what_cannot_be_made_is_said(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in run(tmp_path, "create", *arguments, status=2).stderr
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("{")
    file.chmod(0o600)
    for command in (("list",), ("create", "--name", "a", "--scope", "read"), ("revoke", "a")):
        done = run(tmp_path, *command, status=2, TELEMETRY_TOKENS_FILE=str(file))
        assert done.stderr.startswith(f"telemetryd: {file}: Invalid JSON")
    assert file.read_text() == "{"
    nowhere = run(tmp_path / "nowhere", "create", "--name", "a", "--scope", "read", status=1)
    assert "is not there; start the daemon once" in nowhere.stderr


# --- What a daemon knows -------------------------------------------------------------------------


def known(tmp_path: Path, **values: Any) -> tuple[Settings, Metrics]:
    return Settings(db_path=tmp_path / "db", api_auth_enabled=True, **values), Metrics()


def shown(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_name_in_the_file_controls_no_terminal(tmp_path: Path) -> None:
    file = tmp_path / "db.sqlite.tokens"
    add(file)
    held = json.loads(file.read_text())
    held["tokens"][0]["\x1b[2J\0<0>forged\n" + "long" * 1000] = 1
    file.write_text(json.dumps(held))
    text = run(tmp_path, "list", status=2).stderr
    assert "Extra inputs are not permitted" in text
    assert text.count("\n") == 1
    assert text.removesuffix("\n").isprintable()
    assert len(text) < 1000


def test_authentication_needs_a_token_of_either_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"TELEMETRY_API_AUTH_ENABLED: is true, .* telemetryd tokens create"):
        Tokens(*known(tmp_path))
    assert Tokens(*known(tmp_path, api_auth_token=SINGLE)).find(SINGLE.encode()) is not None
    secret = add(tmp_path / "db.tokens")
    found = Tokens(*known(tmp_path)).find(secret.encode())
    assert found is not None
    assert (found.name, found.prefix) == ("web", "web-")
    (tmp_path / "db.tokens").chmod(0o644)
    with pytest.raises(ConfigurationError, match="mode 0600"):
        Tokens(*known(tmp_path, api_auth_token=SINGLE))


def test_a_token_expires_at_its_time(tmp_path: Path) -> None:
    secret, moment = add(tmp_path / "db.tokens"), NOW.timestamp()
    tokens = Tokens(*known(tmp_path), now=lambda: moment)
    bearer = tokens.find(secret.encode())
    assert bearer is not None
    assert not tokens.has_expired(bearer)
    moment += 86_399
    assert not tokens.has_expired(bearer)
    moment += 1
    assert tokens.has_expired(bearer)


def test_the_file_is_followed_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "db.tokens"
    first = add(file)
    settings, metrics = known(tmp_path)
    tokens = Tokens(settings, metrics)
    tokens.look_every_s = 0
    web = tokens.find(first.encode())
    metrics.count_token("web", 200)
    second = add(file, replace(ASKED, name="second"))
    assert tokens.find(second.encode()) is not None
    assert tokens.find(first.encode()) is web, "who stays keeps what it has used up"
    good = file.read_text()
    for broken in ("{", "[]"):
        file.write_text(broken)
        for _ in range(3):
            assert tokens.find(first.encode()) is web
    assert [record.levelname for record in caplog.records].count("ERROR") == 2, "one line for each change"
    assert shown(metrics, "telemetryd_tokens_broken") == 1
    file.write_text(good)
    assert tokens.find(second.encode()) is not None
    assert shown(metrics, "telemetryd_tokens_broken") == 0
    assert shown(metrics, "telemetryd_tokens") == 2
    token_file.change(file, lambda known: [each for each in known if each.name != "web"])
    assert tokens.find(first.encode()) is None
    metrics.refuse_token("web", "prefix")  # an item of its last batch
    assert shown(metrics, "telemetryd_token_requests_total", token="web", status="2xx") is None
    assert shown(metrics, "telemetryd_token_refusals_total", token="web", reason="prefix") is None
    file.unlink()
    assert tokens.find(second.encode()) is None


def test_a_token_is_revoked_also_if_its_file_could_not_be_read_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "db.tokens"
    secret = add(file)
    settings, metrics = known(tmp_path)
    tokens = Tokens(settings, metrics)
    tokens.look_every_s = 0
    token_file.change(file, lambda known: [])
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(file, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limit[1]))
    try:
        for _ in range(3):
            assert tokens.find(secret.encode()) is not None, "nobody is locked out by that"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    assert shown(metrics, "telemetryd_tokens_broken") == 1
    assert tokens.find(secret.encode()) is None, "although the file has not changed since"
    assert shown(metrics, "telemetryd_tokens_broken") == 0


def test_the_file_is_looked_at_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = add(tmp_path / "db.tokens")
    tokens = Tokens(*known(tmp_path))
    looks = itertools.count()
    real = token_file.signature
    monkeypatch.setattr(token_file, "signature", lambda path: (next(looks), real(path))[1])
    tokens.look_every_s = 3600
    for _ in range(100):
        assert tokens.find(secret.encode()) is not None
    assert next(looks) == 1


def test_a_reload_is_all_or_nothing(tmp_path: Path) -> None:
    file, token = tmp_path / "db.tokens", tmp_path / "token"
    token.write_text(SINGLE)
    settings, metrics = known(tmp_path, api_auth_token_file=token)
    tokens = Tokens(settings, metrics)
    tokens.look_every_s = 3600
    before = tokens.find(SINGLE.encode())
    file.write_text("{")
    token.write_text("another-secret-of-the-house")
    with pytest.raises(ConfigurationError) as caught:
        tokens.prepare(settings)
    assert "mode 0600" in str(caught.value)
    assert tokens.find(SINGLE.encode()) is before
    file.unlink()
    secret = add(file)
    put_into_effect = tokens.prepare(settings)
    assert put_into_effect is not None
    assert tokens.find(secret.encode()) is None
    put_into_effect()
    assert tokens.find(secret.encode()) is not None
    assert tokens.find(SINGLE.encode()) is None
    assert tokens.find(b"another-secret-of-the-house") is not None
    assert tokens.prepare(settings) is None
    off = Tokens(Settings(db_path=tmp_path / "db"), Metrics())
    assert off.prepare(settings) is None
    assert not off.is_on


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_reload_brings_back_nobody_who_was_revoked_meanwhile(tmp_path: Path, is_broken: bool) -> None:
    file = tmp_path / "db.tokens"
    first = add(file)
    settings, metrics = known(tmp_path)
    tokens = Tokens(settings, metrics)
    tokens.look_every_s = 3600
    second = add(file, replace(ASKED, name="second"))
    put_into_effect = tokens.prepare(settings)
    assert put_into_effect is not None
    token_file.change(file, lambda known: [each for each in known if each.name != "web"])
    bearer = tokens.find(second.encode())
    assert bearer is not None, "the file is followed between the two halves of the reload"
    if is_broken:
        file.write_text("{")
    put_into_effect()
    assert tokens.find(first.encode()) is None
    assert tokens.find(second.encode()) is bearer, "who stays keeps what it has used up"


def test_two_processes_make_tokens_at_once(tmp_path: Path) -> None:
    """The lock holds between processes as well."""
    command = [sys.executable, "-m", "telemetryd", "tokens", "create", "--scope", "read", "--name"]
    environment = {**os.environ, "TELEMETRY_TOKENS_FILE": str(tmp_path / "tokens")}
    processes = [popen([*command, f"n-{number}"], environment, stdout=subprocess.PIPE) for number in range(4)]
    secrets = [process.communicate(timeout=60)[0].strip() for process in processes]
    hashes = {tokens.digest(secret.encode()).hex() for secret in secrets}
    assert {each.hash for each in token_file.read(tmp_path / "tokens")} == hashes
    assert len(hashes) == 4
